/*
 * dedup-share: a filter over the disk of a PV backend
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block-global-state.h"
#include "block/block_int-common.h"
#include "block/dedup-share.h"
#include "block/qdict.h"
#include "hw/xen/dedup-share-disk.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/keyval.h"
#include "qobject/qdict.h"

/* Keys that are not for the user of the property to say. */
static const char *const own_keys[] = { "driver", "file", "node-name" };

/* The options of the filter node over @bs.  NULL with *errp set. */
static QDict *parse(const char *options, BlockDriverState *bs, Error **errp)
{
    QDict *dict = !strcmp(options, "on") ? qdict_new()
                  : keyval_parse(options, NULL, NULL, errp);
    g_autofree char *name = NULL;
    unsigned i;

    for (i = 0; dict && i < ARRAY_SIZE(own_keys); i++) {
        if (qdict_haskey(dict, own_keys[i])) {
            error_setg(errp, "dedup-share: '%s' cannot be set here; use on, "
                       "off, or options of the filter, as "
                       "group=default,store=xen", own_keys[i]);
            qobject_unref(dict);
            return NULL;
        }
    }
    if (dict) {
        qdict_flatten(dict);            /* origin.driver and the like */
        name = g_strdup_printf("%s-dedup-share", bdrv_get_node_name(bs));
        qdict_put_str(dict, "driver", "dedup-share");
        qdict_put_str(dict, "node-name", name);
        qdict_put_str(dict, "file", bdrv_get_node_name(bs));
    }
    return dict;
}

bool dedup_share_disk_insert(BlockBackend *blk, DedupShareDisk *disk,
                             Error **errp)
{
    const char *options = disk->options;
    BlockDriverState *bs = blk_bs(blk);
    QDict *dict;
    int flags;

    if (!options || !strcmp(options, "off")) {
        return true;
    }
    dict = parse(options, bs, errp);
    if (!dict) {
        return false;
    }
    flags = (bdrv_is_read_only(bs) ? 0 : BDRV_O_RDWR) |
            (bdrv_get_flags(bs) & (BDRV_O_UNMAP | BDRV_O_NOCACHE));
    disk->filter = bdrv_insert_node(bs, dict, flags, errp);
    return disk->filter;
}

void dedup_share_disk_remove(DedupShareDisk *disk)
{
    Error *err = NULL;

    if (disk->filter) {
        /* it minds who else writes as long as it is in a group */
        dedup_share_leave(disk->filter);
        if (bdrv_drop_filter(disk->filter, &err) < 0) {
            /* a block job holds it where it is */
            warn_report_err(err);
        }
        bdrv_unref(disk->filter);
        disk->filter = NULL;
    }
}
