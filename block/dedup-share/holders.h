/*
 * dedup-share: which frames the processes of a group hold
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A store that cannot count a frame's users keeps this table.  Each process of
 * the group has a row in the file "held", with a bit for each slot.
 *
 * Invariants
 *
 * - The bit of a slot is set before its frame is looked at, and the frame's tag
 *   is looked at after that.  Who evicts changes the tag first and looks at the
 *   bits after that.  So of the two one always sees the other: a frame that a
 *   process has found sealed, with the bit set, is not evicted.
 * - A bit is cleared by its own process only, by a trim: when no request that
 *   could have set it is under way, and no guest page maps the frame.
 * - A row belongs to who holds the lock of its byte in the file.  Who can take
 *   that lock knows that the row's process is dead, and clears the row.  The
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

/* Most processes of a group. */
#define DEDUP_MAX_MEMBERS 1024

/* Threads take their locks by stripes, so that they do not meet. */
#define DEDUP_HOLD_STRIPES 16

typedef struct DedupHoldStripe {
    QemuMutex lock;
    unsigned in_flight[2];      /* requests, by parity; atomic */
} QEMU_ALIGNED(64) DedupHoldStripe;

typedef struct DedupHolders {
    int fd;
    uint32_t nframes;
    unsigned row;               /* ours */
    size_t row_size;
    size_t size;
    void *base;                 /* a header page, then the rows */
    unsigned long *bits;        /* our row */
    /* These change with all stripes locked, and may be read with one. */
    unsigned parity;
    unsigned long *marks;       /* NULL unless a trim is under way */
    DedupHoldStripe stripes[DEDUP_HOLD_STRIPES];
} DedupHolders;

/* A request that holds frames, on its stack. */
typedef struct DedupHold {
    DedupHoldStripe *stripe;
    unsigned parity;
} DedupHold;

/*
 * Make (@create) or open the file "held" in @dirfd, for @nframes slots, and
 * take a row.  Main loop, with the group's directory locked.
 */
bool dedup_holders_open(DedupHolders *h, int dirfd, uint32_t nframes,
                        bool create, Error **errp);
void dedup_holders_close(DedupHolders *h);

/*
 * Hold the frames @slots from now on, also beyond dedup_hold_end(), until a
 * trim finds that they are not used.  Any slot may be named.  Any thread.
 */
void dedup_hold_begin(DedupHolders *h, DedupHold *hold, const uint32_t *slots,
                      unsigned n);
void dedup_hold_more(DedupHolders *h, DedupHold *hold, const uint32_t *slots,
                     unsigned n);
void dedup_hold_end(DedupHold *hold);

/* Clear the rows of processes that have died. */
void dedup_holders_bury(DedupHolders *h);

/* Slots @first to @first + 63, a multiple of 64, that some process holds. */
uint64_t dedup_holders_word(DedupHolders *h, uint32_t first);

/* A trim, by one thread at a time. */
void dedup_trim_begin(DedupHolders *h);
bool dedup_trim_alone(DedupHolders *h);     /* requests of before have ended */
void dedup_trim_mark(DedupHolders *h, uint32_t slot);
void dedup_trim_end(DedupHolders *h);

#endif /* DEDUP_SHARE_HOLDERS_H */
