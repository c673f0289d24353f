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
#include "reclaim.h"
#include "trace.h"

/* Slots that are looked at together: a word of the holders' rows. */
#define CHUNK 64

/* A request looks at so many chunks at most: some tens of microseconds. */
#define CHUNKS_A_REQUEST 512

/* The thread looks so often if somebody wants it to trim ... */
#define PERIOD_MS 1000
/* ... so after this all have, if they are not stopped. */
#define ALL_TRIMMED_US (2 * PERIOD_MS * 1000)

struct DedupReclaim {
    QemuThread thread;
    QemuSemaphore wake;
    bool stop;
    bool all;                   /* evict all that is idle */
    uint32_t trims;             /* of the header's trims_wanted, done */
    int64_t next_trim;          /* us; nobody is asked before */
};

/* --- evicting ------------------------------------------------------------ */

/* Begin to evict those of 64 frames that nobody holds. */
static unsigned begin_chunk(DedupGroup *g, uint32_t first, uint32_t *slots)
{
    uint64_t idle = ~dedup_holders_word(g->holders, first);
    unsigned n = 0;

    for (; idle; idle &= idle - 1) {
        uint32_t slot = first + ctz64(idle);

        if (slot < g->index.nframes &&
            dedup_index_evict_begin(&g->index, slot)) {
            slots[n++] = slot;
        }
    }
    return n;
}

/* Let go of those that somebody holds by now; see holders.h. */
static unsigned check_chunk(DedupGroup *g, uint32_t first, uint32_t *slots,
                            unsigned n)
{
    uint64_t held = dedup_holders_word(g->holders, first);
    unsigned i, kept = 0;

    for (i = 0; i < n; i++) {
        if (held >> (slots[i] - first) & 1) {
            dedup_index_evict_cancel(&g->index, slots[i]);
        } else {
            slots[kept++] = slots[i];
        }
    }
    return kept;
}

static unsigned evict_chunk(DedupGroup *g, uint32_t first)
{
    uint32_t slots[CHUNK];
    unsigned i, n = begin_chunk(g, first, slots);

    if (n) {
        smp_mb();               /* the tags, then the bits */
        n = check_chunk(g, first, slots, n);
    }
    if (n) {
        n = g->ops->evict(g->store, slots, n);
    }
    for (i = n; i--; ) {        /* so that they are taken in ascending order */
        dedup_index_release(&g->index, slots[i]);
    }
    stat64_add(&g->evicted, n);
    return n;
}

static unsigned evict(DedupGroup *g, unsigned want, uint32_t chunks)
{
    uint32_t used = qatomic_read(&g->index.hdr->next_slot);
    uint32_t nchunks = DIV_ROUND_UP(MIN(used, g->index.nframes), CHUNK);
    unsigned evicted = 0;

    for (chunks = MIN(chunks, nchunks);
         chunks && evicted < want && !qatomic_read(&g->reclaim->stop);
         chunks--) {
        uint32_t at = qatomic_fetch_inc(&g->index.hdr->clock_hand);

        evicted += evict_chunk(g, at % nchunks * CHUNK);
    }
    trace_dedup_reclaim_evict(want, evicted);
    return evicted;
}

unsigned dedup_evict(DedupGroup *g, unsigned want)
{
    return evict(g, want, CHUNKS_A_REQUEST);
}

/* --- trimming ------------------------------------------------------------ */

static void mark(void *opaque, uint32_t slot)
{
    dedup_trim_mark(opaque, slot);
}

void dedup_trim_now(DedupGroup *g)
{
    int64_t start = g_get_monotonic_time();

    dedup_holders_bury(g->holders);
    dedup_trim_begin(g->holders);
    while (!dedup_trim_alone(g->holders)) {
        g_usleep(1000);         /* for our own requests, and none of others */
    }
    g->ops->each_used(g->store, mark, g->holders);
    dedup_trim_end(g->holders);
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

/* --- the thread ---------------------------------------------------------- */

static void *reclaim_thread(void *opaque)
{
    DedupGroup *g = opaque;
    DedupReclaim *r = g->reclaim;
    int64_t all_at = INT64_MAX;

    while (!qatomic_read(&r->stop)) {
        uint32_t wanted = qatomic_read(&g->index.hdr->trims_wanted);

        if (wanted != r->trims) {
            r->trims = wanted;
            dedup_trim_now(g);
        }
        if (qatomic_xchg(&r->all, false)) {
            all_at = g_get_monotonic_time() + ALL_TRIMMED_US;
        }
        if (g_get_monotonic_time() >= all_at) {
            all_at = INT64_MAX;
            evict(g, UINT32_MAX, UINT32_MAX);
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
    g_free(g->reclaim);
    g->reclaim = NULL;
}
