/*
 * dedup-share: guest pages that map frames of Linux stores
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A guest page is given a frame by a private mapping of the store's file over
 * it.  The kernel copies the page when the guest, or QEMU, writes to it.
 *
 * Invariants
 *
 * - Only memory that dedup_ram finds is mapped over, and only while its
 *   may_give() is true, which is asked with this file's lock held.
 * - A page that maps a frame is in the table, with the frame's slot.  It leaves
 *   the table when it maps another one, or when the kernel says that it is the
 *   guest's own copy.  In doubt it stays.
 * - Memory that is discarded is anonymous again before it is (or it would show
 *   the frame).
 * - A mapping that fails leaves the memory mapped.
 * - There are never more mappings than the budget: half of vm.max_map_count.
 *   The less is left, the longer a run must be to get one.
 */

#ifndef DEDUP_SHARE_GIVEN_H
#define DEDUP_SHARE_GIVEN_H

/* A piece of memory whose pages may be mapped over. */
typedef struct DedupRam {
    uint8_t *host;
    size_t size;
} DedupRam;

/* Who knows the guest's memory.  Any thread. */
typedef struct DedupRamOps {
    /* Find what @host is in; false if that must not be mapped over. */
    bool (*find)(void *host, DedupRam *ram);
    /* May any memory be mapped over now? */
    bool (*may_give)(void);
    /* Give the new mapping of @host the properties of guest memory. */
    void (*advise)(void *host, size_t size, bool anonymous);
} DedupRamOps;

/* Set once, before the first use. */
void dedup_given_set_ram(const DedupRamOps *ops);

/* Another budget, for tests. */
void dedup_given_set_budget(uint64_t mappings);

/* What pages are given to is counted by owner, a store of this process. */
typedef struct DedupGivenOwner {
    unsigned id;                /* from 1 on */
    int fd;                     /* of the frames */
} DedupGivenOwner;

void dedup_given_owner_init(DedupGivenOwner *owner, int fd);

/*
 * Map the @n frames from @slot on over the memory at @host.  False if it cannot
 * be; then it is as it was, or holds anything.
 */
bool dedup_given_map(DedupGivenOwner *owner, void *host, uint32_t slot,
                     unsigned n);

/*
 * Make what maps frames of @size bytes at @host anonymous again.  Its content
 * is lost.  0, or -errno and what could not be made so is zero.
 */
int dedup_given_drop(void *host, size_t size);

/* The memory at @host is gone. */
void dedup_given_forget(void *host);

/* Return after all that was being mapped has been. */
void dedup_given_wait(void);

/* Call @used for the slot of each page that may still map a frame of @owner. */
void dedup_given_each(DedupGivenOwner *owner,
                      void (*used)(void *opaque, uint32_t slot), void *opaque);

/* Does any page map a frame of @owner, as far as is known? */
bool dedup_given_any(DedupGivenOwner *owner);

/* Mappings made of guest memory, and the most that there may be. */
void dedup_given_mappings(uint64_t *used, uint64_t *budget);

#endif /* DEDUP_SHARE_GIVEN_H */
