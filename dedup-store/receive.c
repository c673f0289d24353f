/*
 * qemu-dedup-store: the threads that wait for what clients say
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "receive.h"
#include "server.h"

/* As many as one disk may have reads under way. */
#define MAX_RECEIVERS 64

/* One of several that had nothing to do for so long ends. */
#define IDLE_MS 15000

/* The number of what has all receivers end. */
#define STOP 0

/* No event is watched for, not even the other side's end. */
#define NOTHING UINT32_MAX

struct Watch {
    uint64_t number;            /* no other watch has, or had it */
    int fd;
    uint32_t events;            /* that are watched for */
    WatchFunc *ready;
    void *opaque;
};

static struct Receivers {
    Fills *fills;
    int epoll, stop;            /* an eventfd */
    GHashTable *watches;        /* by their number */
    uint64_t last;              /* number */
    unsigned running;
    unsigned waiting;           /* of these: they wait, or will at once */
} r;

/* --- what is watched ------------------------------------------------------ */

static int control(const Watch *w, int operation, uint32_t events)
{
    struct epoll_event e = {
        .events = events | EPOLLONESHOT, .data.u64 = w->number,
    };

    return epoll_ctl(r.epoll, operation, w->fd, &e);
}

Watch *watch_new(int fd, uint32_t events, WatchFunc *ready, void *opaque)
{
    Watch *w = g_new0(Watch, 1);

    w->number = ++r.last;
    w->fd = fd;
    w->events = events;
    w->ready = ready;
    w->opaque = opaque;
    if (control(w, EPOLL_CTL_ADD, events) < 0) {
        g_free(w);
        return NULL;
    }
    g_hash_table_insert(r.watches, &w->number, w);
    return w;
}

void watch_set(Watch *w, uint32_t events)
{
    if (w->events != events) {
        /* it is there already, so that no memory is needed */
        control(w, EPOLL_CTL_MOD, events);
        w->events = events;
    }
}

void watch_free(Watch *w)
{
    control(w, EPOLL_CTL_DEL, 0);
    g_hash_table_remove(r.watches, &w->number);
    g_free(w);
}

/* --- receivers ------------------------------------------------------------ */

static bool start_one(void);

/* Returns what has begun by it, if this thread is to carry that out. */
static Fill *handle(const struct epoll_event *e)
{
    uint64_t number = e->data.u64;
    Watch *w = g_hash_table_lookup(r.watches, &number);
    Fill *own;

    if (w) {                    /* or it was freed since */
        w->events = NOTHING;    /* as the kernel has it */
        w->ready(w->opaque, e->events);
    }
    own = fills_take_own(r.fills);
    if (own && !r.waiting && !start_one()) {
        fills_leave(r.fills, own);
        return NULL;
    }
    return own;
}

static void *receiver_thread(void *opaque)
{
    bool ends = false;

    while (!ends) {
        struct epoll_event e = { .data.u64 = STOP };
        int n = epoll_wait(r.epoll, &e, 1, IDLE_MS);
        Fill *own = NULL;

        WITH_QEMU_LOCK_GUARD(&server.lock) {
            r.waiting--;
            if (n > 0 && e.data.u64 != STOP) {
                own = handle(&e);
            } else {
                ends = n > 0 || (n == 0 && r.waiting);
            }
            r.running -= ends;
            r.waiting += !ends && !own;
        }
        if (own) {
            fill_carry_out(r.fills, own);
            QEMU_LOCK_GUARD(&server.lock);
            r.waiting++;
        }
    }
    return NULL;
}

/* False: there are as many as there may be, or can be. */
static bool start_one(void)
{
    GThread *thread = r.running == MAX_RECEIVERS ? NULL :
        g_thread_try_new("receiver", receiver_thread, NULL, NULL);

    if (!thread) {
        return false;
    }
    g_thread_unref(thread);
    r.running++;                /* it does nothing before it has the lock */
    r.waiting++;
    return true;
}

void receivers_start(Fills *fills)
{
    struct epoll_event e = { .events = EPOLLIN, .data.u64 = STOP };

    r.fills = fills;
    r.watches = g_hash_table_new(g_int64_hash, g_int64_equal);
    r.epoll = epoll_create1(EPOLL_CLOEXEC);
    r.stop = eventfd(0, EFD_CLOEXEC);
    if (r.epoll < 0 || r.stop < 0 ||
        epoll_ctl(r.epoll, EPOLL_CTL_ADD, r.stop, &e) < 0) {
        error_report("epoll: %s", strerror(errno));
        exit(1);
    }
    if (!start_one()) {
        error_report("no thread can be started");
        exit(1);
    }
}

void receivers_stop(void)
{
    eventfd_write(r.stop, 1);   /* and nobody reads it */
}

bool receivers_ended(void)
{
    if (r.running) {
        return false;
    }
    close(r.epoll);
    close(r.stop);
    g_hash_table_destroy(r.watches);
    return true;
}
