/*
 * dedup-share: where a file's blocks are on the disk
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * By FIEMAP: Linux, Documentation/filesystems/fiemap.rst.
 */

#include "qemu/osdep.h"
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>
#include "extents.h"

/* Extents that are asked for at once. */
#define BATCH 256

/* More than these flags, and the bytes may be elsewhere, or other ones. */
#define PLAIN (FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_SHARED | \
               FIEMAP_EXTENT_MERGED)

/* Is it read as zeroes, as what has no extent? */
static bool is_hole(uint32_t flags)
{
    return flags & FIEMAP_EXTENT_UNWRITTEN &&
           !(flags & ~(PLAIN | FIEMAP_EXTENT_UNWRITTEN));
}

/* Does @x go on where @last ends, in the same way? */
static bool goes_on(const DedupExtent *last, const DedupExtent *x)
{
    return last->plain && x->plain && last->shared == x->shared &&
           last->logical + last->length == x->logical &&
           last->physical + last->length == x->physical;
}

/* Add @x, as a part of the last one if it goes on there. */
static void append(GArray *all, DedupExtent x)
{
    DedupExtent *last = all->len ? &g_array_index(all, DedupExtent,
                                                  all->len - 1) : NULL;

    if (last && goes_on(last, &x)) {
        last->length += x.length;
    } else {
        g_array_append_val(all, x);
    }
}

static void add(GArray *all, const struct fiemap_extent *e)
{
    DedupExtent x = {
        .logical = e->fe_logical, .physical = e->fe_physical,
        .length = e->fe_length, .plain = !(e->fe_flags & ~PLAIN),
        .shared = e->fe_flags & FIEMAP_EXTENT_SHARED,
    };

    if (!is_hole(e->fe_flags)) {
        append(all, x);
    }
}

/* Add the extents from *from on; true if there may be more. */
static bool get_some(int fd, struct fiemap *fm, GArray *all, uint64_t *from,
                     bool *ok)
{
    unsigned i;

    memset(fm, 0, sizeof(*fm));
    fm->fm_start = *from;
    fm->fm_length = FIEMAP_MAX_OFFSET - *from;
    fm->fm_flags = FIEMAP_FLAG_SYNC;
    fm->fm_extent_count = BATCH;
    *ok = !ioctl(fd, FS_IOC_FIEMAP, fm);
    if (!*ok || !fm->fm_mapped_extents) {
        return false;
    }
    for (i = 0; i < fm->fm_mapped_extents; i++) {
        add(all, &fm->fm_extents[i]);
        *from = fm->fm_extents[i].fe_logical + fm->fm_extents[i].fe_length;
        if (fm->fm_extents[i].fe_flags & FIEMAP_EXTENT_LAST) {
            return false;
        }
    }
    return true;
}

/* Is it the file that is meant, on a file system whose places are unique? */
static bool is_usable(int fd, uint64_t dev, uint64_t ino)
{
    struct fsxattr attr;
    struct statfs fs;
    struct stat st;

    if (fstat(fd, &st) < 0 || st.st_dev != dev || st.st_ino != ino ||
        fstatfs(fd, &fs) < 0) {
        return false;
    }
    return fs.f_type == BTRFS_SUPER_MAGIC ||
           (fs.f_type == XFS_SUPER_MAGIC &&
            !ioctl(fd, FS_IOC_FSGETXATTR, &attr) &&
            !(attr.fsx_xflags & FS_XFLAG_REALTIME));
}

GArray *dedup_extents_get(const char *path, uint64_t dev, uint64_t ino)
{
    g_autofree struct fiemap *fm = g_malloc(sizeof(*fm) + BATCH *
                                            sizeof(struct fiemap_extent));
    GArray *all = g_array_new(false, false, sizeof(DedupExtent));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    uint64_t from = 0;
    bool ok = fd >= 0 && is_usable(fd, dev, ino);

    while (ok && get_some(fd, fm, all, &from, &ok)) {
        /* the next ones */
    }
    if (fd >= 0) {
        close(fd);
    }
    if (!ok) {
        g_array_free(all, true);
        all = NULL;
    }
    return all;
}

bool dedup_extents_equal(const GArray *a, const GArray *b)
{
    unsigned i;

    if (!a || !b || a->len != b->len) {
        return false;
    }
    for (i = 0; i < a->len; i++) {
        const DedupExtent *x = &g_array_index(a, DedupExtent, i);
        const DedupExtent *y = &g_array_index(b, DedupExtent, i);

        if (x->logical != y->logical || x->physical != y->physical ||
            x->length != y->length || x->plain != y->plain ||
            x->shared != y->shared) {
            return false;
        }
    }
    return true;
}

/* The same without a look at who else has the blocks. */
static GArray *places_of(const GArray *all)
{
    GArray *places = g_array_new(false, false, sizeof(DedupExtent));
    unsigned i;

    for (i = 0; i < all->len; i++) {
        DedupExtent x = g_array_index(all, DedupExtent, i);

        x.shared = false;
        append(places, x);
    }
    return places;
}

bool dedup_extents_same_places(const GArray *a, const GArray *b)
{
    g_autoptr(GArray) x = a ? places_of(a) : NULL;
    g_autoptr(GArray) y = b ? places_of(b) : NULL;

    return dedup_extents_equal(x, y);
}
