/*
 * dedup-share: a group's directory, and who is using it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * INDEX-DIR/GROUP/lock carries two locks (open file description locks, which
 * the kernel drops when a process dies, however it dies):
 *
 *   byte 0   held, exclusively, while somebody joins or leaves the group
 *   byte 1   held, shared, by every process that is in the group
 *
 * So who gets byte 1 exclusively is alone: the group is new, or its last
 * user was killed, and the store that it left can be destroyed.  Both happen
 * with byte 0 held.  Lock order: byte 0, then byte 1.  Neither is ever taken
 * by a guest's request.
 */

#ifndef DEDUP_SHARE_INDEX_DIR_H
#define DEDUP_SHARE_INDEX_DIR_H

#include "index.h"

/* Where groups live unless index-dir says otherwise. */
#define DEDUP_INDEX_DIR_DEFAULT "/run/qemu-dedup-share"

typedef struct DedupDir {
    char *path;
    uint8_t uuid[16];           /* of the store of a group that lives here */
    int fd;
    int lock_fd;
} DedupDir;

/*
 * Destroy the store that was made with @uuid, if there is one of any kind.
 *
 * The UUID follows from the directory, so that a store is also found if the
 * process that made it was killed before it could write down anything.  A
 * directory is emptied only by who knows that no such store is left.
 */
typedef void DedupReap(const uint8_t uuid[16]);

/* Is @group a good name for a group?  Else *errp says what one looks like. */
bool dedup_group_name_ok(const char *group, Error **errp);

/*
 * Is @path a directory of ours on a tmpfs?  If it is not there it is made.
 * Sets *made if so.
 */
bool dedup_dir_prepare(const char *path, bool *made, Error **errp);

/*
 * Open the directory of @group below @root, making both if need be, and lock
 * byte 0.  *alone tells if nobody else is in the group; then all that a dead
 * process left in it has been removed, its store by @reap.
 */
bool dedup_dir_join(DedupDir *dir, const char *root, const char *group,
                    DedupReap *reap, bool *alone,
                    Error **errp);

/*
 * Open the directory @name below @root, making both if need be, and lock
 * byte 0, without being a group.  Ends with dedup_dir_close().
 */
bool dedup_dir_lock(DedupDir *dir, const char *root, const char *name,
                    Error **errp);

/* Remove the files of a group whose index is damaged. */
void dedup_dir_empty(DedupDir *dir);

/* The group is set up: let the others in. */
void dedup_dir_joined(DedupDir *dir);

/*
 * Lock byte 0 and leave the group.  True if nobody is left in it; then
 * dedup_dir_remove() may follow.  In any case dedup_dir_close() must.
 */
bool dedup_dir_leave(DedupDir *dir);
void dedup_dir_remove(DedupDir *dir);
void dedup_dir_close(DedupDir *dir);

/* Remove what killed processes left of other groups below @root. */
void dedup_dir_sweep(const char *root, const char *except,
                     DedupReap *reap);

#endif /* DEDUP_SHARE_INDEX_DIR_H */
