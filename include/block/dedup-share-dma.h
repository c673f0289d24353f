/*
 * dedup-share: the guest pages of emulated disks' DMA reads
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_DEDUP_SHARE_DMA_H
#define BLOCK_DEDUP_SHARE_DMA_H

#include "block/aio.h"
#include "system/dma.h"

/*
 * Like dma_blk_read(), if the read can be offered to a dedup-share filter at
 * @blk's root.  NULL, and nothing done, if it cannot.  @sg belongs to the
 * caller and stays until @cb.  Context: as dma_blk_read().
 */
BlockAIOCB *dedup_share_dma_read(BlockBackend *blk, QEMUSGList *sg,
                                 uint64_t offset, BlockCompletionFunc *cb,
                                 void *opaque);

/* Inserted at the head of dma_blk_read(). */
#ifdef CONFIG_DEDUP_SHARE
#define DEDUP_SHARE_DMA_READ(blk, sg, offset, align, cb, opaque)        \
    do {                                                                \
        BlockAIOCB *acb_ = dedup_share_dma_read(blk, sg, offset, cb,    \
                                                opaque);                \
        if (acb_) {                                                     \
            return acb_;                                                \
        }                                                               \
    } while (0)
#else
#define DEDUP_SHARE_DMA_READ(blk, sg, offset, align, cb, opaque)
#endif

#endif /* BLOCK_DEDUP_SHARE_DMA_H */
