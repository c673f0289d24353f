/*
 * dedup-share: guest memory that maps frames
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For system/physmem.c.
 */

#ifndef BLOCK_DEDUP_SHARE_RAM_H
#define BLOCK_DEDUP_SHARE_RAM_H

#include "exec/cpu-common.h"

/*
 * @length bytes at @start of @rb will be discarded, or have just been.  Have
 * them map no frames, or they would show these.  0, or -errno.
 */
int dedup_share_ram_discard(RAMBlock *rb, uint64_t start, size_t length);

/* RAM must not be discarded from now on: wait until all see that. */
void dedup_share_ram_pinned(void);

/* Inserted into ram_block_discard_range() and *_discard_disable(). */
#ifdef CONFIG_DEDUP_SHARE
#define DEDUP_SHARE_RAM_DISCARD(rb, start, length)              \
    do {                                                        \
        if (dedup_share_ram_discard(rb, start, length) < 0) {   \
            return -ENOMEM;                                     \
        }                                                       \
    } while (0)
#define DEDUP_SHARE_RAM_DISCARDED DEDUP_SHARE_RAM_DISCARD
#define DEDUP_SHARE_RAM_PINNED(state)                           \
    do {                                                        \
        if (state) {                                            \
            dedup_share_ram_pinned();                           \
        }                                                       \
    } while (0)
#else
#define DEDUP_SHARE_RAM_DISCARD(rb, start, length)
#define DEDUP_SHARE_RAM_DISCARDED(rb, start, length)
#define DEDUP_SHARE_RAM_PINNED(state)
#endif

#endif /* BLOCK_DEDUP_SHARE_RAM_H */
