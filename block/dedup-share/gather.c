/*
 * dedup-share: several requests' gives in one call of the store
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "gather.h"
#include "trace.h"

/* On the stack of a request's coroutine, which waits. */
struct DedupGathered {
    DedupGive *gives;
    unsigned n;
    Coroutine *co;
    QSIMPLEQ_ENTRY(DedupGathered) next;
};

void dedup_gather_init(DedupGather *ga)
{
    qemu_mutex_init(&ga->lock);
    QSIMPLEQ_INIT(&ga->waiting);
}

void dedup_gather_destroy(DedupGather *ga)
{
    assert(QSIMPLEQ_EMPTY(&ga->waiting));
    qemu_mutex_destroy(&ga->lock);
}

/* Give what so many requests want, from *first on, as fit in a batch. */
static DedupGathered *give_batch(DedupHeld *held, DedupGathered *first)
{
    DedupGive gives[DEDUP_BATCH];
    DedupGathered *w;
    unsigned n = 0, requests = 0;

    for (w = first; w && n + w->n <= DEDUP_BATCH; w = QSIMPLEQ_NEXT(w, next)) {
        memcpy(gives + n, w->gives, w->n * sizeof(*gives));
        n += w->n;
        requests++;
    }
    dedup_held_give_pages(held, gives, n);
    trace_dedup_gather_give(requests, n);
    n = 0;
    for (w = first; requests; requests--, w = QSIMPLEQ_NEXT(w, next)) {
        memcpy(w->gives, gives + n, w->n * sizeof(*gives));
        n += w->n;
    }
    return w;
}

static void gather_bh(void *opaque)
{
    DedupGather *ga = opaque;
    DedupHeld *held = ga->held;
    DedupGathered *w;
    QSIMPLEQ_HEAD(, DedupGathered) all = QSIMPLEQ_HEAD_INITIALIZER(all);

    WITH_QEMU_LOCK_GUARD(&ga->lock) {
        QSIMPLEQ_CONCAT(&all, &ga->waiting);
        ga->ctx = NULL;
    }
    for (w = QSIMPLEQ_FIRST(&all); w; ) {
        w = give_batch(held, w);
    }
    /* the requests may end all, and the node with them: @ga is not used more */
    while ((w = QSIMPLEQ_FIRST(&all))) {
        QSIMPLEQ_REMOVE_HEAD(&all, next);
        aio_co_wake(w->co);
    }
}

/*
 * Wait with the others.  False if they are in another thread, or have frames of
 * another store.
 */
static bool join(DedupGather *ga, DedupHeld *held, DedupGathered *w)
{
    AioContext *ctx = qemu_get_current_aio_context();

    QEMU_LOCK_GUARD(&ga->lock);
    if (ga->ctx && (ga->ctx != ctx || ga->held != held)) {
        return false;
    }
    if (!ga->ctx) {
        ga->ctx = ctx;
        ga->held = held;
        aio_bh_schedule_oneshot(ctx, gather_bh, ga);
    }
    QSIMPLEQ_INSERT_TAIL(&ga->waiting, w, next);
    return true;
}

void coroutine_fn dedup_gather_give(DedupGather *ga, DedupHeld *held,
                                    DedupGive *gives, unsigned n)
{
    DedupGathered w = {
        .gives = gives, .n = n, .co = qemu_coroutine_self(),
    };

    assert(n <= DEDUP_BATCH);
    if (join(ga, held, &w)) {
        qemu_coroutine_yield();
    } else {
        dedup_held_give_pages(held, gives, n);
    }
}
