/*
 * dedup-share: an image that a guest of this process may write to
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Invariants
 *
 * - Only this process writes to the image, and only through nodes that share
 *   this object: QEMU's image locking sees to the first, the table of these
 *   objects to the second.  Where two nodes cannot share one, neither takes
 *   part.
 * - Before a change is submitted, what was known of its blocks is forgotten
 *   (dedup_own_change()), and fills that overlap it record nothing (tracker.h).
 * - What the image held when it was opened is of use to others: as long as a
 *   block has not been changed it is looked up in @keyed, by the key that the
 *   image had then.  A block that was changed is looked up in @map, which no
 *   other process has.  What was changed is noted here, where nobody else can
 *   write, and in @keyed, for others to see.
 */

#ifndef DEDUP_SHARE_OWN_H
#define DEDUP_SHARE_OWN_H

#include "map.h"
#include "tracker.h"

typedef struct DedupOwnId {
    uint64_t dev, ino;          /* of the file or block device */
    char format[16];
    uint64_t nblocks;
} DedupOwnId;

typedef struct DedupOwn {
    DedupOwnId id;
    DedupIndex *index;
    unsigned refcnt;
    DedupTracker tracker;
    uint64_t unit;              /* bytes; changes are rounded to such */
    DedupMap *map;
    DedupMap *keyed;            /* NULL: what it was is of no use */
    unsigned long *dirty;       /* with @keyed: blocks that were changed */
    bool closed;                /* it takes no part any more; atomic */
    QLIST_ENTRY(DedupOwn) next;
} DedupOwn;

/*
 * The object for the image @id, in the group of @index; made if this process
 * has none.  Takes @keyed, which may be NULL.  No request is in flight through
 * the node that is to use it.  Main loop.
 */
DedupOwn *dedup_own_get(DedupIndex *index, const DedupOwnId *id, uint64_t unit,
                        DedupMap *keyed);
void dedup_own_put(DedupOwn *own);

/* The map that @block is looked up in, or NULL.  Any thread. */
DedupMap *dedup_own_map(DedupOwn *own, uint64_t block);

/* A change was announced to the tracker, and is about to be submitted. */
void dedup_own_change(DedupOwn *own, int64_t offset, int64_t bytes);

#endif /* DEDUP_SHARE_OWN_H */
