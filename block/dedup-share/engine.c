/*
 * dedup-share engine: what to do with the blocks of a read
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See engine.h for what must hold.
 */

#include "qemu/osdep.h"
#include "engine.h"
#include "reclaim.h"
#include "trace.h"

/* --- what a request holds, see holders.h --------------------------------- */

static void hold_begin(DedupGroup *g, DedupHold *hold, const uint32_t *slots,
                       unsigned n)
{
    if (g->holders) {
        dedup_hold_begin(g->holders, hold, slots, n);
    }
}

static void hold_more(DedupGroup *g, DedupHold *hold, const uint32_t *slots,
                      unsigned n)
{
    if (g->holders) {
        dedup_hold_more(g->holders, hold, slots, n);
    }
}

static void hold_end(DedupGroup *g, DedupHold *hold)
{
    if (g->holders && hold->stripe) {
        dedup_hold_end(hold);
    }
}

/* --- filling ------------------------------------------------------------- */

/* Look a block up once more.  True if the store has it. */
static bool lookup(DedupRead *r, DedupBlock *b)
{
    DedupGroup *g = r->group;

    b->id = dedup_map_lookup(b->map, b->number);
    hold_more(g, &r->hold, &b->id.slot, 1);
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
    DEDUP_HOT_ARRAY uint32_t drop[DEDUP_BATCH];
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
            /* who evicts may have begun before we held it: then it is theirs */
            if (dedup_index_evict_begin(&g->index, slots[i])) {
                drop[ndrop++] = slots[i];
            }
            if (!lookup(r, b)) {
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
    uint64_t until = stat64_get(&g->full_until);

    return until && g_get_monotonic_time() < until;
}

/* Nothing is idle, as far as is known: have all find out, and wait a while. */
static void out_of_frames(DedupGroup *g)
{
    dedup_trim_all(g);
    stat64_set(&g->full_until, g_get_monotonic_time() + FULL_US);
}

/* The host has no memory. */
static void out_of_memory(DedupGroup *g)
{
    if (!g->holders || !dedup_evict(g, DEDUP_BATCH)) {
        if (g->holders) {
            dedup_trim_all(g);
        }
        stat64_set(&g->full_until, g_get_monotonic_time() + FULL_US);
    }
}

/* Take slots, whose frames are held from the start. */
static unsigned take_slots(DedupRead *r, uint32_t *slots, unsigned n)
{
    DedupGroup *g = r->group;
    unsigned got;

    if (is_full(g)) {
        return 0;
    }
    got = dedup_index_alloc(&g->index, slots, n);
    if (got < n && g->holders) {
        dedup_evict(g, n - got);
        got += dedup_index_alloc(&g->index, slots + got, n - got);
        if (got < n) {
            out_of_frames(g);
        }
    }
    hold_more(g, &r->hold, slots, got);
    return got;
}

/* Read a run of @n missed blocks that follow each other into frames. */
static void coroutine_fn fill_run(DedupRead *r, DedupBlock **blocks,
                                  unsigned n)
{
    DedupGroup *g = r->group;
    DEDUP_HOT_ARRAY uint32_t slots[DEDUP_BATCH];
    DEDUP_HOT_ARRAY uint64_t words[DEDUP_BATCH];
    uint64_t first = blocks[0]->number;
    unsigned got = take_slots(r, slots, n);
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
    r->free(r->opaque, buf);
    trace_dedup_engine_fill(first, got, ret);
    if (ret < 0) {
        if (ret != -ENOTRECOVERABLE) {
            release_slots(g, slots, got);
        }
        if (ret == -ENOMEM) {
            out_of_memory(g);
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

/* --- giving -------------------------------------------------------------- */

/* After the give: what was evicted in between is not in place. */
static unsigned check_given(DedupGroup *g, const DedupGive *gives,
                            DedupBlock **to, unsigned n)
{
    unsigned i, given = 0;
    uint64_t word;

    for (i = 0; i < n; i++) {
        to[i]->result = gives[i].result;
        if (dedup_in_place(gives[i].result) &&
            !dedup_index_get(&g->index, to[i]->id, &word)) {
            to[i]->result = DEDUP_EVICTED;
        }
        given += to[i]->result == DEDUP_GIVEN;
    }
    return given;
}

static void coroutine_fn give(DedupRead *r, DedupBlock *blocks, unsigned n)
{
    DEDUP_HOT_ARRAY DedupGive gives[DEDUP_BATCH];
    DEDUP_HOT_ARRAY DedupBlock *to[DEDUP_BATCH];
    unsigned i, ngive = 0, given;

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
    given = check_given(r->group, gives, to, ngive);
    trace_dedup_engine_give(ngive, given);
}

bool coroutine_fn dedup_engine_hit(DedupRead *r, DedupBlock *blocks,
                                   unsigned n)
{
    DedupGroup *g = r->group;
    DEDUP_HOT_ARRAY uint32_t slots[DEDUP_BATCH];
    unsigned i, hits = 0;

    for (i = 0; i < n; i++) {
        DedupBlock *b = &blocks[i];

        if (b->result == DEDUP_GIVEN) {
            if (!dedup_map_back(b->map, b->number)) {
                return false;
            }
            b->id = dedup_map_lookup(b->map, b->number);
            slots[hits++] = b->id.slot;
        }
    }
    if (!hits) {
        return true;
    }
    hold_begin(g, &r->hold, slots, hits);
    for (i = 0; i < n; i++) {
        if (blocks[i].result == DEDUP_GIVEN &&
            !dedup_index_get(&g->index, blocks[i].id, &blocks[i].word)) {
            hold_end(g, &r->hold);
            return false;
        }
    }
    stat64_add(&r->counters->hits, hits);
    give(r, blocks, n);
    hold_end(g, &r->hold);
    trace_dedup_engine_read(n, 0);
    return true;
}

/*
 * Look all blocks up that are to be given.  Those that the store does not have
 * are put into @missed; returns how many these are.
 */
static unsigned find_missed(DedupRead *r, DedupBlock *blocks, unsigned n,
                            DedupBlock **missed)
{
    DedupGroup *g = r->group;
    DEDUP_HOT_ARRAY uint32_t slots[DEDUP_BATCH];
    DEDUP_HOT_ARRAY DedupBlock *found[DEDUP_BATCH];
    unsigned i, nfound = 0, misses = 0;

    for (i = 0; i < n; i++) {
        DedupBlock *b = &blocks[i];

        if (b->result != DEDUP_GIVEN) {
            continue;
        }
        if (!b->map) {
            b->result = DEDUP_NO_LAYER;
        } else if (!dedup_map_back(b->map, b->number)) {
            b->result = DEDUP_STORE_FULL;
        } else {
            b->id = dedup_map_lookup(b->map, b->number);
            slots[nfound] = b->id.slot;
            found[nfound++] = b;
        }
    }
    if (!nfound) {
        return 0;
    }
    hold_begin(g, &r->hold, slots, nfound);
    for (i = 0; i < nfound; i++) {
        if (!dedup_index_get(&g->index, found[i]->id, &found[i]->word)) {
            missed[misses++] = found[i];
        }
    }
    stat64_add(&r->counters->hits, nfound - misses);
    stat64_add(&r->counters->misses, misses);
    return misses;
}

void coroutine_fn dedup_engine_read(DedupRead *r, DedupBlock *blocks,
                                    unsigned n)
{
    DEDUP_HOT_ARRAY DedupBlock *missed[DEDUP_BATCH];
    unsigned misses;

    assert(n <= DEDUP_BATCH);
    r->hold.stripe = NULL;
    misses = find_missed(r, blocks, n, missed);
    fill_misses(r, missed, misses);
    give(r, blocks, n);
    hold_end(r->group, &r->hold);
    trace_dedup_engine_read(n, misses);
}

static bool all_sealed(DedupGroup *g, const DedupBlock *blocks, unsigned n)
{
    uint64_t word;
    unsigned i;

    for (i = 0; i < n; i++) {
        if (!dedup_index_get(&g->index, blocks[i].id, &word)) {
            return false;
        }
    }
    return true;
}

bool dedup_engine_copy(DedupGroup *g, DedupBlock *blocks, unsigned n,
                       void *buf)
{
    DEDUP_HOT_ARRAY uint32_t slots[DEDUP_BATCH];
    DedupHold hold;
    unsigned i;
    bool ok;

    assert(n && n <= DEDUP_BATCH);
    for (i = 0; i < n; i++) {
        if (!blocks[i].map || !dedup_map_back(blocks[i].map,
                                              blocks[i].number)) {
            return false;
        }
        blocks[i].id = dedup_map_lookup(blocks[i].map, blocks[i].number);
        if (!blocks[i].id.generation) {
            return false;
        }
        slots[i] = blocks[i].id.slot;
    }
    hold_begin(g, &hold, slots, n);
    ok = all_sealed(g, blocks, n) &&
         g->ops->peek(g->store, slots, n, buf) >= 0 &&
         all_sealed(g, blocks, n);
    hold_end(g, &hold);
    return ok;
}
