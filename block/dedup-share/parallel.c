/*
 * dedup-share: the parts of a request, at once
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/aio_task.h"
#include "parallel.h"

typedef struct PartTask {
    AioTask task;
    DedupPartFn *part;
    void *opaque;
    unsigned i;
} PartTask;

static int coroutine_fn run_part(AioTask *task)
{
    PartTask *t = container_of(task, PartTask, task);

    return t->part(t->opaque, t->i);
}

int coroutine_fn dedup_co_all(unsigned n, DedupPartFn *part, void *opaque)
{
    AioTaskPool *pool;
    unsigned i;
    int ret;

    if (n <= 1) {
        return n ? MIN(part(opaque, 0), 0) : 0;
    }
    pool = aio_task_pool_new(DEDUP_PARALLEL);
    for (i = 0; i < n; i++) {
        PartTask *t;

        aio_task_pool_wait_slot(pool);
        if (aio_task_pool_status(pool) < 0) {
            break;
        }
        t = g_new(PartTask, 1);
        *t = (PartTask) {
            .task.func = run_part, .part = part, .opaque = opaque, .i = i,
        };
        aio_task_pool_start_task(pool, &t->task);
    }
    aio_task_pool_wait_all(pool);
    ret = aio_task_pool_status(pool);
    aio_task_pool_free(pool);
    return ret;
}
