/*
 * dedup-share: several requests' gives in one call of the store
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A PV disk's request has eleven pages at most, and guests send several at
 * once.  What the requests of one iteration of the event loop want to give is
 * given together, at its end: the store's calls into the kernel are then
 * shared by all.  A request still goes on only when its own gives are done.
 */

#ifndef DEDUP_SHARE_GATHER_H
#define DEDUP_SHARE_GATHER_H

#include "block/aio.h"
#include "qemu/queue.h"
#include "qemu/thread.h"
#include "held.h"

typedef struct DedupGathered DedupGathered;

typedef struct DedupGather {
    DedupHeld *held;            /* of all that are waiting */
    QemuMutex lock;             /* protects all below; held for moments */
    AioContext *ctx;            /* of all that are waiting */
    QSIMPLEQ_HEAD(, DedupGathered) waiting;
} DedupGather;

void dedup_gather_init(DedupGather *ga);
void dedup_gather_destroy(DedupGather *ga);

/*
 * dedup_held_give_pages(), with others' if there are any.  In a coroutine of a
 * request that is in flight; @n is at most DEDUP_BATCH.
 */
void coroutine_fn dedup_gather_give(DedupGather *ga, DedupHeld *held,
                                    DedupGive *gives, unsigned n);

#endif /* DEDUP_SHARE_GATHER_H */
