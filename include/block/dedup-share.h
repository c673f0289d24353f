/*
 * dedup-share: guests that read the same blocks hold one copy of them
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The seam between the dedup-share filter (block/), the stores that hold
 * the shared frames (hw/xen/memshr/) and the device models whose reads are
 * resolved.  docs/devel/dedup-share/ describes the whole.
 */

#ifndef BLOCK_DEDUP_SHARE_H
#define BLOCK_DEDUP_SHARE_H

#include "block/block-common.h"
#include "qapi/qapi-types-block-core.h"
#include "qemu/coroutine.h"
#include "system/block-backend-common.h"

/* Bytes of a block, of a frame and of a guest page: x86 has no other. */
#define DEDUP_BLOCK_SIZE 4096
#define DEDUP_BLOCK_BITS 12

/* Most blocks that are handed to a store in one call. */
#define DEDUP_BATCH 64

/* A guest page that can be made to be a frame; only its store reads it. */
typedef struct DedupDest {
    uint8_t *host;              /* Linux: where QEMU has it, or any memory */
    uint64_t gfn;               /* Xen: the guest's frame number */
    bool by_grant;              /* Xen: it is granted, by these: */
    uint16_t peer;
    uint32_t ref;
} DedupDest;

/*
 * What became of a block: its destination is a frame, or holds a copy of one;
 * else why it is still to be read.  At first nothing has: it is for a whole
 * page, which may be given.
 */
typedef enum DedupResult {
    DEDUP_UNDECIDED = 0,
    DEDUP_GIVEN,
    DEDUP_COPIED,
    DEDUP_UNALIGNED,
    DEDUP_NOT_RAM,
    DEDUP_GRANT,
    DEDUP_REPEATED,
    DEDUP_NO_LAYER,
    DEDUP_UNALLOCATED,
    DEDUP_STORE_FULL,
    DEDUP_NO_MEMORY,
    DEDUP_BUSY,
    DEDUP_MAPPED,
    DEDUP_CHANGED,
    DEDUP_EVICTED,
    DEDUP_ZEROES,
    DEDUP_SEEN_ONCE,
    DEDUP_UNMATCHED,
    DEDUP_NO_DAEMON,
    DEDUP_FAILED,
    DEDUP_RESULT__MAX,
} DedupResult;

static inline bool dedup_in_place(DedupResult result)
{
    return result == DEDUP_GIVEN || result == DEDUP_COPIED;
}

/* One frame to give; the store sets @result. */
typedef struct DedupGive {
    DedupDest dest;
    uint32_t slot;
    uint64_t handle;            /* Xen: what it is shared by */
    DedupResult result;
} DedupGive;

/* Counters that a store keeps; see DedupShareStoreStats in the QAPI schema. */
typedef struct DedupStoreCounters {
    uint64_t hypercalls;
    uint64_t system_calls;
    uint64_t given_fresh;
    uint64_t given_again;
    uint64_t fresh_hypercalls;
    uint64_t give_hypercalls;
    uint64_t give_system_calls;
} DedupStoreCounters;

typedef struct DedupStore DedupStore;

/*
 * A kind of store, and how its frames get to the guest.  Its frames are a store
 * daemon's.  Those that are pages of a file need no functions but the first
 * ones: they are mapped or copied to addresses in QEMU, and the filter offers
 * its own reads.  For the others device models offer theirs; these have all
 * functions.
 *
 * Any thread, no lock held, unless something else is said; the store locks what
 * it must, and never waits for another process.
 */
typedef struct DedupStoreOps {
    DedupShareStore kind;

    /* Is this process of the kind that the store is made for?  Main loop. */
    bool (*applies)(void);

    /*
     * Has the guest not run yet, so that a daemon may be started for it?  NULL:
     * never.  Main loop.
     */
    bool (*is_starting)(void);

    /*
     * Can this QEMU's guest use such a store?  Sets *errp to what is missing
     * and what would help.  Makes nothing that outlives the process (the Xen
     * store enables sharing for the guest's domain, which shares nothing yet).
     * Main loop.
     */
    bool (*probe)(Error **errp);

    /*
     * A daemon's store, whose slots are gfns of domain @domid.  NULL with *errp
     * set on error.
     */
    DedupStore *(*attach)(uint32_t domid, Error **errp);
    void (*detach)(DedupStore *store);

    /*
     * Copy @bytes from @skip on of the frame @slot, or of as many slots as that
     * takes, which are held.  0, or -errno; also if its daemon has ended
     * meanwhile, and the frames with it.
     */
    int (*copy)(DedupStore *store, uint32_t slot, size_t skip, void *buf,
                size_t bytes);

    /*
     * Make each guest page gives[i].dest be the frame gives[i].slot, copy on
     * write, and set gives[i].result.  Whatever the result, the page can be
     * read and written by ordinary means afterwards; unless it is in place
     * its content is undefined.
     */
    void (*give)(DedupStore *store, DedupGive *gives, unsigned n);

    /*
     * The daemon has ended meanwhile, and the next one may have freed frames
     * that nobody used: no page that is DEDUP_GIVEN stays a frame.  Sets their
     * results.
     */
    void (*take_back)(DedupStore *store, DedupGive *gives, unsigned n);

    /* Call @used for each frame that the guest has, or may have. */
    void (*each_used)(DedupStore *store,
                      void (*used)(void *opaque, uint32_t slot), void *opaque);

    /*
     * Can @dest be had for the page at @offset of @mr?  True if the page is
     * the guest's own RAM, whole, and may be replaced.
     */
    bool (*resolve)(MemoryRegion *mr, uint64_t offset, DedupDest *dest);

    /*
     * Can @dest be had for the page that the guest has granted to domain @peer
     * as @ref?  The guest can make that change at any time; give() looks again.
     */
    bool (*resolve_grant)(uint32_t ref, uint16_t peer, DedupDest *dest);

    /* The guest sets up anew what grants are in. */
    void (*grants_changed)(void);

    /*
     * Does QEMU itself map the page of @dest, without using it?  Then give()
     * fails outside of the main loop, unless let_go() is called before, in the
     * main loop.
     */
    bool (*held)(const DedupDest *dest);
    void (*let_go)(const DedupDest *dest);

    /* This process's counters. */
    void (*counters)(DedupStoreCounters *c);
} DedupStoreOps;

/* Register a kind of store; called from a constructor (type_init()). */
void dedup_store_register(const DedupStoreOps *ops);

/* The ops of a kind, or NULL if this program was built or run without it. */
const DedupStoreOps *dedup_store_find(DedupShareStore kind);

/*
 * One block of a read request and the guest page it is for.  The caller sets
 * all but @result.
 */
typedef struct DedupPage {
    int64_t offset;             /* on the disk, a multiple of 4096 */
    DedupDest dest;
    DedupResult result;
} DedupPage;

/*
 * How a device model has a read resolved:
 *
 *   blk_inc_in_flight(blk);
 *   if (dedup_share_wants(blk, public)) {
 *       dedup_share_resolve(blk, ...) for each whole page of the request;
 *       dedup_share_co_read(blk, pages, ...);
 *       dedup_share_co_read_rests(blk, ...) for what was not given;
 *   } else {
 *       ordinary read;
 *   }
 *   complete the request;
 *   blk_dec_in_flight(blk);
 *
 * All of it from one AioContext, that of the request.  The request stays in
 * flight throughout, so a drained section waits for it as a whole.
 */

/*
 * Does a read from @blk want to be offered?  False also while @blk's node is
 * drained or @blk is throttled, and whenever nothing would come of it.  @public
 * is what blk_get_public() returns, which only the main loop may call.
 */
bool dedup_share_wants(BlockBackend *blk, const BlockBackendPublic *public);

/*
 * Find the destination for the page at @offset of @mr.  False if the page
 * cannot be given.
 */
bool dedup_share_resolve(BlockBackend *blk, MemoryRegion *mr, uint64_t offset,
                         DedupDest *dest);

/* The same for the page that the guest has granted to @peer as @ref. */
bool dedup_share_resolve_grant(BlockBackend *blk, uint32_t ref, uint16_t peer,
                               DedupDest *dest);

/* The guest has connected or disconnected @blk's device: see DedupStoreOps. */
void dedup_share_grants_changed(BlockBackend *blk);

/* Count @n blocks of a read that are not offered, for the reason @why. */
void dedup_share_skip(BlockBackend *blk, unsigned n, DedupResult why);

/*
 * Give the guest as many of @pages as can be given, before returning.
 * Pages whose result is DEDUP_UNDECIDED on entry are tried; those that are not
 * DEDUP_GIVEN on return are the caller's to read with
 * dedup_share_co_read_rests(), in full: whatever happens here, nothing fails.
 * @pages ascend by offset.
 */
void coroutine_fn dedup_share_co_read(BlockBackend *blk, DedupPage *pages,
                                      unsigned n);

/* Bytes of a request that are still to be read. */
typedef struct DedupRest {
    int64_t offset;             /* on the disk */
    int64_t bytes;
    void *buf;                  /* where to */
} DedupRest;

/*
 * Read like blk_co_pread(), as part of a request that was offered: all of
 * @rests at once.  0, or the first error; the buffers are undefined then.
 */
int coroutine_fn dedup_share_co_read_rests(BlockBackend *blk,
                                           const DedupRest *rests, unsigned n);

/*
 * Have the filter node @bs pass everything through from now on, and share all
 * permissions, so that it can be dropped.  Main loop.
 */
void dedup_share_leave(BlockDriverState *bs);

#endif /* BLOCK_DEDUP_SHARE_H */
