/*
 * qemu-dedup-store: the socket, and who is connected
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <glib-unix.h>
#include <sys/socket.h>
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "dedup-store/send.h"
#include "checks.h"
#include "notify.h"
#include "server.h"
#include "trace.h"

/* Connections: in all, of one process, and of those that have said nothing. */
#define MAX_CLIENTS 4096
#define MAX_OF_PROCESS 16
#define MAX_UNGREETED 64
#define UNGREETED_US (5 * G_USEC_PER_SEC)

/* Threads that hang for clients of one user that have gone. */
#define MAX_HUNG 8

/* Nobody is accepted for so long when descriptors have run out. */
#define ACCEPT_PAUSE_MS 100

/* A daemon that ends waits so long for its threads. */
#define END_US (2 * G_USEC_PER_SEC)

#define TRIM_US G_USEC_PER_SEC
/* How long after RECLAIM what becomes idle is dropped. */
#define RECLAIM_US (5 * G_USEC_PER_SEC)

Server server;

/* Connections of @pid, and those that have ended and left holds. */
static unsigned count_processes(pid_t pid)
{
    unsigned n = 0;
    Process *p;

    QTAILQ_FOREACH(p, &server.store->processes, next) {
        n += p->pid == pid;
    }
    return n;
}

/* The one that has said nothing for the longest time, if there are too many. */
static Client *find_silent(int64_t now)
{
    Client *c, *first = NULL;
    unsigned n = 0;

    QTAILQ_FOREACH(c, &server.clients, next) {
        if (c->fd >= 0 && !c->greeted) {
            n++;
            first = first ?: c;
        }
    }
    return first && (n > MAX_UNGREETED || now - first->since > UNGREETED_US)
           ? first : NULL;
}

static void end_silent(void)
{
    Client *c;

    while (DO("silent") && (c = find_silent(g_get_monotonic_time()))) {
        client_end(c, "it has said nothing");
    }
}

/* May it, or why not? */
static const char *refuse_connection(int fd)
{
    struct ucred cred = { .pid = -1, .uid = -1 };
    socklen_t size = sizeof(cred);
    unsigned hung, processes;

    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &size);
    WITH_QEMU_LOCK_GUARD(&server.store->lock) {
        hung = opener_count(cred.uid);
        processes = count_processes(cred.pid);
    }
    return server.nclients >= MAX_CLIENTS ? "there are too many clients" :
           !CHECK("connections", processes < MAX_OF_PROCESS)
           ? "this process has too many connections" :
           !CHECK("hung", hung < MAX_HUNG)
           ? "files of this user hang" : NULL;
}

static void refuse_fd(int fd, const char *why)
{
    DedupMsgRefused m = { .header.type = DEDUP_MSG_REFUSED };

    pstrcpy(m.text, sizeof(m.text), why);
    dedup_send(fd, &m, sizeof(m), NULL, 0, -1);
    opener_close_socket(fd);
}

static gboolean listen_again(gpointer opaque);

static gboolean on_connection(gint listener, GIOCondition condition,
                              gpointer opaque)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    int error = errno;
    const char *why;

    QEMU_LOCK_GUARD(&server.lock);
    if (fd < 0 && (error == EMFILE || error == ENFILE || error == ENOMEM)) {
        /* who connects stays in the queue: look again when some have gone */
        server.listener = g_timeout_add(ACCEPT_PAUSE_MS, listen_again, NULL);
        return G_SOURCE_REMOVE;
    }
    if (fd < 0) {
        return G_SOURCE_CONTINUE;
    }
    why = refuse_connection(fd);
    if (why) {
        refuse_fd(fd, why);
    } else {
        client_new(fd);
        end_silent();
    }
    return G_SOURCE_CONTINUE;
}

static gboolean listen_again(gpointer opaque)
{
    server.listener = g_unix_fd_add(server.listen_fd, G_IO_IN, on_connection,
                                    NULL);
    return G_SOURCE_REMOVE;
}

static bool is_waiting(const Client *c)
{
    Request *r;

    QTAILQ_FOREACH(r, &c->requests, next) {
        if (r->waiting) {
            return true;
        }
    }
    return false;
}

/* It has hit the bound on its holds: some of them may be old. */
static bool is_to_trim(Client *c, int64_t now)
{
    if (!c->too_many || now < c->next_trim) {
        return false;
    }
    c->too_many = false;
    c->next_trim = now + TRIM_US;
    return true;
}

/* Each DEDUP_ALIVE_MS: whoever waits hears that the daemon is at it. */
static gboolean on_alive(gpointer opaque)
{
    int64_t now = g_get_monotonic_time();
    bool trim;
    Client *c;

    QEMU_LOCK_GUARD(&server.lock);
    QEMU_LOCK_GUARD(&server.store->lock);
    trim = server.want_trim && now >= server.next_trim;
    if (trim) {
        server.want_trim = false;
        server.next_trim = now + TRIM_US;
    }
    QTAILQ_FOREACH(c, &server.clients, next) {
        if (c->fd < 0 || !c->greeted || c->observer) {
            continue;
        }
        c->want_trim |= is_to_trim(c, now) || trim;
        c->want_alive |= is_waiting(c);
        if (c->want_trim || c->want_alive) {
            client_kick(c);
        }
    }
    return G_SOURCE_CONTINUE;
}

/* Nobody is connected, and nobody uses a frame. */
static bool is_idle(void)
{
    QEMU_LOCK_GUARD(&server.store->lock);
    return QTAILQ_EMPTY(&server.clients) &&
           QTAILQ_EMPTY(&server.store->processes);
}

static void exit_if_idle(void)
{
    int64_t now = g_get_monotonic_time();

    if (!is_idle()) {
        server.busy_until = now;
    } else if (server.idle_exit &&
               now - server.busy_until >= server.idle_exit * G_USEC_PER_SEC) {
        g_main_loop_quit(server.loop);
    }
}

/* Those that wait for it are told that what was idle is gone. */
static void reclaimed(void)
{
    Client *c;

    QEMU_LOCK_GUARD(&server.store->lock);
    QTAILQ_FOREACH(c, &server.clients, next) {
        if (c->fd >= 0 && c->reclaim_request) {
            client_kick(c);
        }
    }
}

/* So few at a time that nobody is kept waiting. */
static gboolean on_drop(gpointer opaque)
{
    unsigned most, dropped;

    WITH_QEMU_LOCK_GUARD(&server.lock) {
        most = MIN(server.to_drop, STORE_RECLAIM_MOST);
    }
    dropped = store_reclaim(server.store, most);
    QEMU_LOCK_GUARD(&server.lock);
    server.dropped += dropped;
    server.to_drop -= most;
    if (server.to_drop) {
        return G_SOURCE_CONTINUE;
    }
    server.dropping = 0;
    reclaimed();
    return G_SOURCE_REMOVE;
}

/* Try to drop @n frames, or all that are idle now.  With the server's lock. */
static void start_drop(unsigned n)
{
    WITH_QEMU_LOCK_GUARD(&server.store->lock) {
        n = MIN(n, server.store->nidle);
    }
    server.to_drop = MAX(server.to_drop, n);
    if (!server.dropping) {
        server.dropping = g_idle_add_full(G_PRIORITY_DEFAULT, on_drop, NULL,
                                          NULL);
    }
}

void server_reclaim(void)
{
    server.reclaim_until = g_get_monotonic_time() + RECLAIM_US;
    WITH_QEMU_LOCK_GUARD(&server.store->lock) {
        server.want_trim = true;
    }
    start_drop(UINT_MAX);
}

/* Is there more than the store may hold?  Then idle frames go. */
static void mind_size(void)
{
    unsigned excess = store_excess(server.store);

    if (excess) {
        QEMU_LOCK_GUARD(&server.lock);
        WITH_QEMU_LOCK_GUARD(&server.store->lock) {
            server.want_trim = true;
        }
        start_drop(excess);
    }
}

/* Is memory to be given back, and why? */
static void mind_memory(void)
{
    bool reclaims, is_short;
    unsigned idle;

    WITH_QEMU_LOCK_GUARD(&server.lock) {
        reclaims = g_get_monotonic_time() < server.reclaim_until;
    }
    is_short = !reclaims && frames_are_short(&server.store->frames);
    WITH_QEMU_LOCK_GUARD(&server.store->lock) {
        idle = server.store->nidle;
    }
    QEMU_LOCK_GUARD(&server.lock);
    if (reclaims) {
        start_drop(UINT_MAX);
    } else if (is_short) {
        /* an eighth of what is idle; more in a second, if that is not enough */
        start_drop(idle / 8 + 1);
    }
}

static gboolean on_second(gpointer opaque)
{
    WITH_QEMU_LOCK_GUARD(&server.lock) {
        end_silent();
    }
    notify_alive();             /* only if no receiver keeps the lock */
    if (frames_are_lost(&server.store->frames)) {
        error_report("the store domain was destroyed; the store daemon ends");
        server.lost = true;
        g_main_loop_quit(server.loop);
        return G_SOURCE_CONTINUE;
    }
    mind_memory();
    mind_size();
    store_punch_holes(server.store);
    exit_if_idle();
    return G_SOURCE_CONTINUE;
}

/* Leases have broken: who had the layers is told.  With the lock held. */
static void leases_changed(void)
{
    Client *c;
    unsigned i;

    QTAILQ_FOREACH(c, &server.clients, next) {
        for (i = 0; i < DEDUP_LIMIT_LAYERS; i++) {
            ClientLayer *cl = &c->layers[i];

            if (cl->layer && !layer_is_leased(cl->layer) &&
                cl->state == DEDUP_LAYER_LEASED) {
                cl->state = DEDUP_LAYER_BROKEN;
                g_strlcpy(cl->text, "somebody writes to it",
                          sizeof(cl->text));
                cl->changed = c->layers_changed = true;
                client_kick(c);
            }
        }
    }
}

static gboolean on_signal(gpointer opaque)
{
    g_main_loop_quit(server.loop);
    return G_SOURCE_CONTINUE;
}

static void end_all(void)
{
    Client *c, *next;

    QTAILQ_FOREACH_SAFE(c, &server.clients, next, next) {
        client_end(c, "the store daemon ends");
    }
}

/* False if a thread hangs.  What others have for the main loop is done. */
static bool end_threads(void)
{
    int64_t end = g_get_monotonic_time() + END_US;
    bool fills = true, receivers = true;

    while (fills || receivers || !QTAILQ_EMPTY(&server.clients)) {
        if (receivers) {
            QEMU_LOCK_GUARD(&server.lock);
            receivers = !receivers_ended();
        } else if (fills) {
            fills = !fills_free(server.fills);
        }
        if (g_get_monotonic_time() >= end) {
            return false;
        } else if (!g_main_context_iteration(NULL, false)) {
            g_usleep(1000);
        }
    }
    return true;
}

bool server_run(void (*leave)(void))
{
    bool idle;

    QTAILQ_INIT(&server.clients);
    qemu_mutex_init(&server.lock);
    server.loop = g_main_loop_new(NULL, false);
    server.layers = layers_new(server.store, server.layer_idle, leases_changed);
    server.fills = fills_new(server.store, client_answer);
    WITH_QEMU_LOCK_GUARD(&server.lock) {
        receivers_start(server.fills);
    }
    server.busy_until = g_get_monotonic_time();
    listen_again(NULL);
    g_timeout_add(DEDUP_ALIVE_MS, on_alive, NULL);
    g_timeout_add(1000, on_second, NULL);
    g_unix_signal_add(SIGTERM, on_signal, NULL);
    g_unix_signal_add(SIGINT, on_signal, NULL);
    g_main_loop_run(server.loop);
    notify_stopping();
    g_source_remove(server.listener);
    if (leave) {
        leave();
    }
    WITH_QEMU_LOCK_GUARD(&server.lock) {
        end_all();
        receivers_stop();
    }
    layers_end(server.layers);
    idle = end_threads();
    if (idle) {
        layers_free(server.layers);
    }
    return idle;
}
