/*
 * qemu-dedup-store: what frames are made of on Linux
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Pages of one memfd; slot n is at n * 4096.  Nobody but the daemon can open it
 * for writing: its mode is 0600 before anyone gets a descriptor of it, and what
 * clients get is opened for reading, for each of them anew.
 */

#include "qemu/osdep.h"
#include <linux/falloc.h>
#include "qapi/error.h"
#include "../checks.h"
#include "../frames.h"
#include "../memory-limit.h"
#include "old.h"

#define BLOCK DEDUP_PROTOCOL_BLOCK

typedef struct LinuxFrames {
    int fd;
    OldFiles *old;
    uint64_t nclients;          /* by the server's lock */
} LinuxFrames;

static void linux_close(void *opaque)
{
    LinuxFrames *f = opaque;

    if (f->old) {
        old_files_free(f->old);
    }
    if (f->fd >= 0) {
        close(f->fd);
    }
    g_free(f);
}

static void *linux_open(const char *group, const char *place, uint32_t nslots,
                        Error **errp)
{
    LinuxFrames *f = g_new0(LinuxFrames, 1);

    f->fd = memfd_create(FRAMES_FILE_NAME, MFD_CLOEXEC);
    /* a memfd's mode is 0777: its reader could open it anew for writing */
    if (f->fd < 0 ||
        fchmod(f->fd, DO("frames-mode") ? 0600 : 0666) < 0 ||
        ftruncate(f->fd, (off_t)nslots * BLOCK) < 0 ||
        !frames_file_lock(f->fd, FRAMES_LOCK_DAEMON)) {
        error_setg_errno(errp, errno, "cannot make the frames' file");
        linux_close(f);
        return NULL;
    }
    f->old = old_files_new(f->fd);
    return f;
}

static int linux_welcome(void *opaque, pid_t pid, DedupMsgWelcome *w)
{
    LinuxFrames *f = opaque;
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", f->fd);
    int fd = open(path, (DO("read-only") ? O_RDONLY : O_RDWR) | O_CLOEXEC);

    w->lock = frames_lock_of(pid, ++f->nclients);
    if (fd >= 0 && !frames_file_lock(fd, w->lock)) {
        close(fd);
        return -1;
    }
    return fd;
}

static void linux_claim(void *opaque, pid_t pid, uint64_t connection, int fd,
                        const DedupMsgClaim *m, const uint32_t *slots,
                        unsigned n)
{
    LinuxFrames *f = opaque;

    old_files_claim(f->old, pid, connection, fd, m, slots, n);
}

static uint64_t linux_old_memory(void *opaque)
{
    LinuxFrames *f = opaque;

    return old_files_memory(f->old);
}

static int linux_write(void *opaque, uint32_t slot, unsigned n, const void *buf)
{
    LinuxFrames *f = opaque;
    size_t size = (size_t)n * BLOCK;
    ssize_t done = pwrite(f->fd, buf, size, (off_t)slot * BLOCK);

    return done == size ? 0 : done < 0 ? -errno : -ENOSPC;
}

static int linux_read(void *opaque, uint32_t slot, unsigned n, void *buf)
{
    LinuxFrames *f = opaque;
    size_t size = (size_t)n * BLOCK;
    ssize_t done = pread(f->fd, buf, size, (off_t)slot * BLOCK);

    return done == size ? 0 : done < 0 ? -errno : -EIO;
}

static int linux_drop(void *opaque, uint32_t slot, unsigned n)
{
    LinuxFrames *f = opaque;

    return fallocate(f->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                     (off_t)slot * BLOCK, (off_t)n * BLOCK) < 0 ? -errno : 0;
}

static uint64_t linux_memory(void *opaque)
{
    LinuxFrames *f = opaque;
    struct stat st;

    return fstat(f->fd, &st) < 0 ? 0 : st.st_blocks * 512ULL;
}

static uint64_t linux_host_memory(void)
{
    return memory_limit_find("");
}

static bool linux_is_short(void *opaque)
{
    return memory_is_short();
}

const FramesOps frames_linux = {
    .kind = DEDUP_STORE_KIND_LINUX,
    .host_memory = linux_host_memory,
    .open = linux_open,
    .close = linux_close,
    .welcome = linux_welcome,
    .write = linux_write,
    .read = linux_read,
    .drop = linux_drop,
    .memory = linux_memory,
    .old_memory = linux_old_memory,
    .claim = linux_claim,
    .is_short = linux_is_short,
};
