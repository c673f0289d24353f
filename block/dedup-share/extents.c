/*
 * dedup-share: where on its disk a file's bytes are
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See extents.h for what counts.
 */

#include "qemu/osdep.h"
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>
#include "qemu/bitmap.h"
#include "block/dedup-share.h"
#include "extents.h"

#ifndef XFS_SUPER_MAGIC
#define XFS_SUPER_MAGIC 0x58465342
#endif

/* --- asking the kernel ---------------------------------------------------- */

/* Is it on XFS's realtime device, whose blocks are numbered on their own? */
static bool is_realtime(int fd)
{
    struct fsxattr attr;

    return ioctl(fd, FS_IOC_FSGETXATTR, &attr) < 0 ||
           attr.fsx_xflags & FS_XFLAG_REALTIME;
}

bool dedup_extents_comparable(int a, int b, const char **why)
{
    struct stat one, other;
    struct statfs fs;

    *why = NULL;
    if (fstat(a, &one) < 0 || fstat(b, &other) < 0 || fstatfs(a, &fs) < 0) {
        *why = "the files cannot be looked at";
    } else if (!S_ISREG(one.st_mode) || !S_ISREG(other.st_mode)) {
        *why = "they are no regular files";
    } else if (one.st_dev == other.st_dev && one.st_ino == other.st_ino) {
        *why = "they are one file";
    } else if (fs.f_type != XFS_SUPER_MAGIC && fs.f_type != BTRFS_SUPER_MAGIC) {
        *why = "the file system is not XFS or btrfs";
    } else if (one.st_dev != other.st_dev) {
        *why = "they are on two file systems, or in two subvolumes";
    } else if (fs.f_type == XFS_SUPER_MAGIC &&
               (is_realtime(a) || is_realtime(b))) {
        *why = "they are on XFS's realtime device";
    }
    return !*why;
}

static int read_map(int fd, struct fiemap *map)
{
    int ret;

    do {
        ret = ioctl(fd, FS_IOC_FIEMAP, map);
    } while (ret < 0 && errno == EINTR);
    return ret < 0 ? -errno : 0;
}

int dedup_extents_sync(int fd)
{
    /* the whole file is synced; with room for no extent, these are counted */
    struct fiemap map = {
        .fm_length = DEDUP_BLOCK_SIZE, .fm_flags = FIEMAP_FLAG_SYNC,
    };

    /* XFS keeps writers off while FIEMAP syncs: little is left for it */
    return fdatasync(fd) < 0 ? -errno : read_map(fd, &map);
}

int dedup_extents_read(int fd, uint64_t start, uint64_t end, DedupExtents *x)
{
    size_t size = sizeof(struct fiemap) + sizeof(x->extents);
    g_autofree struct fiemap *map = g_malloc0(size);
    const struct fiemap_extent *last;
    int ret;

    map->fm_start = start;
    map->fm_length = end - start;
    map->fm_extent_count = DEDUP_EXTENTS;
    ret = read_map(fd, map);
    if (ret < 0) {
        return ret;
    }
    x->n = MIN(map->fm_mapped_extents, DEDUP_EXTENTS);
    memcpy(x->extents, map->fm_extents, x->n * sizeof(x->extents[0]));
    x->end = end;
    if (x->n == DEDUP_EXTENTS) {        /* there may be more */
        last = &x->extents[x->n - 1];
        x->end = MIN(end, last->fe_logical + last->fe_length);
    }
    return x->end > start ? 0 : -EPROTO;
}

/* --- comparing ------------------------------------------------------------ */

static bool is_plain(const struct fiemap_extent *e)
{
    return (e->fe_flags & ~FIEMAP_EXTENT_LAST) == FIEMAP_EXTENT_SHARED;
}

static uint64_t end_of(const struct fiemap_extent *e)
{
    return e->fe_logical + e->fe_length;
}

static bool can_be(const DedupExtents *x)
{
    uint64_t last = 0;
    unsigned i;

    for (i = 0; i < x->n; i++) {
        const struct fiemap_extent *e = &x->extents[i];

        if (!e->fe_length || e->fe_logical < last ||
            e->fe_length > UINT64_MAX - e->fe_logical ||
            e->fe_length > UINT64_MAX - e->fe_physical) {
            return false;
        }
        last = end_of(e);
    }
    return true;
}

/* Set the whole blocks of bytes from @start to @end. */
static void mark_run(uint64_t start, uint64_t end, uint64_t first, unsigned n,
                     unsigned long *same)
{
    /* not DIV_ROUND_UP(), which may go beyond the last number */
    uint64_t from = MAX(start / DEDUP_BLOCK_SIZE +
                        !!(start % DEDUP_BLOCK_SIZE), first);
    uint64_t to = MIN(end / DEDUP_BLOCK_SIZE, first + n);

    if (from < to) {
        bitmap_set(same, from - first, to - from);
    }
}

void dedup_extents_mark_same(const DedupExtents *a, const DedupExtents *b,
                             uint64_t first, unsigned n, unsigned long *same)
{
    unsigned i = 0, j = 0;

    if (!can_be(a) || !can_be(b)) {
        return;
    }
    while (i < a->n && j < b->n) {
        const struct fiemap_extent *x = &a->extents[i], *y = &b->extents[j];
        uint64_t start = MAX(x->fe_logical, y->fe_logical);
        uint64_t end = MIN(end_of(x), end_of(y));

        if (start < end && is_plain(x) && is_plain(y) &&
            x->fe_physical + (start - x->fe_logical) ==
            y->fe_physical + (start - y->fe_logical)) {
            mark_run(start, MIN(end, MIN(a->end, b->end)), first, n, same);
        }
        if (end_of(x) <= end_of(y)) {
            i++;
        } else {
            j++;
        }
    }
}
