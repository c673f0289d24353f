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

/* In the device: the property, and the node that it led to. */
typedef struct DedupShareDisk {
    char *options;
    BlockDriverState *filter;
} DedupShareDisk;

/*
 * Insert a filter node over @blk's root, as @disk->options say: "on", or the
 * options of the filter, as group=web,store=xen.  NULL or "off": do nothing.
 * The node is called as its child with "-dedup-share" added, and kept in
 * @disk->filter.  False with *errp set if the options are bad.  Main loop.
 */
bool dedup_share_disk_insert(BlockBackend *blk, DedupShareDisk *disk,
                             Error **errp);

/* Undo that.  Nothing of the disk may be in flight.  Main loop. */
void dedup_share_disk_remove(DedupShareDisk *disk);

/*
 * Was the guest seen to be destroyed while a page was given to it?  Then its
 * memory is not to be touched any more.  Any thread.
 */
bool dedup_share_guest_is_ending(void);

/* Inserted into xen-block.c. */
#ifdef CONFIG_DEDUP_SHARE
#define DEDUP_SHARE_DISK_REALIZE(props, errp)                           \
    do {                                                                \
        if (!dedup_share_disk_insert((props)->conf.blk,                 \
                                     &(props)->dedup_share, errp)) {    \
            return;                                                     \
        }                                                               \
    } while (0)
#define DEDUP_SHARE_DISK_UNREALIZE(props)                               \
    dedup_share_disk_remove(&(props)->dedup_share)
#else
#define DEDUP_SHARE_DISK_REALIZE(props, errp)
#define DEDUP_SHARE_DISK_UNREALIZE(props)
#endif

#endif /* HW_XEN_DEDUP_SHARE_DISK_H */
