/*
 * dedup-share: HMP "info dedup"
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "monitor/monitor.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-dedup-share.h"
#include "qapi/qapi-types-dedup-share.h"
#include "qapi/type-helpers.h"
#include "qemu/module.h"
#include "qobject/qdict.h"
#include "qapi/qobject-output-visitor.h"
#include "qapi/qapi-visit-dedup-share.h"

/* The reasons that occurred, by the names that QMP gives them. */
static void append_not_given(GString *buf, DedupShareNotGiven *n)
{
    QObject *obj = NULL;
    Visitor *v = qobject_output_visitor_new(&obj);
    const QDictEntry *e;
    QDict *dict;

    visit_type_DedupShareNotGiven(v, NULL, &n, &error_abort);
    visit_complete(v, &obj);
    dict = qobject_to(QDict, obj);
    for (e = qdict_first(dict); e; e = qdict_next(dict, e)) {
        int64_t count = qdict_get_int(dict, qdict_entry_key(e));

        if (count) {
            g_string_append_printf(buf, " %s=%" PRId64, qdict_entry_key(e),
                                   count);
        }
    }
    visit_free(v);
    qobject_unref(obj);
}

static void append_node(GString *buf, DedupShareStats *s)
{
    g_string_append_printf(buf, "%s: group %s, store %s", s->node_name,
                           s->group, DedupShareStore_str(s->store));
    if (s->reason) {
        g_string_append_printf(buf, " (%s)", s->reason);
    }
    g_string_append_printf(buf, "\n    blocks: %" PRIu64 " read, %" PRIu64
                           " hit, %" PRIu64 " missed, %" PRIu64 " given, %"
                           PRIu64 " copied\n    not given:", s->blocks_read,
                           s->blocks_hit, s->blocks_missed, s->blocks_given,
                           s->blocks_copied);
    append_not_given(buf, s->not_given);
    g_string_append_printf(buf, "\n    image bytes read: %" PRIu64
                           " into the store, %" PRIu64 " passed through\n",
                           s->bytes_filled, s->bytes_passed);
    if (s->origin) {
        const char *why = s->origin->reason;

        g_string_append_printf(buf, "    origin: %" PRIu64 " blocks%s%s%s\n",
                               s->origin->blocks, why ? " (" : "", why ?: "",
                               why ? ")" : "");
    }
    if (s->store == DEDUP_SHARE_STORE_LINUX) {
        g_string_append_printf(buf, "    store: %" PRIu64 " frames held, of at "
                               "most %" PRIu64 "; %" PRIu64 " mappings, of at "
                               "most %" PRIu64 "\n",
                               s->store_stats->frames,
                               s->store_stats->size / 4096,
                               s->store_stats->mappings,
                               s->store_stats->mappings_max);
    } else if (s->store_stats) {
        g_string_append_printf(buf, "    store: %" PRIu64 " frames held, of at "
                               "most %" PRIu64 "; %" PRIu64 " hypercalls in %"
                               PRIu64 " system calls\n",
                               s->store_stats->frames,
                               s->store_stats->size / 4096,
                               s->store_stats->hypercalls,
                               s->store_stats->system_calls);
    }
}

static HumanReadableText *info_dedup(Error **errp)
{
    g_autoptr(DedupShareStatsList) list = qmp_query_dedup_stats(errp);
    g_autoptr(GString) buf = g_string_new("");
    DedupShareStatsList *e;

    for (e = list; e; e = e->next) {
        append_node(buf, e->value);
    }
    if (!list) {
        g_string_append(buf, "There are no dedup-share nodes\n");
    }
    return human_readable_text_from_str(buf);
}

static void dedup_share_hmp_register(void)
{
    monitor_register_hmp_info_hrt("dedup", info_dedup);
}

type_init(dedup_share_hmp_register);
