/*
 * dedup-share: blocks of a reflink copy that are still its origin's
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A raw image that a guest writes to has no lease.  But where it is a copy by
 * "cp --reflink" of an image that nobody writes to, a block that the guest has
 * not written is a block of that one, its origin: it is asked for there.
 *
 * Invariants
 *
 * - What is kept of a block is that it was the origin's when it was looked at,
 *   never where it is on the disk.  A reader can move a file's blocks (dedupe,
 *   defragmentation), leased or not, and its old place is then written to.
 * - It is looked at when it is first read: the copy's extents, the origin's,
 *   and the copy's again.  So at the moment of the second look both had the
 *   physical block.  What was written to both before the first look is synced
 *   then.
 * - From the first look on, a block that is written is the copy's own from
 *   before the write is submitted, also while others look; so are the blocks of
 *   writes that are under way then.  Blocks only ever become the copy's own.
 * - A read waits for the look at its blocks, but not for more than WAIT_MS for
 *   the sync before the first one: the guest may have written much.  Reads go
 *   the ordinary way until that is over, and no drained section waits for it.
 * - All is forgotten, and begins with another first look, when
 *     - a drained section ends, as the graph may be another;
 *     - permissions are settled anew;
 *     - the image is resized;
 *     - the daemon's lease on the origin is another one: it may have changed.
 * - No other node of this process writes to the copy: as long as somebody uses
 *   the filter it does not let its child's other parents write or resize.  A
 *   node that is inactive (as a migration's destination is) may be written to
 *   by others: nothing is asked for then.
 * - A place that was found is good for one connection's lease on the origin,
 *   and says for which.
 */

#ifndef DEDUP_SHARE_ORIGIN_H
#define DEDUP_SHARE_ORIGIN_H

#include "block/block_int.h"
#include "leased.h"
#include "qemu/atomic.h"

/* A write that is under way; in its coroutine. */
typedef struct DedupWrite {
    int64_t offset, bytes;
    QLIST_ENTRY(DedupWrite) next;
} DedupWrite;

typedef struct DedupOrigin {
    /* Change only in the main loop while the node is drained. */
    BdrvChild *child;           /* the origin; NULL: the node has none */
    BlockDriverState *copy;     /* the copy's 'file' node; NULL: none is used */
    DedupFile file;             /* the origin's; with @copy */

    const char *why;            /* atomic: why none is used; or NULL */
    bool failed;                /* by the lock: a sync, so a write may have */

    CoMutex looking;            /* held by the request that looks */
    QemuMutex lock;             /* protects all below; held for moments */
    uint64_t connection;        /* whose lease it is about; 0: no look yet */
    struct DedupSync *sync;     /* the files are put on the disk; or NULL */
    struct DedupSync *begun[4]; /* @sync and others that may be under way */
    unsigned resizes;           /* that are under way */
    GHashTable *windows;        /* number -> Window */
    QLIST_HEAD(, DedupWrite) writes;
} DedupOrigin;

/* First and last; no request is in flight. */
void dedup_origin_init(DedupOrigin *o);
void dedup_origin_destroy(DedupOrigin *o);

/*
 * Open the child "origin" of @bs if @options have one.  False with *errp set if
 * it, or the child "file", which is open, cannot be used as such at all.
 * Main loop.
 */
bool dedup_origin_open(DedupOrigin *o, BlockDriverState *bs, QDict *options,
                       Error **errp);

/* The permissions that the child "origin" takes. */
void dedup_origin_perms(uint64_t *perm, uint64_t *shared);

/* What the child "file" of @bs shares, which is being settled, cut to fit. */
void GRAPH_RDLOCK dedup_origin_cut_shared(DedupOrigin *o, BlockDriverState *bs,
                                          uint64_t *shared);

/*
 * Find the files of the origin and of the copy below @bs anew, or drop them.
 * Main loop, drained.
 */
void GRAPH_RDLOCK dedup_origin_find(DedupOrigin *o, BlockDriverState *bs);
void dedup_origin_drop(DedupOrigin *o, DedupClient *c);

/* Why no block is asked for; NULL: some may be.  Main loop; to be freed. */
char *dedup_origin_reason(DedupOrigin *o, DedupClient *c);

/* May blocks be asked for?  Any thread. */
static inline bool dedup_origin_is_used(const DedupOrigin *o)
{
    return o->copy && !qatomic_read(&o->why);
}

/*
 * Find the places of those of @n blocks of the disk below @bs, from @first on,
 * at most DEDUP_BATCH, that are the origin's.  The others' stay as they are.
 */
void coroutine_fn GRAPH_RDLOCK
dedup_origin_locate(DedupOrigin *o, DedupClient *c, BlockDriverState *bs,
                    uint64_t first, unsigned n, DedupPlace *places);

/*
 * Around each write to the copy, of whatever kind; and around its resizing.
 * The write's blocks are the copy's own when begin returns.  Any thread.
 */
void dedup_origin_begin_write(DedupOrigin *o, DedupWrite *w, int64_t offset,
                              int64_t bytes);
void dedup_origin_end_write(DedupOrigin *o, DedupWrite *w);
void dedup_origin_begin_resize(DedupOrigin *o);
void dedup_origin_end_resize(DedupOrigin *o);

#endif /* DEDUP_SHARE_ORIGIN_H */
