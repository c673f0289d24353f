/*
 * dedup-share index: what block is in which frame, and what content
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Files in a group's directory on a tmpfs, mapped by every process of the
 * group.  No policy, no I/O, no store.
 *
 *   lock        locks only, see index-dir.h
 *   index       a header page, the frame table, the hash index
 *   map-LAYER   a header page, then a layer's block map, see map.h
 *   held        the processes, and who holds which frame, see holders.h
 *   seen        digests that were seen once, see admission.h
 *   frames      the frames, if the store is Linux's
 *
 * Invariants
 *
 * - A frame's tag is one 64-bit word with its generation, its state, who works
 *   on it, and a check of these, of the slot and of the store's seed.  It alone
 *   says what the slot is used for.  A tag whose check is wrong was not written
 *   by us: then the index is damaged, and nobody uses it any more.
 * - The tag is the last thing written when a frame is sealed, and the first
 *   when it is evicted.  A reader that finds the tag of its id before and after
 *   it has read the rest has read what belongs to the id.
 * - A generation is never used twice for a slot.  When 2^20 - 1 are used up the
 *   slot is retired.
 * - All else is advice: the hash index, the digests, the bits that say which
 *   slots are free or were used lately, the counters.  Whatever they say, the
 *   worst is that something is not found.
 * - Nothing in here waits for another process.  What a process killed at any
 *   instruction was doing is in the tags of its slots: dedup_index_recover().
 *
 * A frame's states; "*": the tag names the process that works on it
 *
 *          alloc            seal            evict_begin
 *   FREE ---------> FILLING* ----> SEALED -------------> EVICTING*
 *    ^                 |  ^           ^                    |    |
 *    |   release       |  |           |    evict_cancel:   |    | evict_commit:
 *    +-----------------+  |           +--------------------+    |  it is idle
 *    |  generation + 1    |             somebody holds it       v
 *    |                    +-------------------------------- DROPPING*
 *    |                         reuse, generation + 1            |
 *    +----------------------------------------------------------+
 *                              release, generation + 1
 *
 * FREE slots have no memory in the store; SEALED and EVICTING ones have a
 * frame, which never changes; the others may have some, that nobody looks
 * at.  Released with the last generation a slot is RETIRED.
 */

#ifndef DEDUP_SHARE_INDEX_H
#define DEDUP_SHARE_INDEX_H

#include "block/dedup-share.h"
#include "qemu/atomic.h"

#define DEDUP_INDEX_MAGIC   0x58444950554445ULL     /* "EDUPIDX" */
/* The number, and it inverted: what was scribbled over is no other version. */
#define DEDUP_INDEX_VERSION (3 | (0xffff & ~3) << 16)
#define DEDUP_HEADER_SIZE   4096

/* Bits of a slot's number, and of a generation, in a tag and in a map. */
#define DEDUP_SLOT_BITS       28
#define DEDUP_GENERATION_BITS 20
#define DEDUP_GENERATION_MAX  ((1u << DEDUP_GENERATION_BITS) - 1)

/* Most frames of a store: there are slots that no frame has, see map.h. */
#define DEDUP_MAX_FRAMES ((1u << DEDUP_SLOT_BITS) - 64)

/* Most processes of a group. */
#define DEDUP_MAX_MEMBERS 1024

typedef enum DedupFrameState {
    DEDUP_FRAME_DAMAGED,
    DEDUP_FRAME_FREE,
    DEDUP_FRAME_FILLING,
    DEDUP_FRAME_SEALED,
    DEDUP_FRAME_EVICTING,
    DEDUP_FRAME_DROPPING,
    DEDUP_FRAME_RETIRED,
    DEDUP_FRAME__MAX,
} DedupFrameState;

/* XXH3-128 of a block's content, with the store's seed. */
typedef struct DedupDigest {
    uint64_t low;
    uint64_t high;
} DedupDigest;

/*
 * The first page of "index".  Up to @crc it never changes once the file has
 * its name.
 */
typedef struct DedupIndexHeader {
    uint64_t magic;
    uint32_t version;
    uint32_t nframes;
    uint64_t seed;              /* random; of the checks and digests */
    uint64_t size;              /* of the file */
    uint32_t has_words;         /* are there words? */
    DedupStoreId store;
    uint32_t reserved;
    uint32_t crc;               /* crc32c of all before */

    /* Changing; on a cache line of its own.  By qatomic_*() only. */
    uint32_t damaged QEMU_ALIGNED(64);     /* nobody uses it any more */
    uint32_t nsealed;           /* about */
    uint32_t nfree;             /* about */
    uint32_t alloc_hand;        /* where the search for free slots goes on */
    uint32_t clock_hand;        /* where the search for idle frames goes on */
    uint32_t trims_wanted;      /* how often all were asked to trim */
} DedupIndexHeader;

QEMU_BUILD_BUG_ON(sizeof(DedupIndexHeader) > DEDUP_HEADER_SIZE);

/* The arrays are in the mapped file, and accessed by qatomic_*() only. */
typedef struct DedupIndex {
    DedupIndexHeader *hdr;
    uint64_t *tags;
    uint64_t *digests;          /* the high half of each frame's */
    uint64_t *words;            /* the store's, of each frame; or NULL */
    unsigned long *free;        /* a bit a slot */
    unsigned long *used;        /* a bit a slot: since the clock hand passed */
    uint32_t *hash;             /* buckets of DEDUP_BUCKET entries */
    uint32_t nbuckets;
    /* Copies: nobody can make us read beyond the mapping later. */
    uint32_t nframes;
    uint64_t seed;
    size_t size;
    unsigned member;            /* ours, from 1 on: see holders.h */
} DedupIndex;

/* --- the file ----------------------------------------------------------- */

/*
 * Make (@create) or map the file "index" in @dirfd.  A new file gets its name
 * only when it is complete.  @nframes and @words, whether the store has a word
 * for each frame, are wanted of a new one; @nframes is checked of an old one,
 * unless 0.  *errp tells what is wrong with an old one.  If it is *damaged it
 * may be replaced; what else may be wrong with it is for the user to decide.
 * @what names the directory in messages.
 */
bool dedup_index_make(DedupIndex *index, int dirfd, const char *what,
                      uint32_t nframes, bool words, const DedupStoreId *store,
                      Error **errp);
bool dedup_index_attach(DedupIndex *index, int dirfd, const char *what,
                        uint32_t nframes, bool *damaged, Error **errp);
void dedup_index_unmap(DedupIndex *index);

/*
 * Somebody found what cannot be: nobody uses the index from now on.  Any
 * thread.
 */
void dedup_index_set_damaged(DedupIndex *index);
static inline bool dedup_index_is_damaged(DedupIndex *index)
{
    return qatomic_read(&index->hdr->damaged);
}

/* --- frames ------------------------------------------------------------- */

/*
 * Take up to @n free slots, return how many.  They are FILLING then.  As far as
 * they are free they follow each other.
 */
unsigned dedup_index_alloc(DedupIndex *index, uint32_t *slots, unsigned n);

/* The name of the frame that a slot that is FILLING will be. */
DedupFrameId dedup_index_name(DedupIndex *index, uint32_t slot);

/*
 * Seal a slot that is FILLING; @word is the store's.  Returns its name.  It is
 * found by its content from now on.
 */
DedupFrameId dedup_index_seal(DedupIndex *index, uint32_t slot, uint64_t word,
                              const DedupDigest *digest);

/*
 * Is @id a sealed frame?  If so *word is the store's word for it.  Any id may
 * be asked for, also one from a corrupt map.
 */
bool dedup_index_get(DedupIndex *index, DedupFrameId id, uint64_t *word);

/* The name of the sealed frame @slot, if there is one. */
bool dedup_index_id(DedupIndex *index, uint32_t slot, DedupFrameId *id);

/*
 * Note that @slot was used: it is not evicted when the clock hand comes next.
 */
void dedup_index_touch(DedupIndex *index, uint32_t slot);

/*
 * Give a slot back that is FILLING or DROPPING, and ours.  The store has no
 * memory for it any more.
 */
void dedup_index_release(DedupIndex *index, uint32_t slot);

/*
 * Begin to evict a frame: if it is sealed, nobody finds it from now on, and it
 * belongs to the caller, who alone got true.  Ends with
 * dedup_index_evict_cancel(), if it is in use after all; else with
 * dedup_index_evict_commit(), before the store drops its memory, and then
 * dedup_index_release() or dedup_index_reuse().
 */
bool dedup_index_evict_begin(DedupIndex *index, uint32_t slot);
void dedup_index_evict_cancel(DedupIndex *index, uint32_t slot);
void dedup_index_evict_commit(DedupIndex *index, uint32_t slot);

/* A slot that is DROPPING is FILLING now; false: it was retired. */
bool dedup_index_reuse(DedupIndex *index, uint32_t slot);

/*
 * Slots @first to @first + 63, a multiple of 64, that were used since they were
 * cleared.
 */
uint64_t dedup_index_used(DedupIndex *index, uint32_t first);
void dedup_index_clear_used(DedupIndex *index, uint32_t first, uint64_t bits);

/* What @slot is used for, and by whom (0: nobody in particular). */
DedupFrameState dedup_index_state(DedupIndex *index, uint32_t slot,
                                  unsigned *member);

/*
 * @member has died, and nobody has its number yet: find what it was doing.
 * @idle says whether nobody holds a frame, and @drop takes the memory from a
 * slot and says whether that worked; if not, the slot stays unused.  Slots that
 * are free but not marked so are marked again.  Returns how many were
 * recovered.
 */
typedef bool DedupSlotFn(void *opaque, uint32_t slot);
unsigned dedup_index_recover(DedupIndex *index, unsigned member,
                             DedupSlotFn *idle, DedupSlotFn *drop,
                             void *opaque);

/* --- hash.c: content ---------------------------------------------------- */

/* Entries of a bucket.  Two buckets are looked into for each digest. */
#define DEDUP_BUCKET 8

uint32_t dedup_hash_buckets(uint32_t nframes);

DedupDigest dedup_digest(DedupIndex *index, const void *block);

/*
 * Find a sealed frame that may have this content: the caller compares.  It is
 * advice also in that it may miss one.
 */
bool dedup_hash_find(DedupIndex *index, const DedupDigest *digest,
                     DedupFrameId *id);

/* Have the frame @slot be found. */
void dedup_hash_insert(DedupIndex *index, const DedupDigest *digest,
                       uint32_t slot);

#endif /* DEDUP_SHARE_INDEX_H */
