/*
 * dedup-share: from counters to QAPI
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_SHARE_STATS_H
#define DEDUP_SHARE_STATS_H

#include "node.h"
#include "qapi/qapi-types-dedup-share.h"

/* NULL if @bs is no dedup-share node; else the caller frees it. */
DedupShareStats *dedup_share_stats(BlockDriverState *bs);

/* The client of a node in @group, or NULL.  Main loop. */
DedupClient *dedup_share_client(const char *group);

/* @client, @reason: of the node; each may be NULL. */
DedupShareStats *dedup_stats_new(const char *node, const char *group_name,
                                 const char *reason, DedupClient *client,
                                 DedupCounters *c, DedupOrigin *o);

#endif /* DEDUP_SHARE_STATS_H */
