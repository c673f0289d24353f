/*
 * qemu-dedup-store: what frames are made of on Linux
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/falloc.h>
#include "qapi/error.h"
#include "dedup-store/protocol.h"
#include "checks.h"
#include "frames.h"

#define BLOCK DEDUP_PROTOCOL_BLOCK

static int open_for_clients(int fd)
{
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", fd);

    return open(path, (DO("read-only") ? O_RDONLY : O_RDWR) |
                O_CLOEXEC);
}

bool frames_open(Frames *f, uint32_t nslots, Error **errp)
{
    *f = (Frames) { .nslots = nslots, .client_fd = -1 };
    f->fd = memfd_create("dedup-store", MFD_CLOEXEC);
    /* a memfd's mode is 0777: its reader could open it anew for writing */
    if (f->fd < 0 ||
        fchmod(f->fd, DO("frames-mode") ? 0600 : 0666) < 0 ||
        ftruncate(f->fd, (off_t)nslots * BLOCK) < 0) {
        goto fail;
    }
    f->client_fd = open_for_clients(f->fd);
    if (f->client_fd >= 0) {
        return true;
    }
fail:
    error_setg_errno(errp, errno, "cannot make the frames' file");
    frames_close(f);
    return false;
}

void frames_close(Frames *f)
{
    if (f->client_fd >= 0) {
        close(f->client_fd);
    }
    if (f->fd >= 0) {
        close(f->fd);
    }
}

int frames_write(Frames *f, uint32_t slot, unsigned n, const void *buf)
{
    size_t size = (size_t)n * BLOCK;
    ssize_t done = pwrite(f->fd, buf, size, (off_t)slot * BLOCK);

    return done == size ? 0 : done < 0 ? -errno : -ENOSPC;
}

int frames_read(Frames *f, uint32_t slot, unsigned n, void *buf)
{
    size_t size = (size_t)n * BLOCK;
    ssize_t done = pread(f->fd, buf, size, (off_t)slot * BLOCK);

    return done == size ? 0 : done < 0 ? -errno : -EIO;
}

int frames_drop(Frames *f, uint32_t slot, unsigned n)
{
    return fallocate(f->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                     (off_t)slot * BLOCK, (off_t)n * BLOCK) < 0 ? -errno : 0;
}

uint64_t frames_memory(Frames *f)
{
    struct stat st;

    return fstat(f->fd, &st) < 0 ? 0 : st.st_blocks * 512ULL;
}
