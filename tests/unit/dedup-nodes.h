/*
 * dedup-share: filter nodes for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_NODES_H
#define DEDUP_NODES_H

#include "block/dedup-share/stats.h"
#include "system/block-backend.h"

/*
 * A filter node, as a device has it, that shares by the daemon at @socket, over
 * the node that @below describes in JSON.  @more is more of the filter's
 * options, as JSON, each with a comma behind it.
 */
BlockBackend *dedup_nodes_open(const char *socket, const char *more, bool write,
                               const char *below);

/* A field of its statistics. */
uint64_t dedup_nodes_get(BlockBackend *blk, size_t offset);

#define STAT(blk, name) dedup_nodes_get(blk, offsetof(DedupShareStats, name))

/* How many blocks were not given, for one reason. */
#define NOT_GIVEN(blk, name)                                            \
    dedup_nodes_get_not_given(blk, offsetof(DedupShareNotGiven, name))
uint64_t dedup_nodes_get_not_given(BlockBackend *blk, size_t offset);

#endif /* DEDUP_NODES_H */
