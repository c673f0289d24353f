/*
 * dedup-share: what makes two opened image files the same layer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "layer.h"

/*
 * Has this process the file @st open?  The block layer opened it by its
 * path; what the path leads to now may be another file.
 */
static bool is_open(const struct stat *st)
{
    g_autoptr(GDir) d = g_dir_open("/proc/self/fd", 0, NULL);
    const char *name;

    while (d && (name = g_dir_read_name(d))) {
        struct stat fd_st;

        if (!fstat(atoi(name), &fd_st) && fd_st.st_dev == st->st_dev &&
            fd_st.st_ino == st->st_ino) {
            return true;
        }
    }
    return false;
}

/* Changed less than a second ago, or, by a wrong clock, not yet? */
static bool is_fresh(const struct stat *st)
{
    int64_t changed = st->st_ctim.tv_sec * G_USEC_PER_SEC +
                      st->st_ctim.tv_nsec / 1000;

    return g_get_real_time() - changed < G_USEC_PER_SEC;
}

bool dedup_layer_key(const char *path, const char *format,
                     char key[DEDUP_LAYER_KEY_SIZE], const char **why)
{
    g_autofree char *text = NULL;
    g_autofree char *sum = NULL;
    struct stat st;

    if (stat(path, &st) < 0) {
        *why = "its file cannot be found by its name";
    } else if (!S_ISREG(st.st_mode)) {
        *why = "it is not a regular file";
    } else if (!is_open(&st)) {
        *why = "its file was replaced after it was opened";
    } else if (is_fresh(&st)) {
        *why = "its file was changed within the last second";
    } else {
        text = g_strdup_printf("%s %" PRIu64 " %" PRIu64 " %" PRId64
                               " %" PRId64 ".%ld %" PRId64 ".%ld", format,
                               (uint64_t)st.st_dev, (uint64_t)st.st_ino,
                               (int64_t)st.st_size,
                               (int64_t)st.st_mtim.tv_sec, st.st_mtim.tv_nsec,
                               (int64_t)st.st_ctim.tv_sec, st.st_ctim.tv_nsec);
        sum = g_compute_checksum_for_string(G_CHECKSUM_SHA256, text, -1);
        pstrcpy(key, DEDUP_LAYER_KEY_SIZE, sum);
        return true;
    }
    return false;
}
