/*
 * dedup-share: which store a node's options mean
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "dedup-store/socket.h"
#include "qapi/error.h"
#include "qemu/ctype.h"
#include "qemu/error-report.h"
#include "join.h"
#include "start.h"

/* How long a running guest may be kept waiting for a daemon to answer. */
#define CONNECT_MS 2000

/* How long who starts a guest tries, while another daemon comes or goes. */
#define START_US (5 * G_USEC_PER_SEC)

/* Has this program no guest, as qemu-img has none? */
static bool is_tool(void)
{
    int kind;

    for (kind = 0; kind < DEDUP_SHARE_STORE__MAX; kind++) {
        if (dedup_store_find(kind)) {
            return false;
        }
    }
    return true;
}

/* The store for @kind, which may be auto, if it works.  NULL with *errp set. */
static const DedupStoreOps *find_store(DedupShareStore kind, Error **errp)
{
    static const DedupShareStore kinds[] = {
        DEDUP_SHARE_STORE_XEN, DEDUP_SHARE_STORE_LINUX,
    };
    const DedupStoreOps *ops = NULL;
    int i;

    if (kind != DEDUP_SHARE_STORE_AUTO) {
        ops = dedup_store_find(kind);
    }
    for (i = 0; kind == DEDUP_SHARE_STORE_AUTO && i < ARRAY_SIZE(kinds); i++) {
        ops = dedup_store_find(kinds[i]);
        if (ops && ops->applies()) {
            break;
        }
        ops = NULL;
    }
    if (!ops && kind == DEDUP_SHARE_STORE_AUTO) {
        error_setg(errp, "store: there is none for a guest of this kind; use "
                   "store=off");
        return NULL;
    }
    if (!ops) {
        error_setg(errp, kind == DEDUP_SHARE_STORE_XEN
                   ? "store: this program has no Xen store; it needs a QEMU "
                     "system emulator built with Xen support, running as a "
                     "Xen guest's device model; use store=off elsewhere"
                   : "store: this program has no Linux store; it needs a QEMU "
                     "system emulator; use store=off elsewhere");
        return NULL;
    }
    return ops->probe(errp) ? ops : NULL;
}

static bool check_group(const char *group, Error **errp)
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

static bool check_options(const DedupShareOptions *o, Error **errp)
{
    if (o->has_size && (!o->size || o->size % DEDUP_BLOCK_SIZE)) {
        error_setg(errp, "store-size: %" PRIu64 " is not a multiple of %d "
                   "greater than 0", o->size, DEDUP_BLOCK_SIZE);
        return false;
    }
    return check_group(o->group, errp);
}

/* The daemon that is there has to be as @o says. */
static bool check_size(const DedupShareOptions *o, DedupClient *c, Error **errp)
{
    uint64_t asked = dedup_client_asked_size(c);

    if (!o->has_size || o->size == asked) {
        return true;
    }
    if (asked) {
        error_setg(errp, "store-size: the store daemon of group '%s' was "
                   "started with %" PRIu64 "; say the same, or nothing",
                   o->group, asked);
    } else {
        error_setg(errp, "store-size: the store daemon of group '%s' was "
                   "started without a size, and has %" PRIu64 "; say nothing",
                   o->group, dedup_client_store_size(c));
    }
    return false;
}

char *dedup_find_socket(const DedupShareOptions *o)
{
    return o->socket ? g_canonicalize_filename(o->socket, NULL)
                     : dedup_socket_path(o->group);
}

static DedupClient *connect_to_daemon(const DedupShareOptions *o,
                                      const DedupStoreOps *ops, bool starting,
                                      bool *absent, Error **errp)
{
    DedupStoreKind kind = ops && ops->kind == DEDUP_SHARE_STORE_XEN
                          ? DEDUP_STORE_KIND_XEN : DEDUP_STORE_KIND_LINUX;
    unsigned ms = o->timeout * 1000;

    return dedup_client_get(o->path, kind, ms,
                            starting ? ms : MIN(ms, CONNECT_MS), absent, errp);
}

/* Another QEMU may be starting it, or it may just be ending. */
static DedupClient *start_daemon(const DedupShareOptions *o,
                                 const DedupStoreOps *ops, Error **errp)
{
    int64_t deadline = g_get_monotonic_time() + START_US;

    for (;;) {
        bool absent = false;
        Error *err = NULL;
        DedupClient *c;

        if (!dedup_start_daemon(o->group, o->path, o->size, errp)) {
            return NULL;
        }
        c = connect_to_daemon(o, ops, true, &absent, &err);
        if (c || !absent || g_get_monotonic_time() >= deadline) {
            error_propagate(errp, err);
            return c;
        }
        error_free(err);
        g_usleep(10 * 1000);
    }
}

/*
 * Become a client of the group's store daemon.  @ops is NULL in a program
 * without a guest.  NULL with *errp set.
 */
static DedupClient *join_daemon(const DedupShareOptions *o,
                                const DedupStoreOps *ops, Error **errp)
{
    bool starting = !ops || (ops->is_starting && ops->is_starting());
    bool absent = false;
    Error *err = NULL;
    DedupClient *c;

    c = connect_to_daemon(o, ops, starting, &absent, &err);
    if (!c && absent && ops && starting) {
        error_free(err);
        err = NULL;
        c = start_daemon(o, ops, &err);
    }
    error_propagate(errp, err);
    return c;
}

/* Warn of @reason, unless that was the last thing said. */
static void warn_once(const char *reason)
{
    static char *last;

    if (g_strcmp0(last, reason)) {
        g_free(last);
        last = g_strdup(reason);
        warn_report("dedup-share: nothing will be shared: %s", reason);
    }
}

/* Nothing can be shared, because of @err, which is taken.  Is that an error? */
static bool go_without(const DedupShareOptions *o, Error *err, char **reason,
                       Error **errp)
{
    if (o->store != DEDUP_SHARE_STORE_AUTO) {
        error_propagate(errp, err);
        return false;
    }
    *reason = g_strdup(error_get_pretty(err));
    warn_once(*reason);
    error_free(err);
    return true;
}

bool dedup_join(const DedupShareOptions *o, DedupClient **client, char **reason,
                Error **errp)
{
    const DedupStoreOps *ops = NULL;
    Error *err = NULL;

    *client = NULL;
    *reason = NULL;
    if (o->store == DEDUP_SHARE_STORE_OFF) {
        return true;
    }
    if (is_tool() && !o->x_copy) {
        *reason = g_strdup("store: this program has no guest");
        return true;
    }
    if (!o->x_copy) {
        ops = find_store(o->store, &err);
        if (!ops) {
            return go_without(o, err, reason, errp);
        }
    }
    /* what the user has said wrong is an error, whatever the store */
    if (!check_options(o, errp)) {
        return false;
    }
    *client = join_daemon(o, ops, &err);
    if (!*client) {
        return go_without(o, err, reason, errp);
    }
    if (!check_size(o, *client, errp)) {
        dedup_client_put(*client);
        *client = NULL;
        return false;
    }
    return true;
}
