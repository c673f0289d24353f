/*
 * dedup-share engine: what to do with the blocks of a read
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See engine.h for what must hold.
 */

#include "qemu/osdep.h"
#include "qemu/memalign.h"
#include "engine.h"
#include "trace.h"

/* Look a block up.  True if the store has it. */
static bool lookup(DedupGroup *g, DedupBlock *b)
{
    b->id = dedup_map_lookup(b->map, b->number);
    return dedup_index_get(&g->index, b->id, &b->word);
}

static void set_results(DedupBlock **blocks, unsigned n, DedupResult result)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        blocks[i]->result = result;
    }
}

static void release_slots(DedupGroup *g, const uint32_t *slots, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        dedup_index_release(&g->index, slots[i]);
    }
}

/*
 * The frames @slots hold the content of @blocks and are sealed: record them.
 * A block that another process recorded meanwhile is taken from there, and
 * our frame for it is dropped.
 */
static void record(DedupRead *r, DedupBlock **blocks, const uint32_t *slots,
                   const uint64_t *words, unsigned n)
{
    DedupGroup *g = r->group;
    uint32_t drop[DEDUP_BATCH];
    unsigned i, ndrop = 0;
    bool clean = dedup_fill_lock(r->tracker, r->fill);

    for (i = 0; i < n; i++) {
        DedupBlock *b = blocks[i];
        DedupFrameId id;

        if (!clean) {
            b->result = DEDUP_OVERWRITTEN;
            drop[ndrop++] = slots[i];
            continue;
        }
        id = dedup_index_seal(&g->index, slots[i], words[i]);
        if (dedup_map_record(b->map, b->number, b->id, id)) {
            b->id = id;
            b->word = words[i];
        } else {
            drop[ndrop++] = slots[i];
            if (!lookup(g, b)) {
                b->result = DEDUP_EVICTED;
            }
        }
    }
    dedup_fill_unlock(r->tracker);
    if (ndrop) {
        release_slots(g, drop, g->ops->evict(g->store, drop, ndrop));
    }
}

/*
 * If the host has no memory for a frame, what was read for it is read once more
 * in the ordinary way.  So then nothing is tried for a while.
 */
#define FULL_US G_USEC_PER_SEC

static bool is_full(DedupGroup *g)
{
    return g_get_monotonic_time() < stat64_get(&g->full_until);
}

/* Read a run of @n missed blocks that follow each other into frames. */
static void coroutine_fn fill_run(DedupRead *r, DedupBlock **blocks,
                                  unsigned n)
{
    DedupGroup *g = r->group;
    uint32_t slots[DEDUP_BATCH];
    uint64_t words[DEDUP_BATCH];
    uint64_t first = blocks[0]->number;
    unsigned got = is_full(g) ? 0 : dedup_index_alloc(&g->index, slots, n);
    void *buf;
    int ret;

    set_results(blocks + got, n - got, DEDUP_STORE_FULL);
    if (!got) {
        return;
    }
    buf = r->alloc(r->opaque, (size_t)got * DEDUP_BLOCK_SIZE);
    ret = buf ? r->read(r->opaque, first, got, buf) : -ENOMEM;
    if (ret == 0) {
        stat64_add(&r->counters->bytes_filled,
                   (uint64_t)got * DEDUP_BLOCK_SIZE);
        ret = g->ops->fill(g->store, slots, got, buf, words);
    }
    qemu_vfree(buf);
    trace_dedup_engine_fill(first, got, ret);
    if (ret < 0) {
        if (ret != -ENOTRECOVERABLE) {
            release_slots(g, slots, got);
        }
        if (ret == -ENOMEM) {
            stat64_set(&g->full_until, g_get_monotonic_time() + FULL_US);
        }
        set_results(blocks, got,
                    ret == -ENOMEM ? DEDUP_STORE_FULL : DEDUP_FAILED);
        return;
    }
    record(r, blocks, slots, words, got);
}

static void coroutine_fn fill_misses(DedupRead *r, DedupBlock **missed,
                                     unsigned n)
{
    unsigned i, run;

    for (i = 0; i < n; i += run) {
        run = 1;
        while (i + run < n &&
               missed[i + run]->number == missed[i]->number + run) {
            run++;
        }
        fill_run(r, missed + i, run);
    }
}

static void coroutine_fn give(DedupRead *r, DedupBlock *blocks, unsigned n)
{
    DedupGroup *g = r->group;
    DedupGive gives[DEDUP_BATCH];
    DedupBlock *to[DEDUP_BATCH];
    unsigned i, ngive = 0, given = 0;
    uint64_t word;

    for (i = 0; i < n; i++) {
        if (blocks[i].result == DEDUP_GIVEN) {
            to[ngive] = &blocks[i];
            gives[ngive++] = (DedupGive) {
                .dest = blocks[i].dest,
                .slot = blocks[i].id.slot,
                .word = blocks[i].word,
                .result = DEDUP_FAILED,
            };
        }
    }
    if (!ngive) {
        return;
    }
    r->give(r->opaque, gives, ngive);
    for (i = 0; i < ngive; i++) {
        to[i]->result = gives[i].result;
        if (gives[i].result == DEDUP_GIVEN &&
            !dedup_index_get(&g->index, to[i]->id, &word)) {
            to[i]->result = DEDUP_EVICTED;
        }
        given += to[i]->result == DEDUP_GIVEN;
    }
    trace_dedup_engine_give(ngive, given);
}

void coroutine_fn dedup_engine_read(DedupRead *r, DedupBlock *blocks,
                                    unsigned n)
{
    DedupBlock *missed[DEDUP_BATCH];
    unsigned i, hits = 0, misses = 0;

    assert(n <= DEDUP_BATCH);
    for (i = 0; i < n; i++) {
        DedupBlock *b = &blocks[i];

        if (b->result != DEDUP_GIVEN) {
            continue;
        }
        if (!b->map) {
            b->result = DEDUP_NO_LAYER;
        } else if (!dedup_map_back(b->map, b->number)) {
            b->result = DEDUP_STORE_FULL;
        } else if (lookup(r->group, b)) {
            hits++;
        } else {
            missed[misses++] = b;
        }
    }
    stat64_add(&r->counters->hits, hits);
    stat64_add(&r->counters->misses, misses);
    fill_misses(r, missed, misses);
    give(r, blocks, n);
    trace_dedup_engine_read(n, hits, misses);
}

bool dedup_engine_copy(DedupGroup *g, DedupBlock *blocks, unsigned n,
                       void *buf)
{
    uint32_t slots[DEDUP_BATCH];
    uint64_t word;
    unsigned i;

    for (i = 0; i < n; i++) {
        if (!blocks[i].map || !dedup_map_back(blocks[i].map,
                                              blocks[i].number) ||
            !lookup(g, &blocks[i])) {
            return false;
        }
        slots[i] = blocks[i].id.slot;
    }
    if (g->ops->peek(g->store, slots, n, buf) < 0) {
        return false;
    }
    for (i = 0; i < n; i++) {
        if (!dedup_index_get(&g->index, blocks[i].id, &word)) {
            return false;
        }
    }
    return true;
}
