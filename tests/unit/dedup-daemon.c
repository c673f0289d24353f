/*
 * dedup-share: a store daemon for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "dedup-daemon.h"

static char *find_program(void)
{
    return g_test_build_filename(G_TEST_BUILT, "..", "..", "dedup-store",
                                 "qemu-dedup-store", NULL);
}

/* What it writes; the caller's. */
static char *run_command(const char *socket, const char *command,
                         const char *option)
{
    g_autofree char *program = find_program();
    char *argv[] = { program, (char *)command, (char *)"--socket",
                     (char *)socket, (char *)option, NULL };
    char *text = NULL;
    int status;

    g_assert_true(g_spawn_sync(NULL, argv, NULL, G_SPAWN_DEFAULT, NULL, NULL,
                               &text, NULL, &status, NULL));
    g_assert_cmpint(status, ==, 0);
    return text;
}

void dedup_daemon_reclaim(const char *socket)
{
    g_free(run_command(socket, "reclaim", NULL));
}

uint64_t dedup_daemon_memory(const char *socket)
{
    g_autofree char *text = run_command(socket, "status", "--json");
    g_autoptr(QDict) status =
        qobject_to(QDict, qobject_from_json(text, &error_abort));

    return qdict_get_int(status, "memory");
}

GPid dedup_daemon_start(const char *socket, const char *size)
{
    g_autofree char *program = find_program();
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

void dedup_daemon_stop(GPid pid)
{
    kill(pid, SIGSTOP);
    waitpid(pid, NULL, WUNTRACED);      /* until the last one has stopped */
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
