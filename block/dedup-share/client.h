/*
 * dedup-share: the connection to a store daemon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One object for each store daemon's socket and process.  What is said on the
 * connection is in include/dedup-store/protocol.h; what is kept of the answers,
 * in held.h.
 *
 * Invariants
 *
 * - No request waits for longer than the limit on the daemon's silence; a put
 *   waits so long in all, whatever the daemon says meanwhile.  One that has
 *   waited so long is answered DEDUP_ANSWER_FAILED for each block; what the
 *   daemon says of these later is only noted as held.  While it is silent
 *   nothing is asked, and nothing waits.
 * - All that the daemon says is checked.  After anything wrong the connection
 *   ends, and all requests that wait are answered DEDUP_ANSWER_FAILED; what is
 *   held stays held.
 * - The peer is root, this process's user, or the owner of the socket's
 *   directory: who else listens there could have guests read wrong bytes.
 * - Request numbers ascend in the order in which messages are sent, and are not
 *   used again.  At most DEDUP_LIMIT_REQUESTS are with the daemon, and fewer of
 *   one image: if its disk hangs, reads of other images do not.
 *
 * A request, and who moves it on:
 *
 *   dedup_client_read(), _put()      who reads the socket
 *        |                                |
 *        v        there is room           v
 *     UNSENT ----------------------> SENT ------> done: its coroutine wakes
 *        |                                \
 *        | silence, or the end             `----> abandoned: its coroutine
 *        v                           silence      wakes, and the answer is
 *      done                                       awaited without it
 *
 * The socket is read in each AioContext that has asked lately: who waits there
 * goes on without a wake-up by another thread, and no AioContext waits for one
 * that has other work.  Who waits elsewhere is woken in its own AioContext.
 *
 * One thread minds the limit, and connects anew, at most once a second.  It
 * reads the socket until the first AioContext does; and then now and then, for
 * what none has read, as all may be busy, or gone.
 */

#ifndef DEDUP_SHARE_CLIENT_H
#define DEDUP_SHARE_CLIENT_H

#include "qemu/coroutine.h"
#include "held.h"

typedef struct DedupClient DedupClient;

/*
 * The client of the store daemon that listens at @path; it is connected.
 * @silence_ms is the limit on its silence, for the first who asks for @path.
 * NULL with *errp set if there is no such daemon, or not of this @kind; and
 * *absent, if nobody listens there, or not any more.
 * Main loop; waits for the daemon up to @connect_ms.
 */
DedupClient *dedup_client_get(const char *path, DedupStoreKind kind,
                              unsigned silence_ms, unsigned connect_ms,
                              bool *absent, Error **errp);

/*
 * No request is in flight.  When the last one puts it, the connection ends, at
 * once, whatever the daemon does.  But if a guest may still have frames, it
 * goes on, without anybody waiting for it, until none has: to say what of them
 * is not used any more, to this daemon and, on Linux, to the next ones.
 * The daemon keeps what is held until the process is gone, or says so.
 */
void dedup_client_put(DedupClient *c);

/* What its frames are made of. */
DedupStoreKind dedup_client_kind(const DedupClient *c);

/* Is there a daemon, and does it speak?  Any thread. */
bool dedup_client_is_up(DedupClient *c);

/* Numbers of the process, for query-dedup-stats. */
void dedup_client_counters(DedupClient *c, DedupHeldCounters *counters);

/* Bytes that the store may hold, as its daemon said last. */
uint64_t dedup_client_store_size(DedupClient *c);

/* Those that its daemon was told to, when it was started; 0: it was not. */
uint64_t dedup_client_asked_size(DedupClient *c);

/*
 * Have all clients find out what their guests still use, and the daemon drop
 * the rest.  That goes on in the background.  False with *errp set if it may
 * not be.  Any thread.
 */
bool dedup_client_reclaim(DedupClient *c, Error **errp);

/* What became of a request: @n frames, which are pinned if so answered. */
typedef struct DedupAnswers {
    DedupHeld *held;            /* what they are of; NULL: of nothing */
    unsigned n;
    unsigned nfilled;           /* that the daemon had to read */
    DedupMsgFrame frames[DEDUP_READ_BLOCKS];
} DedupAnswers;

/*
 * Ask for the blocks of @n extents, whose layers are leased on @connection; or
 * hand over @n blocks at @buf, at most DEDUP_PUT_BLOCKS.  @flags are
 * DEDUP_REQUEST_*.  All blocks are answered.  Ends with dedup_client_done().
 *
 * Another connection has other layers by these numbers: nothing is asked then.
 */
void coroutine_fn dedup_client_read(DedupClient *c, uint64_t connection,
                                    const DedupMsgExtent *extents, unsigned n,
                                    uint32_t flags, DedupAnswers *answers);
void coroutine_fn dedup_client_put_blocks(DedupClient *c, const void *buf,
                                          unsigned n, uint32_t flags,
                                          DedupAnswers *answers);

/* The frames of @answers are where they are wanted: unpin them. */
void dedup_client_done(DedupAnswers *answers);

/* --- layers --------------------------------------------------------------- */

/* An image file that the daemon is to read.  Zeroed at first. */
typedef struct DedupClientLayer {
    /* by the client's lock: */
    uint64_t connection;        /* the one that it was named on; 0: none */
    uint32_t number;            /* there */
    DedupLayerState state;      /* 0: not known yet */
    char why[DEDUP_TEXT_MAX];   /* it is not leased */
} DedupClientLayer;

/*
 * Name the image @fd, which is a description of its own, as @l, which was not
 * named on this connection.  Waits for its state.  @fd stays the caller's.
 * One coroutine at a time for each layer.
 */
void coroutine_fn dedup_client_open_layer(DedupClient *c, DedupClientLayer *l,
                                          int fd);

/* The daemon may forget it.  No request for it is in flight. */
void dedup_client_close_layer(DedupClient *c, DedupClientLayer *l);

/*
 * Can blocks of @l be asked for?  *number is what the daemon knows it by on
 * *connection.  If not, *name says whether it is to be named (anew).
 */
bool dedup_client_layer_is_leased(DedupClient *c, DedupClientLayer *l,
                                  uint32_t *number, uint64_t *connection,
                                  bool *name);

/* Why the daemon has no lease on @l; NULL: not known.  To be freed. */
char *dedup_client_layer_why(DedupClient *c, DedupClientLayer *l);

#endif /* DEDUP_SHARE_CLIENT_H */
