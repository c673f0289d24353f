/*
 * dedup-share: what the frames of all store daemons have, by the kernel
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "stress.h"

#define FRAMES_FILE "/memfd:dedup-store"

/* Add the files of frames that the links in @dir lead to, each of them once. */
static uint64_t add_files(GHashTable *seen, const char *dir)
{
    g_autoptr(GDir) d = g_dir_open(dir, 0, NULL);
    const char *name;
    uint64_t sum = 0;

    while (d && (name = g_dir_read_name(d))) {
        g_autofree char *path = g_build_filename(dir, name, NULL);
        g_autofree char *to = g_file_read_link(path, NULL);
        struct stat st;

        if (to && g_str_has_prefix(to, FRAMES_FILE) && !stat(path, &st) &&
            g_hash_table_add(seen, g_memdup2(&st.st_ino, sizeof(st.st_ino)))) {
            sum += st.st_blocks * 512ULL;
        }
    }
    return sum;
}

uint64_t stress_frames_memory(const pid_t *pids, unsigned n)
{
    g_autoptr(GHashTable) seen = g_hash_table_new_full(
        g_int64_hash, g_int64_equal, g_free, NULL);
    static const char *const kinds[] = { "fd", "map_files" };
    uint64_t sum = 0;
    unsigned i, j;

    QEMU_BUILD_BUG_ON(sizeof(ino_t) != sizeof(int64_t));
    for (i = 0; i < n; i++) {
        for (j = 0; j < ARRAY_SIZE(kinds); j++) {
            g_autofree char *dir = g_strdup_printf("/proc/%d/%s", pids[i],
                                                   kinds[j]);

            sum += add_files(seen, dir);
        }
    }
    return sum;
}
