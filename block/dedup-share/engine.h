/*
 * dedup-share engine: what to do with the blocks of a read
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Policy.  Knows the index and the store's ops; nothing of block driver
 * states, of Xen or of QAPI.
 *
 *   look up the block map -- hit ------------------------------------.
 *        |                                                           |
 *       miss: read the image                                         v
 *        |-- zeroes ------------------- record that -> read in the   give
 *        |                                             ordinary way    |
 *        |-- the hash index has it, and the bytes are the same:        |
 *        |                                             record -------->|
 *        `-- new: take slots, fill, seal, ------------ record -------->|
 *                                                                    check
 *
 * Invariants
 *
 * - A block is given only from a frame that its layer's map names, or that
 *   was filled for it in this request.
 * - A frame is filled from the reader that the caller hands in, never from
 *   guest memory, and recorded only if no write overlapped (tracker.h).
 * - A frame that was found by its content's digest is compared, byte by byte,
 *   with what was read before it is recorded or given.
 * - The id is checked after the give as well: if the frame was evicted in
 *   between, the block counts as not given.
 * - Whatever fails, the block's result says so; if what was read could be put
 *   where it is wanted the block is *placed*, and else the caller reads it.
 */

#ifndef DEDUP_SHARE_ENGINE_H
#define DEDUP_SHARE_ENGINE_H

#include "group.h"
#include "map.h"
#include "qemu/stats64.h"
#include "tracker.h"

/*
 * QEMU has the compiler clear all that is on the stack: not these.  (Later
 * QEMUs have QEMU_UNINITIALIZED.)
 */
#define DEDUP_HOT_ARRAY __attribute__((uninitialized))

/* A block of a request.  The caller sets all but what is the engine's. */
typedef struct DedupBlock {
    DedupMap *map;              /* of the layer that owns it; NULL if none */
    uint64_t in_map;            /* its number there */
    uint64_t number;            /* in the disk */
    DedupDest dest;
    DedupResult result;
    bool placed;                /* not given, but the destination has it */
    /* the engine's */
    DedupFrameId id;
    uint64_t word;
} DedupBlock;

typedef struct DedupCounters {
    Stat64 blocks_read;
    Stat64 hits;
    Stat64 misses;
    Stat64 matched;             /* of these, found by content */
    Stat64 results[DEDUP_RESULT__MAX];
    Stat64 copied;
    Stat64 bytes_filled;
    Stat64 bytes_passed;
} DedupCounters;

/* DedupStoreOps.give() for the group's store. */
typedef void coroutine_fn DedupGiveFn(void *opaque, DedupGive *gives,
                                      unsigned n);

typedef struct DedupRead {
    DedupGroup *group;
    DedupTracker *tracker;
    DedupRange *fill;           /* begun; covers all the blocks */
    DedupCounters *counters;
    DedupShareAdmission admission;
    /* Read @n blocks from block @first on into @buf; 0 or -errno. */
    int coroutine_fn (*read)(void *opaque, uint64_t first, unsigned n,
                             void *buf);
    /* A buffer of @size bytes, at most DEDUP_BATCH blocks, or NULL. */
    void *(*alloc)(void *opaque, size_t size);
    void (*free)(void *opaque, void *buf);      /* @buf may be NULL */
    DedupGiveFn *give;
    void *opaque;
    DedupHold hold;             /* the engine's */
} DedupRead;

/*
 * Give as many of the @n blocks as can be given, in ascending order of their
 * numbers; @n is at most DEDUP_BATCH.  Sets every result but those that are
 * not DEDUP_GIVEN on entry, which are left alone.
 */
void coroutine_fn dedup_engine_read(DedupRead *r, DedupBlock *blocks,
                                    unsigned n);

/*
 * The same if the store has all of those blocks, which all have a map; else
 * false, and nothing done.  Needs no @r->fill.
 */
bool coroutine_fn dedup_engine_hit(DedupRead *r, DedupBlock *blocks,
                                   unsigned n);

/*
 * Copy the @n blocks, at most DEDUP_BATCH, from the store to @buf if it holds
 * all of them.  Else false, and what is in @buf is undefined.
 */
bool dedup_engine_copy(DedupGroup *g, DedupBlock *blocks, unsigned n,
                       void *buf);

#endif /* DEDUP_SHARE_ENGINE_H */
