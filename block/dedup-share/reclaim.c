/*
 * dedup-share: frames that nobody uses
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See reclaim.h.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/host-utils.h"
#include "qemu/lockable.h"
#include "reclaim.h"
#include "trace.h"

/* Slots that are looked at together: a word of the holders' rows. */
#define CHUNK 64

/* A request looks at so many chunks at most: some tens of microseconds. */
#define CHUNKS_A_REQUEST 512
/* The same where the store has to be asked for each. */
#define CHUNKS_A_CALL 16

/* The thread looks so often if somebody wants it to trim ... */
#define PERIOD_MS 1000
/* ... so after this all have, if they are not stopped. */
#define ALL_TRIMMED_US (2 * PERIOD_MS * 1000)

struct DedupReclaim {
    QemuThread thread;
    QemuMutex trimming;         /* held by who trims */
    QemuSemaphore wake;
    bool stop;
    bool all;                   /* evict all that is idle */
    uint32_t trims;             /* of the header's trims_wanted, done */
    int64_t next_trim;          /* us; nobody is asked before */
};

/* --- evicting ----------------------------------------------------------- */

/* The lowest @n bits of @bits that are set. */
static uint64_t lowest(uint64_t bits, unsigned n)
{
    uint64_t low = 0;

    for (; bits && n; n--, bits &= bits - 1) {
        low |= bits & -bits;
    }
    return low;
}

/*
 * Move the clock hand on within 64 slots: up to @want that nobody holds and
 * that were not used lately.  What it passes was not used lately from now on.
 */
static uint64_t move_hand(DedupGroup *g, uint32_t *first, unsigned want)
{
    uint32_t hand = qatomic_read(&g->index.hdr->clock_hand), next;
    uint32_t at = hand % ROUND_UP(g->index.nframes, CHUNK);
    uint64_t ahead = MAKE_64BIT_MASK(at % CHUNK, CHUNK - at % CHUNK);
    uint64_t held = 0, idle, victims;

    *first = ROUND_DOWN(at, CHUNK);
    if (g->holders.counts) {
        held = dedup_holders_word(&g->holders, *first);
    }
    idle = ahead & ~held & ~dedup_index_used(&g->index, *first);
    victims = lowest(idle, want);
    if (victims != idle) {      /* there are more behind these */
        ahead &= MAKE_64BIT_MASK(0, CHUNK - clz64(victims));
    }
    dedup_index_clear_used(&g->index, *first, ahead);
    next = *first + CHUNK - clz64(ahead);
    qatomic_cmpxchg(&g->index.hdr->clock_hand, hand, next);
    return victims;
}

/* Begin to evict up to @want frames that are idle. */
static unsigned begin_chunk(DedupGroup *g, uint32_t *first, uint32_t *slots,
                            unsigned want)
{
    uint64_t victims = move_hand(g, first, want);
    unsigned n = 0;

    for (; victims; victims &= victims - 1) {
        uint32_t slot = *first + ctz64(victims);

        if (slot < g->index.nframes &&
            dedup_index_evict_begin(&g->index, slot)) {
            slots[n++] = slot;
        }
    }
    return n;
}

/* Bit i of the result: slots[i], which begins to be evicted, is in use. */
static uint64_t still_used(DedupGroup *g, uint32_t first, const uint32_t *slots,
                           unsigned n)
{
    uint64_t held, used = 0;
    unsigned i;

    if (!g->holders.counts) {
        return g->ops->in_use(g->store, slots, n);
    }
    smp_mb();                   /* the tags, then the bits */
    held = dedup_holders_word(&g->holders, first);
    for (i = 0; i < n; i++) {
        used |= (held >> (slots[i] - first) & 1) << i;
    }
    return used;
}

/* Let go of those that somebody holds by now; see holders.h. */
static unsigned check_chunk(DedupGroup *g, uint32_t first, uint32_t *slots,
                            unsigned n)
{
    uint64_t used = still_used(g, first, slots, n);
    unsigned i, kept = 0;

    for (i = 0; i < n; i++) {
        if (used >> i & 1) {
            dedup_index_evict_cancel(&g->index, slots[i]);
        } else {
            dedup_index_evict_commit(&g->index, slots[i]);
            slots[kept++] = slots[i];
        }
    }
    return kept;
}

/* What the store does not drop stays DROPPING, as its memory is not known. */
static unsigned evict_chunk(DedupGroup *g, uint32_t *slots, unsigned want)
{
    uint32_t first;
    unsigned n = begin_chunk(g, &first, slots, want);

    if (n) {
        n = check_chunk(g, first, slots, n);
    }
    if (n) {
        n = g->ops->evict(g->store, slots, n);
        stat64_add(&g->evicted, n);
    }
    return n;
}

/* A part of the slots, from the clock hand on, until there are @want. */
static unsigned evict(DedupGroup *g, uint32_t *slots, unsigned want,
                      uint32_t chunks)
{
    unsigned got = 0;

    while (chunks-- && got < want && !qatomic_read(&g->reclaim->stop) &&
           !dedup_index_is_damaged(&g->index)) {
        got += evict_chunk(g, slots + got, MIN(want - got, CHUNK));
    }
    return got;
}

unsigned dedup_evict(DedupGroup *g, uint32_t *slots, unsigned want)
{
    unsigned i, kept = 0;
    unsigned got = evict(g, slots, want, g->holders.counts ? CHUNKS_A_REQUEST
                                                           : CHUNKS_A_CALL);

    for (i = 0; i < got; i++) {
        if (dedup_index_reuse(&g->index, slots[i])) {
            slots[kept++] = slots[i];
        }
    }
    trace_dedup_reclaim_evict(want, kept);
    return kept;
}

void dedup_evict_all(DedupGroup *g)
{
    uint32_t chunks = 2 * DIV_ROUND_UP(g->index.nframes, CHUNK) + 1;
    uint32_t slots[CHUNK];
    unsigned n;

    for (; chunks; chunks--) {  /* the first time round they may be used */
        for (n = evict(g, slots, CHUNK, 1); n--; ) {
            dedup_index_release(&g->index, slots[n]);
        }
    }
}

/* --- the dead ----------------------------------------------------------- */

static bool slot_idle(void *opaque, uint32_t slot)
{
    DedupGroup *g = opaque;
    uint32_t first = ROUND_DOWN(slot, CHUNK);

    return !still_used(g, first, &slot, 1);
}

static bool slot_drop(void *opaque, uint32_t slot)
{
    DedupGroup *g = opaque;

    return g->ops->recover ? g->ops->recover(g->store, slot)
                           : g->ops->evict(g->store, &slot, 1) == 1;
}

void dedup_bury(void *opaque, unsigned row)
{
    DedupGroup *g = opaque;

    if (!g->index.member) {
        g->index.member = row + 1;      /* we are about to get that row */
    }
    dedup_index_recover(&g->index, row + 1, slot_idle, slot_drop, g);
}

/* --- trimming ----------------------------------------------------------- */

static void mark(void *opaque, uint32_t slot)
{
    dedup_trim_mark(opaque, slot);
}

void dedup_trim_now(DedupGroup *g)
{
    int64_t start = g_get_monotonic_time();

    dedup_holders_bury(&g->holders);
    if (!g->holders.counts) {
        return;
    }
    QEMU_LOCK_GUARD(&g->reclaim->trimming);
    dedup_trim_begin(&g->holders);
    while (!dedup_trim_alone(&g->holders)) {
        g_usleep(1000);         /* for our own requests, and none of others */
    }
    g->ops->each_used(g->store, mark, &g->holders);
    dedup_trim_end(&g->holders);
    trace_dedup_reclaim_trim(g->name, g_get_monotonic_time() - start);
}

void dedup_trim_all(DedupGroup *g)
{
    DedupReclaim *r = g->reclaim;
    int64_t now = g_get_monotonic_time();

    if (now >= qatomic_read(&r->next_trim)) {
        qatomic_set(&r->next_trim, now + PERIOD_MS * 1000);
        qatomic_inc(&g->index.hdr->trims_wanted);
        qemu_sem_post(&r->wake);
    }
}

void dedup_reclaim_all(DedupGroup *g)
{
    qatomic_inc(&g->index.hdr->trims_wanted);
    qatomic_set(&g->reclaim->all, true);
    qemu_sem_post(&g->reclaim->wake);
}

/* --- the thread --------------------------------------------------------- */

static void *reclaim_thread(void *opaque)
{
    DedupGroup *g = opaque;
    DedupReclaim *r = g->reclaim;
    int64_t all_at = INT64_MAX;

    while (!qatomic_read(&r->stop)) {
        uint32_t wanted = qatomic_read(&g->index.hdr->trims_wanted);

        if (dedup_index_is_damaged(&g->index)) {
            qemu_bh_schedule(g->damaged_bh);
        } else if (wanted != r->trims) {
            r->trims = wanted;
            dedup_trim_now(g);
        }
        if (qatomic_xchg(&r->all, false)) {
            all_at = g_get_monotonic_time() + ALL_TRIMMED_US;
        }
        if (g_get_monotonic_time() >= all_at) {
            all_at = INT64_MAX;
            dedup_evict_all(g);
        }
        qemu_sem_timedwait(&r->wake, PERIOD_MS);
    }
    return NULL;
}

void dedup_reclaim_start(DedupGroup *g)
{
    DedupReclaim *r = g_new0(DedupReclaim, 1);

    g->reclaim = r;
    r->trims = qatomic_read(&g->index.hdr->trims_wanted);
    qemu_mutex_init(&r->trimming);
    qemu_sem_init(&r->wake, 0);
    qemu_thread_create(&r->thread, "dedup-reclaim", reclaim_thread, g,
                       QEMU_THREAD_JOINABLE);
}

void dedup_reclaim_stop(DedupGroup *g)
{
    qatomic_set(&g->reclaim->stop, true);
    qemu_sem_post(&g->reclaim->wake);
    qemu_thread_join(&g->reclaim->thread);
    qemu_sem_destroy(&g->reclaim->wake);
    qemu_mutex_destroy(&g->reclaim->trimming);
    g_free(g->reclaim);
    g->reclaim = NULL;
}
