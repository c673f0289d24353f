/*
 * qemu-dedup-store: where the daemon of a group listens
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_STORE_SOCKET_H
#define DEDUP_STORE_SOCKET_H

/* The directory of the units in contrib/systemd/. */
#define DEDUP_SOCKET_DIR "/run/qemu-dedup-store"

/* The exit code of a daemon that finds another one there. */
#define DEDUP_EXIT_TAKEN 3

/*
 * The directory of the groups' sockets, unless somebody says otherwise: the
 * host's if this user can look into it, or is root; else this user's.
 */
static inline char *dedup_socket_dir(void)
{
    if (geteuid() == 0 || access(DEDUP_SOCKET_DIR, X_OK) == 0) {
        return g_strdup(DEDUP_SOCKET_DIR);
    }
    return g_build_filename(g_get_user_runtime_dir(), "qemu-dedup-store", NULL);
}

/* The socket of @group there.  The caller frees it. */
static inline char *dedup_socket_path(const char *group)
{
    g_autofree char *dir = dedup_socket_dir();

    return g_strdup_printf("%s/%s.sock", dir, group);
}

#endif /* DEDUP_STORE_SOCKET_H */
