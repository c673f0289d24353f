/*
 * dedup-share: the processes of a group, and which frames they hold
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Each process of the group has a row in the file "held".  If the store cannot
 * count a frame's users, the row has a bit for each slot.
 *
 * Invariants
 *
 * - The bit of a slot is set before its frame is looked at, and the frame's tag
 *   is looked at after that.  Who evicts changes the tag first and looks at the
 *   bits after that.  So of the two one always sees the other: a frame that a
 *   process has found sealed, with the bit set, is not evicted.
 * - A bit is cleared by its own process only, by a trim: when no request that
 *   could have set it is under way, and no guest page maps the frame.
 * - Each bit is there twice, in a word and inverted in another.  A slot is not
 *   held only if both words say so and agree in all their bits: so rows that
 *   were scribbled over are rows that hold everything.
 * - A row belongs to who holds the lock of its byte in the file.  Who can take
 *   that lock knows that the row's process is dead, finds what that was doing
 *   with slots (index.h), and clears the row; nobody gets the row before.  The
 *   memory of all rows below the header's count is there, so nobody's look at
 *   them fails.
 * - Nobody waits for another process.
 *
 * A trim: requests are counted under one of two parities.  The trim begins a
 * new parity.  Requests of that set a mark as well as the bit; when all those
 * of the old one have ended, all that the guest maps is marked, and the marks
 * become the row.
 */

#ifndef DEDUP_SHARE_HOLDERS_H
#define DEDUP_SHARE_HOLDERS_H

#include "qemu/thread.h"

/* Threads take their locks by stripes, so that they do not meet. */
#define DEDUP_HOLD_STRIPES 16

typedef struct DedupHoldStripe {
    QemuMutex lock;
    unsigned in_flight[2];      /* requests, by parity; atomic */
} QEMU_ALIGNED(64) DedupHoldStripe;

/*
 * The process of a row, from 0 on, has died: see dedup_index_recover().
 */
typedef void DedupBuryFn(void *opaque, unsigned row);

typedef struct DedupHolders {
    int fd;
    uint32_t nframes;
    unsigned row;               /* ours */
    size_t row_size;
    size_t size;
    void *base;                 /* a header page, then the rows */
    bool counts;                /* do rows have bits? */
    uint64_t *bits;             /* our row: word, inverted word, word ... */
    DedupBuryFn *bury;
    void *opaque;
    /* These change with all stripes locked, and may be read with one. */
    unsigned parity;
    uint64_t *marks;            /* NULL unless a trim is under way */
    DedupHoldStripe stripes[DEDUP_HOLD_STRIPES];
} DedupHolders;

/* A request that holds frames, on its stack. */
typedef struct DedupHold {
    DedupHoldStripe *stripe;
    unsigned parity;
} DedupHold;

/*
 * Make (@create) or open the file "held" in @dirfd, for @nframes slots; rows
 * have bits if the process @counts.  Main loop, with the group's directory
 * locked.  Then take a row, burying who had it before.
 */
bool dedup_holders_open(DedupHolders *h, int dirfd, uint32_t nframes,
                        bool counts, bool create, Error **errp);
bool dedup_holders_take_row(DedupHolders *h, DedupBuryFn *bury, void *opaque,
                            Error **errp);
void dedup_holders_close(DedupHolders *h);

/*
 * These do nothing if rows have no bits.
 *
 * Hold the frames @slots from now on, also beyond dedup_hold_end(), until a
 * trim finds that they are not used.  Any slot may be named.  Any thread.
 */
void dedup_hold_begin(DedupHolders *h, DedupHold *hold, const uint32_t *slots,
                      unsigned n);
void dedup_hold_more(DedupHolders *h, DedupHold *hold, const uint32_t *slots,
                     unsigned n);
void dedup_hold_end(DedupHold *hold);

/* Bury those that have died. */
void dedup_holders_bury(DedupHolders *h);

/*
 * Slots @first to @first + 63, a multiple of 64, that some process holds.  All,
 * if that cannot be told.
 */
uint64_t dedup_holders_word(DedupHolders *h, uint32_t first);

/* A trim, by one thread at a time. */
void dedup_trim_begin(DedupHolders *h);
bool dedup_trim_alone(DedupHolders *h);     /* requests of before have ended */
void dedup_trim_mark(DedupHolders *h, uint32_t slot);
void dedup_trim_end(DedupHolders *h);

#endif /* DEDUP_SHARE_HOLDERS_H */
