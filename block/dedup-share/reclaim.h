/*
 * dedup-share: frames that nobody uses
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For stores whose frames' users the group counts (holders.h).  Frames that no
 * process holds are evicted when slots or memory run out, and when asked for.
 * What a process holds is what it has used since its last trim, and what its
 * guest maps.  So the search for idle frames is a CLOCK: a hand goes round the
 * slots, and the trims are what takes the reference bits away.
 *
 * A thread for each group trims, when anybody in the group has asked for it.
 */

#ifndef DEDUP_SHARE_RECLAIM_H
#define DEDUP_SHARE_RECLAIM_H

#include "group.h"

/* Main loop; the group has holders. */
void dedup_reclaim_start(DedupGroup *g);
void dedup_reclaim_stop(DedupGroup *g);

/*
 * Evict about @want frames.  Gives up after a part of the store has been looked
 * at.  Returns how many were evicted.  Any thread.
 */
unsigned dedup_evict(DedupGroup *g, unsigned want);

/* Trim now.  The thread does it; tests, while nobody has asked for it. */
void dedup_trim_now(DedupGroup *g);

/* Have all processes of the group trim, soon.  Any thread. */
void dedup_trim_all(DedupGroup *g);

/* The same, and evict all that is idle then. */
void dedup_reclaim_all(DedupGroup *g);

#endif /* DEDUP_SHARE_RECLAIM_H */
