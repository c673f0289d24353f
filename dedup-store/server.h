/*
 * qemu-dedup-store: the socket, and who is connected
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Invariants
 *
 * - What a client says is checked as if an enemy had sent it; protocol.h says
 *   what a wrong message gets.  No client can have the daemon wait, or use more
 *   than its share of memory, descriptors and threads.
 * - Calls on a descriptor that a client has passed can hang (FUSE), close()
 *   too.  They are made by a thread of that client, and nowhere else.
 * - Answers are made when they are sent: one that is sent after a lease was
 *   given back does not use the layer's map.
 *
 * Locks: the server's, then the store's.  With the server's lock, receivers
 * handle what clients say, and the main loop what is due.  A client's opener
 * thread and who has decided an answer, which is sent at once, have the store's
 * only: it protects what they change, and is what is meant by "the lock".
 */

#ifndef DEDUP_STORE_SERVER_H
#define DEDUP_STORE_SERVER_H

#include "fill.h"
#include "receive.h"
#include "qapi/qapi-types-dedup-share.h"

typedef struct Server {
    const char *group;
    Store *store;
    Layers *layers;
    Fills *fills;
    QemuMutex lock;             /* protects what has no other */
    uint64_t asked;             /* bytes that the store was to hold; or 0 */
    int listen_fd;
    guint listener;             /* GLib's source that accepts, or will */
    GMainLoop *loop;
    unsigned idle_exit;         /* seconds; 0: never */
    unsigned layer_idle;        /* seconds */
    int64_t busy_until;         /* us: when there was a client last */
    QTAILQ_HEAD(, Client) clients;
    unsigned nclients;
    uint64_t last_client;       /* number */
    bool want_trim;             /* by the lock: the store is full */
    int64_t next_trim;
    int64_t reclaim_until;      /* us: what becomes idle until then goes */
    unsigned to_drop;           /* idle frames, little by little */
    unsigned dropping;          /* GLib's source that does, or 0 */
    uint64_t dropped;           /* frames, in all */
    bool lost;                  /* it ends, as its frames were taken away */
} Server;

extern Server server;

/*
 * Serve until there is nothing to do, or a signal; then call @leave, if not
 * NULL, before who is connected hears of it.  False if a thread is left that
 * hangs and may come back: what it uses must stay.
 */
bool server_run(void (*leave)(void));

/*
 * Drop what is idle, in the background, and tell clients that have asked for it
 * when that is done; have the clients let go of what they do not use, and drop
 * that when they have.
 */
void server_reclaim(void);

/* --- client.c, with the server's lock held -------------------------------- */

/* A number that a client has given to a layer. */
typedef struct ClientLayer {
    bool used;
    bool opening;
    bool changed;               /* the client is to be told */
    DedupLayerState state;
    Layer *layer;               /* if it is leased, or was */
    char text[DEDUP_TEXT_MAX];
} ClientLayer;

/* A thread that does what may hang, while there is something to do. */
typedef struct Opener {
    Client *client;
    GQueue jobs;
    bool runs;                  /* its client stays until it does not */
} Opener;

/* A layer that hangs keeps no claim waiting: behind many, nothing is read. */
enum { OPENS_LAYERS, NOTES_CLAIMS, OPENERS };

struct Client {
    uint64_t number;            /* later ones have greater ones */
    int fd;                     /* -1: it has ended; changes with the lock */
    pid_t pid;
    uid_t uid;
    int64_t since;              /* us: when it connected */
    bool greeted, observer;
    bool busy;                  /* it is in use, and not to be freed */
    Watch *watch;               /* of its socket */
    uint64_t last_request;
    /* by the lock: */
    Process *process;
    ClientLayer layers[DEDUP_LIMIT_LAYERS];
    bool layers_changed;        /* perhaps: one of them */
    QTAILQ_HEAD(, Request) requests;
    unsigned nrequests;
    bool kicked;                /* it will be flushed */
    bool full;                  /* the socket is: it is watched for that */
    bool want_alive, want_trim;
    bool too_many;              /* holds: it is to trim, again and again */
    int64_t next_trim;          /* us; for that reason */
    char *status;               /* to be sent from @sent on */
    size_t sent;
    uint64_t status_request;
    uint64_t reclaim_request;   /* it waits for RECLAIMED; 0: it does not */
    uint64_t reclaim_from;      /* server.dropped then */
    Opener openers[OPENERS];
    unsigned nclaims;           /* jobs, and the one that is being done */
    QTAILQ_ENTRY(Client) next;
};

/* A connection that was accepted; takes @fd. */
void client_new(int fd);

/* Send what there is to be sent, until the socket is full. */
void client_flush(Client *c);

/* End the connection; @text, if not NULL, is why. */
void client_end(Client *c, const char *text);

/* Have a client flushed by the main loop.  With only the store's lock held. */
void client_kick(Client *c);

/*
 * Send the answers that are decided, or have the main loop do it if that cannot
 * be at once.  With only the store's lock held.
 */
void client_answer(Client *c);

/* --- opener.c: what may hang ---------------------------------------------- */

/*
 * Have @c's thread open @fd as its layer @layer, and close it; or only close it
 * if @layer is negative.  With the lock held.
 */
void opener_add(Client *c, int fd, int layer);

/* Have it make the claim @m of @n slots, and close @fd.  With the lock held. */
void opener_add_claim(Client *c, int fd, const DedupMsgClaim *m,
                      const uint32_t *slots, unsigned n);

/* Has it so many claims that no more is read of @c?  With the lock held. */
bool opener_is_full(const Client *c);

/*
 * Close a client's socket, whose other side sees its end at once.  What has
 * come in and was not read may hold descriptors, whose close() can hang: of a
 * TCP socket, say, that lingers.  With the server's lock held.
 */
void opener_close_socket(int fd);

/* Prepare a new client's openers.  Does any of them run?  With the lock. */
void opener_init(Client *c);
bool opener_runs(const Client *c);

/* Clients of @uid that are gone, and whose openers run.  With the lock held. */
unsigned opener_count(uid_t uid);

/* --- status.c ------------------------------------------------------------- */

/* The status as JSON.  With the lock held. */
char *status_json(void);

#endif /* DEDUP_STORE_SERVER_H */
