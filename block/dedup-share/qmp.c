/*
 * dedup-share: QMP commands
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Reads counters, owns none.
 */

#include "qemu/osdep.h"
#include "block/block-global-state.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-dedup-share.h"
#include "stats.h"

static DedupShareNotGiven *not_given_new(DedupCounters *c)
{
    DedupShareNotGiven *n = g_new0(DedupShareNotGiven, 1);
    uint64_t *fields[DEDUP_RESULT__MAX] = {
        [DEDUP_UNALIGNED] = &n->unaligned,
        [DEDUP_NOT_RAM] = &n->not_ram,
        [DEDUP_GRANT] = &n->grant,
        [DEDUP_REPEATED] = &n->repeated,
        [DEDUP_NO_LAYER] = &n->no_layer,
        [DEDUP_UNALLOCATED] = &n->unallocated,
        [DEDUP_STORE_FULL] = &n->store_full,
        [DEDUP_NO_MEMORY] = &n->no_memory,
        [DEDUP_BUSY] = &n->busy,
        [DEDUP_MAPPED] = &n->mapped,
        [DEDUP_CHANGED] = &n->changed,
        [DEDUP_EVICTED] = &n->evicted,
        [DEDUP_ZEROES] = &n->zeroes,
        [DEDUP_SEEN_ONCE] = &n->seen_once,
        [DEDUP_UNMATCHED] = &n->unmatched,
        [DEDUP_NO_DAEMON] = &n->no_daemon,
        [DEDUP_FAILED] = &n->failed,
    };
    int i;

    for (i = DEDUP_COPIED + 1; i < DEDUP_RESULT__MAX; i++) {
        *fields[i] = stat64_get(&c->results[i]);
    }
    return n;
}

/* What this process knows; the store daemon knows the rest. */
static DedupShareStoreStats *store_stats_new(DedupClient *client)
{
    DedupShareStoreStats *s = g_new0(DedupShareStoreStats, 1);
    DedupStoreCounters x = { 0 };
    DedupHeldCounters c;

    if (dedup_client_kind(client) == DEDUP_STORE_KIND_XEN) {
        dedup_store_find(DEDUP_SHARE_STORE_XEN)->counters(&x);
    }
    dedup_client_counters(client, &c);
    *s = (DedupShareStoreStats) {
        .size = dedup_client_store_size(client),
        .frames = c.frames,
        .hypercalls = x.hypercalls,
        .system_calls = x.system_calls,
        .given_fresh = x.given_fresh,
        .given_again = x.given_again,
        .fresh_hypercalls = x.fresh_hypercalls,
        .give_hypercalls = x.give_hypercalls,
        .give_system_calls = x.give_system_calls,
        .given_runs = c.runs,
        .time_ns = c.ns,
    };
    dedup_given_mappings(&s->mappings, &s->mappings_max);
    return s;
}

static DedupShareOriginStats *origin_stats_new(DedupOrigin *o,
                                               DedupClient *client,
                                               DedupCounters *c)
{
    DedupShareOriginStats *s = g_new0(DedupShareOriginStats, 1);

    s->blocks = stat64_get(&c->of_origin);
    s->reason = client ? dedup_origin_reason(o, client) : NULL;
    return s;
}

DedupShareStats *dedup_stats_new(const char *node, const char *group_name,
                                 const char *reason, DedupClient *client,
                                 DedupCounters *c, DedupOrigin *o)
{
    DedupShareStats *s = g_new0(DedupShareStats, 1);

    *s = (DedupShareStats) {
        .node_name = g_strdup(node),
        .group = g_strdup(group_name),
        .store = !client ? DEDUP_SHARE_STORE_OFF :
                 dedup_client_kind(client) == DEDUP_STORE_KIND_XEN
                 ? DEDUP_SHARE_STORE_XEN : DEDUP_SHARE_STORE_LINUX,
        .reason = g_strdup(reason),
        .blocks_read = stat64_get(&c->blocks_read),
        .blocks_hit = stat64_get(&c->hits),
        .blocks_missed = stat64_get(&c->misses),
        .blocks_matched = stat64_get(&c->matched),
        .blocks_given = stat64_get(&c->results[DEDUP_GIVEN]),
        .not_given = not_given_new(c),
        .blocks_copied = stat64_get(&c->copied) +
                         stat64_get(&c->results[DEDUP_COPIED]),
        .bytes_filled = stat64_get(&c->bytes_filled),
        .bytes_passed = stat64_get(&c->bytes_passed),
        .origin = o->child ? origin_stats_new(o, client, c) : NULL,
        .store_stats = client ? store_stats_new(client) : NULL,
    };
    return s;
}

void qmp_dedup_share_reclaim(const char *group, Error **errp)
{
    DedupClient *c = dedup_share_client(group ?: "default");

    if (c) {
        dedup_client_reclaim(c, errp);
    } else {
        error_setg(errp, "group: this QEMU is not in group '%s'; name one that "
                   "query-dedup-stats shows", group ?: "default");
    }
}

DedupShareStatsList *qmp_query_dedup_stats(Error **errp)
{
    DedupShareStatsList *list = NULL, **tail = &list;
    BlockDriverState *bs = NULL;

    while ((bs = bdrv_next_all_states(bs))) {
        DedupShareStats *s = dedup_share_stats(bs);

        if (s) {
            QAPI_LIST_APPEND(tail, s);
        }
    }
    return list;
}
