/*
 * qemu-dedup-store: which content is in which frame, and who holds it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/random.h>
#include <xxhash.h>
#include "qapi/error.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "checks.h"
#include "store.h"
#include "trace.h"

/* Idle frames that are tried for a block, before the store is full. */
#define RETIRE_TRIES 4

/* Idle frames are dropped for so long when a daemon ends. */
#define DROP_AT_END_US (10 * G_USEC_PER_SEC)

/* Of a group's digests that were seen once, and then forgotten at once. */
#define MAX_SEEN (1 << 20)

struct Frame {
    XXH128_hash_t digest;
    uint32_t generation;
    uint32_t holders;           /* processes */
    uint32_t pins;              /* requests that use it */
    enum { FREE, FILLING, SEALED } state;
    bool hashed;                /* it is in store->digests */
    QTAILQ_ENTRY(Frame) next;   /* idle */
};

uint32_t frame_slot(const Store *s, const Frame *f)
{
    return f - s->table;
}

uint32_t frame_generation(const Frame *f)
{
    return f->generation;
}

static void fill_random(void *buf, size_t size)
{
    /* so few bytes come whole, or the kernel has none at all */
    if (getrandom(buf, size, 0) != size) {
        abort();
    }
}

static guint digest_hash(gconstpointer key)
{
    return ((const Frame *)key)->digest.low64;
}

static gboolean digest_equal(gconstpointer a, gconstpointer b)
{
    const Frame *x = a, *y = b;

    return x->digest.low64 == y->digest.low64 &&
           x->digest.high64 == y->digest.high64;
}

Store *store_new(const FramesOps *ops, const char *group, const char *place,
                 uint64_t size, Error **errp)
{
    Store *s = g_new0(Store, 1);
    uint64_t nslots = size / (BLOCK + STORE_OVERHEAD);

    if (!nslots || nslots >= UINT32_MAX) {
        error_setg(errp, "size: a store holds 1 to 2^32 - 1 frames of 4 KiB; "
                   "%" PRIu64 " bytes are too %s", size,
                   nslots ? "many" : "few");
        g_free(s);
        return NULL;
    }
    if (!frames_open(&s->frames, ops, group, place, nslots, errp)) {
        g_free(s);
        return NULL;
    }
    s->size = size;
    fill_random(&s->seed, sizeof(s->seed));
    fill_random(s->uuid, sizeof(s->uuid));
    qemu_mutex_init(&s->lock);
    s->table = g_new0(Frame, nslots);
    s->free = bitmap_new(nslots);
    bitmap_set(s->free, 0, nslots);
    s->nfree = nslots;
    s->digests = g_hash_table_new(digest_hash, digest_equal);
    s->seen = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free, NULL);
    QTAILQ_INIT(&s->idle);
    QTAILQ_INIT(&s->processes);
    return s;
}

/* What outlives the daemon would wait for the next one. */
static void drop_idle(Store *s)
{
    int64_t end = g_get_monotonic_time() + DROP_AT_END_US;
    unsigned left, some;

    store_punch_holes(s);
    for (left = s->nidle; left && g_get_monotonic_time() < end; left -= some) {
        some = MIN(left, STORE_RECLAIM_MOST);
        store_reclaim(s, some);
    }
}

void store_free(Store *s)
{
    if (s->frames.ops->retire) {
        drop_idle(s);
    }
    frames_close(&s->frames);
    g_hash_table_destroy(s->digests);
    g_hash_table_destroy(s->seen);
    g_free(s->table);
    g_free(s->free);
    qemu_mutex_destroy(&s->lock);
    g_free(s);
}

/* --- frames, with the lock held ------------------------------------------ */

static bool is_idle(const Frame *f)
{
    /* a slot whose generations are used up stays as it is */
    return f->state == SEALED && !f->holders && !f->pins &&
           f->generation < UINT32_MAX;
}

static void frame_used(Store *s, Frame *f)
{
    if (is_idle(f)) {
        QTAILQ_REMOVE(&s->idle, f, next);
        s->nidle--;
    }
}

static void frame_unused(Store *s, Frame *f)
{
    if (is_idle(f)) {
        QTAILQ_INSERT_TAIL(&s->idle, f, next);
        s->nidle++;
    }
}

static void pin(Store *s, Frame *f)
{
    frame_used(s, f);
    f->pins++;
}

void store_unpin(Store *s, Frame *f)
{
    f->pins--;
    frame_unused(s, f);
}

Frame *store_pin(Store *s, uint32_t slot, uint32_t generation)
{
    Frame *f = &s->table[slot];

    if (f->state != SEALED || f->generation != generation) {
        return NULL;
    }
    pin(s, f);
    return f;
}

/* NULL: none is free, or as many as earlier daemons' frames take the room of */
static Frame *take_free(Store *s)
{
    uint32_t slot = find_next_bit(s->free, s->frames.nslots, s->hint);

    if (slot == s->frames.nslots ||
        s->nfree <= frames_old_memory(&s->frames) / BLOCK) {
        return NULL;
    }
    clear_bit(slot, s->free);
    s->hint = slot + 1;
    s->nfree--;
    s->table[slot].state = FILLING;
    /* not 0, which names nothing; and see is_idle() */
    s->table[slot].generation = MAX(s->table[slot].generation, 1);
    s->table[slot].pins = 1;
    return &s->table[slot];
}

/* It holds nothing any more. */
static void put_free(Store *s, Frame *f)
{
    uint32_t slot = frame_slot(s, f);

    f->pins = 0;
    f->state = FREE;
    set_bit(slot, s->free);
    s->hint = MIN(s->hint, slot);
    s->nfree++;
}

static void seal(Store *s, Frame *f)
{
    f->state = SEALED;
    s->nsealed++;
    /* two that were made at once: the second one is not found */
    f->hashed = !g_hash_table_contains(s->digests, f);
    if (f->hashed) {
        g_hash_table_add(s->digests, f);
    }
}

/*
 * Take the oldest idle frame out of all tables, to be retired: then it is
 * evicted(), or untaken().
 */
static Frame *take_idle(Store *s)
{
    Frame *f = QTAILQ_FIRST(&s->idle);

    if (f) {
        frame_used(s, f);
        if (f->hashed) {
            g_hash_table_remove(s->digests, f);
        }
        f->state = FILLING;
        f->pins = 1;
        s->nsealed--;
    }
    return f;
}

/* Nobody uses it: its slot is free for other content. */
static void evicted(Store *s, Frame *f)
{
    f->generation += DO("generation");
    s->evicted++;
}

/* Somebody uses it, whom no client stands for: it is the youngest again. */
static void untaken(Store *s, Frame *f)
{
    seal(s, f);
    store_unpin(s, f);
}

/* Take at most @n idle frames, the oldest first; and how many. */
static unsigned take_idles(Store *s, uint32_t *slots, unsigned n)
{
    unsigned i;

    QEMU_LOCK_GUARD(&s->lock);
    for (i = 0; i < n; i++) {
        Frame *f = take_idle(s);

        if (!f) {
            break;
        }
        slots[i] = frame_slot(s, f);
    }
    return i;
}

/* Of @n slots that were taken, those that nobody uses stay; and how many. */
static unsigned retire(Store *s, uint32_t *slots, unsigned n)
{
    bool idle[STORE_RECLAIM_MOST];
    unsigned i, kept = 0;

    frames_retire(&s->frames, slots, n, idle);
    QEMU_LOCK_GUARD(&s->lock);
    for (i = 0; i < n; i++) {
        Frame *f = &s->table[slots[i]];

        if (idle[i]) {
            evicted(s, f);
            slots[kept++] = slots[i];
        } else {
            untaken(s, f);
        }
    }
    return kept;
}

unsigned store_reclaim(Store *s, unsigned n)
{
    uint32_t slots[STORE_RECLAIM_MOST];
    unsigned i, run, taken, done;

    taken = take_idles(s, slots, MIN(n, STORE_RECLAIM_MOST));
    done = retire(s, slots, taken);
    for (i = 0; i < done; i += run) {
        run = 1;
        while (i + run < done && slots[i + run] == slots[i] + run) {
            run++;
        }
        frames_drop(&s->frames, slots[i], run);
    }
    QEMU_LOCK_GUARD(&s->lock);
    for (i = 0; i < done; i++) {
        put_free(s, &s->table[slots[i]]);
    }
    trace_dedup_store_reclaim(n, done);
    return done;
}

unsigned store_excess(Store *s)
{
    uint64_t old = frames_old_memory(&s->frames) / BLOCK;

    QEMU_LOCK_GUARD(&s->lock);
    return old > s->nfree ? MIN(old - s->nfree, UINT_MAX) : 0;
}

/* --- processes, with the lock held --------------------------------------- */

Process *process_new(Store *s, pid_t pid, uid_t uid)
{
    Process *p = g_new0(Process, 1);

    p->refs = 1;
    p->pid = pid;
    p->uid = uid;
    p->held = g_hash_table_new(NULL, NULL);
    fill_random(p->token, sizeof(p->token));
    QTAILQ_INSERT_TAIL(&s->processes, p, next);
    return p;
}

Process *process_find(Store *s, const uint8_t *token)
{
    Process *p;

    QTAILQ_FOREACH(p, &s->processes, next) {
        if (!memcmp(p->token, token, sizeof(p->token))) {
            break;
        }
    }
    return p;
}

static void frame_let_go(Store *s, Frame *f)
{
    s->saved -= f->holders > 1;
    f->holders--;
    frame_unused(s, f);
}

void process_release_all(Store *s, Process *p)
{
    GHashTableIter iter;
    gpointer f;

    g_hash_table_iter_init(&iter, p->held);
    while (g_hash_table_iter_next(&iter, &f, NULL)) {
        frame_let_go(s, f);
    }
    g_hash_table_remove_all(p->held);
}

void process_unref(Store *s, Process *p)
{
    if (--p->refs) {
        return;
    }
    trace_dedup_store_process_end(p->pid, g_hash_table_size(p->held));
    process_release_all(s, p);
    QTAILQ_REMOVE(&s->processes, p, next);
    g_hash_table_destroy(p->held);
    g_free(p);
}

/* One client cannot take the whole store. */
static uint32_t max_holds(const Store *s)
{
    return s->frames.nslots - s->frames.nslots / 4;
}

bool process_hold(Store *s, Process *p, Frame *f, uint64_t serial,
                  bool *newly)
{
    bool held = g_hash_table_contains(p->held, f);

    if (newly) {
        *newly = false;
    }
    if (!held && !CHECK("holds-limit",
                        g_hash_table_size(p->held) < max_holds(s))) {
        return false;
    }
    if (DO("hold")) {
        if (!held) {
            frame_used(s, f);
            s->saved += f->holders > 0;
            f->holders++;
            if (newly) {
                *newly = true;
            }
        }
        g_hash_table_insert(p->held, f, GSIZE_TO_POINTER(serial));
    }
    return true;
}

void process_release(Store *s, Process *p, uint32_t slot, uint64_t serial)
{
    Frame *f = &s->table[slot];
    gpointer named;

    if (!g_hash_table_lookup_extended(p->held, f, NULL, &named)) {
        if (DO("release-own") || !f->holders) {
            return;             /* it does not hold it */
        }
    } else if (!CHECK("release-serial", GPOINTER_TO_SIZE(named) <= serial)) {
        return;                 /* an answer that is on its way names it */
    }
    g_hash_table_remove(p->held, f);
    frame_let_go(s, f);
}

/* --- finding and making frames ------------------------------------------- */

/* A block on its way. */
typedef struct Work {
    Frame key;                  /* its digest */
    enum { ZEROES, FOUND, NEW, TWIN, NONE } kind;
    bool taken;                 /* NEW: its slot has to be retired first */
    bool refused;               /* NONE: somebody uses what it has taken */
    unsigned twin;
    Frame *frame;               /* FOUND, NEW: pinned */
} Work;

/* Is there an equal new one before it? */
static bool find_twin(Work *w, unsigned i, const uint8_t *buf)
{
    unsigned j;

    for (j = 0; j < i; j++) {
        if (w[j].kind == NEW && digest_equal(&w[j].key, &w[i].key) &&
            !memcmp(buf + j * BLOCK, buf + i * BLOCK, BLOCK)) {
            w[i].kind = TWIN;
            w[i].twin = j;
            return true;
        }
    }
    return false;
}

static void digest_all(Store *s, Work *w, const uint8_t *buf, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        w[i].frame = NULL;
        w[i].taken = w[i].refused = false;
        if (buffer_is_zero(buf + i * BLOCK, BLOCK)) {
            w[i].kind = ZEROES;
            continue;
        }
        w[i].kind = NONE;
        w[i].key.digest = XXH3_128bits_withSeed(buf + i * BLOCK, BLOCK,
                                                s->seed);
    }
}

/* Is the content of @w admitted?  If not, it is next time. */
static bool admit(Store *s, const Work *w, uint32_t flags)
{
    gint64 digest = w->key.digest.low64;

    if (!(flags & DEDUP_REQUEST_SECOND_READ) ||
        g_hash_table_remove(s->seen, &digest)) {
        return true;
    }
    if (g_hash_table_size(s->seen) >= MAX_SEEN) {
        g_hash_table_remove_all(s->seen);
    }
    g_hash_table_add(s->seen, g_memdup2(&digest, sizeof(digest)));
    return false;
}

/* Find what there is, and take slots for the rest. */
static void find_all(Store *s, Work *w, const uint8_t *buf, unsigned n,
                     uint32_t flags, Kept *kept)
{
    unsigned i;

    QEMU_LOCK_GUARD(&s->lock);
    for (i = 0; i < n; i++) {
        if (w[i].kind != NONE) {
            continue;
        }
        w[i].frame = g_hash_table_lookup(s->digests, &w[i].key);
        if (w[i].frame) {
            w[i].kind = FOUND;
            pin(s, w[i].frame);
        } else if (!find_twin(w, i, buf)) {
            if (!admit(s, &w[i], flags)) {
                kept[i].answer = DEDUP_ANSWER_SEEN_ONCE;
                continue;
            }
            w[i].frame = take_free(s);
            if (!w[i].frame) {
                w[i].frame = take_idle(s);
                w[i].taken = w[i].frame;
            }
            kept[i].answer = DEDUP_ANSWER_FULL;
            if (w[i].frame) {
                w[i].kind = NEW;
            }
        }
    }
}

/* Try idle frames in place of those that somebody uses; false: none is idle. */
static bool take_others(Store *s, Work *w, unsigned n)
{
    bool any = false;
    unsigned i;

    QEMU_LOCK_GUARD(&s->lock);
    for (i = 0; i < n; i++) {
        if (!w[i].refused) {
            continue;
        }
        w[i].frame = take_idle(s);
        if (!w[i].frame) {
            break;
        }
        w[i].kind = NEW;
        w[i].taken = any = true;
        w[i].refused = false;
    }
    return any;
}

/*
 * Of the frames that were taken, those that somebody uses are not for us.
 * Returns whether there are such.
 */
static bool retire_taken(Store *s, Work *w, unsigned n)
{
    bool refused = false;
    uint32_t slots[DEDUP_READ_BLOCKS];
    bool idle[DEDUP_READ_BLOCKS];
    unsigned i, ntaken = 0;

    for (i = 0; i < n; i++) {
        if (w[i].taken) {
            slots[ntaken++] = frame_slot(s, w[i].frame);
        }
    }
    if (!ntaken) {
        return false;
    }
    frames_retire(&s->frames, slots, ntaken, idle);
    QEMU_LOCK_GUARD(&s->lock);
    for (i = ntaken = 0; i < n; i++) {
        if (!w[i].taken) {
            continue;
        }
        w[i].taken = false;
        if (idle[ntaken++]) {
            evicted(s, w[i].frame);
        } else {
            untaken(s, w[i].frame);
            w[i].frame = NULL;
            w[i].kind = NONE;           /* its answer is FULL */
            w[i].refused = refused = true;
        }
    }
    return refused;
}

static void write_new(Store *s, Work *w, const uint8_t *buf, unsigned n,
                      Kept *kept)
{
    unsigned i, j, run;

    for (i = 0; i < n; i += run) {
        uint32_t slot;
        int ret;

        run = 1;
        if (w[i].kind != NEW) {
            continue;
        }
        slot = frame_slot(s, w[i].frame);
        while (i + run < n && w[i + run].kind == NEW &&
               frame_slot(s, w[i + run].frame) == slot + run) {
            run++;
        }
        ret = frames_write(&s->frames, slot, run, buf + i * BLOCK);
        for (j = i; j < i + run; j++) {
            w[j].frame->digest = w[j].key.digest;
            kept[j].answer =
                ret == -ENOMEM || ret == -ENOSPC ? DEDUP_ANSWER_FULL :
                ret < 0 ? DEDUP_ANSWER_FAILED : DEDUP_ANSWER_FRAME;
        }
    }
}

/* Those that were found by their digest: are they what was looked for? */
static void compare_found(Store *s, Work *w, const uint8_t *buf, unsigned n,
                          Kept *kept)
{
    g_autofree uint8_t *there = g_malloc(BLOCK);
    unsigned i;

    for (i = 0; i < n; i++) {
        if (w[i].kind == FOUND) {
            bool same = !frames_read(&s->frames, frame_slot(s, w[i].frame), 1,
                                     there) &&
                        !memcmp(there, buf + i * BLOCK, BLOCK);

            kept[i].answer = same ? DEDUP_ANSWER_FRAME : DEDUP_ANSWER_FAILED;
        }
    }
}

/* Hand the frames over, with their pins. */
static void hand_over(Store *s, Work *w, unsigned n, Kept *kept)
{
    unsigned i;

    QEMU_LOCK_GUARD(&s->lock);
    for (i = 0; i < n; i++) {
        bool ok = kept[i].answer == DEDUP_ANSWER_FRAME;

        if (w[i].kind == ZEROES) {
            kept[i].answer = DEDUP_ANSWER_ZEROES;
        } else if (w[i].kind == TWIN) {
            kept[i] = kept[w[i].twin];
            if (kept[i].frame) {
                pin(s, kept[i].frame);
            }
        } else if (w[i].kind == NEW && ok) {
            seal(s, w[i].frame);
            kept[i].frame = w[i].frame;
            kept[i].made = true;
        } else if (w[i].kind == NEW) {
            put_free(s, w[i].frame);
        } else if (w[i].kind == FOUND && ok) {
            kept[i].frame = w[i].frame;
            s->matched++;
        } else if (w[i].kind == FOUND) {
            store_unpin(s, w[i].frame);
            s->collisions++;
        }
    }
}

void store_keep(Store *s, const uint8_t *buf, unsigned n, uint32_t flags,
                Kept *kept)
{
    g_autofree Work *w = g_new(Work, n);
    unsigned tries = RETIRE_TRIES;

    memset(kept, 0, n * sizeof(*kept));
    digest_all(s, w, buf, n);
    find_all(s, w, buf, n, flags, kept);
    while (retire_taken(s, w, n) && --tries && take_others(s, w, n)) {
        /* until all have a slot that nobody uses */
    }
    write_new(s, w, buf, n, kept);
    compare_found(s, w, buf, n, kept);
    hand_over(s, w, n, kept);
    trace_dedup_store_keep(n);
}

/* --- memory --------------------------------------------------------------- */

/* Take up to DEDUP_READ_BLOCKS free slots in a row, from @from on. */
static unsigned take_run(Store *s, uint32_t from, uint32_t *first)
{
    uint32_t end;

    QEMU_LOCK_GUARD(&s->lock);
    *first = find_next_bit(s->free, s->frames.nslots, from);
    end = find_next_zero_bit(s->free, s->frames.nslots, *first);
    end = MIN(end, *first + DEDUP_READ_BLOCKS);
    bitmap_clear(s->free, *first, end - *first);
    s->nfree -= end - *first;
    return end - *first;
}

static void return_run(Store *s, uint32_t first, unsigned n)
{
    QEMU_LOCK_GUARD(&s->lock);
    bitmap_set(s->free, first, n);
    s->nfree += n;
    s->hint = MIN(s->hint, first);
}

void store_punch_holes(Store *s)
{
    uint32_t from = 0, first;
    uint64_t most;
    unsigned n;

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        most = (uint64_t)(s->frames.nslots - s->nfree) * BLOCK;
    }
    if (!DO("holes") || frames_memory(&s->frames) <= most) {
        return;
    }
    while ((n = take_run(s, from, &first))) {
        frames_drop(&s->frames, first, n);
        return_run(s, first, n);
        from = first + n;
    }
}
