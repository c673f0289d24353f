/*
 * dedup-share: tests of the connection to a store daemon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Against the real daemon, and against scripts that break the protocol, or do
 * not speak.
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include "block/aio.h"
#include "block/dedup-share.h"
#include "block/dedup-share/client.h"
#include "block/dedup-share/gather.h"
#include "dedup-store/send.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/memfd.h"
#include "qemu/units.h"
#include "dedup-daemon.h"
#include "dedup-guest-ram.h"
#include "iothread.h"

#define PAGE DEDUP_BLOCK_SIZE
#define BLOCKS 512              /* of the image; 2 MiB */
#define SLOTS 64                /* of a scripted daemon */
#define LIMIT_MS 20000          /* of silence: none of the real daemon */

static char *dir, *sock, *image;
static uint8_t *bytes;          /* what the image holds */
static GPid daemon_pid;
static DedupHeld *trimmed;

/* --- the real daemon ------------------------------------------------------ */

static void start_daemon(const char *size)
{
    daemon_pid = dedup_daemon_start(sock, size);
}

static void end_daemon(int signal)
{
    dedup_daemon_end(daemon_pid, sock, signal);
}

static void setup(void)
{
    unsigned i;

    dir = g_strdup_printf("%s/dedup-client-XXXXXX", g_get_tmp_dir());
    g_assert_nonnull(g_mkdtemp(dir));
    sock = g_build_filename(dir, "sock", NULL);
    image = g_build_filename(dir, "image", NULL);
    bytes = g_malloc(BLOCKS * PAGE);
    for (i = 0; i < BLOCKS * PAGE / 4; i++) {
        ((uint32_t *)bytes)[i] = g_test_rand_int();
    }
    g_assert_true(g_file_set_contents(image, (char *)bytes, BLOCKS * PAGE,
                                      NULL));
}

static void teardown(void)
{
    g_unlink(image);
    g_assert_cmpint(g_rmdir(dir), ==, 0);
    g_free(bytes);
    g_free(image);
    g_free(sock);
    g_free(dir);
}

static DedupClient *get(void)
{
    bool absent;

    return dedup_client_get(sock, DEDUP_STORE_KIND_LINUX, LIMIT_MS, LIMIT_MS,
                            &absent, &error_abort);
}

/* --- in coroutines -------------------------------------------------------- */

typedef struct Ask {
    DedupClient *c;
    DedupMsgExtent extent;      /* n is 0: put @buf */
    uint64_t connection;
    const void *buf;
    unsigned n;
    DedupClientLayer *layer;    /* open it, if not NULL */
    int fd;
    bool done;
    DedupAnswers a;
} Ask;

static void coroutine_fn ask_entry(void *opaque)
{
    Ask *q = opaque;

    if (q->layer) {
        dedup_client_open_layer(q->c, q->layer, q->fd);
    } else if (q->extent.n) {
        dedup_client_read(q->c, q->connection, &q->extent, 1, 0, &q->a);
    } else {
        dedup_client_put_blocks(q->c, q->buf, q->n, 0, &q->a);
    }
    q->done = true;
}

static void begin(Ask *q)
{
    q->done = false;
    qemu_coroutine_enter(qemu_coroutine_create(ask_entry, q));
}

static void end(Ask *q)
{
    while (!q->done) {
        aio_poll(qemu_get_aio_context(), true);
    }
}

static void ask(Ask *q)
{
    begin(q);
    end(q);
}

static DedupLayerState open_layer(DedupClient *c, DedupClientLayer *l)
{
    Ask q = { .c = c, .layer = l, .fd = open(image, O_RDONLY) };

    ask(&q);
    close(q.fd);
    return l->state;
}

static void read_layer(Ask *q, DedupClient *c, const DedupClientLayer *l,
                       unsigned first, unsigned n)
{
    *q = (Ask) {
        .c = c, .connection = l->connection,
        .extent = { .layer = l->number, .first = first, .n = n },
    };
    ask(q);
    g_assert_cmpint(q->a.n, ==, n);
}

static void put(Ask *q, DedupClient *c, const void *buf, unsigned n)
{
    *q = (Ask) { .c = c, .buf = buf, .n = n };
    ask(q);
    g_assert_cmpint(q->a.n, ==, n);
}

/* All blocks are in frames that hold these bytes. */
static void check_frames(const DedupAnswers *a, const uint8_t *want)
{
    g_autofree uint8_t *got = g_malloc(PAGE);
    unsigned i;

    for (i = 0; i < a->n; i++) {
        g_assert_cmpint(a->frames[i].answer, ==, DEDUP_ANSWER_FRAME);
        g_assert_cmpint(dedup_held_copy(a->held, a->frames[i].slot, 0, got,
                                        PAGE), ==, 0);
        g_assert_cmpmem(got, PAGE, want + i * PAGE, PAGE);
    }
}

static void check_all(const DedupAnswers *a, DedupAnswer want)
{
    unsigned i;

    for (i = 0; i < a->n; i++) {
        g_assert_cmpint(a->frames[i].answer, ==, want);
    }
}

/* --- tests with the real daemon ------------------------------------------- */

static void test_read(void)
{
    DedupClientLayer l = { 0 };
    DedupClient *c;
    uint64_t connection;
    uint32_t number;
    bool name;
    Ask q, again;

    setup();
    start_daemon("16M");
    c = get();
    g_assert_true(dedup_client_is_up(c));
    g_assert_cmpint(dedup_client_store_size(c), ==, 16 * MiB);
    g_assert_false(dedup_client_layer_is_leased(c, &l, &number,
                                               &connection, &name));
    g_assert_true(name);
    g_assert_cmpint(open_layer(c, &l), ==, DEDUP_LAYER_LEASED);
    g_assert_true(dedup_client_layer_is_leased(c, &l, &number,
                                               &connection, &name));
    read_layer(&q, c, &l, 7, 256);
    check_frames(&q.a, bytes + 7 * PAGE);
    read_layer(&again, c, &l, 7, 256);
    check_frames(&again.a, bytes + 7 * PAGE);
    g_assert_cmpint(q.a.frames[3].slot, ==, again.a.frames[3].slot);
    g_assert_cmpint(dedup_held_count(q.a.held), ==, 256);
    dedup_client_done(&q.a);
    dedup_client_done(&again.a);

    /* content that is there is found when it is put */
    put(&again, c, bytes + 9 * PAGE, 32);
    check_frames(&again.a, bytes + 9 * PAGE);
    g_assert_cmpint(q.a.frames[2].slot, ==, again.a.frames[0].slot);
    dedup_client_done(&again.a);
    dedup_client_close_layer(c, &l);
    dedup_client_put(c);
    end_daemon(SIGTERM);
    teardown();
}

/* More requests than the daemon takes, and more bytes than the socket does. */
static void test_many(void)
{
    enum { MANY = 3 * DEDUP_LIMIT_REQUESTS };
    g_autofree Ask *q = g_new0(Ask, MANY);
    DedupClientLayer l = { 0 };
    DedupClient *c;
    unsigned i, n = 16;

    setup();
    start_daemon("16M");
    c = get();
    for (i = 0; i < MANY; i++) {
        q[i] = (Ask) { .c = c, .buf = bytes + i * 2 * PAGE, .n = n };
        begin(&q[i]);
    }
    for (i = 0; i < MANY; i++) {
        end(&q[i]);
        check_frames(&q[i].a, bytes + i * 2 * PAGE);
        dedup_client_done(&q[i].a);
    }

    /* it finds all of them when it goes on, and is not asked too much */
    g_assert_cmpint(open_layer(c, &l), ==, DEDUP_LAYER_LEASED);
    dedup_daemon_stop(daemon_pid);
    for (i = 0; i < MANY; i++) {
        q[i] = (Ask) {
            .c = c, .connection = l.connection,
            .extent = { .layer = l.number, .first = i, .n = 1 },
        };
        begin(&q[i]);
    }
    kill(daemon_pid, SIGCONT);
    for (i = 0; i < MANY; i++) {
        end(&q[i]);
        check_frames(&q[i].a, bytes + i * PAGE);
        dedup_client_done(&q[i].a);
    }
    dedup_client_close_layer(c, &l);
    dedup_client_put(c);
    end_daemon(SIGTERM);
    teardown();
}

/* Who opens the image for writing waits for nobody, and ends the lease. */
static void test_break(void)
{
    DedupClientLayer l = { 0 };
    DedupClient *c;
    uint64_t connection;
    uint32_t number;
    bool name;
    Ask q;
    int fd;

    setup();
    start_daemon("16M");
    c = get();
    g_assert_cmpint(open_layer(c, &l), ==, DEDUP_LAYER_LEASED);
    read_layer(&q, c, &l, 0, 64);
    fd = open(image, O_WRONLY);
    g_assert_cmpint(pwrite(fd, bytes + PAGE, PAGE, 0), ==, PAGE);
    check_frames(&q.a, bytes);          /* what was read is what it was */
    dedup_client_done(&q.a);
    read_layer(&q, c, &l, 0, 64);
    check_all(&q.a, DEDUP_ANSWER_NO_LEASE);
    dedup_client_done(&q.a);
    g_assert_false(dedup_client_layer_is_leased(c, &l, &number,
                                               &connection, &name));
    g_assert_false(name);
    g_assert_cmpint(l.state, ==, DEDUP_LAYER_BROKEN);
    close(fd);
    dedup_client_close_layer(c, &l);
    g_assert_cmpint(open_layer(c, &l), ==, DEDUP_LAYER_LEASED);
    read_layer(&q, c, &l, 0, 1);
    check_frames(&q.a, bytes + PAGE);
    dedup_client_done(&q.a);
    dedup_client_close_layer(c, &l);
    dedup_client_put(c);
    end_daemon(SIGTERM);
    teardown();
}

/* Put new content until the daemon has taken @want blocks of it. */
static void put_new(DedupClient *c, unsigned want)
{
    uint8_t *buf = g_malloc0(PAGE);
    static uint64_t number;
    Ask q;

    while (want) {
        *(uint64_t *)buf = ++number;
        put(&q, c, buf, 1);
        if (q.a.frames[0].answer == DEDUP_ANSWER_FRAME) {
            check_frames(&q.a, buf);
            want--;
        } else {
            /* the store is full, or this client has its part of it */
            g_assert_true(q.a.frames[0].answer == DEDUP_ANSWER_FULL ||
                          q.a.frames[0].answer == DEDUP_ANSWER_BUSY);
            g_usleep(10 * 1000);
        }
        dedup_client_done(&q.a);
    }
    g_free(buf);
}

/*
 * What a page of the guest maps is kept when the store is filled twice; what
 * none does, is not.  So it is when the connection is another.
 */
static void test_trim(void)
{
    uint8_t *guest = dedup_guest_ram_new(8 * PAGE);
    DedupClient *c;
    DedupHeld *h;
    unsigned i, slots;
    Ask q;

    setup();
    start_daemon("1M");
    c = get();
    slots = dedup_client_store_size(c) / PAGE;
    for (i = 0; i < 8; i++) {
        put(&q, c, bytes + i * PAGE, 1);
        g_assert_true(dedup_given_map(dedup_held_owner(q.a.held),
                                      guest + i * PAGE, q.a.frames[0].slot,
                                      1));
        h = dedup_held_ref(q.a.held);
        dedup_client_done(&q.a);
        if (i < 7) {
            dedup_held_unref(h);
        }
    }
    put_new(c, 2 * slots);
    g_assert_cmpmem(guest, 8 * PAGE, bytes, 8 * PAGE);
    dedup_client_put(c);                /* and its holds stay */
    c = get();
    memset(guest + 4 * PAGE, 0x55, 4 * PAGE);
    put_new(c, 2 * slots);
    g_assert_cmpmem(guest, 4 * PAGE, bytes, 4 * PAGE);
    g_assert_cmpint(dedup_held_count(h), >=, 4);
    dedup_held_unref(h);
    dedup_client_put(c);
    end_daemon(SIGTERM);
    dedup_guest_ram_free();
    teardown();
}

static const DedupMsgFrame late = {
    .answer = DEDUP_ANSWER_FRAME, .slot = 2 * DEDUP_RELEASE_SLOTS - 9,
    .generation = 5,
};

static void release_some(void *opaque, const uint32_t *slots, unsigned n,
                         uint64_t serial)
{
    unsigned *calls = opaque;
    unsigned i;

    g_assert_cmpint(serial, ==, 7);
    for (i = 0; i < n; i++) {
        g_assert_cmpint(slots[i], !=, late.slot);
    }
    if (!(*calls)++) {
        dedup_held_unpin(trimmed, &late, 1);
    }
}

/* A request that ends while a trim is under way may have given its frame. */
static void test_trim_race(void)
{
    uint32_t nslots = 2 * DEDUP_RELEASE_SLOTS, i;
    DedupMsgWelcome w = {
        .store = DEDUP_STORE_KIND_LINUX, .nslots = nslots, .uuid = { 1 },
    };
    int fd = qemu_memfd_create("frames", (size_t)nslots * PAGE, false, 0, 0,
                               &error_abort);
    DedupHeld *h = dedup_held_new(fd, &w, &error_abort);
    g_autofree DedupMsgFrame *frames = g_new(DedupMsgFrame, nslots);
    unsigned calls = 0, done;

    trimmed = h;
    for (i = 0; i < nslots; i++) {
        frames[i] = late;
        frames[i].slot = i;
    }
    frames[late.slot].answer = DEDUP_ANSWER_ZEROES;
    g_assert_true(dedup_held_add(h, 6, frames, nslots, false, &done));
    g_assert_true(dedup_held_add(h, 7, &late, 1, true, &done));
    g_assert_false(dedup_held_add(h, 7, &late, 1, true, &done));
    dedup_held_trim(h, release_some, &calls);
    g_assert_cmpint(calls, ==, 2);
    g_assert_cmpint(dedup_held_count(h), ==, 1);
    dedup_held_unref(h);
}

/* What the daemon would know, of as many slots as an answer has. */
static struct {
    QemuMutex lock;
    uint64_t named;             /* the serial of the answer that named all */
    bool holds[DEDUP_READ_BLOCKS];
    bool stop;                  /* atomic */
} model;

static void release_in_model(void *opaque, const uint32_t *slots, unsigned n,
                             uint64_t serial)
{
    unsigned i;

    QEMU_LOCK_GUARD(&model.lock);
    for (i = 0; i < n; i++) {
        model.holds[slots[i]] &= model.named > serial;
    }
}

static void *trim_always(void *opaque)
{
    while (!qatomic_read(&model.stop)) {
        dedup_held_trim(opaque, release_in_model, NULL);
    }
    return NULL;
}

/* A trim lets go of nothing that an answer names which it says it knows of. */
static void test_trim_serial(void)
{
    DedupMsgFrame frames[DEDUP_READ_BLOCKS];
    DedupMsgWelcome w = {
        .store = DEDUP_STORE_KIND_LINUX, .nslots = DEDUP_READ_BLOCKS,
        .uuid = { 1 },
    };
    int fd = qemu_memfd_create("frames", DEDUP_READ_BLOCKS * PAGE, false, 0, 0,
                               &error_abort);
    DedupHeld *h = dedup_held_new(fd, &w, &error_abort);
    GThread *thread;
    unsigned i, done, rounds;

    qemu_mutex_init(&model.lock);
    for (i = 0; i < DEDUP_READ_BLOCKS; i++) {
        frames[i] = late;
        frames[i].slot = i;
    }
    thread = g_thread_new("trim", trim_always, h);
    for (rounds = 1; rounds <= 20000; rounds++) {
        WITH_QEMU_LOCK_GUARD(&model.lock) {
            model.named = rounds;
            memset(model.holds, true, sizeof(model.holds));
        }
        g_assert_true(dedup_held_add(h, rounds, frames, DEDUP_READ_BLOCKS,
                                     true, &done));
        WITH_QEMU_LOCK_GUARD(&model.lock) {
            for (i = 0; i < DEDUP_READ_BLOCKS; i++) {
                g_assert_true(model.holds[i]);
            }
        }
        dedup_held_unpin(h, frames, DEDUP_READ_BLOCKS);
    }
    qatomic_set(&model.stop, true);
    g_thread_join(thread);
    qemu_mutex_destroy(&model.lock);
    dedup_held_unref(h);
}

/* The daemon dies: requests go on without, and with the next one. */
static void test_killed(void)
{
    DedupClientLayer l = { 0 };
    DedupClient *c;
    uint64_t connection;
    uint32_t number;
    bool name;
    Ask old, q;

    setup();
    start_daemon("16M");
    c = get();
    g_assert_cmpint(open_layer(c, &l), ==, DEDUP_LAYER_LEASED);
    read_layer(&old, c, &l, 0, 64);
    end_daemon(SIGKILL);
    read_layer(&q, c, &l, 0, 64);
    check_all(&q.a, DEDUP_ANSWER_FAILED);
    dedup_client_done(&q.a);
    start_daemon("16M");
    while (dedup_client_layer_is_leased(c, &l, &number,
                                               &connection, &name) || !name) {
        g_usleep(10 * 1000);
    }
    g_assert_cmpint(open_layer(c, &l), ==, DEDUP_LAYER_LEASED);
    read_layer(&q, c, &l, 64, 64);
    check_frames(&q.a, bytes + 64 * PAGE);
    g_assert_true(old.a.held != q.a.held);
    dedup_client_done(&q.a);
    check_frames(&old.a, bytes);        /* of the one that has died */
    dedup_client_done(&old.a);
    dedup_client_close_layer(c, &l);
    dedup_client_put(c);
    end_daemon(SIGTERM);
    teardown();
}

/* --- several AioContexts -------------------------------------------------- */

/* Who asks for blocks, one after the other, in an AioContext. */
typedef struct Asker {
    DedupClient *c;
    const DedupClientLayer *layer;
    unsigned left;              /* requests; atomic: others look */
} Asker;

static void coroutine_fn asker_entry(void *opaque)
{
    Asker *a = opaque;
    unsigned left;

    while ((left = qatomic_read(&a->left))) {
        unsigned first = left * 37 % (BLOCKS - 3);
        DedupMsgExtent e = {
            .layer = a->layer->number, .first = first, .n = 3,
        };
        DedupAnswers answers;

        dedup_client_read(a->c, a->layer->connection, &e, 1, 0, &answers);
        check_frames(&answers, bytes + first * PAGE);
        dedup_client_done(&answers);
        qatomic_set(&a->left, left - 1);
    }
}

static void asker_begin(Asker *a, AioContext *ctx, unsigned n)
{
    qatomic_set(&a->left, n);
    aio_co_enter(ctx, qemu_coroutine_create(asker_entry, a));
}

/*
 * Who asks is answered in its own AioContext, whatever the others do: all at
 * once; while one that has asked before does something else; when others have
 * ended.
 */
static void test_contexts(void)
{
    IOThread *threads[] = { iothread_new(), iothread_new() };
    DedupClientLayer l = { 0 };
    Asker askers[3];
    DedupClient *c;
    unsigned i;

    setup();
    start_daemon("16M");
    c = get();
    g_assert_cmpint(open_layer(c, &l), ==, DEDUP_LAYER_LEASED);
    for (i = 0; i < 3; i++) {
        askers[i] = (Asker) { .c = c, .layer = &l };
        asker_begin(&askers[i], i < 2 ? iothread_get_aio_context(threads[i]) :
                    qemu_get_aio_context(), 2000);
    }
    while (qatomic_read(&askers[0].left) || qatomic_read(&askers[1].left) ||
           askers[2].left) {
        aio_poll(qemu_get_aio_context(), askers[2].left);
    }
    asker_begin(&askers[1], iothread_get_aio_context(threads[1]), 2000);
    while (qatomic_read(&askers[1].left)) {
        g_usleep(1000);
    }
    iothread_join(threads[0]);
    iothread_join(threads[1]);
    asker_begin(&askers[2], qemu_get_aio_context(), 100);
    while (askers[2].left) {
        aio_poll(qemu_get_aio_context(), true);
    }
    dedup_client_close_layer(c, &l);
    dedup_client_put(c);        /* which has read in those that are gone */
    end_daemon(SIGTERM);
    teardown();
}

/* A daemon that is stopped is not waited for, and is asked again later. */
static void test_stopped(void)
{
    DedupClient *c;
    bool absent;
    Ask q;

    setup();
    start_daemon("16M");
    c = dedup_client_get(sock, DEDUP_STORE_KIND_LINUX, 300, LIMIT_MS, &absent,
                         &error_abort);
    dedup_daemon_stop(daemon_pid);
    put(&q, c, bytes, 4);
    check_all(&q.a, DEDUP_ANSWER_FAILED);
    dedup_client_done(&q.a);
    g_assert_false(dedup_client_is_up(c));
    put(&q, c, bytes, 4);
    check_all(&q.a, DEDUP_ANSWER_FAILED);
    dedup_client_done(&q.a);
    kill(daemon_pid, SIGCONT);
    while (!dedup_client_is_up(c)) {
        g_usleep(1000);
    }
    put(&q, c, bytes, 4);
    check_frames(&q.a, bytes);
    g_assert_cmpint(dedup_held_count(q.a.held), ==, 4);
    dedup_client_done(&q.a);
    dedup_client_put(c);
    end_daemon(SIGTERM);
    teardown();
}

/* An image that could not be named in time is named later. */
static void test_named_too_late(void)
{
    enum { MANY = DEDUP_LIMIT_REQUESTS };
    g_autofree Ask *q = g_new0(Ask, MANY);
    DedupClientLayer l = { 0 };
    uint64_t connection;
    uint32_t number;
    DedupClient *c;
    unsigned i;
    bool absent, name;
    Ask read;

    setup();
    start_daemon("16M");
    c = dedup_client_get(sock, DEDUP_STORE_KIND_LINUX, 300, LIMIT_MS, &absent,
                         &error_abort);
    dedup_daemon_stop(daemon_pid);
    for (i = 0; i < MANY; i++) {
        q[i] = (Ask) { .c = c, .buf = bytes, .n = 1 };
        begin(&q[i]);
    }
    g_assert_cmpint(open_layer(c, &l), ==, 0);
    for (i = 0; i < MANY; i++) {
        end(&q[i]);
        dedup_client_done(&q[i].a);
    }
    kill(daemon_pid, SIGCONT);
    while (!dedup_client_is_up(c)) {
        g_usleep(1000);
    }
    g_assert_false(dedup_client_layer_is_leased(c, &l, &number, &connection,
                                                &name));
    g_assert_true(name);
    g_assert_cmpint(open_layer(c, &l), ==, DEDUP_LAYER_LEASED);
    read_layer(&read, c, &l, 5, 9);
    check_frames(&read.a, bytes + 5 * PAGE);
    dedup_client_done(&read.a);
    dedup_client_close_layer(c, &l);
    put(&read, c, bytes, 1);            /* the connection is the same */
    check_frames(&read.a, bytes);
    dedup_client_done(&read.a);
    dedup_client_put(c);
    end_daemon(SIGTERM);
    teardown();
}

/* --- a daemon that is not one --------------------------------------------- */

typedef struct Script {
    DedupMsgWelcome welcome;
    int frames;                 /* passed with it, if >= 0 */
    /* to the first request; its number, and perhaps more, is filled in */
    union {
        DedupMsgHeader header;
        DedupMsgLayerState state;
        struct {
            DedupMsgAnswer answer;
            DedupMsgFrame frames[2];
        };
    } m;
    size_t size;                /* of @m; 0: say nothing */
    int fd;                     /* passed with it, if > 0 */
    unsigned times;             /* that it is said, at most twice */
    void *(*run)(void *);       /* NULL: run_script() */
    GThread *thread;
    int listener;
} Script;

/* Serve one connection until it ends. */
static void *run_script(void *opaque)
{
    Script *sc = opaque;
    g_autofree uint8_t *buf = g_malloc(DEDUP_MSG_MAX);
    DedupMsgHeader *h = (void *)buf;
    int s = accept(sc->listener, NULL, NULL);
    unsigned i;

    if (recv(s, buf, DEDUP_MSG_MAX, 0) > 0) {
        dedup_send(s, &sc->welcome, sizeof(sc->welcome), NULL, 0, sc->frames);
    }
    while (recv(s, buf, DEDUP_MSG_MAX, 0) > 0) {
        for (i = 0; sc->size && i < sc->times; i++) {
            if (sc->m.header.type == DEDUP_MSG_ANSWER) {
                sc->m.header.request += h->request;
                sc->m.answer.serial += i;
            }
            dedup_send(s, &sc->m, sc->size, NULL, 0, sc->fd > 0 ? sc->fd : -1);
            sc->m.header.request = 0;
        }
    }
    close(s);
    return NULL;
}

static void listen_for(Script *sc)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };

    pstrcpy(addr.sun_path, sizeof(addr.sun_path), sock);
    sc->listener = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    g_assert_cmpint(bind(sc->listener, (struct sockaddr *)&addr,
                         sizeof(addr)), ==, 0);
    g_assert_cmpint(listen(sc->listener, 1), ==, 0);
    sc->thread = g_thread_new("script", sc->run ?: run_script, sc);
}

/* What holds its frames still looks for it there: the next one is elsewhere. */
static void end_script(Script *sc)
{
    static unsigned n;

    g_thread_join(sc->thread);
    close(sc->listener);
    g_unlink(sock);
    g_free(sock);
    sock = g_strdup_printf("%s/sock-%u", dir, n++);
}

static int make_frames(size_t size, int flags)
{
    int fd = qemu_memfd_create("frames", size, false, 0, 0, &error_abort);
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", fd);
    int reopened = open(path, flags);

    close(fd);
    g_assert_cmpint(reopened, >=, 0);
    return reopened;
}

/* What an honest daemon says. */
static Script honest(void)
{
    static uint8_t uuid;

    return (Script) {
        .welcome = {
            .header.type = DEDUP_MSG_WELCOME,
            .version = DEDUP_PROTOCOL_VERSION,
            .store = DEDUP_STORE_KIND_LINUX, .nslots = SLOTS,
            .uuid = { ++uuid },
        },
        .frames = make_frames(SLOTS * PAGE, O_RDONLY),
        .m = {
            .answer = {
                .header = { DEDUP_MSG_ANSWER, 2, 0 }, .serial = 1,
            },
            .frames = {
                { .answer = DEDUP_ANSWER_FRAME, .slot = 3, .generation = 1 },
                { .answer = DEDUP_ANSWER_ZEROES },
            },
        },
        .size = sizeof(DedupMsgAnswer) + 2 * sizeof(DedupMsgFrame),
        .times = 1,
    };
}

/* Put two blocks. */
static void with_script(Script *sc, void (*check)(DedupClient *c, Ask *q))
{
    DedupClient *c;
    Ask q;

    listen_for(sc);
    c = get();
    put(&q, c, bytes, 2);
    check(c, &q);
    dedup_client_done(&q.a);
    dedup_client_put(c);
    end_script(sc);
    close(sc->frames);
}

static void check_honest(DedupClient *c, Ask *q)
{
    g_assert_cmpint(q->a.frames[0].answer, ==, DEDUP_ANSWER_FRAME);
    g_assert_cmpint(q->a.frames[0].slot, ==, 3);
    g_assert_cmpint(q->a.frames[1].answer, ==, DEDUP_ANSWER_ZEROES);
    g_assert_true(dedup_client_is_up(c));
}

/* At least one block was not decided, and the connection has ended. */
static void check_refused(DedupClient *c, Ask *q)
{
    g_assert_cmpint(q->a.frames[1].answer, ==, DEDUP_ANSWER_FAILED);
    while (dedup_client_is_up(c)) {
        g_usleep(1000);
    }
}

/* The request was answered; then the connection has ended. */
static void check_ended(DedupClient *c, Ask *q)
{
    while (dedup_client_is_up(c)) {
        g_usleep(1000);
    }
}

static void test_wrong_answers(void)
{
    void (*check)(DedupClient *, Ask *);
    unsigned i;

    setup();
    for (i = 0; i <= 16; i++) {
        Script sc = honest();

        check = check_refused;
        switch (i) {
        case 0:
            check = check_honest;
            break;
        case 1:
            sc.m.header.count = 3;
            break;
        case 2:
            sc.size -= 8;
            break;
        case 3:
            sc.m.header.request = 1;    /* of none that was asked */
            break;
        case 4:
            sc.m.header.count = 1;      /* one block of two */
            sc.size -= sizeof(DedupMsgFrame);
            break;
        case 5:
            sc.m.answer.serial = 0;
            break;
        case 6:
            sc.m.frames[1].answer = 0;
            break;
        case 7:
            sc.m.frames[1].answer = DEDUP_ANSWER_BUSY + 1;
            break;
        case 8:
            sc.m.frames[1] = (DedupMsgFrame) {
                .answer = DEDUP_ANSWER_FRAME, .slot = SLOTS, .generation = 1,
            };
            break;
        case 9:
            sc.m.frames[1] = (DedupMsgFrame) {
                .answer = DEDUP_ANSWER_FRAME, .slot = 1,
            };
            break;
        case 10:                        /* a held slot with another content */
            sc.m.frames[1] = sc.m.frames[0];
            sc.m.frames[1].generation = 2;
            break;
        case 11:
            sc.m.frames[1].flags = 1 << 31;
            break;
        case 12:
            sc.m.header.type = 99;
            break;
        case 13:
            sc.m.header.type = DEDUP_MSG_WELCOME;
            break;
        case 14:
            sc.fd = sc.frames;
            break;
        case 15:
            sc.size = sizeof(DedupMsgHeader) - 4;
            break;
        case 16:                        /* all of it once more */
            sc.times = 2;
            check = check_ended;
            break;
        }
        with_script(&sc, check);
    }
    teardown();
}

static void test_wrong_welcomes(void)
{
    Error *err = NULL;
    bool absent;
    unsigned i;

    setup();
    for (i = 0; i <= 11; i++) {
        Script sc = honest();
        int whole = sc.frames;

        switch (i) {
        case 0:
            sc.welcome.store = DEDUP_STORE_KIND_XEN;
            break;
        case 1:
            sc.welcome.version++;
            break;
        case 2:
            sc.welcome.nslots = 0;
            break;
        case 3:
            sc.welcome.nslots++;
            break;
        case 4:
            sc.frames = -1;
            break;
        case 5:
            sc.frames = make_frames(SLOTS * PAGE, O_RDWR);
            break;
        case 6:
            sc.frames = make_frames(SLOTS * PAGE, O_PATH);
            break;
        case 7:
            sc.frames = make_frames(SLOTS * PAGE / 2, O_RDONLY);
            break;
        case 8:
            sc.frames = open(image, O_RDONLY);
            sc.welcome.nslots = BLOCKS;
            break;
        case 9:
            sc.welcome.header.count = 1;
            break;
        case 10:
            sc.welcome.header.type = DEDUP_MSG_ALIVE;
            break;
        case 11:
            memset(sc.welcome.uuid, 0, sizeof(sc.welcome.uuid));
            break;
        }
        listen_for(&sc);
        g_assert_null(dedup_client_get(sock, DEDUP_STORE_KIND_LINUX, LIMIT_MS,
                                       LIMIT_MS, &absent, &err));
        g_assert_false(absent);
        g_assert_true(g_str_has_prefix(error_get_pretty(err), "socket: "));
        error_free(err);
        err = NULL;
        end_script(&sc);
        if (sc.frames >= 0 && sc.frames != whole) {
            close(sc.frames);
        }
        close(whole);
    }
    teardown();
}

static void test_nobody(void)
{
    Error *err = NULL;
    bool absent;

    setup();
    g_assert_null(dedup_client_get(sock, DEDUP_STORE_KIND_LINUX, LIMIT_MS,
                                   LIMIT_MS, &absent, &err));
    g_assert_true(absent);
    g_assert_nonnull(strstr(error_get_pretty(err), "no store daemon listens"));
    error_free(err);
    teardown();
}

static void *run_close(void *opaque)
{
    Script *sc = opaque;

    close(accept(sc->listener, NULL, NULL));
    return NULL;
}

static void *run_hear_and_close(void *opaque)
{
    Script *sc = opaque;
    int s = accept(sc->listener, NULL, NULL);
    DedupMsgHello hello;

    g_assert_cmpint(recv(s, &hello, sizeof(hello), 0), ==, sizeof(hello));
    close(s);
    return NULL;
}

/* It ends with a connection that it has not accepted. */
static void *run_end(void *opaque)
{
    Script *sc = opaque;
    struct pollfd p = { .fd = sc->listener, .events = POLLIN };

    g_assert_cmpint(poll(&p, 1, -1), ==, 1);
    g_usleep(10 * 1000);                /* and perhaps said HELLO */
    close(sc->listener);
    sc->listener = -1;
    return NULL;
}

/* One that ends before it has said anything is absent. */
static void test_ending(void)
{
    void *(*const runs[])(void *) = { run_close, run_hear_and_close, run_end };
    unsigned i;
    bool absent;

    setup();
    for (i = 0; i < ARRAY_SIZE(runs); i++) {
        Script sc = { .run = runs[i] };
        Error *err = NULL;

        listen_for(&sc);
        g_assert_null(dedup_client_get(sock, DEDUP_STORE_KIND_LINUX, LIMIT_MS,
                                       LIMIT_MS, &absent, &err));
        g_assert_true(absent);
        g_assert_nonnull(strstr(error_get_pretty(err), "just ended"));
        error_free(err);
        end_script(&sc);
    }
    teardown();
}

/* Accept, and say nothing, until the peer is gone. */
static void *run_silent(void *opaque)
{
    Script *sc = opaque;
    DedupMsgHello hello;
    int s = accept(sc->listener, NULL, NULL);

    qatomic_set(&sc->times, 1);
    while (recv(s, &hello, sizeof(hello), 0) > 0) {
        qatomic_set(&sc->times, 2);
    }
    close(s);
    return NULL;
}

/* Who is not wanted any more waits for no daemon that does not answer. */
static void test_put_while_connecting(void)
{
    Script sc = { .run = run_silent };
    DedupClient *c;
    int64_t start;

    setup();
    start_daemon("16M");
    c = get();
    end_daemon(SIGTERM);
    listen_for(&sc);
    while (qatomic_read(&sc.times) < 2) {
        g_usleep(1000);
    }
    start = g_get_monotonic_time();
    dedup_client_put(c);
    g_assert_cmpint(g_get_monotonic_time() - start, <, LIMIT_MS * 1000 / 2);
    end_script(&sc);
    teardown();
}

static void say_leased(int s, uint32_t layer)
{
    DedupMsgLayerState m = {
        .header.type = DEDUP_MSG_LAYER_STATE, .layer = layer,
        .state = DEDUP_LAYER_LEASED,
    };

    dedup_send(s, &m, sizeof(m), NULL, 0, -1);
}

static void say_zeroes(int s, uint64_t request, uint64_t serial)
{
    DedupMsgAnswer a = {
        .header = { DEDUP_MSG_ANSWER, 1, request }, .serial = serial,
    };
    DedupMsgFrame f = { .answer = DEDUP_ANSWER_ZEROES };

    dedup_send(s, &a, sizeof(a), &f, sizeof(f), -1);
}

/* The disk of layer 0 hangs; all else is answered. */
static void *run_hanging_disk(void *opaque)
{
    Script *sc = opaque;
    g_autofree uint8_t *buf = g_malloc(DEDUP_MSG_MAX);
    int s = accept(sc->listener, NULL, NULL);
    DedupMsgHeader *h = (void *)buf;
    DedupMsgExtent *e = (void *)(buf + sizeof(DedupMsgRead));
    uint64_t serial = 0;

    while (recv(s, buf, DEDUP_MSG_MAX, 0) > 0) {
        if (h->type == DEDUP_MSG_HELLO) {
            dedup_send(s, &sc->welcome, sizeof(sc->welcome), NULL, 0,
                       sc->frames);
        } else if (h->type == DEDUP_MSG_LAYER) {
            say_leased(s, ((DedupMsgLayer *)h)->layer);
        } else if (h->type == DEDUP_MSG_PUT ||
                   (h->type == DEDUP_MSG_READ && e->layer)) {
            say_zeroes(s, h->request, ++serial);
        }
    }
    close(s);
    return NULL;
}

/* It keeps no request for another image waiting. */
static void test_hanging_disk(void)
{
    enum { MANY = 2 * DEDUP_LIMIT_REQUESTS };
    g_autofree Ask *q = g_new0(Ask, MANY);
    DedupClientLayer hangs = { 0 }, other = { 0 };
    Script sc = honest();
    DedupClient *c;
    unsigned i;
    bool absent;
    Ask one;

    setup();
    sc.run = run_hanging_disk;
    listen_for(&sc);
    c = dedup_client_get(sock, DEDUP_STORE_KIND_LINUX, 1000, LIMIT_MS, &absent,
                         &error_abort);
    g_assert_cmpint(open_layer(c, &hangs), ==, DEDUP_LAYER_LEASED);
    g_assert_cmpint(open_layer(c, &other), ==, DEDUP_LAYER_LEASED);
    for (i = 0; i < MANY; i++) {
        q[i] = (Ask) {
            .c = c, .connection = hangs.connection,
            .extent = { .layer = hangs.number, .first = i, .n = 1 },
        };
        begin(&q[i]);
    }
    for (i = 0; i < 20; i++) {
        read_layer(&one, c, &other, i, 1);
        check_all(&one.a, DEDUP_ANSWER_ZEROES);
        dedup_client_done(&one.a);
        put(&one, c, bytes, 1);
        check_all(&one.a, DEDUP_ANSWER_ZEROES);
        dedup_client_done(&one.a);
    }
    g_assert_false(q[0].done);
    for (i = 0; i < MANY; i++) {
        end(&q[i]);                     /* the daemon says nothing more */
        dedup_client_done(&q[i].a);
    }
    dedup_client_put(c);
    end_script(&sc);
    close(sc.frames);
    teardown();
}

static unsigned count_fds(void)
{
    g_autoptr(GDir) dir = g_dir_open("/proc/self/fd", 0, NULL);
    unsigned n = 0;

    while (g_dir_read_name(dir)) {
        n++;
    }
    return n;
}

/* Who is got, and not wanted, leaves no connection. */
static void test_put_at_once(void)
{
    unsigned i, before = 0;

    setup();
    start_daemon("16M");
    for (i = 0; i < 50; i++) {
        dedup_client_put(get());
        before = before ?: count_fds();         /* it keeps some */
    }
    g_assert_cmpint(count_fds(), ==, before);
    end_daemon(SIGTERM);
    teardown();
}

/* Gives of several requests, in as few calls of the store as can be */

static unsigned give_calls;

static DedupStore *fake_attach(uint32_t domid, Error **errp)
{
    if (domid != 7) {
        error_setg(errp, "store: there is no domain %u", domid);
        return NULL;
    }
    return (DedupStore *)&give_calls;
}

static void fake_detach(DedupStore *s)
{
    g_assert_true(s == (DedupStore *)&give_calls);
}

static int fake_copy(DedupStore *s, uint32_t slot, size_t skip, void *buf,
                     size_t bytes)
{
    memset(buf, slot, bytes);
    return slot == 5 ? -ESTALE : 0;
}

/* The guest has two frames, one of them twice. */
static void fake_each_used(DedupStore *s,
                           void (*used)(void *opaque, uint32_t slot),
                           void *opaque)
{
    used(opaque, 1);
    used(opaque, 3);
    used(opaque, 1);
}

static void count_give(DedupStore *s, DedupGive *gives, unsigned n)
{
    unsigned i;

    give_calls++;
    g_assert_cmpint(n, <=, DEDUP_BATCH);
    for (i = 0; i < n; i++) {
        gives[i].result = gives[i].slot % DEDUP_RESULT__MAX;
    }
}

/* Frames that are another domain's pages. */
static const DedupStoreOps fake_xen = {
    .kind = DEDUP_SHARE_STORE_XEN,
    .attach = fake_attach, .detach = fake_detach, .copy = fake_copy,
    .give = count_give, .each_used = fake_each_used,
};

static DedupHeld *hold_fake(uint32_t nslots)
{
    DedupMsgWelcome w = {
        .store = DEDUP_STORE_KIND_XEN, .nslots = nslots, .domid = 7,
        .uuid = { 2 },
    };
    DedupHeld *h = dedup_held_new(-1, &w, &error_abort);
    Error *err = NULL;

    g_assert_true(dedup_held_is_of(h, &w, -1));
    w.domid = 8;
    g_assert_null(dedup_held_new(-1, &w, &err));
    error_free_or_abort(&err);
    w.uuid[0]++;
    g_assert_false(dedup_held_is_of(h, &w, -1));
    return h;
}

static void release_two(void *opaque, const uint32_t *slots, unsigned n,
                        uint64_t serial)
{
    g_assert_cmpint(n, ==, 2);
    g_assert_cmpint(slots[0], ==, 0);
    g_assert_cmpint(slots[1], ==, 4);
}

/* On Xen: who has what is the store's to say, pinned frames stay. */
static void test_xen_held(void)
{
    DedupMsgFrame pinned = { .answer = DEDUP_ANSWER_FRAME, .slot = 2,
                             .generation = 1, .handle = 99 };
    DedupHeld *h = hold_fake(8);
    unsigned done;
    uint8_t byte;
    uint32_t i;

    for (i = 0; i < 5; i++) {
        DedupMsgFrame f = pinned;

        f.slot = i;
        g_assert_true(dedup_held_add(h, i + 1, &f, 1, i == pinned.slot,
                                     &done));
    }
    g_assert_false(dedup_held_give(h, 0, NULL, 1));
    g_assert_cmpint(dedup_held_copy(h, 4, 9, &byte, 1), ==, 0);
    g_assert_cmpint(byte, ==, 4);
    g_assert_cmpint(dedup_held_copy(h, 5, 9, &byte, 1), ==, -ESTALE);
    dedup_held_trim(h, release_two, NULL);
    g_assert_cmpint(dedup_held_count(h), ==, 3);
    dedup_held_unpin(h, &pinned, 1);
    dedup_held_unref(h);
}

typedef struct Gatherer {
    DedupGather *gather;
    DedupHeld *held;
    DedupGive gives[40];
    unsigned n;
    bool done;
} Gatherer;

static void coroutine_fn gather_entry(void *opaque)
{
    Gatherer *q = opaque;

    dedup_gather_give(q->gather, q->held, q->gives, q->n);
    q->done = true;
}

static void test_gather(void)
{
    DedupHeld *held = hold_fake(1024), *other = hold_fake(8);
    DedupGather gather;
    Gatherer q[5] = {};
    unsigned i, j, slot = 0;

    dedup_gather_init(&gather);
    for (i = 0; i < ARRAY_SIZE(q); i++) {
        q[i].gather = &gather;
        q[i].held = held;
        q[i].n = i == 3 ? 40 : 11;      /* 33, then 51: two calls */
        for (j = 0; j < q[i].n; j++) {
            q[i].gives[j].slot = slot++;
        }
        qemu_coroutine_enter(qemu_coroutine_create(gather_entry, &q[i]));
        g_assert_false(q[i].done);
        /* nobody may take it for given while it waits */
        g_assert_false(dedup_in_place(q[i].gives[0].result));
    }
    g_assert_cmpint(give_calls, ==, 0);
    while (!q[4].done) {
        aio_poll(qemu_get_aio_context(), true);
    }
    g_assert_cmpint(give_calls, ==, 2);
    for (i = 0; i < ARRAY_SIZE(q); i++) {
        g_assert_true(q[i].done);
        for (j = 0; j < q[i].n; j++) {
            g_assert_cmpint(q[i].gives[j].result, ==,
                            q[i].gives[j].slot % DEDUP_RESULT__MAX);
        }
    }
    /* and again: nothing of the first time is left */
    q[0].done = false;
    qemu_coroutine_enter(qemu_coroutine_create(gather_entry, &q[0]));
    while (!q[0].done) {
        aio_poll(qemu_get_aio_context(), true);
    }
    g_assert_cmpint(give_calls, ==, 3);
    /* frames of another store are not given with these */
    q[0].done = q[1].done = false;
    q[1].held = other;
    qemu_coroutine_enter(qemu_coroutine_create(gather_entry, &q[0]));
    qemu_coroutine_enter(qemu_coroutine_create(gather_entry, &q[1]));
    g_assert_true(q[1].done && !q[0].done);
    while (!q[0].done) {
        aio_poll(qemu_get_aio_context(), true);
    }
    g_assert_cmpint(give_calls, ==, 5);
    dedup_gather_destroy(&gather);
    dedup_held_unref(held);
    dedup_held_unref(other);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    g_test_add_func("/dedup/client/nobody", test_nobody);
    g_test_add_func("/dedup/client/put-at-once", test_put_at_once);
    g_test_add_func("/dedup/client/ending", test_ending);
    g_test_add_func("/dedup/client/put-while-connecting",
                    test_put_while_connecting);
    g_test_add_func("/dedup/client/hanging-disk", test_hanging_disk);
    g_test_add_func("/dedup/client/named-too-late", test_named_too_late);
    g_test_add_func("/dedup/client/wrong-welcomes", test_wrong_welcomes);
    g_test_add_func("/dedup/client/wrong-answers", test_wrong_answers);
    g_test_add_func("/dedup/client/read", test_read);
    g_test_add_func("/dedup/client/many", test_many);
    g_test_add_func("/dedup/client/break", test_break);
    g_test_add_func("/dedup/client/trim", test_trim);
    g_test_add_func("/dedup/client/trim-serial", test_trim_serial);
    g_test_add_func("/dedup/client/trim-race", test_trim_race);
    dedup_store_register(&fake_xen);
    g_test_add_func("/dedup/client/xen-held", test_xen_held);
    g_test_add_func("/dedup/client/gather", test_gather);
    g_test_add_func("/dedup/client/contexts", test_contexts);
    g_test_add_func("/dedup/client/killed", test_killed);
    g_test_add_func("/dedup/client/stopped", test_stopped);
    return g_test_run();
}
