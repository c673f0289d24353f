/*
 * dedup-share: the kinds of stores that this program knows
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/dedup-share.h"

static const DedupStoreOps *store_ops[DEDUP_SHARE_STORE__MAX];

void dedup_store_register(const DedupStoreOps *ops)
{
    store_ops[ops->kind] = ops;
}

const DedupStoreOps *dedup_store_find(DedupShareStore kind)
{
    return store_ops[kind];
}
