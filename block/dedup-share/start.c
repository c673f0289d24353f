/*
 * dedup-share: starting a store daemon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The daemon that is started is in this process's cgroup, namespaces and user.
 * It gets none of its descriptors.  Its memory counts as this guest's, so it
 * takes no more than a quarter of what there is.
 */

#include "qemu/osdep.h"
#include "dedup-store/socket.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "start.h"
#include "trace.h"

/* It stays so long without clients; a guest may just be started anew. */
#define IDLE_EXIT_SECONDS "10"
#define MOST_PERCENT "25"

static bool run(const char *group, const char *socket, const char *size,
                char **said, Error **errp)
{
    g_autofree char *program = get_relocated_path(CONFIG_BINDIR
                                                  "/qemu-dedup-store");
    const char *argv[] = {
        program, "--group", group, "--socket", socket, "--daemonize",
        "--idle-exit", IDLE_EXIT_SECONDS, "--most", MOST_PERCENT,
        size ? "--size" : NULL, size, NULL,
    };
    g_autoptr(GError) err = NULL;
    int status;

    if (!g_spawn_sync("/", (char **)argv, NULL, G_SPAWN_STDOUT_TO_DEV_NULL,
                      NULL, NULL, NULL, said, &status, &err)) {
        error_setg(errp, "socket: no store daemon listens at '%s', and none "
                   "can be started: %s (with -sandbox spawn=deny it cannot); "
                   "start qemu-dedup-store before, or enable its systemd unit",
                   socket, err->message);
        return false;
    }
    g_strchomp(*said);
    if (WIFEXITED(status) && WEXITSTATUS(status) == DEDUP_EXIT_TAKEN) {
        (*said)[0] = 0;
        return true;
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status)) {
        error_setg(errp, "socket: the store daemon did not start: %s", *said);
        return false;
    }
    return true;
}

bool dedup_start_daemon(const char *group, const char *socket, uint64_t size,
                        Error **errp)
{
    g_autofree char *text = size ? g_strdup_printf("%" PRIu64, size) : NULL;
    g_autofree char *said = NULL;

    trace_dedup_start_daemon(group, socket, size);
    if (!run(group, socket, text, &said, errp)) {
        return false;
    }
    if (said[0]) {
        warn_report("dedup-share: %s", said);
    }
    return true;
}
