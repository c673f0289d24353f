/*
 * qemu-dedup-store: requests for blocks, and the reads that answer them
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A block of a request, and who moves it on:
 *
 *   request_look_up()     it is in a frame, or known to be zeroes --.
 *     |                   it is refused ----------------------------|
 *     v                                                             v
 *   WAITING (answer 0) -- fill or put, any thread --------------> decided
 *
 * When all blocks of a request are decided, client.c sends its answer.  Until
 * then, or until the request is dropped, a decided block has its frame pinned.
 */

#ifndef DEDUP_STORE_FILL_H
#define DEDUP_STORE_FILL_H

#include "layer.h"

typedef struct Client Client;

typedef struct Block {
    DedupAnswer answer;         /* 0: waiting */
    Frame *frame;               /* FRAME: pinned */
    Layer *layer;               /* the leased layer it is of, or NULL */
    uint64_t number;            /* there */
    bool filled;                /* it is to be read from there */
    bool made;                  /* its frame was, for this request */
    bool newly_held;            /* an answer that is not sent yet began it */
} Block;

typedef struct Request {
    unsigned refs;
    Client *client;             /* NULL: it is gone */
    uint64_t id;
    uint32_t flags;
    unsigned n;
    unsigned waiting;           /* blocks that are not decided */
    QTAILQ_ENTRY(Request) next;
    Block blocks[];
} Request;

/*
 * Reads of layers, and puts, that are under way.  Who has begun one with the
 * server's lock held takes the last one that way, by fills_take_own(), and
 * carries it out or leaves it; workers carry out all others.  @decided is
 * called with the store's lock held when requests are.
 */
typedef struct Fills Fills;
typedef struct Fill Fill;
Fills *fills_new(Store *s, void (*decided)(Client *c));
/* False, and nothing is freed, if any is under way: a disk may hang. */
bool fills_free(Fills *f);

/* The one that was begun last, if nobody has it yet, or NULL. */
Fill *fills_take_own(Fills *f);

/* Leave it to workers. */
void fills_leave(Fills *f, Fill *fill);

/* Carry it out, with no lock held; and others that have waited for its end. */
void fill_carry_out(Fills *f, Fill *fill);

/* --- with the store's lock held ------------------------------------------ */

Request *request_new(Client *c, uint64_t id, uint32_t flags, unsigned n);
void request_unref(Store *s, Request *r);

/* The client is gone: nobody waits for its blocks. */
void request_abandon(Store *s, Request *r);

/* Look up @r's block @i, @number of @layer, which may be NULL: not leased. */
void request_look_up(Store *s, Request *r, unsigned i, Layer *layer,
                     uint64_t number);

/* Have all blocks of @r read that are waiting. */
void request_fill(Fills *f, Request *r);

/* Have the blocks at @buf, all of @r's, kept; takes @buf. */
void request_put(Fills *f, Request *r, uint8_t *buf);

#endif /* DEDUP_STORE_FILL_H */
