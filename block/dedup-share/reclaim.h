/*
 * dedup-share: frames that nobody uses
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Frames that nobody uses are evicted when slots or memory run out, and when
 * asked for.  Who uses a frame is known to the store, or noted in the holders'
 * table (holders.h).  What a process holds there is what it has used since its
 * last trim, and what its guest maps.
 *
 * The search for idle frames is a CLOCK: a hand goes round the slots.  A frame
 * that was used since the hand last passed is let be once more.  It costs a
 * look at two words of bits for each process and 64 frames, and is bounded for
 * each request.
 *
 * A thread for each group trims, when anybody in the group has asked for it,
 * and buries the dead.
 */

#ifndef DEDUP_SHARE_RECLAIM_H
#define DEDUP_SHARE_RECLAIM_H

#include "group.h"

/* Main loop. */
void dedup_reclaim_start(DedupGroup *g);
void dedup_reclaim_stop(DedupGroup *g);

/*
 * Evict frames for the use of the caller: up to @want slots, which are FILLING
 * then.  Gives up after a part of the store has been looked at.  Returns how
 * many it got.  Any thread.
 */
unsigned dedup_evict(DedupGroup *g, uint32_t *slots, unsigned want);

/* DedupBuryFn: @opaque is the group. */
void dedup_bury(void *opaque, unsigned row);

/* Evict all that is idle. */
void dedup_evict_all(DedupGroup *g);

/* Trim now, in this thread, where no request waits for it. */
void dedup_trim_now(DedupGroup *g);

/* Have all processes of the group trim, soon.  Any thread. */
void dedup_trim_all(DedupGroup *g);

/* The same, and evict all that is idle then. */
void dedup_reclaim_all(DedupGroup *g);

#endif /* DEDUP_SHARE_RECLAIM_H */
