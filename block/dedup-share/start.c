/*
 * dedup-share: starting a store daemon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The daemon that is started is in this process's cgroup, namespaces and user.
 * It gets none of its descriptors, and is not pinned to its processors.  Its
 * memory counts as this guest's, so it takes no more than a quarter of what
 * there is.
 */

#include "qemu/osdep.h"
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include "dedup-store/socket.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "start.h"
#include "trace.h"

/* It stays so long without clients; a guest may just be started anew. */
#define IDLE_EXIT_SECONDS "10"
#define MOST_PERCENT "25"

/* So long it may take to be ready; it makes empty tables. */
#define START_SECONDS 10

/* In the child: what pins this guest is not for the whole group. */
static void unpin_child(gpointer opaque)
{
    cpu_set_t all;

    memset(&all, 0xff, sizeof(all));
    sched_setaffinity(0, sizeof(all), &all);
    syscall(SYS_set_mempolicy, 0 /* MPOL_DEFAULT */, NULL, 0);
}

/* All of what the child says until it has ended, or NULL: it takes too long. */
static char *hear(int fd)
{
    int64_t deadline = g_get_monotonic_time() + START_SECONDS * G_USEC_PER_SEC;
    g_autoptr(GString) said = g_string_new("");
    struct pollfd p = { .fd = fd, .events = POLLIN };
    char buf[512];
    ssize_t got;

    do {
        int64_t left = deadline - g_get_monotonic_time();

        if (left <= 0 || !RETRY_ON_EINTR(poll(&p, 1, left / 1000 + 1))) {
            return NULL;
        }
        got = RETRY_ON_EINTR(read(fd, buf, sizeof(buf)));
        g_string_append_len(said, buf, MAX(got, 0));
    } while (got > 0);
    return g_strchomp(g_string_free(g_steal_pointer(&said), false));
}

/* Run it until it is in the background; what it says is *said. */
static bool run(const char **argv, char **said, int *status, Error **errp)
{
    g_autoptr(GError) err = NULL;
    GPid pid;
    int fd;

    if (!g_spawn_async_with_pipes("/", (char **)argv, NULL,
                                  G_SPAWN_STDOUT_TO_DEV_NULL |
                                  G_SPAWN_DO_NOT_REAP_CHILD, unpin_child, NULL,
                                  &pid, NULL, NULL, &fd, &err)) {
        error_setg(errp, "none can be started: %s (with -sandbox spawn=deny it "
                   "cannot); start qemu-dedup-store before, or enable its "
                   "systemd unit", err->message);
        return false;
    }
    *said = hear(fd);
    if (!*said) {
        kill(pid, SIGKILL);
    }
    close(fd);
    RETRY_ON_EINTR(waitpid(pid, status, 0));
    if (!*said) {
        error_setg(errp, "one was started, and was not ready within %d s",
                   START_SECONDS);
    }
    return *said;
}

bool dedup_start_daemon(const char *group, const char *socket, uint64_t size,
                        Error **errp)
{
    g_autofree char *program = get_relocated_path(CONFIG_BINDIR
                                                  "/qemu-dedup-store");
    g_autofree char *text = size ? g_strdup_printf("%" PRIu64, size) : NULL;
    const char *argv[] = {
        program, "--group", group, "--socket", socket, "--daemonize",
        "--idle-exit", IDLE_EXIT_SECONDS, "--most", MOST_PERCENT,
        text ? "--size" : NULL, text, NULL,
    };
    g_autofree char *said = NULL;
    int status;

    trace_dedup_start_daemon(group, socket, size);
    if (!run(argv, &said, &status, errp)) {
        error_prepend(errp, "socket: no store daemon listens at '%s', and ",
                      socket);
        return false;
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == DEDUP_EXIT_TAKEN) {
        return true;
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status)) {
        error_setg(errp, "socket: the store daemon did not start: %s", said);
        return false;
    }
    if (said[0]) {
        warn_report("dedup-share: %s", said);
    }
    return true;
}
