/*
 * dedup-share block maps: which frame holds a block of a layer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Invariants
 *
 * - An entry is one 64-bit word: it is seen whole or not at all.
 * - An entry carries a check of itself, of the block's number, of the map's key
 *   and of the store's seed.  One whose check is wrong was not written by us,
 *   or not here: the index is damaged.
 * - What an entry names is looked up in the frame table, so a stale one is a
 *   miss.
 *
 * - A block's dirty bit is set before the block changes.
 *
 * A map is a sparse file of the group, or memory of this process alone.
 */

#ifndef DEDUP_SHARE_MAP_H
#define DEDUP_SHARE_MAP_H

#include "index.h"
#include "sparse.h"

#define DEDUP_MAP_MAGIC 0x50414d50554445ULL         /* "EDUPMAP" */

/* Longest path of an image that is remembered. */
#define DEDUP_MAP_PATH 3584

/*
 * The first page of a map's file.  A bit for each block follows, rounded up to
 * whole pages: it was changed since the image had this key.  Then the entries.
 */
typedef struct DedupMapHeader {
    uint64_t magic;
    uint32_t version;
    uint32_t crc;               /* crc32c of all behind it, up to @path's end */
    uint64_t nblocks;
    char key[72];               /* the layer, as in the file's name */
    uint64_t dev;               /* of the image's file system */
    uint64_t ino;               /* the image's there */
    int64_t made;               /* when; us, real time */
    char path[DEDUP_MAP_PATH];  /* the image; empty: not known */
    /* Changing. */
    uint32_t all_dirty;         /* all bits count as set */
} DedupMapHeader;
QEMU_BUILD_BUG_ON(sizeof(DedupMapHeader) > DEDUP_HEADER_SIZE);

/* A layer, as dedup_map_open() wants it. */
typedef struct DedupMapLayer {
    const char *key;
    uint64_t nblocks;
    uint64_t dev;               /* 0: no file system of the host's */
    uint64_t ino;
    const char *path;           /* may be NULL */
    bool writer;                /* we may write to it, and nobody else does */
} DedupMapLayer;

typedef struct DedupMap {
    DedupSparse file;
    int lock_fd;                /* of the file, locked as in use; or -1 */
    unsigned long *dirty;       /* in it; NULL: it has none */
    uint64_t *entries;          /* in it */
    uint64_t nblocks;
    uint64_t seed;              /* of the entries' checks */
    DedupIndex *index;          /* to be told of damage */
    char *key;                  /* NULL: of no layer that others know */
} DedupMap;

/* Stands for a block of zeroes, which no frame holds. */
#define DEDUP_ZERO_SLOT ((1u << DEDUP_SLOT_BITS) - 1)
#define DEDUP_ZERO ((DedupFrameId) { DEDUP_ZERO_SLOT, 1 })

static inline bool dedup_id_is_zero(DedupFrameId id)
{
    return id.slot == DEDUP_ZERO_SLOT && id.generation;
}

/*
 * Map the block map of a layer; made if it is not there.  NULL and *errp set if
 * it cannot be had.  @index outlives it.
 *
 * Locks of the file: byte 0 is held, shared, by all that use it; byte 1,
 * exclusively, by who may write to the image, as long as it is open.
 */
DedupMap *dedup_map_open(DedupIndex *index, int dirfd,
                         const DedupMapLayer *layer, Error **errp);

/* Is this the header of a map, whatever layer it is of? */
bool dedup_map_header_ok(const DedupMapHeader *hdr);

/* Is it the map of the layer @key? */
bool dedup_map_is_of(const DedupMap *map, const char *key);

/* A map that no other process has.  NULL if there is no memory for it. */
DedupMap *dedup_map_new(DedupIndex *index, uint64_t nblocks);

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

/*
 * Note that blocks @first to @first + @n - 1 of the image are about to change,
 * for all to see.  They are dirty then.
 */
void dedup_map_set_dirty(DedupMap *map, uint64_t first, uint64_t n);

/* How many of the blocks @first to @first + @n - 1 in a row are not dirty? */
uint64_t dedup_map_clean_run(DedupMap *map, uint64_t first, uint64_t n);

/* Is there a process that may write to the image, and has not died? */
bool dedup_map_has_writer(DedupMap *map);

/*
 * Remove maps that no process uses, all but those that were opened last.  In
 * @dirfd, which is locked.
 */
void dedup_map_sweep(int dirfd, const char *path);

/* Forget blocks @first to @first + @n - 1, as far as they were backed. */
void dedup_map_forget(DedupMap *map, uint64_t first, uint64_t n);

#endif /* DEDUP_SHARE_MAP_H */
