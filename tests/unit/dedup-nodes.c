/*
 * dedup-share: filter nodes for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "block/block-global-state.h"
#include "block/block_int-common.h"
#include "dedup-nodes.h"

BlockBackend *dedup_nodes_open(const char *socket, const char *more, bool write,
                               const char *below)
{
    g_autofree char *options = g_strdup_printf(
        "json:{\"driver\":\"dedup-share\",\"store\":\"linux\","
        "\"socket\":\"%s\",%s\"file\":%s}", socket, more, below);
    BlockDriverState *bs;
    BlockBackend *blk;

    blk = blk_new(qemu_get_aio_context(),
                  BLK_PERM_CONSISTENT_READ | (write ? BLK_PERM_WRITE : 0),
                  BLK_PERM_ALL);
    bs = bdrv_open(options, NULL, NULL, write ? BDRV_O_RDWR : 0, &error_abort);
    blk_insert_bs(blk, bs, &error_abort);
    bdrv_unref(bs);
    return blk;
}

uint64_t dedup_nodes_get(BlockBackend *blk, size_t offset)
{
    DedupShareStats *s = dedup_share_stats(blk_bs(blk));
    uint64_t value = *(int64_t *)((uint8_t *)s + offset);

    qapi_free_DedupShareStats(s);
    return value;
}

uint64_t dedup_nodes_get_not_given(BlockBackend *blk, size_t offset)
{
    DedupShareStats *s = dedup_share_stats(blk_bs(blk));
    uint64_t value = *(int64_t *)((uint8_t *)s->not_given + offset);

    qapi_free_DedupShareStats(s);
    return value;
}
