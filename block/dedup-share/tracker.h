/*
 * dedup-share: which writes and which fills of a disk overlap
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Invariant: a fill that overlapped a write in time and in place records
 * nothing.  What a fill reads while a write is in flight may be old, new or
 * a mixture, and, with a write that allocates in an overlay, may belong to
 * another layer than the one that was found to own the block.
 *
 * A disk's writes (also discards, resizes, snapshots: all that changes what
 * is read) and fills are announced here before they are submitted.
 */

#ifndef DEDUP_SHARE_TRACKER_H
#define DEDUP_SHARE_TRACKER_H

#include "qemu/queue.h"
#include "qemu/thread.h"

typedef struct DedupRange {
    int64_t offset;
    int64_t bytes;
    bool tainted;               /* fills: met a write */
    QLIST_ENTRY(DedupRange) next;
} DedupRange;

typedef struct DedupTracker {
    QemuMutex lock;             /* protects all below; held for moments */
    QLIST_HEAD(, DedupRange) writes;
    QLIST_HEAD(, DedupRange) fills;
} DedupTracker;

void dedup_tracker_init(DedupTracker *t);
void dedup_tracker_destroy(DedupTracker *t);

/* Call before a write is submitted, and after it has ended.  Any thread. */
void dedup_write_begin(DedupTracker *t, DedupRange *w, int64_t offset,
                       int64_t bytes);
void dedup_write_end(DedupTracker *t, DedupRange *w);

/*
 * Call before the owner of the blocks is looked up, and after they were
 * recorded, which is done under dedup_fill_lock(), while no write can begin.
 */
void dedup_fill_begin(DedupTracker *t, DedupRange *f, int64_t offset,
                      int64_t bytes);
void dedup_fill_end(DedupTracker *t, DedupRange *f);

/* Lock writes out.  True if @f is clean: the caller may record.  Unlock. */
bool dedup_fill_lock(DedupTracker *t, DedupRange *f);
void dedup_fill_unlock(DedupTracker *t);

#endif /* DEDUP_SHARE_TRACKER_H */
