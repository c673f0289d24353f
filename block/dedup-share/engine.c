/*
 * dedup-share engine: what to do with the blocks of a read
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See engine.h for what must hold.
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "engine.h"
#include "parallel.h"
#include "reclaim.h"
#include "trace.h"

/* --- looking up --------------------------------------------------------- */

/* Look a block up once more.  True if the store has it. */
static bool lookup(DedupRead *r, DedupBlock *b)
{
    DedupGroup *g = r->group;

    b->id = dedup_map_lookup(b->map, b->in_map);
    dedup_hold_more(&g->holders, &r->hold, &b->id.slot, 1);
    return dedup_index_get(&g->index, b->id, &b->word);
}

/* The block is zeroes, which are not shared: put them there if that can be. */
static void place_zeroes(DedupRead *r, DedupBlock *b)
{
    b->result = DEDUP_ZEROES;
    if (r->group->ops->by_host) {
        memset(b->dest.host, 0, DEDUP_BLOCK_SIZE);
        b->placed = true;
    }
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

/* --- a full store ------------------------------------------------------- */

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
    uint32_t slots[DEDUP_BATCH];
    unsigned n = dedup_evict(g, slots, DEDUP_BATCH);

    release_slots(g, slots, n);
    if (!n) {
        out_of_frames(g);
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
    if (got < n) {
        got += dedup_evict(g, slots + got, n - got);
        if (got < n) {
            out_of_frames(g);
        }
    }
    dedup_hold_more(&g->holders, &r->hold, slots, got);
    return got;
}

/* --- filling ------------------------------------------------------------ */

/* A missed block whose content has been read. */
typedef struct Missed {
    DedupBlock *b;
    const uint8_t *data;
    enum { ZEROES, FOUND, NEW, TWIN, LEFT, DROP } kind;
    DedupDigest digest;
    DedupFrameId id;            /* FOUND, NEW */
    uint64_t word;
    unsigned twin;              /* TWIN: of which one before it */
} Missed;

/* Is there an equal new one before it? */
static bool find_twin(Missed *m, unsigned i)
{
    unsigned j;

    for (j = 0; j < i; j++) {
        if (m[j].kind == NEW && m[j].digest.high == m[i].digest.high &&
            !memcmp(m[j].data, m[i].data, DEDUP_BLOCK_SIZE)) {
            m[i].kind = TWIN;
            m[i].twin = j;
            return true;
        }
    }
    return false;
}

/* What to do with a block, as far as that can be told without its frame. */
static void sort_out(DedupRead *r, Missed *m, unsigned i)
{
    DedupGroup *g = r->group;

    if (buffer_is_zero(m[i].data, DEDUP_BLOCK_SIZE)) {
        m[i].kind = ZEROES;
        return;
    }
    m[i].digest = dedup_digest(&g->index, m[i].data);
    if (dedup_hash_find(&g->index, &m[i].digest, &m[i].id)) {
        m[i].kind = FOUND;
    } else if (!find_twin(m, i)) {
        m[i].kind = NEW;
    }
}

/* New content: does it enter the store? */
static void admit(DedupRead *r, Missed *m)
{
    if (r->admission == DEDUP_SHARE_ADMISSION_SECOND_READ &&
        !dedup_seen(&r->group->seen, &m->digest)) {
        m->kind = LEFT;
        m->b->result = DEDUP_SEEN_ONCE;
    } else {
        m->kind = NEW;
    }
}

/* Are the frames found what was read?  Those that are not are new. */
static void confirm(DedupRead *r, Missed *m, unsigned n)
{
    DedupGroup *g = r->group;
    DEDUP_HOT_ARRAY uint32_t slots[DEDUP_BATCH];
    DEDUP_HOT_ARRAY Missed *found[DEDUP_BATCH];
    unsigned i, nfound = 0, matched = 0;
    uint8_t *buf;
    bool ok;

    for (i = 0; i < n; i++) {
        if (m[i].kind == FOUND) {
            slots[nfound] = m[i].id.slot;
            found[nfound++] = &m[i];
        }
    }
    if (!nfound) {
        return;
    }
    dedup_hold_more(&g->holders, &r->hold, slots, nfound);
    buf = r->alloc(r->opaque, (size_t)nfound * DEDUP_BLOCK_SIZE);
    ok = buf && g->ops->peek(g->store, slots, nfound, buf) >= 0;
    for (i = 0; i < nfound; i++) {
        if (ok && dedup_index_get(&g->index, found[i]->id, &found[i]->word) &&
            !memcmp(buf + (size_t)i * DEDUP_BLOCK_SIZE, found[i]->data,
                    DEDUP_BLOCK_SIZE)) {
            matched++;
        } else {
            found[i]->kind = NEW;
        }
    }
    r->free(r->opaque, buf);
    stat64_add(&r->counters->matched, matched);
}

/* Fill slots with new blocks that follow each other in the buffer. */
static void fill_new(DedupRead *r, Missed *m, unsigned n, const uint32_t *slots)
{
    DedupGroup *g = r->group;
    DEDUP_HOT_ARRAY uint64_t words[DEDUP_BATCH];
    unsigned i;
    int ret = g->ops->fill(g->store, slots, n, m->data, words);

    trace_dedup_engine_fill(m->b->number, n, ret);
    if (ret < 0 && ret != -ENOTRECOVERABLE) {
        release_slots(g, slots, n);
    }
    if (ret == -ENOMEM) {
        out_of_memory(g);
    }
    for (i = 0; i < n; i++) {
        if (ret < 0) {
            m[i].kind = LEFT;
            m[i].b->result = ret == -ENOMEM ? DEDUP_STORE_FULL : DEDUP_FAILED;
        } else {
            m[i].word = words[i];
            m[i].id.slot = slots[i];
        }
    }
}

static unsigned count_new(const Missed *m, unsigned n)
{
    unsigned i, count = 0;

    for (i = 0; i < n; i++) {
        count += m[i].kind == NEW;
    }
    return count;
}

/* Take slots for the new blocks and fill them. */
static void fill_all_new(DedupRead *r, Missed *m, unsigned n)
{
    DEDUP_HOT_ARRAY uint32_t slots[DEDUP_BATCH];
    unsigned want = count_new(m, n), i, run, used = 0;
    unsigned got = want ? take_slots(r, slots, want) : 0;

    for (i = 0; i < n; i += run) {
        run = 0;
        while (i + run < n && m[i + run].kind == NEW && used + run < got) {
            run++;
        }
        if (run) {
            fill_new(r, m + i, run, slots + used);
            used += run;
        } else {
            run = 1;
            if (m[i].kind == NEW) {
                m[i].kind = LEFT;
                m[i].b->result = DEDUP_STORE_FULL;
            }
        }
    }
}

/*
 * Record that a block is in @id; a new frame is sealed when its block is
 * recorded.  If another process was faster, what that recorded is taken.
 * Writes are locked out, and none overlapped.
 */
static void record(DedupRead *r, Missed *m, DedupFrameId id)
{
    DedupBlock *b = m->b;

    if (dedup_map_record(b->map, b->in_map, b->id, id)) {
        if (m->kind == NEW) {
            dedup_index_seal(&r->group->index, id.slot, m->word, &m->digest);
        }
        b->id = id;
        b->word = m->word;
        if (m->kind == ZEROES) {
            b->result = DEDUP_ZEROES;   /* put there when writes may go on */
        }
        return;
    }
    if (m->kind == NEW) {
        m->kind = DROP;
    }
    if (!lookup(r, b)) {
        b->result = DEDUP_EVICTED;
    }
}

/* The frame that a block is in by now; generation 0: in none. */
static DedupFrameId frame_of(DedupRead *r, Missed *m, unsigned i)
{
    const Missed *twin = &m[m[i].twin];

    switch (m[i].kind) {
    case ZEROES:
        return DEDUP_ZERO;
    case NEW:
        m[i].id = dedup_index_name(&r->group->index, m[i].id.slot);
        return m[i].id;
    case FOUND:
        return m[i].id;
    case TWIN:
        if (twin->kind == NEW) {
            m[i].word = twin->word;
            return twin->id;
        }
        m[i].b->result = twin->b->result ?: DEDUP_EVICTED;
        /* fall through */
    default:
        return (DedupFrameId) { 0 };
    }
}

/* Drop frames of a kind, which were filled and never sealed. */
static void drop(DedupGroup *g, const Missed *m, unsigned n, int kind)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        if (m[i].kind == kind && g->ops->evict(g->store, &m[i].id.slot, 1)) {
            dedup_index_release(&g->index, m[i].id.slot);
        }
    }
}

/* Record all that is in a frame, unless a write overlapped. */
static void record_all(DedupRead *r, Missed *m, unsigned n)
{
    bool clean = dedup_fill_lock(r->tracker, r->fill);
    unsigned i;

    for (i = 0; i < n; i++) {
        DedupFrameId id = { 0 };

        if (clean) {
            id = frame_of(r, m, i);
        } else {
            m[i].b->result = DEDUP_OVERWRITTEN;
        }
        if (id.generation) {
            record(r, &m[i], id);
        }
    }
    dedup_fill_unlock(r->tracker);
    drop(r->group, m, n, clean ? DROP : NEW);
}

/* What is in no frame is put where it is wanted, if that can be. */
static void place_rest(DedupRead *r, Missed *m, unsigned n)
{
    unsigned i;

    for (i = 0; r->group->ops->by_host && i < n; i++) {
        DedupBlock *b = m[i].b;

        if (b->result != DEDUP_GIVEN && !b->placed) {
            memcpy(b->dest.host, m[i].data, DEDUP_BLOCK_SIZE);
            b->placed = true;
        }
    }
}

/* The @n blocks of a run have been read to @buf. */
static void keep_run(DedupRead *r, DedupBlock **blocks, unsigned n,
                     const uint8_t *buf)
{
    DEDUP_HOT_ARRAY Missed m[DEDUP_BATCH];
    unsigned i;

    for (i = 0; i < n; i++) {
        m[i].b = blocks[i];
        m[i].data = buf + (size_t)i * DEDUP_BLOCK_SIZE;
        m[i].word = 0;
        m[i].twin = 0;
        sort_out(r, m, i);
    }
    confirm(r, m, n);
    for (i = 0; i < n; i++) {
        if (m[i].kind == NEW) {
            admit(r, &m[i]);
        }
    }
    fill_all_new(r, m, n);
    record_all(r, m, n);
    place_rest(r, m, n);
}

/* Read a run of @n missed blocks that follow each other, and keep them. */
static void coroutine_fn fill_run(DedupRead *r, DedupBlock **blocks,
                                  unsigned n)
{
    uint64_t first = blocks[0]->number;
    void *buf;
    int ret;

    if (!r->group->ops->by_host && is_full(r->group)) {
        /* what was read for nothing would be read again */
        set_results(blocks, n, DEDUP_STORE_FULL);
        return;
    }
    buf = r->alloc(r->opaque, (size_t)n * DEDUP_BLOCK_SIZE);
    ret = buf ? r->read(r->opaque, first, n, buf) : -ENOMEM;
    if (ret < 0) {
        set_results(blocks, n, DEDUP_FAILED);
    } else {
        stat64_add(&r->counters->bytes_filled, (uint64_t)n * DEDUP_BLOCK_SIZE);
        keep_run(r, blocks, n, buf);
    }
    r->free(r->opaque, buf);
}

/* The missed blocks of a request, in runs. */
typedef struct Misses {
    DedupRead *r;
    DedupBlock **blocks;
    uint8_t starts[DEDUP_BATCH + 1];    /* of each run; behind them the end */
} Misses;

static int coroutine_fn fill_one_run(void *opaque, unsigned i)
{
    Misses *m = opaque;

    fill_run(m->r, m->blocks + m->starts[i], m->starts[i + 1] - m->starts[i]);
    return 0;                   /* what failed is in the blocks' results */
}

/*
 * What a run does between its read and its end it does without a wait, so that
 * one run's new frames are found by the next one.
 */
static void coroutine_fn fill_misses(DedupRead *r, DedupBlock **missed,
                                     unsigned n)
{
    DEDUP_HOT_ARRAY Misses m;
    unsigned i, nruns = 0;

    QEMU_BUILD_BUG_ON(DEDUP_BATCH > UINT8_MAX);
    m.r = r;
    m.blocks = missed;
    for (i = 0; i < n; i++) {
        if (i == 0 || missed[i]->number != missed[i - 1]->number + 1) {
            m.starts[nruns++] = i;
        }
    }
    m.starts[nruns] = n;
    dedup_co_all(nruns, fill_one_run, &m);
}

/* --- giving ------------------------------------------------------------- */

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

/* --- reading ------------------------------------------------------------ */

/* The blocks that are to be given, or copied, and what they hold. */
typedef struct Wanted {
    DedupBlock *blocks[DEDUP_BATCH];
    uint32_t slots[DEDUP_BATCH];
    unsigned n;
    unsigned hits;              /* that a frame holds */
} Wanted;

/* Look up a block; false if there is no memory to record it in. */
static bool wanted_add(Wanted *w, DedupBlock *b)
{
    if (!dedup_map_back(b->map, b->in_map)) {
        return false;
    }
    b->id = dedup_map_lookup(b->map, b->in_map);
    w->blocks[w->n] = b;
    w->slots[w->n++] = b->id.slot;
    return true;
}

/*
 * Which of the blocks does the store not have?  They are moved to the front;
 * returns how many these are.  All are held then.
 */
static unsigned wanted_missed(DedupRead *r, Wanted *w)
{
    DedupGroup *g = r->group;
    unsigned i, misses = 0;

    w->hits = 0;
    dedup_hold_begin(&g->holders, &r->hold, w->slots, w->n);
    for (i = 0; i < w->n; i++) {
        DedupBlock *b = w->blocks[i];

        if (dedup_id_is_zero(b->id)) {
            place_zeroes(r, b);
        } else if (dedup_index_get(&g->index, b->id, &b->word)) {
            dedup_index_touch(&g->index, b->id.slot);
            w->hits++;
        } else {
            w->blocks[misses++] = b;
        }
    }
    return misses;
}

bool coroutine_fn dedup_engine_hit(DedupRead *r, DedupBlock *blocks,
                                   unsigned n)
{
    DedupGroup *g = r->group;
    DEDUP_HOT_ARRAY Wanted w;
    unsigned i;

    w.n = 0;
    r->hold.stripe = NULL;
    if (dedup_index_is_damaged(&g->index)) {
        return false;
    }
    for (i = 0; i < n; i++) {
        if (blocks[i].result == DEDUP_GIVEN && !wanted_add(&w, &blocks[i])) {
            return false;
        }
    }
    w.hits = 0;
    if (w.n && wanted_missed(r, &w)) {
        for (i = 0; i < n; i++) {       /* they are looked at once more */
            if (blocks[i].result == DEDUP_ZEROES) {
                blocks[i].result = DEDUP_GIVEN;
                blocks[i].placed = false;
            }
        }
        dedup_hold_end(&r->hold);
        return false;
    }
    stat64_add(&r->counters->hits, w.hits);
    give(r, blocks, n);
    dedup_hold_end(&r->hold);
    trace_dedup_engine_read(n, 0);
    return true;
}

/* Choose the blocks of a request that are to be given. */
static void choose(DedupRead *r, DedupBlock *blocks, unsigned n, Wanted *w)
{
    bool damaged = dedup_index_is_damaged(&r->group->index);
    unsigned i;

    w->n = 0;
    for (i = 0; i < n; i++) {
        DedupBlock *b = &blocks[i];

        if (b->result != DEDUP_GIVEN) {
            continue;
        }
        if (!b->map) {
            b->result = DEDUP_NO_LAYER;
        } else if (damaged) {
            b->result = DEDUP_FAILED;
        } else if (!wanted_add(w, b)) {
            b->result = DEDUP_STORE_FULL;
        }
    }
}

void coroutine_fn dedup_engine_read(DedupRead *r, DedupBlock *blocks,
                                    unsigned n)
{
    DEDUP_HOT_ARRAY Wanted w;
    unsigned misses = 0;

    assert(n <= DEDUP_BATCH);
    r->hold.stripe = NULL;
    choose(r, blocks, n, &w);
    if (w.n) {
        misses = wanted_missed(r, &w);
        stat64_add(&r->counters->hits, w.hits);
        stat64_add(&r->counters->misses, misses);
        fill_misses(r, w.blocks, misses);
        give(r, blocks, n);
    }
    dedup_hold_end(&r->hold);
    trace_dedup_engine_read(n, misses);
}

static bool all_there(DedupGroup *g, const Wanted *w)
{
    uint64_t word;
    unsigned i;

    for (i = 0; i < w->n; i++) {
        DedupFrameId id = w->blocks[i]->id;

        if (!dedup_id_is_zero(id) && !dedup_index_get(&g->index, id, &word)) {
            return false;
        }
    }
    return true;
}

/* Copy all blocks to @buf; those that are zeroes have no frame. */
static bool peek_all(DedupGroup *g, const Wanted *w, uint8_t *buf)
{
    unsigned i, run;

    for (i = 0; i < w->n; i += run) {
        uint8_t *at = buf + (size_t)i * DEDUP_BLOCK_SIZE;

        if (dedup_id_is_zero(w->blocks[i]->id)) {
            memset(at, 0, DEDUP_BLOCK_SIZE);
            run = 1;
            continue;
        }
        dedup_index_touch(&g->index, w->slots[i]);
        run = 1;
        while (i + run < w->n && !dedup_id_is_zero(w->blocks[i + run]->id)) {
            dedup_index_touch(&g->index, w->slots[i + run]);
            run++;
        }
        if (g->ops->peek(g->store, w->slots + i, run, at) < 0) {
            return false;
        }
    }
    return true;
}

bool dedup_engine_copy(DedupGroup *g, DedupBlock *blocks, unsigned n,
                       void *buf)
{
    DEDUP_HOT_ARRAY Wanted w;
    DedupHold hold;
    unsigned i;
    bool ok;

    assert(n && n <= DEDUP_BATCH);
    w.n = 0;
    for (i = 0; i < n; i++) {
        if (!blocks[i].map || !wanted_add(&w, &blocks[i]) ||
            !blocks[i].id.generation) {
            return false;
        }
    }
    dedup_hold_begin(&g->holders, &hold, w.slots, n);
    ok = !dedup_index_is_damaged(&g->index) && all_there(g, &w) &&
         peek_all(g, &w, buf) && all_there(g, &w);
    dedup_hold_end(&hold);
    return ok;
}
