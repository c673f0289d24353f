/*
 * qemu-dedup-store: calls on descriptors of clients, which may hang
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/socket.h>
#include "qemu/cutils.h"
#include "qemu/lockable.h"
#include "checks.h"
#include "server.h"

/* A client that has more claims for its thread is not listened to. */
#define MAX_CLAIMS 2

/* Threads that close sockets. */
#define MAX_CLOSERS 8

typedef struct Job {
    int fd;
    int layer;                  /* < 0: only close it */
    DedupMsgClaim *claim;       /* NULL: none; its slots are behind it */
} Job;

/* The layer was found, or not: the client is told. */
static void finish_layer(Client *c, int number, Layer *layer,
                         DedupLayerState state, const char *text)
{
    ClientLayer *cl = &c->layers[number];

    if (c->fd < 0 || !cl->used) {       /* nobody wants to know any more */
        if (layer) {
            layer_close(server.layers, layer);
        }
        cl->opening = false;
        return;
    }
    cl->opening = false;
    cl->layer = layer;
    /* its lease may have broken meanwhile; then nobody was told */
    cl->state = layer && !layer_is_leased(layer) ? DEDUP_LAYER_BROKEN : state;
    pstrcpy(cl->text, sizeof(cl->text), text);
    cl->changed = c->layers_changed = true;
    client_kick(c);
}

static void run_job(Client *c, const Job *job)
{
    char text[DEDUP_TEXT_MAX] = "";
    DedupLayerState state = DEDUP_LAYER_LEASED;
    Layer *layer;

    if (job->claim) {
        server.store->frames.ops->claim(
            server.store->frames.opaque, c->pid, c->number, job->fd,
            job->claim, (const void *)(job->claim + 1),
            job->claim->header.count);
    } else if (job->layer >= 0) {
        layer = layers_open(server.layers, job->fd, &state, text);
        WITH_QEMU_LOCK_GUARD(&server.store->lock) {
            finish_layer(c, job->layer, layer, state, text);
        }
    }
    close(job->fd);
    if (job->claim) {
        QEMU_LOCK_GUARD(&server.store->lock);
        c->nclaims--;
        client_kick(c);         /* it may be listened to again */
    }
}

static void *opener_thread(void *opaque)
{
    Opener *o = opaque;

    for (;;) {
        g_autofree Job *job = NULL;

        WITH_QEMU_LOCK_GUARD(&server.store->lock) {
            job = g_queue_pop_head(&o->jobs);
            o->runs = job != NULL;
            if (!job) {
                client_kick(o->client); /* it may be freed now */
            }
        }
        if (!job) {
            return NULL;
        }
        run_job(o->client, job);
        g_free(job->claim);
    }
}

static void add_job(Client *c, Job *job)
{
    Opener *o = &c->openers[job->claim ? NOTES_CLAIMS : OPENS_LAYERS];
    QemuThread thread;

    g_queue_push_tail(&o->jobs, job);
    if (!o->runs) {
        o->runs = true;
        qemu_thread_create(&thread, "opener", opener_thread, o,
                           QEMU_THREAD_DETACHED);
    }
}

void opener_init(Client *c)
{
    unsigned i;

    for (i = 0; i < OPENERS; i++) {
        c->openers[i].client = c;
        g_queue_init(&c->openers[i].jobs);
    }
}

bool opener_runs(const Client *c)
{
    return c->openers[OPENS_LAYERS].runs || c->openers[NOTES_CLAIMS].runs;
}

void opener_add(Client *c, int fd, int layer)
{
    Job *job = g_new0(Job, 1);

    *job = (Job) { .fd = fd, .layer = layer };
    add_job(c, job);
}

void opener_add_claim(Client *c, int fd, const DedupMsgClaim *m,
                      const uint32_t *slots, unsigned n)
{
    Job *job = g_new0(Job, 1);

    *job = (Job) { .fd = fd, .layer = -1 };
    job->claim = g_malloc(sizeof(*m) + n * sizeof(*slots));
    *job->claim = *m;
    memcpy(job->claim + 1, slots, n * sizeof(*slots));
    c->nclaims++;
    add_job(c, job);
}

bool opener_is_full(const Client *c)
{
    return c->nclaims > MAX_CLAIMS;
}

/* --- sockets -------------------------------------------------------------- */

/* Is there a message, of whatever length, in the socket that was shut down? */
static bool has_message(int fd)
{
    uint8_t control[CMSG_SPACE(sizeof(struct ucred))]
        QEMU_ALIGNED(sizeof(size_t));
    uint8_t byte;
    struct iovec iov = { &byte, 1 };
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1,
        .msg_control = control, .msg_controllen = sizeof(control),
    };
    int on = 1;

    /* with each message comes who has sent it; with the end comes nothing */
    setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on));
    return recvmsg(fd, &msg, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC) < 0 ||
           msg.msg_controllen;
}

static void close_socket(gpointer fd, gpointer opaque)
{
    close(GPOINTER_TO_INT(fd));
}

void opener_close_socket(int fd)
{
    static GThreadPool *closers;        /* by the server's lock */

    shutdown(fd, SHUT_RDWR);            /* nothing more comes in */
    if (CHECK("close-socket", !has_message(fd))) {
        close(fd);
        return;
    }
    if (!closers) {
        closers = g_thread_pool_new(close_socket, NULL, MAX_CLOSERS, false,
                                    NULL);
    }
    g_thread_pool_push(closers, GINT_TO_POINTER(fd), NULL);
}

unsigned opener_count(uid_t uid)
{
    unsigned n = 0;
    Client *c;

    QTAILQ_FOREACH(c, &server.clients, next) {
        n += c->uid == uid && c->fd < 0 && opener_runs(c);
    }
    return n;
}
