/*
 * qemu-dedup-store: requests for blocks, and the reads that answer them
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "fill.h"
#include "trace.h"
#include "turns.h"

/*
 * Blocks that are read at once.  With the number of readers it bounds the
 * memory of their buffers: 16 MiB for a disk, 64 in all, and 16 of receivers.
 */
#define RUN 64

/*
 * Readers wait for disks, mostly.  Each disk may have as many as QEMU's own
 * thread pool has, and as a client has requests.
 */
#define READERS 256
#define READERS_OF_DISK 64

/* What is put is at hand: that takes a processor, and no disk. */
#define PUTTERS MIN(g_get_num_processors(), 16)

struct Fills {
    Store *store;
    GThreadPool *readers;
    GThreadPool *putters;
    Turns *turns;               /* by the store's lock */
    unsigned running;           /* ... fills and puts that have not ended */
    unsigned putting;           /* ... of these: puts */
    Fill *own;                  /* by the server's lock: nobody has it yet */
    void (*decided)(Client *c);
};

/* Who waits for a block of a fill. */
typedef struct Waiter {
    Request *request;
    unsigned block;             /* of the request */
    unsigned at;                /* of the fill */
} Waiter;

/* A run of blocks of a layer that are read, or those of a PUT. */
struct Fill {
    Layer *layer;               /* NULL: a put */
    uint64_t first;
    unsigned n;
    uint32_t flags;
    uint8_t *buf;               /* of a put */
    GArray *waiters;            /* Waiter */
};

/* --- requests, with the lock held ---------------------------------------- */

Request *request_new(Client *c, uint64_t id, uint32_t flags, unsigned n)
{
    Request *r = g_malloc0(sizeof(*r) + n * sizeof(r->blocks[0]));

    r->refs = 1;
    r->client = c;
    r->id = id;
    r->flags = flags;
    r->n = n;
    return r;
}

static void block_clear(Store *s, Block *b)
{
    if (b->frame) {
        store_unpin(s, b->frame);
        b->frame = NULL;
    }
    if (b->layer) {
        layer_unref(b->layer);
        b->layer = NULL;
    }
}

void request_unref(Store *s, Request *r)
{
    unsigned i;

    if (--r->refs) {
        return;
    }
    for (i = 0; i < r->n; i++) {
        block_clear(s, &r->blocks[i]);
    }
    g_free(r);
}

void request_abandon(Store *s, Request *r)
{
    r->client = NULL;
    request_unref(s, r);
}

static bool is_known(Store *s, Block *b, const Entry *e)
{
    if (!e || !e->generation) {
        return false;
    }
    if (e->slot == ENTRY_ZEROES) {
        b->answer = DEDUP_ANSWER_ZEROES;
        return true;
    }
    b->frame = store_pin(s, e->slot, e->generation);
    if (b->frame) {
        b->answer = DEDUP_ANSWER_FRAME;
    }
    return b->frame;
}

void request_look_up(Store *s, Request *r, unsigned i, Layer *layer,
                     uint64_t number)
{
    Block *b = &r->blocks[i];

    b->number = number;
    if (!layer || !layer_is_leased(layer)) {
        b->answer = DEDUP_ANSWER_NO_LEASE;
        return;
    }
    layer_ref(layer);
    b->layer = layer;
    if (is_known(s, b, layer_entry(layer, number))) {
        return;
    }
    if (r->flags & DEDUP_REQUEST_NO_FILL) {
        b->answer = DEDUP_ANSWER_ABSENT;
    } else {
        b->filled = true;
    }
}

/* --- workers -------------------------------------------------------------- */

static int read_run(const Fill *fill, uint8_t *buf)
{
    off_t offset = fill->first * BLOCK;
    size_t size = (size_t)fill->n * BLOCK, done = 0;

    while (done < size) {
        ssize_t got = pread(fill->layer->fd, buf + done, size - done,
                            offset + done);

        if (got == 0 || (got < 0 && errno != EINTR)) {
            return got < 0 ? -errno : -EIO;
        }
        done += MAX(got, 0);
    }
    return 0;
}

static void record(Store *s, Layer *layer, uint64_t number, const Kept *k)
{
    if (k->answer != DEDUP_ANSWER_FRAME && k->answer != DEDUP_ANSWER_ZEROES) {
        return;
    }
    layer_record(layer, number,
                 k->frame ? (Entry) { frame_slot(s, k->frame),
                                      frame_generation(k->frame) }
                          : (Entry) { ENTRY_ZEROES, 1 });
}

/* Tell who waits, whose clients may be gone. */
static void tell_waiters(Fills *f, Fill *fill, const Kept *kept, bool leased)
{
    unsigned i;

    for (i = 0; i < fill->waiters->len; i++) {
        Waiter *w = &g_array_index(fill->waiters, Waiter, i);
        Block *b = &w->request->blocks[w->block];
        const Kept *k = &kept[w->at];

        b->answer = leased ? k->answer : DEDUP_ANSWER_NO_LEASE;
        if (leased && k->frame) {
            b->frame = store_pin(f->store, frame_slot(f->store, k->frame),
                                 frame_generation(k->frame));
            b->made = k->made;
        }
        if (!--w->request->waiting && w->request->client) {
            f->decided(w->request->client);
        }
        request_unref(f->store, w->request);
    }
}

/*
 * The frames have it: the page cache need not.  That keeps a folio of which
 * only a part is said to be not needed; so where all of a chunk is known, all
 * of it is let go.
 */
static void forget_pages(Fills *f, const Fill *fill)
{
    uint64_t first = fill->first, end = first + fill->n, last = end - 1;

    WITH_QEMU_LOCK_GUARD(&f->store->lock) {
        if (layer_is_leased(fill->layer)) {
            if (layer_is_whole(fill->layer, first)) {
                first = QEMU_ALIGN_DOWN(first, CHUNK_BLOCKS);
            }
            if (layer_is_whole(fill->layer, last)) {
                end = QEMU_ALIGN_UP(end, CHUNK_BLOCKS);
            }
        }
    }
    posix_fadvise(fill->layer->fd, first * BLOCK, (end - first) * BLOCK,
                  POSIX_FADV_DONTNEED);
}

/* Record what is known now, and tell who waits. */
static void finish(Fills *f, Fill *fill, const Kept *kept)
{
    bool leased;
    unsigned i;

    QEMU_LOCK_GUARD(&f->store->lock);
    /* if somebody began to write meanwhile, what was read may be anything */
    leased = !fill->layer || layer_is_leased(fill->layer);
    for (i = 0; fill->layer && i < fill->n; i++) {
        g_hash_table_remove(fill->layer->fills,
                            GSIZE_TO_POINTER(fill->first + i));
        if (leased) {
            record(f->store, fill->layer, fill->first + i, &kept[i]);
        }
    }
    tell_waiters(f, fill, kept, leased);
    for (i = 0; i < fill->n; i++) {
        if (kept[i].frame) {
            store_unpin(f->store, kept[i].frame);
        }
    }
    *(fill->layer ? &f->store->fills : &f->store->puts) += fill->n;
}

/*
 * A worker's buffer, of RUN blocks, is kept: the kernel would clear the pages
 * of a new one for each fill.
 */
static uint8_t *get_buffer(void)
{
    static GPrivate buffer = G_PRIVATE_INIT(qemu_vfree);

    if (!g_private_get(&buffer)) {
        g_private_set(&buffer, qemu_memalign(BLOCK, RUN * BLOCK));
    }
    return g_private_get(&buffer);
}

/* It has ended; with the lock held. */
static void fill_free(Fills *f, Fill *fill)
{
    f->running--;
    if (fill->layer) {
        layer_unref(fill->layer);
    } else {
        f->putting--;
    }
    qemu_vfree(fill->buf);
    g_array_free(fill->waiters, true);
    g_free(fill);
}

/* Have all who have asked for it gone? */
static bool is_abandoned(Fills *f, const Fill *fill)
{
    unsigned i;

    QEMU_LOCK_GUARD(&f->store->lock);
    for (i = 0; i < fill->waiters->len; i++) {
        if (g_array_index(fill->waiters, Waiter, i).request->client) {
            return false;
        }
    }
    return true;
}

/* Read it, or take what was put, and keep that. */
static void do_fill(Fills *f, Fill *fill, bool abandoned)
{
    g_autofree Kept *kept = g_new0(Kept, fill->n);
    uint8_t *buf = fill->buf ?: get_buffer();
    int ret = abandoned ? -ECANCELED : fill->layer ? read_run(fill, buf) : 0;
    unsigned i;

    if (ret == 0) {
        store_keep(f->store, buf, fill->n, fill->flags, kept);
    }
    for (i = 0; ret < 0 && i < fill->n; i++) {
        kept[i].answer = DEDUP_ANSWER_FAILED;
    }
    trace_dedup_store_fill(fill->first, fill->n, ret);
    finish(f, fill, kept);
    if (fill->layer && !fill->layer->direct) {
        forget_pages(f, fill);          /* when nobody waits any more */
    }
}

/* A thread of readers: this one, and others that waited for it to end. */
static void read_some(gpointer data, gpointer opaque)
{
    Fills *f = opaque;
    Fill *fill = data;

    while (fill) {
        /* what is in it was written with the lock held */
        bool abandoned = is_abandoned(f, fill);
        dev_t device = fill->layer->dev;

        do_fill(f, fill, abandoned);
        QEMU_LOCK_GUARD(&f->store->lock);
        fill_free(f, fill);
        fill = turns_end(f->turns, device);
    }
}

static void put_some(gpointer data, gpointer opaque)
{
    Fills *f = opaque;

    do_fill(f, data, is_abandoned(f, data));
    QEMU_LOCK_GUARD(&f->store->lock);
    fill_free(f, data);
}

Fill *fills_take_own(Fills *f)
{
    return g_steal_pointer(&f->own);
}

void fills_leave(Fills *f, Fill *fill)
{
    g_thread_pool_push(fill->layer ? f->readers : f->putters, fill, NULL);
}

void fill_carry_out(Fills *f, Fill *fill)
{
    (fill->layer ? read_some : put_some)(fill, f);
}

Fills *fills_new(Store *s, void (*decided)(Client *c))
{
    Fills *f = g_new0(Fills, 1);

    f->store = s;
    f->decided = decided;
    f->turns = turns_new(READERS_OF_DISK);
    f->readers = g_thread_pool_new(read_some, f, READERS, false, NULL);
    f->putters = g_thread_pool_new(put_some, f, PUTTERS, false, NULL);
    /* they end, with their buffers, when they were idle for 15 s */
    g_thread_pool_set_max_unused_threads(READERS_OF_DISK);
    return f;
}

bool fills_free(Fills *f)
{
    WITH_QEMU_LOCK_GUARD(&f->store->lock) {
        if (f->running) {
            return false;
        }
    }
    g_thread_pool_free(f->readers, false, true);
    g_thread_pool_free(f->putters, false, true);
    turns_free(f->turns);
    g_free(f);
    return true;
}

/* --- beginning, with the lock held ---------------------------------------- */

static Fill *fill_new(Request *r, Layer *layer, uint64_t first)
{
    Fill *fill = g_new0(Fill, 1);

    fill->layer = layer;
    fill->first = first;
    fill->flags = r->flags;
    fill->waiters = g_array_new(false, false, sizeof(Waiter));
    if (layer) {
        layer_ref(layer);
    }
    return fill;
}

static void wait_for(Fill *fill, Request *r, unsigned block, unsigned at)
{
    Waiter w = { .request = r, .block = block, .at = at };

    r->refs++;
    r->waiting++;
    g_array_append_val(fill->waiters, w);
}

/* Can @b be read behind what @fill reads? */
static bool follows(const Fill *fill, const Block *b)
{
    return fill && fill->layer == b->layer && fill->n < RUN &&
           b->number == fill->first + fill->n;
}

static void start(Fills *f, Fill *fill, Client *c)
{
    if (!fill) {
        return;
    }
    f->running++;
    if (fill->layer && !turns_begin(f->turns, fill->layer->dev, c, fill)) {
        return;                 /* it waits for another one to end */
    }
    f->putting += !fill->layer;
    if (!fill->layer && f->putting > PUTTERS) {
        fills_leave(f, fill);   /* more of them would only take turns */
        return;
    }
    if (f->own) {
        fills_leave(f, f->own);
    }
    f->own = fill;
}

void request_fill(Fills *f, Request *r)
{
    Fill *fill = NULL, *other;
    unsigned i;

    for (i = 0; i < r->n; i++) {
        Block *b = &r->blocks[i];
        gpointer key = GSIZE_TO_POINTER(b->number);

        if (b->answer) {
            continue;
        }
        other = g_hash_table_lookup(b->layer->fills, key);
        if (other) {
            wait_for(other, r, i, b->number - other->first);
            continue;
        }
        if (!follows(fill, b)) {
            start(f, fill, r->client);
            fill = fill_new(r, b->layer, b->number);
        }
        wait_for(fill, r, i, fill->n++);
        g_hash_table_insert(b->layer->fills, key, fill);
    }
    start(f, fill, r->client);
}

void request_put(Fills *f, Request *r, uint8_t *buf)
{
    Fill *fill = fill_new(r, NULL, 0);
    unsigned i;

    fill->n = r->n;
    fill->buf = buf;
    for (i = 0; i < r->n; i++) {
        wait_for(fill, r, i, i);
    }
    start(f, fill, r->client);
}
