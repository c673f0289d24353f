/*
 * dedup-share: what makes two opened image files the same layer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/magic.h>
#include <sys/vfs.h>
#include "qemu/cutils.h"
#include "layer.h"

/*
 * Has this process the file @st open?  The block layer opened it by its
 * path; what the path leads to now may be another file.
 */
bool dedup_layer_is_open(const struct stat *st, unsigned nodes)
{
    g_autoptr(GDir) d = g_dir_open("/proc/self/fd", 0, NULL);
    const char *name;
    unsigned n = 0;

    while (d && (name = g_dir_read_name(d))) {
        struct stat fd_st;

        n += !fstat(atoi(name), &fd_st) && fd_st.st_dev == st->st_dev &&
             fd_st.st_ino == st->st_ino;
    }
    return n >= nodes;
}

/* Changed less than a second ago, or, by a wrong clock, not yet? */
static bool is_fresh(const struct stat *st)
{
    int64_t changed = st->st_ctim.tv_sec * G_USEC_PER_SEC +
                      st->st_ctim.tv_nsec / 1000;

    return g_get_real_time() - changed < G_USEC_PER_SEC;
}

/* Is its change time set by this host's kernel, and by nobody else? */
static bool is_trusted(const char *path)
{
    static const uint32_t types[] = {
        EXT4_SUPER_MAGIC,       /* and ext2, ext3 */
        XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, F2FS_SUPER_MAGIC, TMPFS_MAGIC,
        0xca451a4e,             /* bcachefs */
        0x2fc12fc1,             /* ZFS */
    };
    struct statfs fs;
    unsigned i;

    if (statfs(path, &fs) < 0) {
        return false;
    }
    for (i = 0; i < ARRAY_SIZE(types); i++) {
        if ((uint32_t)fs.f_type == types[i]) {
            return true;
        }
    }
    return false;
}

/* Why its content cannot be told from its change time, or NULL. */
static const char *doubt(const char *path, const struct stat *st)
{
    if (!is_trusted(path)) {
        return "its file system is not known to keep change times";
    }
    if (!st->st_ctim.tv_nsec) {
        return "its file's change time has no fraction of a second";
    }
    return NULL;
}

/* Why it may change while it is open, or NULL. */
static const char *unrest(const struct stat *st, unsigned nodes)
{
    if (!S_ISREG(st->st_mode)) {
        return "it is not a regular file";
    }
    if (!dedup_layer_is_open(st, nodes)) {
        return "its file was replaced after it was opened";
    }
    if (is_fresh(st)) {
        return "its file was changed within the last second";
    }
    return NULL;
}

static void make_key(const struct stat *st, const char *format,
                     char key[DEDUP_LAYER_KEY_SIZE])
{
    g_autofree char *text = NULL;
    g_autofree char *sum = NULL;

    text = g_strdup_printf("%s %" PRIu64 " %" PRIu64 " %" PRId64
                           " %" PRId64 ".%ld %" PRId64 ".%ld", format,
                           (uint64_t)st->st_dev, (uint64_t)st->st_ino,
                           (int64_t)st->st_size,
                           (int64_t)st->st_mtim.tv_sec, st->st_mtim.tv_nsec,
                           (int64_t)st->st_ctim.tv_sec, st->st_ctim.tv_nsec);
    sum = g_compute_checksum_for_string(G_CHECKSUM_SHA256, text, -1);
    pstrcpy(key, DEDUP_LAYER_KEY_SIZE, sum);
}

DedupLayerKey dedup_layer_key(const char *path, const char *format,
                              unsigned nodes, char key[DEDUP_LAYER_KEY_SIZE],
                              const char **why)
{
    struct stat st;

    if (stat(path, &st) < 0) {
        *why = "its file cannot be found by its name";
        return DEDUP_KEY_NONE;
    }
    *why = unrest(&st, nodes);
    if (*why) {
        return DEDUP_KEY_NONE;
    }
    *why = doubt(path, &st);
    if (*why) {
        return DEDUP_KEY_PRIVATE;
    }
    make_key(&st, format, key);
    return DEDUP_KEY_SHARED;
}

DedupLayerKey dedup_layer_key_of_path(const char *path, const char *format,
                                      char key[DEDUP_LAYER_KEY_SIZE],
                                      const char **why)
{
    return dedup_layer_key(path, format, 0, key, why);
}
