/*
 * dedup-share: where a file's blocks are on the disk
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_SHARE_EXTENTS_H
#define DEDUP_SHARE_EXTENTS_H

/* In bytes.  Not all are multiples of blocks. */
typedef struct DedupExtent {
    uint64_t logical;
    uint64_t physical;
    uint64_t length;
    bool plain;                 /* the file's bytes are those of the disk */
    bool shared;                /* another file may map them, too */
} DedupExtent;

/*
 * The extents of the file @path, in ascending order, as long as can be, after
 * all that is to be written to the disk was.  What is in none is read as
 * zeroes.  An array of DedupExtent, the caller's; NULL if the file system
 * cannot tell.
 */
GArray *dedup_extents_get(const char *path, uint64_t dev, uint64_t ino);

bool dedup_extents_equal(const GArray *a, const GArray *b);

/*
 * Are the same bytes of the file at the same places?  Whether others share them
 * may have changed.
 */
bool dedup_extents_same_places(const GArray *a, const GArray *b);

#endif /* DEDUP_SHARE_EXTENTS_H */
