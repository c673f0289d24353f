/*
 * dedup-share: a filter over the disk of a PV backend
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The toolstack makes a PV disk by xenstore, which has no key for a filter
 * node.  So the device has the property "dedup-share", to be set for all disks
 * by -global xen-disk.dedup-share=OPTIONS.
 */

#ifndef HW_XEN_DEDUP_SHARE_DISK_H
#define HW_XEN_DEDUP_SHARE_DISK_H

#include "system/block-backend.h"

/*
 * Insert a filter node over @blk's root, as @options say: "on", or the
 * options of the filter, as group=web,store=xen.  NULL or "off": do nothing.
 * The node is called as its child with "-dedup-share" added, and returned in
 * *filter.  False with *errp set if @options are bad.  Main loop.
 */
bool dedup_share_disk_insert(BlockBackend *blk, const char *options,
                             BlockDriverState **filter, Error **errp);

/* Undo that.  Nothing of the disk may be in flight.  Main loop. */
void dedup_share_disk_remove(BlockDriverState **filter);

/* Inserted into xen-block.h and xen-block.c. */
#ifdef CONFIG_DEDUP_SHARE
#define DEDUP_SHARE_DISK_FIELDS                                         \
    char *dedup_share;                                                  \
    BlockDriverState *dedup_share_filter;
#define DEDUP_SHARE_DISK_PROP                                           \
    DEFINE_PROP_STRING("dedup-share", XenBlockDevice, props.dedup_share),
#define DEDUP_SHARE_DISK_REALIZE(props, errp)                           \
    do {                                                                \
        if (!dedup_share_disk_insert((props)->conf.blk,                 \
                                     (props)->dedup_share,              \
                                     &(props)->dedup_share_filter,      \
                                     errp)) {                           \
            return;                                                     \
        }                                                               \
    } while (0)
#define DEDUP_SHARE_DISK_UNREALIZE(props)                               \
    dedup_share_disk_remove(&(props)->dedup_share_filter)
#else
#define DEDUP_SHARE_DISK_FIELDS
#define DEDUP_SHARE_DISK_PROP
#define DEDUP_SHARE_DISK_REALIZE(props, errp)
#define DEDUP_SHARE_DISK_UNREALIZE(props)
#endif

#endif /* HW_XEN_DEDUP_SHARE_DISK_H */
