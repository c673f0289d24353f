/*
 * dedup-share: where on its disk a file's bytes are
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Two files that have one physical block have the same bytes there, as long as
 * both have it.  A file system shares blocks between files that were copied by
 * "cp --reflink" and writes none of them in place.
 *
 * - Only what FIEMAP says plainly counts: blocks that are written, as they are,
 *   at a place that is known, and that is shared.  A flag that is not known
 *   here means that something is not plain.
 * - A list that cannot be (extents that are empty, not in order, that overlap
 *   or end behind the last byte) counts as none.
 * - FIEMAP tells of what is on the disk: who asks has had the files synced.
 */

#ifndef DEDUP_SHARE_EXTENTS_H
#define DEDUP_SHARE_EXTENTS_H

#include <linux/fiemap.h>

/* Extents that are asked for at once. */
#define DEDUP_EXTENTS 256

/* What is known of a file from a place on, up to @end (bytes). */
typedef struct DedupExtents {
    uint64_t end;
    unsigned n;
    struct fiemap_extent extents[DEDUP_EXTENTS];
} DedupExtents;

/*
 * Can blocks of @a and @b be compared?  Both are regular files, on one file
 * system, of a kind whose FIEMAP can be relied on.  If not, *why says so.  May
 * hang with the disk.
 */
bool dedup_extents_comparable(int a, int b, const char **why);

/* Put all on the disk that was written to @fd.  0, or -errno.  May hang. */
int dedup_extents_sync(int fd);

/*
 * Find what @fd has from @start to @end, at least up to x->end, which is more
 * than @start.  0, or -errno.  May hang.
 */
int dedup_extents_read(int fd, uint64_t start, uint64_t end, DedupExtents *x);

/*
 * Of the @n blocks of DEDUP_BLOCK_SIZE from @first on, set those in @same that
 * are the same physical blocks in both files, at the same place of each.
 */
void dedup_extents_mark_same(const DedupExtents *a, const DedupExtents *b,
                             uint64_t first, unsigned n, unsigned long *same);

#endif /* DEDUP_SHARE_EXTENTS_H */
