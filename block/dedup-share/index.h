/*
 * dedup-share index: what block is in which frame
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Files in a group's directory on a tmpfs, mapped by every process of the
 * group.  No policy, no I/O, no store.
 *
 *   lock        locks only, see index-dir.h
 *   index       a header page, then the frame table
 *   map-LAYER   a header page, then a layer's block map
 *   held        who holds which frame, see holders.h
 *   frames      the frames, if the store is Linux's
 *
 * Invariants
 *
 * - A frame's tag holds its generation and its state in one 64-bit word, and
 *   is the last thing written when it is sealed and the first when it is
 *   released.  A reader that finds the tag of its id before and after it has
 *   read the rest has read what belongs to the id.
 * - A generation is never used twice for a slot.  When 2^32 - 1 are used up
 *   the slot is retired.
 * - A block map entry is one 64-bit word: an entry is seen whole or not at
 *   all.  Every id read from a map is checked against the frame table, so a
 *   stale entry is a miss.
 * - Nothing in here waits for another process.  A process killed at any
 *   instruction loses the slots it was filling, and those it had popped.
 *
 * A frame's states
 *
 *            alloc            seal             release
 *   FREE ----------> FILLING ------> SEALED -----------> FREE, generation + 1
 *                       \_____________________________/
 *                            release (fill failed)
 *
 * and, where idle frames are evicted,
 *
 *          evict_begin               release
 *   SEALED ------------> EVICTING ------------> FREE, generation + 1
 *         \______________/
 *           evict_cancel: somebody holds it
 *
 * A free slot has no memory in the store.
 */

#ifndef DEDUP_SHARE_INDEX_H
#define DEDUP_SHARE_INDEX_H

#include "block/dedup-share.h"
#include "sparse.h"

#define DEDUP_INDEX_MAGIC   0x58444950554445ULL     /* "EDUPIDX" */
#define DEDUP_MAP_MAGIC     0x50414d50554445ULL     /* "EDUPMAP" */
#define DEDUP_INDEX_VERSION 2
#define DEDUP_HEADER_SIZE   4096

/* A frame, 24 bytes.  Accessed by qatomic_*() only. */
typedef struct DedupFrame {
    uint64_t tag;       /* generation << 32 | state */
    uint64_t word;      /* sealed: the store's; free: the next free slot + 1 */
    uint64_t digest;    /* content digest; 0 until the hash index uses it */
} DedupFrame;

/*
 * The first page of "index".  Up to @crc it never changes once the file has
 * its name.
 */
typedef struct DedupIndexHeader {
    uint64_t magic;
    uint32_t version;
    uint32_t nframes;
    uint64_t frames_offset;
    uint64_t hash_offset;       /* the hash index, later; 0: none */
    uint64_t size;              /* of the file */
    DedupStoreId store;
    uint32_t reserved;
    uint32_t crc;               /* crc32c of all before */

    /* Changing; on a cache line of its own. */
    uint32_t next_slot QEMU_ALIGNED(64);   /* slots from here: never used */
    uint32_t nsealed;
    uint64_t free_list;         /* pops << 32 | first free slot + 1 */
    uint32_t clock_hand;        /* where the search for idle frames goes on */
    uint32_t trims_wanted;      /* how often all were asked to trim */
} DedupIndexHeader;

/* The first page of a block map; the entries follow. */
typedef struct DedupMapHeader {
    uint64_t magic;
    uint32_t version;
    uint32_t crc;               /* crc32c of @nblocks and @key */
    uint64_t nblocks;
    char key[72];               /* the layer, as in the file's name */
} DedupMapHeader;

QEMU_BUILD_BUG_ON(sizeof(DedupFrame) != 24);
QEMU_BUILD_BUG_ON(sizeof(DedupIndexHeader) > DEDUP_HEADER_SIZE);

typedef struct DedupIndex {
    DedupIndexHeader *hdr;
    DedupFrame *frames;
    uint32_t nframes;
} DedupIndex;

typedef struct DedupMap {
    DedupSparse file;
    uint64_t *entries;          /* in it */
    uint64_t nblocks;
} DedupMap;

/*
 * Make (@create) or map the file "index" in @dirfd.  A new file gets its name
 * only when it is complete.  @nframes is wanted of a new one; of an old one
 * it is checked unless 0.  *errp tells what is wrong with an old one; @what
 * names the directory in messages.
 */
bool dedup_index_map(DedupIndex *index, int dirfd, const char *what,
                     bool create, uint32_t nframes, const DedupStoreId *store,
                     Error **errp);
void dedup_index_unmap(DedupIndex *index);

/*
 * Take up to @n free slots, return how many.  They are FILLING then.  As long
 * as there are slots that were never used, those taken follow each other.
 */
unsigned dedup_index_alloc(DedupIndex *index, uint32_t *slots, unsigned n);

/* Seal a slot that is FILLING; @word is the store's.  Returns its name. */
DedupFrameId dedup_index_seal(DedupIndex *index, uint32_t slot, uint64_t word);

/*
 * Is @id a sealed frame?  If so *word is the store's word for it.  Any id may
 * be asked for, also one from a corrupt map.
 */
bool dedup_index_get(DedupIndex *index, DedupFrameId id, uint64_t *word);

/*
 * Give a slot back.  The caller has taken it with alloc, or begun to evict it.
 * The store has no memory for it any more.
 */
void dedup_index_release(DedupIndex *index, uint32_t slot);

/*
 * Begin to evict a frame: if it is sealed, nobody finds it from now on, and it
 * belongs to the caller, who alone got true.  Ends with
 * dedup_index_evict_cancel(), if it is in use after all, and else with
 * dedup_index_release().
 */
bool dedup_index_evict_begin(DedupIndex *index, uint32_t slot);
void dedup_index_evict_cancel(DedupIndex *index, uint32_t slot);

/*
 * Map the block map of the layer @key, of @nblocks blocks; made if it is not
 * there.  NULL and *errp set if it cannot be had.
 */
DedupMap *dedup_map_open(int dirfd, const char *key, uint64_t nblocks,
                         Error **errp);
void dedup_map_close(DedupMap *map);

/*
 * Is there memory to record @block in?  To be asked before it is looked up or
 * recorded.  False if the tmpfs is full.
 */
bool dedup_map_back(DedupMap *map, uint64_t block);

/* The frame of a block; generation 0 if there is none. */
DedupFrameId dedup_map_lookup(DedupMap *map, uint64_t block);

/*
 * Record that @block is in @id, in place of @old.  If somebody was faster
 * false is returned and nothing changed.
 */
bool dedup_map_record(DedupMap *map, uint64_t block, DedupFrameId old,
                      DedupFrameId id);

#endif /* DEDUP_SHARE_INDEX_H */
