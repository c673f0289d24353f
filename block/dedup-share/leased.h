/*
 * dedup-share: reads of images that the store daemon has leases on
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Invariants
 *
 * - A block is asked for only by its place in a file, if all nodes between the
 *   image and that file are known to leave bytes as they are, and the block is
 *   plain data there: not compressed, not encrypted, at a multiple of 4096.
 * - That the file does not change is the kernel's word, by the daemon's lease;
 *   so who else could write to the image does not matter here.
 * - An image file is opened anew by a worker thread, when a request wants it,
 *   and by what QEMU has open: its name may lead to another file by now.
 * - A node that is throttled is not filled for: its limit holds.
 */

#ifndef DEDUP_SHARE_LEASED_H
#define DEDUP_SHARE_LEASED_H

#include "block/block_int.h"
#include "client.h"

/* A file that holds data of a layer. */
typedef struct DedupFile {
    BlockDriverState *node;     /* only to compare, and for its descriptor */
    int depth;                  /* of the layer: 1 is the first */
    bool throttled;
    CoMutex opening;            /* held by the request that opens it */
    DedupClientLayer layer;
    uint64_t nblocks;           /* whole blocks; while it is leased */
    bool failed;                /* it cannot be opened anew; atomic */
} DedupFile;

/* Files of a chain; several of a layer are possible. */
#define DEDUP_MAX_FILES 64

typedef struct DedupFiles {
    DedupFile *files;           /* DEDUP_MAX_FILES, or NULL */
    unsigned n;
    BlockDriverState *tail;     /* from here on none is in @files; or NULL */
} DedupFiles;

/* Find the files below @bs, or forget them.  Main loop, drained. */
void GRAPH_RDLOCK dedup_files_find(DedupFiles *f, BlockDriverState *bs);
void dedup_files_drop(DedupFiles *f, DedupClient *c);

/* A block's place in a file; @file is NULL if it has none that can be used. */
typedef struct DedupPlace {
    DedupFile *file;
    uint64_t block;
    bool unallocated;           /* no image holds it */
    uint64_t connection;        /* whose lease it is good for; 0: any */
} DedupPlace;

/*
 * Find the places of @n blocks of the disk below @bs, from block @first on, at
 * most DEDUP_READ_BLOCKS.  Opens the files that are not open yet.
 */
void coroutine_fn GRAPH_RDLOCK
dedup_files_locate(DedupFiles *f, DedupClient *c, BlockDriverState *bs,
                   uint64_t first, unsigned n, DedupPlace *places);

/*
 * The 'file' node that @bs leads to through nodes that leave bytes where they
 * are, or NULL.  *throttled is set if one of them is 'throttle'.
 */
BlockDriverState *GRAPH_RDLOCK dedup_file_node(BlockDriverState *bs,
                                               bool *throttled);

/*
 * The connection on which the daemon has a lease on @file, or 0.  Opens the
 * file if it is not open yet.
 */
uint64_t coroutine_fn dedup_file_lease(DedupClient *c, DedupFile *file);

/* The descriptor of a 'file' node; QEMU's own. */
int dedup_share_file_fd(BlockDriverState *bs);

#endif /* DEDUP_SHARE_LEASED_H */
