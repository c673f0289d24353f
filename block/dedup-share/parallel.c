/*
 * dedup-share: the parts of a request, at once
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/aio_task.h"
#include "qemu/atomic.h"
#include "parallel.h"

typedef struct PartTask {
    AioTask task;
    DedupPartFn *part;
    void *opaque;
    unsigned i;
} PartTask;

/* Coroutines that parts of all requests have; atomic. */
static unsigned in_flight;

static bool take_coroutine(void)
{
    if (qatomic_fetch_inc(&in_flight) < DEDUP_PARALLEL_ALL) {
        return true;
    }
    qatomic_dec(&in_flight);
    return false;
}

static int coroutine_fn run_part(AioTask *task)
{
    PartTask *t = container_of(task, PartTask, task);
    int ret = t->part(t->opaque, t->i);

    qatomic_dec(&in_flight);
    return ret;
}

static void coroutine_fn start_part(AioTaskPool *pool, DedupPartFn *part,
                                    void *opaque, unsigned i)
{
    PartTask *t = g_new(PartTask, 1);

    *t = (PartTask) {
        .task.func = run_part, .part = part, .opaque = opaque, .i = i,
    };
    aio_task_pool_start_task(pool, &t->task);
}

int coroutine_fn dedup_co_all(unsigned n, DedupPartFn *part, void *opaque)
{
    AioTaskPool *pool;
    unsigned i;
    int ret = 0;

    if (n <= 1) {
        return n ? MIN(part(opaque, 0), 0) : 0;
    }
    pool = aio_task_pool_new(DEDUP_PARALLEL);
    for (i = 0; i < n && ret >= 0; i++) {
        aio_task_pool_wait_slot(pool);
        if (aio_task_pool_status(pool) < 0) {
            break;
        }
        if (take_coroutine()) {
            start_part(pool, part, opaque, i);
        } else {
            ret = part(opaque, i);
        }
        /* of two errors, the one that came first */
        ret = aio_task_pool_status(pool) ?: MIN(ret, 0);
    }
    aio_task_pool_wait_all(pool);
    ret = ret ?: aio_task_pool_status(pool);
    aio_task_pool_free(pool);
    return ret;
}
