/*
 * dedup-share: this process's membership in a group
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One object a group and process, shared by the process's filter nodes.
 * Got and put in the main loop; used, while held, from any thread.
 *
 * If a group's index is damaged, the group begins anew, with an empty store:
 * whoever joins first finds that and makes new files in its directory.  The old
 * ones stay with those who have them open.
 *
 * A process whose guest still uses frames stays in the group when its last node
 * is closed, until it ends: otherwise the frames could be evicted.
 */

#ifndef DEDUP_SHARE_GROUP_H
#define DEDUP_SHARE_GROUP_H

#include "admission.h"
#include "index-dir.h"
#include "holders.h"
#include "qemu/stats64.h"

typedef struct DedupReclaim DedupReclaim;

typedef struct DedupGroup {
    char *name;
    char *root;                 /* index-dir */
    unsigned refcnt;            /* 0: stays for the guest's frames only */
    const DedupStoreOps *ops;
    DedupStore *store;
    DedupIndex index;
    DedupDir dir;
    Stat64 full_until;          /* monotonic time, us; no fill before that */
    Stat64 evicted;
    DedupHolders holders;
    DedupReclaim *reclaim;
    DedupSeen seen;             /* open if a node wants it; main loop */
    QEMUBH *damaged_bh;         /* main loop: see dedup_group_on_damage() */
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

/*
 * The index of a group is found to be damaged.  The nodes of such groups are to
 * leave them, and to join again, which gets them a new store; what their guests
 * have of the old one stays as it is.  @fn is called in the main loop, once or
 * more often.
 */
void dedup_group_on_damage(void (*fn)(void));

/* The process ends: leave the groups that it has stayed in. */
void dedup_groups_leave(void);

/* The group of that name that this process is in, or NULL.  Main loop. */
DedupGroup *dedup_group_find(const char *name);

#endif /* DEDUP_SHARE_GROUP_H */
