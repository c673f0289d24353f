/*
 * dedup-share: images that share physical blocks with others
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copies made by reflink (XFS, btrfs) map the same physical blocks.  A block of
 * such an image is looked up, and recorded, as the block of the other image
 * that it is: the second copy's first read needs no I/O.
 *
 * When that is sound
 *
 * A physical block can be freed and used again, so that two files have had it
 * mapped proves nothing.  What is proved is that the bytes of image B from b
 * on, as B is when it is opened, are those of image A from a on, as A was when
 * it got its key (layer.h).  Both do not change any more: so it is proved once,
 * at opening, and it does not matter what becomes of the files.  At opening
 *
 * - B has a key, the same before and after, so B did not change;
 * - the file system, asked to write out what it has first (FIEMAP_FLAG_SYNC),
 *   says that B maps a physical block, plainly (not compressed, not inline, not
 *   unwritten), as shared; then that A maps the same one, plainly; then again
 *   that B maps it.  A block that is mapped twice is copied when one of the two
 *   is written to: at that moment the bytes are the same;
 * - A is the file that got the key, by its inode, and A's bytes have not
 *   changed since: either it has this key still; or a process of the group that
 *   may write to it lives, and has not marked the block dirty (map.h), which is
 *   looked at after A was.
 *
 * The blocks of a raw image are where they are in its file.  Those of a qcow2
 * image are not, so there the files have to be the same in all of their
 * extents, and no block of A may be dirty.
 */

#ifndef DEDUP_SHARE_REFLINK_H
#define DEDUP_SHARE_REFLINK_H

#include "map.h"

typedef struct DedupAlias DedupAlias;

/* Does the file share blocks with any other, as far as can be told? */
bool dedup_alias_possible(const DedupMapLayer *layer);

/*
 * Find what the image @layer, whose map is @map, in @format, shares with those
 * of the group's directory @dirfd, whose path is @dir, and whose maps are
 * older. NULL if there is nothing.  Main loop.
 */
DedupAlias *dedup_alias_find(DedupMap *map, int dirfd, const char *dir,
                             const DedupMapLayer *layer, const char *format);
void dedup_alias_free(DedupAlias *alias);

/* Where block *number is looked up, if not where it was.  Any thread. */
void dedup_alias_lookup(const DedupAlias *alias, DedupMap **map,
                        uint64_t *number);

#endif /* DEDUP_SHARE_REFLINK_H */
