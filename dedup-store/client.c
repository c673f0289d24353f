/*
 * qemu-dedup-store: a connection, and what is said on it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See protocol.h for what each message may contain.
 */

#include "qemu/osdep.h"
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "qemu/cutils.h"
#include "dedup-store/send.h"
#include "checks.h"
#include "server.h"
#include "trace.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

/* As many descriptors as the kernel passes with one message. */
#define MAX_FDS 253

/* Bytes of a text in one STATUS. */
#define STATUS_PART 32768

/* A message that was received, and its descriptors, which are to be closed. */
typedef struct Message {
    union {
        DedupMsgHeader header;
        DedupMsgHello hello;
        DedupMsgLayer layer;
        DedupMsgRead read;
        DedupMsgPut put;
        DedupMsgRelease release;
        DedupMsgClaim claim;
        uint8_t bytes[DEDUP_MSG_MAX];
    };
    size_t size;
    int fds[MAX_FDS];
    unsigned nfds;
} Message;

/* --- sending -------------------------------------------------------------- */

/* False if it cannot be sent now, or ever. */
static bool send_two(Client *c, const void *a, size_t asize, const void *b,
                     size_t bsize)
{
    return dedup_send(c->fd, a, asize, b, bsize, -1);
}

static bool send_plain(Client *c, DedupMsgType type, uint32_t count,
                       uint64_t request)
{
    DedupMsgHeader h = { .type = type, .count = count, .request = request };

    return send_two(c, &h, sizeof(h), NULL, 0);
}

/* --- answers, with the lock held ------------------------------------------ */

/*
 * The layer was written to since the block was decided: that is void.  The
 * kernel is asked: while this process was stopped it may have taken the lease
 * away, and the thread that minds leases may not know yet.  *last is the layer
 * that was found to have one last.
 */
static void check_lease(Store *s, Block *b, const Layer **last)
{
    if (!b->layer || b->layer == *last || b->answer == DEDUP_ANSWER_NO_LEASE) {
        return;
    }
    if (CHECK("answer-leased", layer_has_lease(b->layer))) {
        *last = b->layer;
    } else {
        if (b->frame) {
            store_unpin(s, b->frame);
            b->frame = NULL;
        }
        b->answer = DEDUP_ANSWER_NO_LEASE;
    }
}

/* Hold the frame, and say what became of the block. */
static DedupMsgFrame answer_block(Store *s, Client *c, Block *b,
                                  uint64_t serial, const Layer **last)
{
    uint32_t flags = (b->filled ? DEDUP_FRAME_FILLED : 0) |
                     (b->made ? DEDUP_FRAME_NEW : 0);

    check_lease(s, b, last);
    if (b->answer == DEDUP_ANSWER_FULL) {
        server.want_trim = true;
    }
    if (b->frame && !process_hold(s, c->process, b->frame, serial,
                                  &b->newly_held)) {
        c->too_many = true;
        return (DedupMsgFrame) {
            .answer = DEDUP_ANSWER_BUSY, .flags = flags,
        };
    }
    if (!b->frame) {
        return (DedupMsgFrame) { .answer = b->answer, .flags = flags };
    }
    return (DedupMsgFrame) {
        .answer = b->answer, .slot = frame_slot(s, b->frame),
        .generation = frame_generation(b->frame), .flags = flags,
        .handle = frames_handle(&s->frames, frame_slot(s, b->frame)),
    };
}

/* It was not told: when it is, the answer may be another one. */
static void take_back(Store *s, Client *c, Request *r, uint64_t serial)
{
    unsigned i;
    int error = errno;

    for (i = 0; i < r->n; i++) {
        Block *b = &r->blocks[i];

        if (b->newly_held) {
            process_release(s, c->process, frame_slot(s, b->frame), serial);
            b->newly_held = false;
        }
    }
    errno = error;
}

static bool send_answer(Client *c, Request *r)
{
    DedupMsgFrame frames[DEDUP_READ_BLOCKS];
    DedupMsgAnswer a = {
        .header = { DEDUP_MSG_ANSWER, r->n, r->id },
        .serial = ++c->process->serial,
    };
    const Layer *last = NULL;
    unsigned i;

    for (i = 0; i < r->n; i++) {
        frames[i] = answer_block(server.store, c, &r->blocks[i], a.serial,
                                 &last);
    }
    if (send_two(c, &a, sizeof(a), frames, r->n * sizeof(frames[0]))) {
        return true;
    }
    take_back(server.store, c, r, a.serial);
    return false;
}

static bool send_answers(Client *c)
{
    Request *r, *next;

    QTAILQ_FOREACH_SAFE(r, &c->requests, next, next) {
        if (r->waiting) {
            continue;
        }
        if (!send_answer(c, r)) {
            return false;
        }
        QTAILQ_REMOVE(&c->requests, r, next);
        c->nrequests--;
        request_unref(server.store, r);
    }
    return true;
}

static bool send_layer(Client *c, unsigned number)
{
    const ClientLayer *cl = &c->layers[number];
    DedupMsgLayerState m = {
        .header.type = DEDUP_MSG_LAYER_STATE,
        .layer = number, .state = cl->state,
    };

    pstrcpy(m.text, sizeof(m.text), cl->text);
    return send_two(c, &m, sizeof(m), NULL, 0);
}

static bool send_layers(Client *c)
{
    unsigned i;

    for (i = 0; c->layers_changed && i < DEDUP_LIMIT_LAYERS; i++) {
        if (!c->layers[i].changed) {
            continue;
        }
        if (!send_layer(c, i)) {
            return false;
        }
        c->layers[i].changed = false;
    }
    c->layers_changed = false;
    return true;
}

static bool send_status(Client *c)
{
    while (c->status) {
        size_t left = strlen(c->status) - c->sent;
        DedupMsgStatus m = {
            .header = { DEDUP_MSG_STATUS, MIN(left, STATUS_PART),
                        c->status_request },
            .flags = left > STATUS_PART ? DEDUP_STATUS_MORE : 0,
        };

        if (!send_two(c, &m, sizeof(m), c->status + c->sent,
                      m.header.count)) {
            return false;
        }
        c->sent += m.header.count;
        if (left <= STATUS_PART) {
            g_clear_pointer(&c->status, g_free);
        }
    }
    return true;
}

static bool send_flag(Client *c, bool *flag, DedupMsgType type)
{
    if (*flag && !send_plain(c, type, 0, 0)) {
        return false;
    }
    *flag = false;
    return true;
}

/* What was idle when it asked is gone. */
static bool send_reclaimed(Client *c)
{
    if (!c->reclaim_request || server.dropping) {
        return true;
    }
    if (!send_plain(c, DEDUP_MSG_RECLAIMED, server.dropped - c->reclaim_from,
                    c->reclaim_request)) {
        return false;
    }
    c->reclaim_request = 0;
    return true;
}

static bool send_all(Client *c)
{
    return send_layers(c) && send_answers(c) && send_status(c) &&
           send_reclaimed(c) &&
           send_flag(c, &c->want_trim, DEDUP_MSG_TRIM) &&
           send_flag(c, &c->want_alive, DEDUP_MSG_ALIVE);
}

/* --- receiving ------------------------------------------------------------ */

/* Descriptors that nobody asked for are closed where that may hang. */
static void drop_fds(Client *c, Message *m)
{
    QEMU_LOCK_GUARD(&server.store->lock);
    for (; m->nfds; m->nfds--) {
        opener_add(c, m->fds[m->nfds - 1], -1);
    }
}

static void collect_fds(struct msghdr *msg, Message *m)
{
    struct cmsghdr *h;

    m->nfds = 0;
    for (h = CMSG_FIRSTHDR(msg); h; h = CMSG_NXTHDR(msg, h)) {
        if (h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS) {
            m->nfds = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(m->fds, CMSG_DATA(h), m->nfds * sizeof(int));
        }
    }
}

/* 1: a message; 0: none now; -1: the end. */
static int receive(Client *c, Message *m)
{
    uint8_t control[CMSG_SPACE(MAX_FDS * sizeof(int))]
        QEMU_ALIGNED(sizeof(size_t));
    struct iovec iov = { m->bytes, sizeof(m->bytes) };
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1,
        .msg_control = control, .msg_controllen = sizeof(control),
    };
    ssize_t got = recvmsg(c->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

    if (got < 0) {
        m->nfds = 0;
        return errno == EAGAIN || errno == EINTR ? 0 : -1;
    }
    collect_fds(&msg, m);
    m->size = got;
    if (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
        m->size = 0;            /* as if it were too short */
    }
    return got ? 1 : -1;
}

/* --- processes ------------------------------------------------------------ */

/* The process that has connected. */
static int open_pidfd(int fd, pid_t pid)
{
    socklen_t size = sizeof(int);
    int pidfd;

    if (getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &size) == 0) {
        return pidfd;
    }
    return syscall(SYS_pidfd_open, pid, 0);
}

/* Nobody waits for its end any more.  With the lock held, too. */
static void unwatch(Process *p)
{
    if (p->watch) {
        watch_free(p->watch);
        p->watch = NULL;
        close(p->pidfd);
        process_unref(server.store, p);
    }
}

/* Its guest maps nothing any more. */
static void on_gone(void *opaque, uint32_t events)
{
    QEMU_LOCK_GUARD(&server.store->lock);
    unwatch(opaque);
}

/* --- messages; they return why they are wrong, or NULL -------------------- */

static bool has_size(const Message *m, size_t fixed, size_t entry)
{
    return CHECK("message-size", m->size == fixed +
                 (uint64_t)m->header.count * entry);
}

/*
 * The process that was given @token, if @c is of that process, for which it
 * then stands; or NULL.  With the lock held.
 */
static Process *find_own_process(const Client *c, const uint8_t *token)
{
    static const uint8_t none[DEDUP_TOKEN_SIZE];
    Process *p = memcmp(token, none, sizeof(none))
                 ? process_find(server.store, token) : NULL;

    return p && CHECK("token", p->pid == c->pid) ? p : NULL;
}

/* @c takes over from an earlier connection, whose end was not read yet. */
static void end_earlier(Client *c, const uint8_t *token)
{
    Client *other;

    WITH_QEMU_LOCK_GUARD(&server.store->lock) {
        Process *p = find_own_process(c, token);

        QTAILQ_FOREACH(other, &server.clients, next) {
            if (p && other->process == p) {
                break;
            }
        }
    }
    if (other) {
        client_end(other, "its process has connected anew");
    }
}

static const char *on_hello(Client *c, const Message *m)
{
    const DedupMsgHello *h = &m->hello;
    Store *s = server.store;
    DedupMsgWelcome w = {
        .header.type = DEDUP_MSG_WELCOME,
        .version = DEDUP_PROTOCOL_VERSION, .store = s->frames.ops->kind,
        .nslots = s->frames.nslots, .size = s->size, .asked = server.asked,
    };
    Process *p;
    bool sent;
    int fd;

    if (!has_size(m, sizeof(*h), 0) || m->header.count ||
        h->magic != DEDUP_PROTOCOL_MAGIC) {
        return "this is no HELLO";
    }
    if (!CHECK("version", h->version == DEDUP_PROTOCOL_VERSION)) {
        return "the store daemon speaks version 1 of the protocol; end it, "
               "and the QEMUs of its group, and start them anew";
    }
    if (h->flags & ~DEDUP_HELLO_OBSERVER || h->reserved) {
        return "HELLO: unknown flags";
    }
    if (h->store && h->store != w.store) {
        return w.store == DEDUP_STORE_KIND_XEN
               ? "the store daemon has a Xen store"
               : "the store daemon has a Linux store";
    }
    c->observer = h->flags & DEDUP_HELLO_OBSERVER;
    if (!c->observer) {
        end_earlier(c, h->token);
    }
    QEMU_LOCK_GUARD(&s->lock);
    if (!c->observer) {
        p = find_own_process(c, h->token);
        if (p) {
            unwatch(c->process);
            process_unref(s, c->process);
            c->process = p;
            p->refs++;
        }
        memcpy(w.token, c->process->token, sizeof(w.token));
        memcpy(w.uuid, s->uuid, sizeof(w.uuid));
    }
    c->greeted = true;
    fd = c->observer ? -1 : s->frames.ops->welcome(s->frames.opaque, c->pid,
                                                   &w);
    sent = dedup_send(c->fd, &w, sizeof(w), NULL, 0, fd);
    if (fd >= 0) {
        close(fd);
    }
    return sent ? NULL : "WELCOME could not be sent";
}

static const char *on_layer(Client *c, Message *m)
{
    uint32_t number = m->layer.layer;
    ClientLayer *cl;

    if (!has_size(m, sizeof(m->layer), 0) || m->header.count ||
        m->layer.reserved) {
        return "LAYER: wrong size or fields";
    }
    if (m->nfds != 1) {
        return "LAYER: it passes one descriptor";
    }
    if (!CHECK("layer-number", number < DEDUP_LIMIT_LAYERS)) {
        return "LAYER: the number is out of range";
    }
    QEMU_LOCK_GUARD(&server.store->lock);
    cl = &c->layers[number];
    if (!CHECK("layer-unused", !cl->used && !cl->opening)) {
        return "LAYER: the number is in use";
    }
    cl->used = cl->opening = true;
    opener_add(c, m->fds[0], number);
    m->nfds = 0;
    return NULL;
}

static void close_layer(ClientLayer *cl)
{
    if (cl->layer) {
        layer_close(server.layers, cl->layer);
    }
    cl->layer = NULL;
    cl->used = cl->changed = false;
}

static const char *on_unlayer(Client *c, const Message *m)
{
    uint32_t number = m->layer.layer;

    if (!has_size(m, sizeof(m->layer), 0) || m->header.count ||
        m->layer.reserved || number >= DEDUP_LIMIT_LAYERS) {
        return "UNLAYER: wrong size or fields";
    }
    QEMU_LOCK_GUARD(&server.store->lock);
    if (!c->layers[number].used) {
        return "UNLAYER: there is no such layer";
    }
    close_layer(&c->layers[number]);
    return NULL;
}

/* A request with a new number. */
static const char *check_request(Client *c, const Message *m, uint32_t flags)
{
    if (!CHECK("request-number", m->header.request > c->last_request)) {
        return "the request's number was used";
    }
    if (flags & ~(DEDUP_REQUEST_NO_FILL | DEDUP_REQUEST_SECOND_READ)) {
        return "unknown flags";
    }
    c->last_request = m->header.request;
    return NULL;
}

static void add_request(Client *c, Request *r)
{
    QTAILQ_INSERT_TAIL(&c->requests, r, next);
    c->nrequests++;
}

/* It has too much in flight: all blocks are answered at once. */
static bool is_busy(Client *c, Request *r)
{
    unsigned i;

    if (c->nrequests <= DEDUP_LIMIT_REQUESTS) {
        return false;
    }
    for (i = 0; i < r->n; i++) {
        r->blocks[i].answer = DEDUP_ANSWER_BUSY;
    }
    return true;
}

/* How many blocks @extents have; 0 if anything is wrong with them. */
static unsigned count_blocks(Client *c, const DedupMsgExtent *extents,
                             unsigned n)
{
    unsigned i, blocks = 0;

    for (i = 0; i < n; i++) {
        const DedupMsgExtent *e = &extents[i];
        const ClientLayer *cl;

        if (!CHECK("extent-layer", e->layer < DEDUP_LIMIT_LAYERS) ||
            !e->n || e->n > DEDUP_READ_BLOCKS - blocks) {
            return 0;
        }
        cl = &c->layers[e->layer];
        if (!cl->used ||
            (cl->layer && !CHECK("extent-end", e->first < cl->layer->nblocks &&
                                 e->n <= cl->layer->nblocks - e->first))) {
            return 0;
        }
        blocks += e->n;
    }
    return blocks;
}

static const char *on_read(Client *c, const Message *m)
{
    const DedupMsgExtent *extents = (const void *)(&m->read + 1);
    const char *wrong = check_request(c, m, m->read.flags);
    unsigned i, j, n, block = 0;
    Request *r;

    if (wrong) {
        return wrong;
    }
    if (!m->header.count || m->header.count > DEDUP_READ_BLOCKS ||
        !has_size(m, sizeof(m->read), sizeof(*extents)) || m->read.reserved) {
        return "READ: wrong size or fields";
    }
    QEMU_LOCK_GUARD(&server.store->lock);
    n = count_blocks(c, extents, m->header.count);
    if (!n) {
        return "READ: extents that are out of range, or of no layer";
    }
    r = request_new(c, m->header.request, m->read.flags, n);
    add_request(c, r);
    if (is_busy(c, r)) {
        return NULL;
    }
    for (i = 0; i < m->header.count; i++) {
        for (j = 0; j < extents[i].n; j++) {
            request_look_up(server.store, r, block++,
                            c->layers[extents[i].layer].layer,
                            extents[i].first + j);
        }
    }
    request_fill(server.fills, r);
    return NULL;
}

static const char *on_put(Client *c, const Message *m)
{
    const char *wrong = check_request(c, m, m->put.flags);
    uint32_t n = m->header.count;
    uint8_t *buf;
    Request *r;

    if (wrong) {
        return wrong;
    }
    if (!n || n > DEDUP_PUT_BLOCKS || !has_size(m, sizeof(m->put), BLOCK) ||
        m->put.reserved) {
        return "PUT: wrong size or fields";
    }
    QEMU_LOCK_GUARD(&server.store->lock);
    r = request_new(c, m->header.request, m->put.flags, n);
    add_request(c, r);
    if (!is_busy(c, r)) {
        buf = qemu_memalign(BLOCK, n * BLOCK);
        memcpy(buf, &m->put + 1, n * BLOCK);
        request_put(server.fills, r, buf);
    }
    return NULL;
}

static const char *on_release(Client *c, const Message *m)
{
    const uint32_t *slots = (const void *)(&m->release + 1);
    uint32_t i;

    if (m->header.count > DEDUP_RELEASE_SLOTS ||
        !has_size(m, sizeof(m->release), sizeof(*slots))) {
        return "RELEASE: wrong size";
    }
    QEMU_LOCK_GUARD(&server.store->lock);
    if (!CHECK("release-future",
               m->release.serial <= c->process->serial)) {
        return "RELEASE: a serial number that no answer had";
    }
    for (i = 0; i < m->header.count; i++) {
        if (!CHECK("release-slot", slots[i] < server.store->frames.nslots)) {
            return "RELEASE: a slot is out of range";
        }
        process_release(server.store, c->process, slots[i],
                        m->release.serial);
    }
    return NULL;
}

static const char *on_claim(Client *c, Message *m)
{
    const uint32_t known = DEDUP_CLAIM_FIRST | DEDUP_CLAIM_LAST;

    if (!server.store->frames.ops->claim) {
        return "CLAIM: there is no file of frames";
    }
    if (m->header.count > DEDUP_CLAIM_SLOTS ||
        !has_size(m, sizeof(m->claim), sizeof(uint32_t)) ||
        m->claim.flags & ~known || m->claim.reserved) {
        return "CLAIM: wrong size or fields";
    }
    if (m->nfds != 1) {
        return "CLAIM: it passes one descriptor";
    }
    QEMU_LOCK_GUARD(&server.store->lock);
    opener_add_claim(c, m->fds[0], &m->claim, (const void *)(&m->claim + 1),
                     m->header.count);
    m->nfds = 0;
    return NULL;
}

static const char *on_ask_status(Client *c, const Message *m)
{
    const char *wrong = check_request(c, m, 0);

    if (wrong || !has_size(m, sizeof(m->header), 0) || m->header.count) {
        return wrong ?: "ASK_STATUS: wrong size";
    }
    QEMU_LOCK_GUARD(&server.store->lock);
    if (!c->status) {
        c->status = status_json();
        c->sent = 0;
        c->status_request = m->header.request;
    }
    return NULL;
}

static const char *on_reclaim(Client *c, const Message *m)
{
    const char *wrong = check_request(c, m, 0);

    if (wrong || !has_size(m, sizeof(m->header), 0) || m->header.count) {
        return wrong ?: "RECLAIM: wrong size";
    }
    if (!CHECK("reclaim-uid", c->uid == 0 || c->uid == geteuid())) {
        return "RECLAIM: only root and the store daemon's user may";
    }
    if (!c->reclaim_request) {
        c->reclaim_from = server.dropped;
    }
    c->reclaim_request = m->header.request;
    server_reclaim();
    return NULL;
}

static const char *handle_client(Client *c, Message *m)
{
    switch (m->header.type) {
    case DEDUP_MSG_LAYER:
        return on_layer(c, m);
    case DEDUP_MSG_UNLAYER:
        return on_unlayer(c, m);
    case DEDUP_MSG_READ:
        return on_read(c, m);
    case DEDUP_MSG_PUT:
        return on_put(c, m);
    case DEDUP_MSG_RELEASE:
        return on_release(c, m);
    case DEDUP_MSG_CLAIM:
        return on_claim(c, m);
    default:
        return "a message of unknown type, or out of turn";
    }
}

static const char *handle(Client *c, Message *m)
{
    if (m->size < sizeof(m->header)) {
        return "a message that is too short or too long";
    }
    if (m->nfds && m->header.type != DEDUP_MSG_LAYER &&
        m->header.type != DEDUP_MSG_CLAIM) {
        return "a descriptor that was not asked for";
    }
    if (!c->greeted) {
        return m->header.type == DEDUP_MSG_HELLO ? on_hello(c, m)
                                                 : "it begins with HELLO";
    }
    switch (m->header.type) {
    case DEDUP_MSG_ASK_STATUS:
        return on_ask_status(c, m);
    case DEDUP_MSG_RECLAIM:
        return on_reclaim(c, m);
    default:
        return c->observer ? "an observer may not say that"
                           : handle_client(c, m);
    }
}

/* --- the connection ------------------------------------------------------- */

static void client_reap(Client *c)
{
    WITH_QEMU_LOCK_GUARD(&server.store->lock) {
        if (c->fd >= 0 || opener_runs(c) || c->kicked || c->busy) {
            return;
        }
        QTAILQ_REMOVE(&server.clients, c, next);
    }
    g_free(c);
}

static void let_go_all(Client *c)
{
    Request *r, *next;
    unsigned i;

    QEMU_LOCK_GUARD(&server.store->lock);
    QTAILQ_FOREACH_SAFE(r, &c->requests, next, next) {
        QTAILQ_REMOVE(&c->requests, r, next);
        request_abandon(server.store, r);
    }
    for (i = 0; i < DEDUP_LIMIT_LAYERS; i++) {
        close_layer(&c->layers[i]);
    }
    g_clear_pointer(&c->status, g_free);
    if (!DO("hold-process")) {
        process_release_all(server.store, c->process);
    }
    if (!g_hash_table_size(c->process->held)) {
        unwatch(c->process);    /* nothing is to be known of it any more */
    }
    process_unref(server.store, c->process);
    c->process = NULL;
}

void client_end(Client *c, const char *text)
{
    DedupMsgRefused refused = { .header.type = DEDUP_MSG_REFUSED };

    if (c->fd < 0) {
        return;
    }
    if (text) {
        trace_dedup_store_refuse(c->pid, text);
        pstrcpy(refused.text, sizeof(refused.text), text);
        send_two(c, &refused, sizeof(refused), NULL, 0);
    }
    watch_free(c->watch);
    WITH_QEMU_LOCK_GUARD(&server.store->lock) {
        opener_close_socket(c->fd);
        c->fd = -1;
    }
    server.nclients--;
    let_go_all(c);
    client_reap(c);
}

/* Receive a message, if there is one, and do what it says. */
static void receive_one(Client *c)
{
    static Message m;           /* by the server's lock */
    int got = receive(c, &m);
    const char *wrong = got > 0 ? handle(c, &m) : NULL;

    drop_fds(c, &m);
    if (got < 0 || wrong) {
        client_end(c, wrong);
    } else {
        client_flush(c);
    }
}

static void on_ready(void *opaque, uint32_t events)
{
    if (events & EPOLLIN) {
        receive_one(opaque);
    } else if (events & EPOLLOUT) {
        client_flush(opaque);
    } else {
        client_end(opaque, NULL);       /* it has gone, and is not read */
    }
}

/* While something waits to be sent, or to be opened, nothing is read. */
static void watch(Client *c, bool full, bool busy)
{
    bool reads = (!full && !busy) || !DO("backpressure");

    watch_set(c->watch, (full ? EPOLLOUT : 0) | (reads ? EPOLLIN : 0));
}

void client_flush(Client *c)
{
    bool sent, full, busy;

    if (c->fd < 0) {
        return;
    }
    if (!c->greeted) {
        watch(c, false, false);
        return;
    }
    WITH_QEMU_LOCK_GUARD(&server.store->lock) {
        sent = send_all(c);
        full = !sent && (errno == EAGAIN || errno == ENOBUFS);
        c->full = full;
        busy = opener_is_full(c);
    }
    if (!sent && !full) {
        client_end(c, NULL);
        return;
    }
    watch(c, full, busy);
}

void client_answer(Client *c)
{
    if (c->fd < 0 || c->full || !send_answers(c)) {
        client_kick(c);
    }
}

static gboolean on_kick(gpointer opaque)
{
    Client *c = opaque;

    QEMU_LOCK_GUARD(&server.lock);
    c->busy = true;
    WITH_QEMU_LOCK_GUARD(&server.store->lock) {
        c->kicked = false;
    }
    client_flush(c);
    c->busy = false;
    client_reap(c);
    return G_SOURCE_REMOVE;
}

void client_kick(Client *c)
{
    if (!c->kicked) {
        c->kicked = true;
        g_idle_add_full(G_PRIORITY_DEFAULT, on_kick, c, NULL);
    }
}

/* Its socket and its process are watched; false if the kernel does not. */
static bool watch_new_client(Client *c, int pidfd)
{
    c->watch = watch_new(c->fd, EPOLLIN, on_ready, c);
    if (!c->watch) {
        return false;
    }
    QEMU_LOCK_GUARD(&server.store->lock);
    c->process = process_new(server.store, c->pid, c->uid);
    c->process->pidfd = pidfd;
    c->process->watch = watch_new(pidfd, EPOLLIN, on_gone, c->process);
    if (!c->process->watch) {
        process_unref(server.store, c->process);
        watch_free(c->watch);
        return false;
    }
    c->process->refs++;
    QTAILQ_INSERT_TAIL(&server.clients, c, next);
    return true;
}

void client_new(int fd)
{
    struct ucred cred = { .pid = -1 };
    socklen_t size = sizeof(cred);
    Client *c = g_new0(Client, 1);
    int pidfd;

    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &size);
    pidfd = open_pidfd(fd, cred.pid);
    c->number = ++server.last_client;
    c->fd = fd;
    c->pid = cred.pid;
    c->uid = cred.uid;
    c->since = g_get_monotonic_time();
    QTAILQ_INIT(&c->requests);
    opener_init(c);
    if (pidfd < 0 || !watch_new_client(c, pidfd)) {
        /* it is gone already, or the kernel has no memory */
        if (pidfd >= 0) {
            close(pidfd);
        }
        opener_close_socket(fd);
        g_free(c);
        return;
    }
    server.nclients++;
    trace_dedup_store_connect(c->pid, c->uid);
}
