/*
 * dedup-share: the filter node, for the files that make it up
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_SHARE_NODE_H
#define DEDUP_SHARE_NODE_H

#include "block/block_int.h"
#include "block/dedup-share.h"
#include "gather.h"
#include "leased.h"
#include "origin.h"
#include "qemu/stats64.h"

/* Whether a node still puts; see put.c.  Atomic, but only a hint. */
typedef struct DedupPutting {
    bool stopped;               /* it only probes */
    unsigned turn;              /* counts requests then */
    unsigned unmatched;         /* blocks in a row */
} DedupPutting;

/*
 * QEMU has the compiler clear all that is on the stack: not these.  (Later
 * QEMUs have QEMU_UNINITIALIZED.)
 */
#define DEDUP_HOT_ARRAY __attribute__((uninitialized))

/* A block of a request. */
typedef struct DedupBlock {
    uint64_t number;            /* in the disk */
    DedupDest dest;
    DedupResult result;
    bool placed;                /* not given, but the destination has it */
} DedupBlock;

typedef struct DedupCounters {
    Stat64 blocks_read;
    Stat64 hits;
    Stat64 misses;
    Stat64 matched;             /* of these, found by content */
    Stat64 of_origin;           /* that were asked for there */
    Stat64 results[DEDUP_RESULT__MAX];
    Stat64 copied;
    Stat64 bytes_filled;
    Stat64 bytes_passed;
} DedupCounters;

typedef struct DedupShareOptions {
    char *group;
    char *socket;               /* of the store daemon; NULL: the default */
    char *path;                 /* it, or the default, absolute since open */
    DedupShareStore store;
    bool has_size;
    uint64_t size;
    DedupShareAdmission admission;
    DedupShareScope share;
    bool share_encrypted;
    unsigned timeout;           /* seconds that the daemon may be silent */
    bool x_copy;                /* join though the program has no guest */
} DedupShareOptions;

/* What a reopen will change; then, until it ends, what it has changed. */
typedef struct DedupShareReopen {
    DedupShareOptions opts;
    DedupClient *client;
    char *reason;
} DedupShareReopen;

typedef struct BDRVDedupShareState {
    /* Change only in the main loop while the node is drained. */
    DedupShareOptions opts;
    DedupClient *client;        /* NULL: requests pass through */
    const DedupStoreOps *offers;        /* if device models offer their reads */
    DedupFiles files;           /* with a client */
    bool puts;                  /* with a client: all may be put */
    char *reason;               /* without one, why; NULL if it was asked for */

    bool drained;               /* atomic: the files may be others by now */

    /* Have their own locks, or are atomic. */
    DedupGather gather;
    DedupOrigin origin;
    DedupCounters counters;
    DedupPutting putting;

    QemuMutex buffers_lock;
    void *buffers[4];           /* of DEDUP_BATCH blocks; not in use */
    unsigned nbuffers;
} BDRVDedupShareState;

/* Is @bs a dedup-share node? */
bool dedup_share_is(const BlockDriverState *bs);

/* Are blocks of any image asked for? */
static inline bool dedup_share_asks(const BDRVDedupShareState *s)
{
    return s->files.n || dedup_origin_is_used(&s->origin);
}

/* The node's read, of a request that was offered or not. */
int coroutine_fn GRAPH_RDLOCK
dedup_share_co_preadv(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, BdrvRequestFlags flags);

/* Blocks that a request touches, whole or in part. */
static inline uint64_t dedup_count_blocks(int64_t offset, int64_t bytes)
{
    return DIV_ROUND_UP(offset + bytes, DEDUP_BLOCK_SIZE) -
           offset / DEDUP_BLOCK_SIZE;
}

/* Count @n blocks of a read that are not looked at, for the reason @why. */
static inline void dedup_count_skipped(BDRVDedupShareState *s, uint64_t n,
                                       DedupResult why)
{
    stat64_add(&s->counters.blocks_read, n);
    stat64_add(&s->counters.results[why], n);
}

/* --- read.c, direct.c --------------------------------------------------- */

/* Count @n blocks of a read by their results. */
void dedup_count_results(DedupCounters *c, const DedupBlock *blocks,
                         unsigned n);

/* Buffers that reads use.  No request is in flight. */
void dedup_buffers_init(BDRVDedupShareState *s);
void dedup_buffers_destroy(BDRVDedupShareState *s);

/* A buffer of DEDUP_BATCH blocks, or NULL; and back.  Any thread. */
void *dedup_buffer_get(BDRVDedupShareState *s);
void dedup_buffer_put(BDRVDedupShareState *s, void *buf);

/* The node's read of what is not offered. */
int coroutine_fn GRAPH_RDLOCK
dedup_read_direct(BlockDriverState *bs, int64_t offset, int64_t bytes,
                  QEMUIOVector *qiov, BdrvRequestFlags flags);

/* --- asked.c -------------------------------------------------------------- */

/*
 * A part of a request: where its bytes go.  If it was offered by a device model
 * @qiov is NULL: blocks can only be given to their dests.
 */
typedef struct DedupTarget {
    int64_t offset, bytes;      /* on the disk */
    QEMUIOVector *qiov;
    size_t qiov_offset;         /* for @offset */
} DedupTarget;

/*
 * Ask the store daemon for the @n blocks in a row of @t, at most
 * DEDUP_READ_BLOCKS; if they were offered, DEDUP_BATCH.  Those whose result is
 * UNDECIDED are for the whole pages at their dest, and are given or copied;
 * others are only copied.  What is in place then has that result, or is placed.
 */
void coroutine_fn GRAPH_RDLOCK
dedup_ask_blocks(BlockDriverState *bs, DedupBlock *blocks, unsigned n,
                 const DedupTarget *t);

/* --- placed.c ------------------------------------------------------------- */

/*
 * Put into place what @answers name; number i is for blocks[which[i]].  A block
 * whose result is UNDECIDED is for the whole page at its dest.  The others'
 * results say why not.
 */
void coroutine_fn dedup_place_answers(BDRVDedupShareState *s,
                                      const DedupTarget *t,
                                      const DedupAnswers *answers,
                                      const uint8_t *which, DedupBlock *blocks);

/* --- put.c ---------------------------------------------------------------- */

/*
 * Read those of @n blocks in a row whose result is NO_LAYER, and hand them to
 * the store daemon.  What was read is in place, whatever came of that.  If the
 * node has stopped that, they are UNMATCHED.
 */
void coroutine_fn GRAPH_RDLOCK
dedup_put_blocks(BlockDriverState *bs, const DedupTarget *t,
                 DedupBlock *blocks, unsigned n);

/* Does the node only probe? */
bool dedup_put_is_stopped(BDRVDedupShareState *s);

/* Is a request to be passed through, as nothing of it would be put? */
bool dedup_put_skips(BDRVDedupShareState *s);

/*
 * The @n blocks are in place; see whether one that is UNMATCHED is known by
 * now, if it is this request's turn.
 */
void coroutine_fn dedup_put_probe(BDRVDedupShareState *s,
                                  const DedupBlock *blocks, unsigned n);

/* --- chain.c: what of a chain takes part ---------------------------------- */

/* Find what takes part below @bs anew, or forget it.  Main loop, drained. */
void GRAPH_RDLOCK dedup_layers_find(BlockDriverState *bs);
void dedup_layers_drop(BDRVDedupShareState *s);

/*
 * Does any layer take part?  If not, nothing can come of looking at a read.
 * Any thread, when a request begins; one that began before a drained section
 * ends before the graph changes.
 */
bool dedup_layers_take_part(BDRVDedupShareState *s);

#endif /* DEDUP_SHARE_NODE_H */
