/*
 * dedup-share: a store daemon for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "dedup-daemon.h"

GPid dedup_daemon_start(const char *socket, const char *size)
{
    g_autofree char *program = g_test_build_filename(
        G_TEST_BUILT, "..", "..", "dedup-store", "qemu-dedup-store", NULL);
    char *argv[] = { program, (char *)"--socket", (char *)socket,
                     (char *)"--size", (char *)size, NULL };
    GPid pid;

    g_assert_true(g_spawn_async(NULL, argv, NULL, G_SPAWN_DO_NOT_REAP_CHILD,
                                NULL, NULL, &pid, NULL));
    while (!g_file_test(socket, G_FILE_TEST_EXISTS)) {
        g_assert_cmpint(waitpid(pid, NULL, WNOHANG), ==, 0);
        g_usleep(1000);
    }
    return pid;
}

void dedup_daemon_end(GPid pid, const char *socket, int signal)
{
    g_autofree char *lock = g_strconcat(socket, ".lock", NULL);

    kill(pid, signal);
    waitpid(pid, NULL, 0);
    g_spawn_close_pid(pid);
    g_unlink(socket);
    g_unlink(lock);
}
