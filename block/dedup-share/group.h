/*
 * dedup-share: this process's membership in a group
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One object a group and process, shared by the process's filter nodes.
 * Got and put in the main loop; used, while held, from any thread.
 */

#ifndef DEDUP_SHARE_GROUP_H
#define DEDUP_SHARE_GROUP_H

#include "index-dir.h"
#include "qemu/stats64.h"

typedef struct DedupGroup {
    char *name;
    char *root;                 /* index-dir */
    unsigned refcnt;
    const DedupStoreOps *ops;
    DedupStore *store;
    DedupIndex index;
    DedupDir dir;
    Stat64 full_until;          /* monotonic time, us; no fill before that */
    QLIST_ENTRY(DedupGroup) next;
} DedupGroup;

typedef struct DedupGroupConfig {
    const char *name;
    const char *root;
    DedupShareStore store;      /* not auto, not off */
    bool has_size;
    uint64_t size;              /* bytes */
} DedupGroupConfig;

/* Are @config's values good, for a store of its kind?  Opens nothing. */
bool dedup_group_check(const DedupGroupConfig *config, Error **errp);

/*
 * Join the group, or take one more reference to it.  NULL with *errp set on
 * error, and nothing left behind.  Ends with dedup_group_put().
 */
DedupGroup *dedup_group_get(const DedupGroupConfig *config, Error **errp);
void dedup_group_put(DedupGroup *group);

#endif /* DEDUP_SHARE_GROUP_H */
