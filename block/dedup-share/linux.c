/*
 * dedup-share: Linux store
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Frames are pages of the file "frames" in the group's directory, which is on a
 * tmpfs: slot n is at n * 4096.  A free slot is a hole.  A frame is written by
 * pwrite() before anybody knows its slot, and never again until it was evicted.
 * Who uses which frame is not known here, see holders.h.
 *
 * A guest page is given a frame by a private mapping of the file (given.h), or
 * where that cannot be or is not worth it, by a copy.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/madvise.h"
#include "qemu/stats64.h"
#include "qemu/timer.h"
#include "given.h"
#include "linux.h"
#include "trace.h"

struct DedupStore {
    int fd;
    uint8_t *window;            /* all frames, read-only */
    size_t size;
    DedupGivenOwner owner;
    Stat64 runs;
    Stat64 ns;                  /* spent on mapping and filling */
};

static uint64_t linux_store_host_frames(void)
{
    return (uint64_t)sysconf(_SC_PHYS_PAGES) * qemu_real_host_page_size() /
           DEDUP_BLOCK_SIZE;
}

static DedupStore *linux_store_open(const char *group, int dirfd,
                                    uint32_t nframes, bool create,
                                    DedupStoreId *id, Error **errp)
{
    DedupStore *s = g_new0(DedupStore, 1);

    s->size = (size_t)nframes * DEDUP_BLOCK_SIZE;
    s->window = MAP_FAILED;
    s->fd = openat(dirfd, "frames", O_RDWR | O_CLOEXEC | O_NOFOLLOW |
                   (create ? O_CREAT | O_EXCL : 0), 0600);
    if (s->fd >= 0 && (!create || !ftruncate(s->fd, s->size))) {
        s->window = mmap(NULL, s->size, PROT_READ, MAP_SHARED, s->fd, 0);
    }
    if (s->window == MAP_FAILED) {
        error_setg_errno(errp, errno, "store: could not open the frames of "
                         "group '%s'; choose a smaller store-size or use "
                         "store=off", group);
        if (s->fd >= 0) {
            close(s->fd);
        }
        g_free(s);
        return NULL;
    }
    qemu_madvise(s->window, s->size, QEMU_MADV_DONTFORK);
    dedup_given_owner_init(&s->owner, s->fd);
    trace_dedup_linux_open(group, nframes, create);
    return s;
}

/*
 * The files go with the group's directory; but copies that the guest has made
 * are still part of mappings of it, which would keep all of its memory.
 */
static void linux_store_close(DedupStore *s, bool last)
{
    if (last && !dedup_given_any(&s->owner)) {
        fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                  s->size);
    }
    munmap(s->window, s->size);
    close(s->fd);
    g_free(s);
}

static void linux_store_reap(const uint8_t uuid[16])
{
    /* nothing outlives the files */
}

/* How many of @slots follow each other from the first on? */
static unsigned slot_run(const uint32_t *slots, unsigned n)
{
    unsigned run = 1;

    while (run < n && slots[run] == slots[0] + run) {
        run++;
    }
    return run;
}

/* Make holes of frames; how many, from the first on, are holes now. */
static unsigned linux_store_evict(DedupStore *s, const uint32_t *slots,
                                  unsigned n)
{
    unsigned i, run;

    for (i = 0; i < n; i += run) {
        run = slot_run(slots + i, n - i);
        if (fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      (off_t)slots[i] * DEDUP_BLOCK_SIZE,
                      (off_t)run * DEDUP_BLOCK_SIZE) < 0) {
            break;
        }
    }
    return i;
}

static int write_run(DedupStore *s, uint32_t slot, const void *buf, size_t size)
{
    off_t at = (off_t)slot * DEDUP_BLOCK_SIZE;
    ssize_t done;

    while (size) {
        done = RETRY_ON_EINTR(pwrite(s->fd, buf, size, at));
        if (done <= 0) {
            return done < 0 && errno != ENOSPC ? -errno : -ENOMEM;
        }
        buf += done;
        at += done;
        size -= done;
    }
    return 0;
}

static int linux_store_fill(DedupStore *s, const uint32_t *slots, unsigned n,
                            const void *buf, uint64_t *words)
{
    int64_t start = get_clock();
    unsigned i, run;
    int ret = 0;

    for (i = 0; i < n && !ret; i += run) {
        run = slot_run(slots + i, n - i);
        ret = write_run(s, slots[i], buf + (size_t)i * DEDUP_BLOCK_SIZE,
                        (size_t)run * DEDUP_BLOCK_SIZE);
    }
    if (ret && linux_store_evict(s, slots, n) != n) {
        ret = -ENOTRECOVERABLE;
    }
    memset(words, 0, n * sizeof(*words));
    stat64_add(&s->ns, get_clock() - start);
    trace_dedup_linux_fill(slots[0], n, ret);
    return ret;
}

static void *frame(DedupStore *s, uint32_t slot)
{
    return s->window + (size_t)slot * DEDUP_BLOCK_SIZE;
}

static int linux_store_peek(DedupStore *s, const uint32_t *slots, unsigned n,
                            void *buf)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        memcpy(buf + (size_t)i * DEDUP_BLOCK_SIZE, frame(s, slots[i]),
               DEDUP_BLOCK_SIZE);
    }
    return 0;
}

/* How many gives are for pages and frames that follow each other? */
static unsigned give_run(const DedupGive *gives, unsigned n)
{
    unsigned run = 1;

    while (run < n && gives[run].slot == gives[0].slot + run &&
           gives[run].dest.host == gives[0].dest.host +
                                   run * DEDUP_BLOCK_SIZE) {
        run++;
    }
    return run;
}

static void linux_store_give(DedupStore *s, DedupGive *gives, unsigned n)
{
    unsigned i, j, run;

    for (i = 0; i < n; i += run) {
        uint8_t *host = gives[i].dest.host;
        int64_t start;
        bool mapped;

        run = give_run(gives + i, n - i);
        start = get_clock();
        mapped = dedup_given_map(&s->owner, host, gives[i].slot, run);
        if (mapped) {
            stat64_add(&s->runs, 1);
            stat64_add(&s->ns, get_clock() - start);
        } else {
            memcpy(host, frame(s, gives[i].slot), run * DEDUP_BLOCK_SIZE);
        }
        for (j = i; j < i + run; j++) {
            gives[j].result = mapped ? DEDUP_GIVEN : DEDUP_COPIED;
        }
    }
}

static void linux_store_each_used(DedupStore *s,
                                  void (*used)(void *opaque, uint32_t slot),
                                  void *opaque)
{
    dedup_given_each(&s->owner, used, opaque);
}

static bool linux_store_any_used(DedupStore *s)
{
    return dedup_given_any(&s->owner);
}

static void linux_store_counters(DedupStore *s, DedupStoreCounters *c)
{
    *c = (DedupStoreCounters) {
        .given_runs = stat64_get(&s->runs), .ns = stat64_get(&s->ns),
    };
    dedup_given_mappings(&c->mappings, &c->mappings_max);
}

/* What a guest's QEMU needs beside is asked by who registers the store. */
static bool linux_store_probe(Error **errp)
{
    void *page = mmap(NULL, DEDUP_BLOCK_SIZE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool ok = page != MAP_FAILED &&
              !madvise(page, DEDUP_BLOCK_SIZE, MADV_POPULATE_WRITE);

    if (page != MAP_FAILED) {
        munmap(page, DEDUP_BLOCK_SIZE);
    }
    if (qemu_real_host_page_size() != DEDUP_BLOCK_SIZE) {
        error_setg(errp, "store: the host's pages have %zu bytes, not %d; use "
                   "store=off", (size_t)qemu_real_host_page_size(),
                   DEDUP_BLOCK_SIZE);
    } else if (!ok) {
        error_setg(errp, "store: the Linux store needs Linux 5.14 or later; "
                   "use store=off");
    } else {
        return true;
    }
    return false;
}

const DedupStoreOps dedup_linux_store_ops = {
    .kind = DEDUP_SHARE_STORE_LINUX,
    .by_host = true,
    .probe = linux_store_probe,
    .host_frames = linux_store_host_frames,
    .open = linux_store_open,
    .close = linux_store_close,
    .reap = linux_store_reap,
    .fill = linux_store_fill,
    .peek = linux_store_peek,
    .give = linux_store_give,
    .each_used = linux_store_each_used,
    .any_used = linux_store_any_used,
    .evict = linux_store_evict,
    .counters = linux_store_counters,
};
