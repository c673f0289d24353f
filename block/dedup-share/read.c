/*
 * dedup-share: what both kinds of reads that share do, see offer.c and direct.c
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "node.h"

/*
 * Buffers are kept: the kernel would clear the pages of a new one for each
 * request, which takes longer than to fill the frames from it.
 */
void *dedup_buffer_get(BDRVDedupShareState *s)
{
    WITH_QEMU_LOCK_GUARD(&s->buffers_lock) {
        if (s->nbuffers) {
            return s->buffers[--s->nbuffers];
        }
    }
    return qemu_try_memalign(DEDUP_BLOCK_SIZE, DEDUP_BATCH * DEDUP_BLOCK_SIZE);
}

void dedup_buffer_put(BDRVDedupShareState *s, void *buf)
{
    WITH_QEMU_LOCK_GUARD(&s->buffers_lock) {
        if (buf && s->nbuffers < ARRAY_SIZE(s->buffers)) {
            s->buffers[s->nbuffers++] = buf;
            return;
        }
    }
    qemu_vfree(buf);
}

static void *read_alloc(void *opaque, size_t size)
{
    return dedup_buffer_get(((BlockDriverState *)opaque)->opaque);
}

static void read_free(void *opaque, void *buf)
{
    dedup_buffer_put(((BlockDriverState *)opaque)->opaque, buf);
}

void dedup_buffers_init(BDRVDedupShareState *s)
{
    qemu_mutex_init(&s->buffers_lock);
}

void dedup_buffers_destroy(BDRVDedupShareState *s)
{
    while (s->nbuffers) {
        qemu_vfree(s->buffers[--s->nbuffers]);
    }
    qemu_mutex_destroy(&s->buffers_lock);
}

static int coroutine_fn GRAPH_RDLOCK
read_blocks(void *opaque, uint64_t first, unsigned n, void *buf)
{
    BlockDriverState *bs = opaque;
    int64_t bytes = (int64_t)n * DEDUP_BLOCK_SIZE;
    int ret = bdrv_co_pread(bs->file, first * DEDUP_BLOCK_SIZE, bytes, buf, 0);

    return ret < 0 ? ret : 0;
}

/* Find the owners of @n blocks, which ascend. */
static void coroutine_fn GRAPH_RDLOCK
find_owners(BlockDriverState *bs, DedupBlock *blocks, unsigned n)
{
    unsigned i, run;

    for (i = 0; i < n; i += run) {
        run = 1;
        while (i + run < n &&
               blocks[i + run].number == blocks[i].number + run) {
            run++;
        }
        dedup_find_owners(bs, blocks + i, run);
    }
}

void dedup_count_results(DedupCounters *c, const DedupBlock *blocks, unsigned n)
{
    unsigned i, run;

    stat64_add(&c->blocks_read, n);
    for (i = 0; i < n; i += run) {
        run = 1;
        while (i + run < n && blocks[i + run].result == blocks[i].result) {
            run++;
        }
        stat64_add(&c->results[blocks[i].result], run);
    }
}

void coroutine_fn dedup_read_blocks(BlockDriverState *bs, DedupBlock *blocks,
                                    unsigned n, DedupGiveFn *give)
{
    BDRVDedupShareState *s = bs->opaque;
    int64_t first = blocks[0].number * DEDUP_BLOCK_SIZE;
    int64_t end = (blocks[n - 1].number + 1) * DEDUP_BLOCK_SIZE;
    DedupRange fill;
    DedupRead r = {
        .group = s->group, .tracker = s->tracker, .fill = &fill,
        .counters = &s->counters, .admission = s->opts.admission,
        .read = read_blocks, .alloc = read_alloc,
        .free = read_free, .give = give, .opaque = bs,
    };

    find_owners(bs, blocks, n);
    if (!dedup_engine_hit(&r, blocks, n)) {
        /* a write from now on is seen; one that was meanwhile, by the owners */
        dedup_fill_begin(s->tracker, &fill, first, end - first);
        find_owners(bs, blocks, n);
        dedup_engine_read(&r, blocks, n);
        dedup_fill_end(s->tracker, &fill);
    }
    dedup_count_results(&s->counters, blocks, n);
}
