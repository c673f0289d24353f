/*
 * dedup-share: the connection to a store daemon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See client.h for what must hold.
 */

#include "qemu/osdep.h"
#include <poll.h>
#include <sys/socket.h>
#include "block/aio.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/event_notifier.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "client.h"
#include "dedup-store/send.h"
#include "greet.h"
#include "trace.h"

/* Stores of daemons that have ended, whose frames the guest may still map. */
#define MAX_OLD 16

/* A connection is tried so often. */
#define RECONNECT_US G_USEC_PER_SEC

/* READs of one image that are with the daemon: its disk may hang. */
#define MAX_READS_OF_LAYER (DEDUP_LIMIT_REQUESTS * 3 / 4)

/* A coroutine that waits; on its stack. */
typedef struct Waiter {
    Coroutine *co;
    QSIMPLEQ_ENTRY(Waiter) next;
} Waiter;

/* A message to the daemon; stays until its answer has come, if there is one. */
typedef struct Request {
    enum { READ, PUT, LAYER, SAY } kind;
    uint64_t id;                /* READ, PUT: once it is sent */
    Waiter *waiter;             /* NULL: none does, any more */
    int64_t since;              /* us: when it began to wait */
    union {
        DedupMsgHeader header;
        DedupMsgRead read;
        DedupMsgPut put;
        DedupMsgLayer layer;
        DedupMsgRelease release;
        DedupMsgClaim claim;
    } head;
    size_t head_size;
    const void *body;           /* the coroutine's, until it is sent */
    size_t body_size;
    void *own_body;             /* SAY: freed with it */
    int fd;                     /* LAYER: the coroutine's; SAY: that of @held */
    DedupHeld *held;            /* SAY: a reference, or NULL */
    uint64_t connection;        /* that it is for; 0: any */
    uint32_t layer;             /* READ: the number of its first extent's */
    DedupAnswers *answers;      /* READ, PUT: of the coroutine */
    unsigned n;                 /* blocks */
    QTAILQ_ENTRY(Request) next;
} Request;

typedef QTAILQ_HEAD(, Request) RequestList;
typedef QSIMPLEQ_HEAD(, Waiter) WaiterList;

/* AioContexts that read the socket; more of them wait for these. */
#define MAX_READERS 64

/*
 * Messages that one of them reads before it does something else: who goes on
 * may ask for more, and so on.
 */
#define READ_AT_ONCE 16

/* The thread looks so often what none of them has read. */
#define LOOK_US G_USEC_PER_SEC

typedef struct Reader {
    AioContext *ctx;            /* a reference */
    bool asked;                 /* since the thread looked last */
} Reader;

struct DedupClient {
    char *path;
    DedupStoreKind kind;
    int64_t limit;              /* us, of silence */
    unsigned refs;              /* main loop */
    QemuThread thread;
    EventNotifier wake;
    bool has_thread;
    bool stop;                  /* atomic */
    bool lingers;               /* atomic: nobody uses it; see is_over() */
    QLIST_ENTRY(DedupClient) next;

    QemuMutex lock;             /* protects all below; held for moments */
    int sock;                   /* -1: none; changed by the thread only */
    Reader readers[MAX_READERS];        /* who reads it */
    unsigned nreaders;          /* 0: the thread does */
    WaiterList woken;           /* go on when the lock is let go */
    union {
        uint64_t align;
        uint8_t bytes[sizeof(DedupMsgAnswer) +
                      DEDUP_READ_BLOCKS * sizeof(DedupMsgFrame)];
    } message;                  /* that was received last */
    uint64_t connection;        /* counts them */
    bool silent;
    int64_t heard;              /* us: when something came last */
    uint64_t last_id;
    unsigned nsent;             /* requests that are with the daemon */
    bool full;                  /* the socket is: the thread waits for room */
    const char *wrong;          /* the connection is to end */
    uint8_t token[DEDUP_TOKEN_SIZE];
    uint64_t size, asked;       /* as WELCOME has them */
    uint64_t epoch;             /* counts what serial numbers belong to */
    DedupHeld *held;
    DedupHeld *old[MAX_OLD];    /* Linux; the oldest first */
    unsigned nold;
    bool trims;                 /* a thread does */
    bool trim_again;            /* when it ends */
    RequestList unsent, sent;
    DedupClientLayer *layers[DEDUP_LIMIT_LAYERS];
    uint8_t reads[DEDUP_LIMIT_LAYERS];  /* that are with the daemon */
    /* of layers, in use */
    unsigned long numbers[BITS_TO_LONGS(DEDUP_LIMIT_LAYERS)];
};

DedupStoreKind dedup_client_kind(const DedupClient *c)
{
    return c->kind;
}

/* Main loop.  They stay: what the guest maps belongs to the process. */
static QLIST_HEAD(, DedupClient) clients = QLIST_HEAD_INITIALIZER(clients);

/* --- the end of a request, with the lock held ----------------------------- */

static void request_free(Request *r)
{
    if (r->held) {
        dedup_held_unref(r->held);
    }
    g_free(r->own_body);
    g_free(r);
}

/* Its coroutine is to go on, and does not touch it any more. */
static void wake_up(DedupClient *c, Request *r)
{
    if (r->waiter) {
        QSIMPLEQ_INSERT_TAIL(&c->woken, r->waiter, next);
    }
    r->waiter = NULL;
    r->answers = NULL;
}

/*
 * Coroutines go on.  Without the lock: what they do first is to ask for more,
 * here or in threads of their own, and these would wait for it.
 */
static void run_woken(DedupClient *c)
{
    WaiterList woken = QSIMPLEQ_HEAD_INITIALIZER(woken);
    Waiter *w;

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        QSIMPLEQ_CONCAT(&woken, &c->woken);
    }
    while ((w = QSIMPLEQ_FIRST(&woken))) {
        QSIMPLEQ_REMOVE_HEAD(&woken, next);
        aio_co_wake(w->co);
    }
}

/* It has failed; nobody waits for it any more. */
static void give_up(DedupClient *c, Request *r)
{
    unsigned i;

    for (i = 0; r->answers && i < r->n; i++) {
        r->answers->frames[i].answer = DEDUP_ANSWER_FAILED;
    }
    wake_up(c, r);
}

static void remove_sent(DedupClient *c, Request *r)
{
    QTAILQ_REMOVE(&c->sent, r, next);
    c->reads[r->layer] -= r->kind == READ;
    c->nsent--;
    request_free(r);
}

static void give_up_all(DedupClient *c, RequestList *list)
{
    Request *r;

    while ((r = QTAILQ_FIRST(list))) {
        QTAILQ_REMOVE(list, r, next);
        give_up(c, r);
        request_free(r);
    }
}

/* --- sending, with the lock held ------------------------------------------ */

static bool is_answered(const Request *r)
{
    return r->kind == READ || r->kind == PUT;
}

static bool has_id(const Request *r)
{
    return is_answered(r) || r->head.header.type == DEDUP_MSG_RECLAIM;
}

/* A message that is out. */
static void was_sent(DedupClient *c, Request *r)
{
    QTAILQ_REMOVE(&c->unsent, r, next);
    if (r->kind == SAY) {
        request_free(r);
        return;
    }
    r->body = NULL;
    r->fd = -1;
    QTAILQ_INSERT_TAIL(&c->sent, r, next);
    c->reads[r->layer] += r->kind == READ;
    c->nsent++;
}

/* The next one to be sent; images whose disks hang do not keep others. */
static Request *next_unsent(DedupClient *c)
{
    Request *r;

    if (c->nsent >= DEDUP_LIMIT_REQUESTS) {
        return NULL;
    }
    QTAILQ_FOREACH(r, &c->unsent, next) {
        if (r->kind != READ || c->reads[r->layer] < MAX_READS_OF_LAYER) {
            break;
        }
    }
    return r;
}

static void end_connection(DedupClient *c, const char *why)
{
    if (!c->wrong) {
        c->wrong = why;
        event_notifier_set(&c->wake);
    }
}

/* Send what can be sent. */
static void send_all(DedupClient *c)
{
    Request *r;

    while (c->sock >= 0 && !c->full && !c->wrong && (r = next_unsent(c))) {
        if (has_id(r)) {
            r->id = r->head.header.request = c->last_id + 1;
        }
        if (dedup_send(c->sock, &r->head, r->head_size, r->body, r->body_size,
                       r->fd)) {
            c->last_id += has_id(r);
            was_sent(c, r);
        } else if (errno == EAGAIN || errno == ENOBUFS) {
            c->full = true;
            event_notifier_set(&c->wake);
        } else if (errno != EINTR) {
            end_connection(c, "it cannot be written to");
        }
    }
}

/* --- what the daemon says, with the lock held ----------------------------- */
/* They return what is wrong with it, or NULL. */

static Request *find_sent(DedupClient *c, uint64_t id)
{
    Request *r;

    QTAILQ_FOREACH(r, &c->sent, next) {
        if (is_answered(r) && r->id == id) {
            return r;
        }
    }
    return NULL;
}

static bool is_answer(const DedupMsgFrame *f)
{
    return f->answer >= DEDUP_ANSWER_FRAME && f->answer <= DEDUP_ANSWER_BUSY &&
           !(f->flags & ~(DEDUP_FRAME_FILLED | DEDUP_FRAME_NEW));
}

static const char *on_answer(DedupClient *c, const DedupMsgAnswer *a,
                             size_t size)
{
    const DedupMsgFrame *frames = (const void *)(a + 1);
    Request *r = find_sent(c, a->header.request);
    unsigned i, known = 0, done;
    bool whole;

    if (!r || a->header.count != r->n ||
        size != sizeof(*a) + r->n * sizeof(*frames)) {
        return "an answer to nothing that was asked";
    }
    while (known < r->n && is_answer(&frames[known])) {
        known++;
    }
    if (!dedup_held_add(c->held, a->serial, frames, known, r->answers, &done)) {
        return "a serial number that does not ascend";
    }
    trace_dedup_client_answer(r->id, r->n, !r->answers);
    for (i = 0; r->answers && i < r->n; i++) {
        if (i < done) {
            r->answers->nfilled += frames[i].flags & DEDUP_FRAME_FILLED;
            r->answers->frames[i] = frames[i];
        } else {
            r->answers->frames[i].answer = DEDUP_ANSWER_FAILED;
        }
    }
    whole = done == r->n;
    wake_up(c, r);
    remove_sent(c, r);
    send_all(c);
    return whole ? NULL : "an unknown answer, or a frame that cannot be";
}

static Request *find_layer_request(DedupClient *c, uint32_t number)
{
    Request *r;

    QTAILQ_FOREACH(r, &c->sent, next) {
        if (r->kind == LAYER && r->head.layer.layer == number) {
            return r;
        }
    }
    return NULL;
}

static const char *on_layer_state(DedupClient *c, DedupMsgLayerState *m,
                                  size_t size)
{
    DedupClientLayer *l;
    Request *r;

    if (size != sizeof(*m) || m->header.count ||
        m->layer >= DEDUP_LIMIT_LAYERS ||
        m->state < DEDUP_LAYER_LEASED || m->state > DEDUP_LAYER_LIMIT) {
        return "a state of a layer that cannot be";
    }
    m->text[DEDUP_TEXT_MAX - 1] = 0;
    trace_dedup_client_layer_state(m->layer, m->state, m->text);
    l = c->layers[m->layer];
    if (l) {
        /* a stale one, of who had the number before, is followed by its own */
        l->state = m->state;
        memcpy(l->why, m->text, DEDUP_TEXT_MAX);
    }
    r = find_layer_request(c, m->layer);
    if (r) {
        wake_up(c, r);
        remove_sent(c, r);
        send_all(c);
    }
    return NULL;
}

static void start_trim(DedupClient *c);

static const char *handle(DedupClient *c, void *message, size_t size, int fd)
{
    const DedupMsgHeader *h = message;

    if (fd >= 0) {
        close(fd);
        return "a descriptor";
    }
    if (size < sizeof(*h)) {
        return "a message that is too short";
    }
    switch (h->type) {
    case DEDUP_MSG_ANSWER:
        return size < sizeof(DedupMsgAnswer) ? "an answer that is too short"
                                             : on_answer(c, message, size);
    case DEDUP_MSG_LAYER_STATE:
        return on_layer_state(c, message, size);
    case DEDUP_MSG_ALIVE:
        return size == sizeof(*h) ? NULL : "an ALIVE of a wrong size";
    case DEDUP_MSG_TRIM:
        start_trim(c);
        return size == sizeof(*h) ? NULL : "a TRIM of a wrong size";
    case DEDUP_MSG_RECLAIMED:
        return size == sizeof(*h) ? NULL : "a RECLAIMED of a wrong size";
    case DEDUP_MSG_REFUSED:
        return "it refuses";
    default:
        return "a message of an unknown type";
    }
}

/* --- receiving ------------------------------------------------------------ */

/* Take a message, if one has come; false if none has. */
static bool receive_one(DedupClient *c)
{
    const char *wrong;
    ssize_t got;
    int fd;

    QEMU_LOCK_GUARD(&c->lock);
    if (c->sock < 0 || c->wrong) {
        return false;
    }
    got = dedup_receive(c->sock, &c->message, sizeof(c->message), &fd);
    if (got == -EAGAIN) {
        return false;
    }
    c->heard = g_get_monotonic_time();
    c->silent = false;
    wrong = got > 0 ? handle(c, &c->message, got, fd) :
            got == -EPROTO ? "a message that is too long" :
            "the store daemon has ended it";
    if (wrong) {
        end_connection(c, wrong);
    }
    return !wrong;
}

/* In the AioContext of one who has asked. */
static void on_readable(void *opaque)
{
    DedupClient *c = opaque;
    unsigned i;

    for (i = 0; i < READ_AT_ONCE && receive_one(c); i++) {
        run_woken(c);
    }
}

/* This AioContext reads the socket, too, from now on.  With the lock held. */
static void add_reader(DedupClient *c)
{
    AioContext *ctx = qemu_get_current_aio_context();
    unsigned i;

    for (i = 0; i < c->nreaders && c->readers[i].ctx != ctx; i++) {
        /* find it */
    }
    if (i == MAX_READERS) {
        return;
    }
    if (i == c->nreaders) {
        aio_context_ref(ctx);
        c->readers[c->nreaders++].ctx = ctx;
        aio_set_fd_handler(ctx, c->sock, on_readable, NULL, NULL, NULL, c);
    }
    c->readers[i].asked = true;
}

static bool is_waiting_in(const RequestList *list, const AioContext *ctx)
{
    Request *r;

    QTAILQ_FOREACH(r, list, next) {
        if (r->waiter && qemu_coroutine_get_aio_context(r->waiter->co) == ctx) {
            return true;
        }
    }
    return false;
}

/* Has it asked lately, or waits for something?  With the lock held. */
static bool is_busy(DedupClient *c, Reader *r)
{
    bool busy = r->asked || is_waiting_in(&c->sent, r->ctx) ||
                is_waiting_in(&c->unsent, r->ctx);

    r->asked = false;
    return busy;
}

/*
 * Those AioContexts read no more that are not busy, or all of them; with the
 * lock held.  How many these are, and their references, which are the caller's.
 */
static unsigned remove_readers(DedupClient *c, bool all, AioContext **removed)
{
    unsigned i, n = 0;

    for (i = c->nreaders; i--; ) {
        AioContext *ctx = c->readers[i].ctx;

        if (all || !is_busy(c, &c->readers[i])) {
            aio_set_fd_handler(ctx, c->sock, NULL, NULL, NULL, NULL, NULL);
            removed[n++] = ctx;
            c->readers[i] = c->readers[--c->nreaders];
        }
    }
    return n;
}

/* Without the lock: the last reference frees it. */
static void unref_contexts(AioContext **contexts, unsigned n)
{
    while (n) {
        aio_context_unref(contexts[--n]);
    }
}

/*
 * Who has not asked lately, and waits for nothing, is not to be woken by what
 * others are told.
 */
static void remove_idle_readers(DedupClient *c)
{
    AioContext *removed[MAX_READERS];
    unsigned n;

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        n = remove_readers(c, false, removed);
    }
    unref_contexts(removed, n);
}

/* --- trimming ------------------------------------------------------------- */

static Request *request_new(int kind, DedupMsgType type, uint32_t count,
                            size_t head_size)
{
    Request *r = g_new0(Request, 1);

    r->kind = kind;
    r->head.header.type = type;
    r->head.header.count = count;
    r->head_size = head_size;
    r->fd = -1;
    r->since = g_get_monotonic_time();
    return r;
}

/*
 * A message that nobody waits for; dropped if the connection ends, or if it is
 * of another @epoch, or for another one than r->connection, unless that is 0.
 */
static void say(DedupClient *c, Request *r, uint64_t epoch)
{
    QEMU_LOCK_GUARD(&c->lock);
    if (c->sock < 0 || c->wrong || (epoch && epoch != c->epoch) ||
        (r->connection && r->connection != c->connection)) {
        request_free(r);
        return;
    }
    QTAILQ_INSERT_TAIL(&c->unsent, r, next);
    send_all(c);
}

typedef struct Trim {
    DedupClient *c;
    DedupHeld *held;
    DedupHeld *old[MAX_OLD];
    unsigned nold;
    DedupHeld *claimed;         /* of these: what is claimed now */
    uint64_t epoch, connection;
    QemuThread thread;
} Trim;

static void say_release(void *opaque, const uint32_t *slots, unsigned n,
                        uint64_t serial)
{
    Trim *t = opaque;
    Request *r = request_new(SAY, DEDUP_MSG_RELEASE, n,
                             sizeof(DedupMsgRelease));

    r->head.release.serial = serial;
    r->body_size = n * sizeof(*slots);
    r->body = r->own_body = g_memdup2(slots, r->body_size);
    /* slots and serial numbers of another daemon mean other frames */
    say(t->c, r, t->epoch);
}

static void say_claim(void *opaque, int fd, uint64_t lock,
                      const uint32_t *slots, unsigned n, uint32_t flags)
{
    Trim *t = opaque;
    Request *r = request_new(SAY, DEDUP_MSG_CLAIM, n, sizeof(DedupMsgClaim));

    r->head.claim.flags = flags;
    r->head.claim.lock = lock;
    r->body_size = n * sizeof(*slots);
    r->body = r->own_body = g_memdup2(slots, r->body_size);
    r->fd = fd;
    r->held = dedup_held_ref(t->claimed);
    /* a claim of which another connection has a part would lack that */
    r->connection = t->connection;
    say(t->c, r, 0);
}

/* Nothing is left of it. */
static void drop_old(DedupClient *c, DedupHeld *h)
{
    unsigned i;

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        for (i = 0; i < c->nold && c->old[i] != h; i++) {
            /* find it */
        }
        if (i == c->nold) {
            return;
        }
        c->nold--;
        memmove(c->old + i, c->old + i + 1, (c->nold - i) * sizeof(h));
    }
    dedup_held_unref(h);
}

static void *trim_thread(void *opaque)
{
    Trim *t = opaque;
    DedupClient *c = t->c;
    unsigned i;

    dedup_held_trim(t->held, say_release, t);
    dedup_held_unref(t->held);
    for (i = 0; i < t->nold; i++) {
        t->claimed = t->old[i];
        if (dedup_held_claim(t->claimed, say_claim, t)) {
            drop_old(c, t->old[i]);
        }
        dedup_held_unref(t->old[i]);
    }
    g_free(t);
    QEMU_LOCK_GUARD(&c->lock);
    c->trims = false;
    if (c->trim_again) {
        c->trim_again = false;
        start_trim(c);
    }
    event_notifier_set(&c->wake);       /* it may be over */
    return NULL;
}

/* Clients are not freed, so a thread of theirs may end when it likes. */
static void start_trim(DedupClient *c)
{
    unsigned i;
    Trim *t;

    if (c->trims) {
        c->trim_again = true;
        return;
    }
    c->trims = true;
    t = g_new0(Trim, 1);
    t->c = c;
    t->held = dedup_held_ref(c->held);
    for (i = 0; i < c->nold; i++) {
        t->old[t->nold++] = dedup_held_ref(c->old[i]);
    }
    t->epoch = c->epoch;
    t->connection = c->connection;
    qemu_thread_create(&t->thread, "dedup-trim", trim_thread, t,
                       QEMU_THREAD_DETACHED);
}

/* --- the connection: the thread only, but for the first one --------------- */

/* There is another store; of the one before the guest may still map frames. */
static void keep_old(DedupClient *c)
{
    if (!c->held) {
        return;
    }
    if (c->kind == DEDUP_STORE_KIND_XEN) {
        dedup_held_unref(c->held);      /* Xen counts who uses them */
        return;
    }
    if (c->nold == MAX_OLD) {
        /* what is left of the oldest stays as long as it is mapped */
        dedup_held_unref(c->old[0]);
        memmove(c->old, c->old + 1, --c->nold * sizeof(c->old[0]));
    }
    c->old[c->nold++] = c->held;
}

/* False, and nothing is taken, if the store of @w cannot be used. */
static bool adopt(DedupClient *c, int sock, int frames,
                  const DedupMsgWelcome *w, Error **errp)
{
    bool again = c->held && dedup_held_is_of(c->held, w, frames);
    DedupHeld *new = again ? NULL : dedup_held_new(frames, w, errp);

    if (!again && !new) {
        return false;
    }
    QEMU_LOCK_GUARD(&c->lock);
    if (again) {
        if (frames >= 0) {
            close(frames);
        }
        dedup_held_set_orphaned(c->held, false);
        if (memcmp(c->token, w->token, sizeof(c->token))) {
            dedup_held_restart(c->held);
            c->epoch++;
        }
    } else {
        keep_old(c);
        c->held = new;
        c->epoch++;
    }
    memcpy(c->token, w->token, sizeof(c->token));
    c->size = w->size;
    c->asked = w->asked;
    c->connection++;
    c->last_id = 0;
    c->heard = g_get_monotonic_time();
    c->silent = c->full = false;
    c->wrong = NULL;
    c->sock = sock;
    trace_dedup_client_connect(c->path, w->nslots, again);
    if (c->nold || qatomic_read(&c->lingers)) {
        start_trim(c);          /* to claim; and to let go of what is left */
    }
    return true;
}

/* Takes @limit_ms at most, and ends if @stop_fd, if it is one, is readable. */
static int try_connect(DedupClient *c, unsigned limit_ms, int stop_fd,
                       Error **errp)
{
    DedupMsgWelcome welcome;
    int frames, sock;

    sock = dedup_greet(c->path, c->kind, c->token, limit_ms, stop_fd,
                       &welcome, &frames, errp);
    if (sock < 0) {
        return sock;
    }
    if (!adopt(c, sock, frames, &welcome, errp)) {
        close(sock);
        if (frames >= 0) {
            close(frames);
        }
        return -EPROTO;
    }
    return 0;
}

/* Whoever waits goes on; with the lock held. */
static void forget_connection(DedupClient *c, const char *why)
{
    unsigned i;

    trace_dedup_client_end(c->path, why);
    dedup_held_set_orphaned(c->held, true);
    /* at once, though an AioContext may not have let go of it yet */
    shutdown(c->sock, SHUT_RDWR);
    close(c->sock);
    c->sock = -1;
    c->nsent = 0;
    memset(c->reads, 0, sizeof(c->reads));
    give_up_all(c, &c->unsent);
    give_up_all(c, &c->sent);
    for (i = 0; i < DEDUP_LIMIT_LAYERS; i++) {
        c->layers[i] = NULL;
    }
    bitmap_zero(c->numbers, DEDUP_LIMIT_LAYERS);
}

static void disconnect(DedupClient *c, const char *why)
{
    AioContext *removed[MAX_READERS];
    unsigned n = 0;

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        if (c->sock >= 0) {
            n = remove_readers(c, true, removed);
            forget_connection(c, why);
        }
    }
    unref_contexts(removed, n);
    run_woken(c);
}

/* How long may @r still wait?  us; not more than 0: it has waited enough. */
static int64_t time_left(DedupClient *c, const Request *r, int64_t now)
{
    /* the bytes of a put are at hand: there is nothing to wait for so long */
    return (r->kind == PUT ? r->since : MAX(r->since, c->heard)) +
           c->limit - now;
}

static void unname_layer(DedupClient *c, uint32_t number);

/* An unsent one has waited too long. */
static void give_up_unsent(DedupClient *c, Request *r)
{
    QTAILQ_REMOVE(&c->unsent, r, next);
    give_up(c, r);
    if (r->kind == LAYER) {
        unname_layer(c, r->head.layer.layer);
    }
    request_free(r);
}

/* us until the next of @list has waited too long, at most @next; *n have. */
static int64_t end_waiting_of(DedupClient *c, RequestList *list, int64_t now,
                              int64_t next, unsigned *n)
{
    Request *r, *after;
    int64_t left;

    QTAILQ_FOREACH_SAFE(r, list, next, after) {
        left = time_left(c, r, now);
        if (!r->waiter) {
            continue;
        }
        if (left > 0) {
            next = MIN(next, left);
            continue;
        }
        ++*n;
        if (list == &c->unsent) {
            give_up_unsent(c, r);
        } else {
            give_up(c, r);
        }
    }
    return next;
}

/* us until the next request has waited too long. */
static int64_t end_waiting(DedupClient *c)
{
    int64_t now = g_get_monotonic_time(), next = c->limit;
    unsigned n = 0;

    QEMU_LOCK_GUARD(&c->lock);
    next = end_waiting_of(c, &c->sent, now, next, &n);
    next = end_waiting_of(c, &c->unsent, now, next, &n);
    if (n) {
        /* it may speak, and only be slow */
        c->silent = now - c->heard >= c->limit;
        trace_dedup_client_silent(c->path, n);
    }
    return next;
}

/* Those that have waited too long wait no more. */
static int64_t mind_limit(DedupClient *c)
{
    int64_t us = end_waiting(c);

    run_woken(c);
    return us;
}

/*
 * Wait for a message, unless others do, or for room if that is wanted, or to be
 * woken.
 */
static void wait_for_socket(DedupClient *c, int64_t us)
{
    struct pollfd fds[] = {
        { .fd = c->sock },
        { .fd = event_notifier_get_fd(&c->wake), .events = POLLIN },
    };

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        fds[0].events = (c->nreaders ? 0 : POLLIN) | (c->full ? POLLOUT : 0);
    }
    poll(fds, ARRAY_SIZE(fds), us / 1000 + 1);
    if (fds[1].revents) {
        event_notifier_test_and_clear(&c->wake);
    }
    if (fds[0].revents & POLLOUT) {
        QEMU_LOCK_GUARD(&c->lock);
        c->full = false;
        send_all(c);
    }
}

/*
 * Is there nothing more to be said?  If nobody uses it, but a guest still maps
 * frames, the daemon is told when it does not any more; and the next daemon,
 * what it maps.
 */
static bool is_over(DedupClient *c)
{
    if (qatomic_read(&c->stop) || !qatomic_read(&c->lingers)) {
        return qatomic_read(&c->stop);
    }
    QEMU_LOCK_GUARD(&c->lock);
    return !c->trims && !c->nold && !dedup_held_count(c->held) &&
           (c->sock < 0 || c->wrong || QTAILQ_EMPTY(&c->unsent));
}

static const char *converse(DedupClient *c)
{
    int64_t looked = g_get_monotonic_time();
    const char *why = NULL;

    while (!why && !is_over(c)) {
        wait_for_socket(c, MIN(mind_limit(c), LOOK_US));
        if (g_get_monotonic_time() - looked >= LOOK_US) {
            looked = g_get_monotonic_time();
            remove_idle_readers(c);
        }
        while (receive_one(c)) {
            run_woken(c);
        }
        WITH_QEMU_LOCK_GUARD(&c->lock) {
            why = c->wrong;
        }
    }
    return why ?: "it is not needed any more";
}

static void *client_thread(void *opaque)
{
    DedupClient *c = opaque;
    struct pollfd wake = {
        .fd = event_notifier_get_fd(&c->wake), .events = POLLIN,
    };
    int64_t next;

    while (!is_over(c)) {
        next = g_get_monotonic_time() + RECONNECT_US;
        if (c->sock >= 0 ||
            !try_connect(c, c->limit / 1000, wake.fd, NULL)) {
            disconnect(c, converse(c));
        }
        while (!is_over(c) && g_get_monotonic_time() < next) {
            poll(&wake, 1, (next - g_get_monotonic_time()) / 1000 + 1);
            event_notifier_test_and_clear(&c->wake);
        }
    }
    /* it may have been stopped before it began */
    disconnect(c, "it is not needed any more");
    return NULL;
}

/* --- getting and putting a client: main loop ------------------------------ */

static DedupClient *client_new(const char *path, DedupStoreKind kind)
{
    DedupClient *c = g_new0(DedupClient, 1);

    c->path = g_strdup(path);
    c->kind = kind;
    c->sock = -1;
    event_notifier_init(&c->wake, false);
    qemu_mutex_init(&c->lock);
    QTAILQ_INIT(&c->unsent);
    QTAILQ_INIT(&c->sent);
    QSIMPLEQ_INIT(&c->woken);
    QLIST_INSERT_HEAD(&clients, c, next);
    return c;
}

static DedupClient *client_find(const char *path, DedupStoreKind kind)
{
    DedupClient *c;

    QLIST_FOREACH(c, &clients, next) {
        if (!strcmp(c->path, path) && c->kind == kind) {
            return c;
        }
    }
    return NULL;
}

static void end_thread(DedupClient *c)
{
    if (c->has_thread) {
        qatomic_set(&c->stop, true);
        event_notifier_set(&c->wake);
        qemu_thread_join(&c->thread);
        c->has_thread = false;
    }
}

static void start_thread(DedupClient *c, bool lingers)
{
    c->stop = false;
    c->lingers = lingers;
    c->has_thread = true;
    qemu_thread_create(&c->thread, "dedup-client", client_thread, c,
                       QEMU_THREAD_JOINABLE);
}

DedupClient *dedup_client_get(const char *path, DedupStoreKind kind,
                              unsigned silence_ms, unsigned connect_ms,
                              bool *absent, Error **errp)
{
    DedupClient *c = client_find(path, kind) ?: client_new(path, kind);
    int ret = 0;

    GLOBAL_STATE_CODE();
    if (!c->refs) {
        end_thread(c);
        c->limit = silence_ms * 1000LL;
        ret = try_connect(c, connect_ms, -1, errp);
        *absent = ret == -ENOENT;
        if (ret < 0 && c->held) {
            start_thread(c, true);
        }
        if (ret < 0) {
            return NULL;
        }
        start_thread(c, false);
    }
    c->refs++;
    return c;
}

void dedup_client_put(DedupClient *c)
{
    GLOBAL_STATE_CODE();
    if (--c->refs) {
        return;
    }
    WITH_QEMU_LOCK_GUARD(&c->lock) {
        if (c->sock >= 0) {
            start_trim(c);
        }
    }
    qatomic_set(&c->lingers, true);
    event_notifier_set(&c->wake);
}

bool dedup_client_is_up(DedupClient *c)
{
    QEMU_LOCK_GUARD(&c->lock);
    return c->sock >= 0 && !c->silent && !c->wrong;
}

void dedup_client_counters(DedupClient *c, DedupHeldCounters *counters)
{
    DedupHeld *h;

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        h = dedup_held_ref(c->held);
    }
    dedup_held_counters(h, counters);
    dedup_held_unref(h);
}

uint64_t dedup_client_store_size(DedupClient *c)
{
    QEMU_LOCK_GUARD(&c->lock);
    return c->size;
}

uint64_t dedup_client_asked_size(DedupClient *c)
{
    QEMU_LOCK_GUARD(&c->lock);
    return c->asked;
}

bool dedup_client_reclaim(DedupClient *c, Error **errp)
{
    struct ucred cred = { .uid = -1 };
    socklen_t size = sizeof(cred);

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        if (c->sock < 0) {
            error_setg(errp, "group: there is no store daemon at '%s' now",
                       c->path);
            return false;
        }
        getsockopt(c->sock, SOL_SOCKET, SO_PEERCRED, &cred, &size);
    }
    if (geteuid() != 0 && geteuid() != cred.uid) {
        error_setg(errp, "group: only root and the store daemon's user may "
                   "reclaim; use 'qemu-dedup-store reclaim'");
        return false;
    }
    say(c, request_new(SAY, DEDUP_MSG_RECLAIM, 0, sizeof(DedupMsgHeader)), 0);
    return true;
}

/* --- requests ------------------------------------------------------------- */

/* Send @r and wait for its answer.  False, and freed, if it cannot be sent. */
static bool coroutine_fn ask(DedupClient *c, Request *r)
{
    Waiter w = { .co = qemu_coroutine_self() };

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        if (c->sock < 0 || c->silent || c->wrong ||
            (r->connection && r->connection != c->connection)) {
            request_free(r);
            return false;
        }
        if (r->answers) {
            r->answers->held = dedup_held_ref(c->held);
        }
        r->waiter = &w;
        add_reader(c);
        QTAILQ_INSERT_TAIL(&c->unsent, r, next);
        send_all(c);
    }
    qemu_coroutine_yield();
    return true;
}

static void coroutine_fn ask_blocks(DedupClient *c, Request *r, unsigned n,
                                    DedupAnswers *answers)
{
    unsigned i;

    answers->held = NULL;
    answers->n = r->n = n;
    answers->nfilled = 0;
    r->answers = answers;
    if (!ask(c, r)) {
        for (i = 0; i < n; i++) {
            answers->frames[i].answer = DEDUP_ANSWER_FAILED;
        }
    }
}

void coroutine_fn dedup_client_read(DedupClient *c, uint64_t connection,
                                    const DedupMsgExtent *extents, unsigned n,
                                    uint32_t flags, DedupAnswers *answers)
{
    Request *r = request_new(READ, DEDUP_MSG_READ, n, sizeof(DedupMsgRead));
    unsigned i, blocks = 0;

    for (i = 0; i < n; i++) {
        blocks += extents[i].n;
    }
    assert(n && blocks <= DEDUP_READ_BLOCKS);
    r->head.read.flags = flags;
    r->connection = connection;
    r->layer = extents[0].layer;
    r->body = extents;
    r->body_size = n * sizeof(*extents);
    ask_blocks(c, r, blocks, answers);
}

void coroutine_fn dedup_client_put_blocks(DedupClient *c, const void *buf,
                                          unsigned n, uint32_t flags,
                                          DedupAnswers *answers)
{
    Request *r = request_new(PUT, DEDUP_MSG_PUT, n, sizeof(DedupMsgPut));

    assert(n && n <= DEDUP_PUT_BLOCKS);
    r->head.put.flags = flags;
    r->body = buf;
    r->body_size = (size_t)n * DEDUP_PROTOCOL_BLOCK;
    ask_blocks(c, r, n, answers);
}

void dedup_client_done(DedupAnswers *answers)
{
    if (answers->held) {
        dedup_held_unpin(answers->held, answers->frames, answers->n);
        dedup_held_unref(answers->held);
        answers->held = NULL;
    }
}

/* --- layers --------------------------------------------------------------- */

/* Does the daemon know it by its number?  With the lock held. */
static bool is_named(DedupClient *c, const DedupClientLayer *l)
{
    return c->sock >= 0 && l->connection == c->connection &&
           c->layers[l->number] == l;
}

/* A number for @l, with the lock held.  False: there are too many. */
static bool number_layer(DedupClient *c, DedupClientLayer *l)
{
    unsigned long number = find_first_zero_bit(c->numbers, DEDUP_LIMIT_LAYERS);

    *l = (DedupClientLayer) { .connection = c->connection };
    if (number >= DEDUP_LIMIT_LAYERS) {
        l->state = DEDUP_LAYER_LIMIT;
        pstrcpy(l->why, sizeof(l->why), "this QEMU has too many images");
        return false;
    }
    l->number = number;
    set_bit(number, c->numbers);
    c->layers[number] = l;
    return true;
}

/* The daemon was never told of @number, with the lock held. */
static void unname_layer(DedupClient *c, uint32_t number)
{
    *c->layers[number] = (DedupClientLayer) { 0 };
    c->layers[number] = NULL;
    clear_bit(number, c->numbers);
}

/*
 * @l has no number any more, with the lock held.  One whose state was not heard
 * stays in use: the daemon may still be at it.
 */
static void forget_layer(DedupClient *c, DedupClientLayer *l)
{
    Request *r = find_layer_request(c, l->number);

    if (r) {
        remove_sent(c, r);
    }
    if (l->state) {
        clear_bit(l->number, c->numbers);
    }
    c->layers[l->number] = NULL;
    *l = (DedupClientLayer) { 0 };
}

void coroutine_fn dedup_client_open_layer(DedupClient *c, DedupClientLayer *l,
                                          int fd)
{
    Request *r = request_new(LAYER, DEDUP_MSG_LAYER, 0, sizeof(DedupMsgLayer));

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        if (c->sock < 0 || !number_layer(c, l)) {
            request_free(r);
            return;
        }
        r->connection = l->connection;
    }
    r->head.layer.layer = l->number;
    r->fd = fd;
    if (!ask(c, r)) {
        QEMU_LOCK_GUARD(&c->lock);
        if (is_named(c, l)) {
            unname_layer(c, l->number);
        }
    }
}

void dedup_client_close_layer(DedupClient *c, DedupClientLayer *l)
{
    Request *r = request_new(SAY, DEDUP_MSG_UNLAYER, 0, sizeof(DedupMsgLayer));

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        if (is_named(c, l)) {
            r->head.layer.layer = l->number;
            QTAILQ_INSERT_TAIL(&c->unsent, r, next);
            r = NULL;
            forget_layer(c, l);
            send_all(c);
        }
        *l = (DedupClientLayer) { 0 };
    }
    g_free(r);
}

bool dedup_client_layer_is_leased(DedupClient *c, DedupClientLayer *l,
                                  uint32_t *number, uint64_t *connection,
                                  bool *name)
{
    QEMU_LOCK_GUARD(&c->lock);
    *number = l->number;
    *connection = l->connection;
    *name = c->sock >= 0 && !c->silent && !c->wrong &&
            l->connection != c->connection;
    return c->sock >= 0 && l->connection == c->connection &&
           l->state == DEDUP_LAYER_LEASED;
}

char *dedup_client_layer_why(DedupClient *c, DedupClientLayer *l)
{
    QEMU_LOCK_GUARD(&c->lock);
    return l->state && l->state != DEDUP_LAYER_LEASED ? g_strdup(l->why) : NULL;
}
