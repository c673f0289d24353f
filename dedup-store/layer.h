/*
 * qemu-dedup-store: image files that nobody writes to, by the kernel's word
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Invariants
 *
 * - A layer is read, and its map used, only while the daemon has a read lease
 *   on its file, by an open description that nobody else has.  While that
 *   stands nobody has the file open or mapped for writing (measured on ext4,
 *   XFS and btrfs; the kernel also grants leases where that is not so).
 * - When somebody wants to write, the map is dropped before the lease is given
 *   back, and no answer that is sent later uses it.  That waits for no client
 *   and no fill.
 * - Leases are taken by the thread that waits for their breaks: one that was
 *   taken by a thread that has ended breaks unheard, after the kernel's 45 s.
 *
 * A layer's states:
 *
 *    NEW ----> LEASED ----> BROKEN     by the lease thread
 *     `------> REFUSED
 *
 * What knows a layer has a reference; its file is closed with the last one.
 */

#ifndef DEDUP_STORE_LAYER_H
#define DEDUP_STORE_LAYER_H

#include "store.h"

typedef struct Fill Fill;

/* What is known of a block: a frame's name, or that it is all zeroes. */
typedef struct Entry {
    uint32_t slot;
    uint32_t generation;        /* 0: nothing is known */
} Entry;
#define ENTRY_ZEROES UINT32_MAX /* a slot that no store has */

/* As much as the largest folio of the page cache. */
#define CHUNK_BLOCKS 512

typedef struct Chunk {
    unsigned known;             /* entries that are used */
    Entry entries[CHUNK_BLOCKS];
} Chunk;

typedef struct Layer {
    int fd;
    bool direct;                /* no page of the page cache is made by reads */
    dev_t dev;
    ino_t ino;
    uint64_t nblocks;           /* whole ones */

    /* The rest is protected by the store's lock. */
    unsigned refs;
    enum { LAYER_NEW, LAYER_LEASED, LAYER_BROKEN, LAYER_REFUSED } state;
    int error;                  /* REFUSED: errno of F_SETLEASE */
    unsigned clients;           /* that have it open */
    int64_t unused_since;       /* us, if there are none */
    Chunk **chunks;             /* or NULL */
    uint64_t known;             /* entries that are used */
    GHashTable *fills;          /* block -> Fill, which reads it */
    QTAILQ_ENTRY(Layer) next;
} Layer;

typedef struct Layers Layers;

/* The lease thread calls @changed, with the lock, when leases have broken. */
Layers *layers_new(Store *s, unsigned idle_seconds, void (*changed)(void));
/* Give all leases back: nothing has one any more. */
void layers_end(Layers *l);
/* After layers_end(), when nobody uses it. */
void layers_free(Layers *l);

/*
 * The layer of the file that @client_fd is of, with a lease and one more client
 * and reference; or NULL with *why and *text set.  Opens the file anew; does
 * not close @client_fd.  May hang, as calls on the client's descriptor can.
 */
Layer *layers_open(Layers *l, int client_fd, DedupLayerState *why,
                   char text[DEDUP_TEXT_MAX]);

/* --- with the store's lock held ------------------------------------------ */

/* A client is done with it; gives up its reference. */
void layer_close(Layers *l, Layer *layer);
void layer_ref(Layer *layer);
void layer_unref(Layer *layer);

static inline bool layer_is_leased(const Layer *layer)
{
    return layer->state == LAYER_LEASED;
}

/* Is it leased, as the kernel says at this moment? */
bool layer_has_lease(const Layer *layer);

/* What is known of @block; NULL: nothing of all that is near it. */
const Entry *layer_entry(const Layer *layer, uint64_t block);
void layer_record(Layer *layer, uint64_t block, Entry entry);

/* Is all that is in @block's chunk known? */
bool layer_is_whole(const Layer *layer, uint64_t block);

/* Call @layer for each. */
void layers_each(Layers *l, void (*each)(void *opaque, Layer *layer),
                 void *opaque);

#endif /* DEDUP_STORE_LAYER_H */
