/*
 * dedup-share: a group's directory, and who is using it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See index-dir.h for the locks.
 */

#include "qemu/osdep.h"
#include <sys/vfs.h>
#include <linux/magic.h>
#include "qapi/error.h"
#include "qemu/ctype.h"
#include "qemu/error-report.h"
#include "index-dir.h"
#include "trace.h"

enum { LOCK_DOOR, LOCK_MEMBER };

/* Joining and leaving take milliseconds; ten seconds' wait is a sick host. */
#define DOOR_TRIES 1000
#define DOOR_WAIT_US 10000
/* A guest may be running when its last node is closed: it waits a second. */
#define LEAVE_TRIES 100

bool dedup_group_name_ok(const char *group, Error **errp)
{
    size_t len = strlen(group);
    bool ok = len >= 1 && len <= 32 && qemu_isalnum(group[0]);
    size_t i;

    for (i = 1; ok && i < len; i++) {
        ok = qemu_isalnum(group[i]) || strchr("-_.", group[i]);
    }
    if (!ok) {
        error_setg(errp, "group: '%s' is not a group name; use 1 to 32 "
                   "letters, digits, '-', '_' or '.', beginning with a letter "
                   "or digit", group);
    }
    return ok;
}

/* See DedupReap.  Another mount of a tmpfs has another device number. */
static void find_uuid(DedupDir *dir)
{
    g_autoptr(GChecksum) sum = g_checksum_new(G_CHECKSUM_SHA256);
    struct stat st = { 0 };
    uint64_t id[2];
    uint8_t digest[32];
    gsize len = sizeof(digest);

    fstat(dir->fd, &st);
    id[0] = st.st_dev;
    id[1] = st.st_ino;
    g_checksum_update(sum, (const uint8_t *)"dedup-share", 11);
    g_checksum_update(sum, (const uint8_t *)id, sizeof(id));
    g_checksum_get_digest(sum, digest, &len);
    memcpy(dir->uuid, digest, sizeof(dir->uuid));
    dir->uuid[6] = (dir->uuid[6] & 0x0f) | 0x80;    /* RFC 9562: version 8 */
    dir->uuid[8] = (dir->uuid[8] & 0x3f) | 0x80;
}

/* Is the open directory @fd one that only we can change, on a tmpfs? */
static bool dir_check(int fd, const char *path, Error **errp)
{
    struct statfs fs;
    struct stat st;

    if (fstat(fd, &st) < 0 || fstatfs(fd, &fs) < 0) {
        error_setg_errno(errp, errno, "index-dir: '%s'", path);
    } else if (st.st_uid != geteuid()) {
        error_setg(errp, "index-dir: '%s' belongs to user %d, QEMU runs as "
                   "%d; guests of two users cannot share, name another "
                   "index-dir or group", path, (int)st.st_uid,
                   (int)geteuid());
    } else if ((st.st_mode & 07777) != 0700) {
        error_setg(errp, "index-dir: '%s' has mode %04o, not 0700; make sure "
                   "that nobody tampered with it, then remove it or 'chmod "
                   "0700' it", path, st.st_mode & 07777);
    } else if (fs.f_type != TMPFS_MAGIC) {
        error_setg(errp, "index-dir: '%s' is not on a tmpfs; the index must "
                   "not outlive the host's memory, name a directory below "
                   "/run", path);
    } else {
        return true;
    }
    return false;
}

static int dir_open(const char *path, bool *made, Error **errp)
{
    int fd;

    *made = !mkdir(path, 0700);
    if (!*made && errno != EEXIST) {
        error_setg_errno(errp, errno, "index-dir: could not make '%s'", path);
        return -1;
    }
    fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) {
        error_setg_errno(errp, errno, "index-dir: '%s' is not a directory "
                         "that can be opened", path);
    } else if (!dir_check(fd, path, errp)) {
        close(fd);
        fd = -1;
    }
    if (fd < 0 && *made) {
        rmdir(path);
    }
    return fd;
}

bool dedup_dir_prepare(const char *path, bool *made, Error **errp)
{
    int fd = dir_open(path, made, errp);

    if (fd < 0) {
        return false;
    }
    close(fd);
    return true;
}

/* Is the lock file still the one that the directory holds? */
static bool lock_is_current(DedupDir *dir)
{
    struct stat a, b;

    return !fstat(dir->lock_fd, &a) &&
           !fstatat(dir->fd, "lock", &b, AT_SYMLINK_NOFOLLOW) &&
           a.st_ino == b.st_ino;
}

static bool door_lock(DedupDir *dir, unsigned tries)
{
    while (qemu_lock_fd(dir->lock_fd, LOCK_DOOR, 1, true) < 0) {
        if (!--tries) {
            return false;
        }
        g_usleep(DOOR_WAIT_US);
    }
    return true;
}

static void close_fds(DedupDir *dir)
{
    if (dir->lock_fd >= 0) {
        close(dir->lock_fd);
    }
    if (dir->fd >= 0) {
        close(dir->fd);
    }
    dir->fd = dir->lock_fd = -1;
}

static bool name_is_ours(const char *name)
{
    return !strcmp(name, "lock") || !strcmp(name, "index") ||
           !strcmp(name, "index.new") || !strcmp(name, "held") ||
           !strcmp(name, "seen") ||
           g_str_has_prefix(name, "map-") || g_str_has_prefix(name, "frames");
}

/* The directory holds nothing but files that we make. */
static bool only_ours(const char *path, Error **errp)
{
    g_autoptr(GDir) d = g_dir_open(path, 0, NULL);
    const char *name;

    while (d && (name = g_dir_read_name(d))) {
        if (!name_is_ours(name)) {
            error_setg(errp, "index-dir: '%s' holds '%s', which is not "
                       "dedup-share's; choose another group or index-dir",
                       path, name);
            return false;
        }
    }
    return true;
}

static void remove_files(DedupDir *dir)
{
    g_autoptr(GDir) d = g_dir_open(dir->path, 0, NULL);
    const char *name;

    while (d && (name = g_dir_read_name(d))) {
        if (name_is_ours(name) && strcmp(name, "lock")) {
            unlinkat(dir->fd, name, 0);
        }
    }
}

void dedup_dir_empty(DedupDir *dir)
{
    remove_files(dir);
}

/* Nobody is in the group: remove what the last one left, if it was killed. */
static bool reclaim(DedupDir *dir, DedupReap *reap,
                    Error **errp)
{
    DedupIndex index;
    bool damaged = false;
    Error *err = NULL;

    if (!only_ours(dir->path, errp)) {
        return false;
    }
    reap(dir->uuid);            /* also if the index is no good */
    if (!faccessat(dir->fd, "index", F_OK, AT_SYMLINK_NOFOLLOW)) {
        if (dedup_index_attach(&index, dir->fd, dir->path, 0, &damaged,
                               &err)) {
            dedup_index_unmap(&index);
        } else if (damaged) {
            warn_report_err(err);
        } else {
            error_propagate(errp, err);
            return false;
        }
        trace_dedup_index_reap(dir->path);
    }
    remove_files(dir);
    return true;
}

static bool open_lock(DedupDir *dir, Error **errp)
{
    do {
        if (dir->lock_fd >= 0) {
            close(dir->lock_fd);
        }
        dir->lock_fd = openat(dir->fd, "lock",
                              O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (dir->lock_fd < 0) {
            error_setg_errno(errp, errno, "index-dir: could not open '%s/lock'",
                             dir->path);
            return false;
        }
        if (!door_lock(dir, DOOR_TRIES)) {
            error_setg(errp, "index-dir: '%s' stays locked by another "
                       "process; look for a stopped QEMU of that group",
                       dir->path);
            return false;
        }
    } while (!lock_is_current(dir));
    return true;
}

/* Open and lock; *made: the directories that were not there. */
static bool dir_lock(DedupDir *dir, const char *root, const char *name,
                     bool *made_root, bool *made, Error **errp)
{
    ERRP_GUARD();
    int tries = 10;

    *dir = (DedupDir) { .fd = -1, .lock_fd = -1 };
    *made = false;
    if (!dedup_dir_prepare(root, made_root, errp)) {
        return false;
    }
    dir->path = g_build_filename(root, name, NULL);
    do {
        if (*errp) {
            /* removed by its last user between our two steps */
            error_free(*errp);
            *errp = NULL;
            close_fds(dir);
        }
        errno = 0;
        dir->fd = dir_open(dir->path, made, errp);
        if (dir->fd >= 0 && open_lock(dir, errp)) {
            find_uuid(dir);
            return true;
        }
    } while (errno == ENOENT && --tries);
    return false;
}

/*
 * Close, and remove the directories that we made, if they are empty.  If the
 * door is not ours, @locked, somebody else is in it.
 */
static void dir_abandon(DedupDir *dir, const char *root, bool made_root,
                        bool made, bool locked)
{
    if (made && locked) {
        unlinkat(dir->fd, "lock", 0);
        rmdir(dir->path);
    }
    if (made_root) {
        rmdir(root);
    }
    dedup_dir_close(dir);
}

bool dedup_dir_lock(DedupDir *dir, const char *root, const char *name,
                    Error **errp)
{
    bool made_root, made;

    if (!dir_lock(dir, root, name, &made_root, &made, errp)) {
        dir_abandon(dir, root, made_root, made, false);
        return false;
    }
    return true;
}

bool dedup_dir_join(DedupDir *dir, const char *root, const char *group,
                    DedupReap *reap, bool *alone,
                    Error **errp)
{
    bool made_root, made;
    bool locked = dir_lock(dir, root, group, &made_root, &made, errp);

    if (locked) {
        *alone = !qemu_lock_fd(dir->lock_fd, LOCK_MEMBER, 1, true);
        if (!*alone || reclaim(dir, reap, errp)) {
            /* with byte 0 held nobody has byte 1 exclusively: this works */
            qemu_lock_fd(dir->lock_fd, LOCK_MEMBER, 1, false);
            return true;
        }
    }
    dir_abandon(dir, root, made_root, made, locked);
    return false;
}

void dedup_dir_joined(DedupDir *dir)
{
    qemu_unlock_fd(dir->lock_fd, LOCK_DOOR, 1);
}

bool dedup_dir_leave(DedupDir *dir)
{
    /*
     * Without the door's lock somebody may be joining: then we are not the
     * last, or whoever comes next finds what we leave and reclaims it.
     */
    return door_lock(dir, LEAVE_TRIES) && lock_is_current(dir) &&
           !qemu_lock_fd(dir->lock_fd, LOCK_MEMBER, 1, true);
}

void dedup_dir_remove(DedupDir *dir)
{
    remove_files(dir);
    unlinkat(dir->fd, "lock", 0);
    rmdir(dir->path);
}

void dedup_dir_close(DedupDir *dir)
{
    close_fds(dir);
    g_free(dir->path);
    dir->path = NULL;
}

static void sweep_one(const char *root, const char *group,
                      DedupReap *reap)
{
    DedupDir dir = {
        .path = g_build_filename(root, group, NULL),
        .lock_fd = -1,
    };

    dir.fd = open(dir.path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir.fd >= 0 && dir_check(dir.fd, dir.path, NULL)) {
        dir.lock_fd = openat(dir.fd, "lock", O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    }
    if (dir.lock_fd >= 0 && door_lock(&dir, 1) && lock_is_current(&dir) &&
        !qemu_lock_fd(dir.lock_fd, LOCK_MEMBER, 1, true)) {
        find_uuid(&dir);
        if (reclaim(&dir, reap, NULL)) {
            dedup_dir_remove(&dir);
        }
    }
    dedup_dir_close(&dir);
}

void dedup_dir_sweep(const char *root, const char *except,
                     DedupReap *reap)
{
    g_autoptr(GDir) d = g_dir_open(root, 0, NULL);
    const char *name;

    while (d && (name = g_dir_read_name(d))) {
        if (strcmp(name, except) && dedup_group_name_ok(name, NULL)) {
            sweep_one(root, name, reap);
        }
    }
}
