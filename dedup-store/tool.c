/*
 * qemu-dedup-store: commands for a running daemon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/socket.h>
#include <sys/un.h>
#include "dedup-store/protocol.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-dedup-share.h"
#include "qapi/qobject-input-visitor.h"
#include "qobject/qjson.h"
#include "qobject/qobject.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "tool.h"

/* What the daemon says. */
static union {
    DedupMsgHeader header;
    DedupMsgRefused refused;
    DedupMsgStatus status;
    char bytes[DEDUP_MSG_MAX + 1];
} reply;

static bool get_reply(int fd, DedupMsgType type)
{
    ssize_t got = recv(fd, reply.bytes, sizeof(reply) - 1, 0);

    if (got >= (ssize_t)sizeof(reply.header) && reply.header.type == type) {
        reply.bytes[got] = 0;
        return true;
    }
    if (got == sizeof(reply.refused) &&
        reply.header.type == DEDUP_MSG_REFUSED) {
        reply.refused.text[DEDUP_TEXT_MAX - 1] = 0;
        error_report("the store daemon refuses: %s", reply.refused.text);
    } else {
        error_report("the store daemon has ended the connection");
    }
    return false;
}

static int connect_to(const char *path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    struct timeval limit = { .tv_sec = 10 };
    DedupMsgHello hello = {
        .header.type = DEDUP_MSG_HELLO, .magic = DEDUP_PROTOCOL_MAGIC,
        .version = DEDUP_PROTOCOL_VERSION, .flags = DEDUP_HELLO_OBSERVER,
    };
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    pstrcpy(addr.sun_path, sizeof(addr.sun_path), path);
    if (fd < 0 || connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        error_report("cannot connect to '%s': %s; is there a store daemon of "
                     "this group?", path, strerror(errno));
        exit(1);
    }
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    if (send(fd, &hello, sizeof(hello), MSG_NOSIGNAL) < 0 ||
        !get_reply(fd, DEDUP_MSG_WELCOME)) {
        exit(1);
    }
    return fd;
}

static void ask(int fd, DedupMsgType type)
{
    DedupMsgHeader h = { .type = type, .request = 1 };

    if (send(fd, &h, sizeof(h), MSG_NOSIGNAL) < 0) {
        error_report("the store daemon has ended the connection");
        exit(1);
    }
}

static void print_size(const char *name, uint64_t bytes)
{
    g_autofree char *text = size_to_str(bytes);

    printf("%s: %s\n", name, text);
}

static void print_client(const DedupStoreClient *c)
{
    DedupStoreClientLayerList *l;

    printf("client: pid %" PRId64 ", holds %" PRIu64 " frames, %" PRIu64
           " requests%s\n", c->pid, c->holds, c->requests,
           c->connected ? "" : ", not connected");
    for (l = c->layers; l; l = l->next) {
        printf("    layer %" PRIu64 ": %s%s\n", l->value->layer,
               l->value->leased ? "leased" : "not leased: ",
               l->value->leased ? "" : l->value->reason);
    }
}

static void print_status(const DedupStoreStatus *s)
{
    DedupStoreClientList *c;
    DedupStoreLayerList *l;

    printf("group: %s\n", s->group);
    print_size("size", s->size);
    print_size("memory", s->memory);
    printf("frames: %" PRIu64 " in use, %" PRIu64 " idle\n", s->frames_used,
           s->frames_idle);
    print_size("saved", s->saved);
    for (l = s->layers; l; l = l->next) {
        printf("layer: device %s inode %" PRIu64 ", %" PRIu64 " of %" PRIu64
               " blocks known, %" PRIu64 " clients\n", l->value->device,
               l->value->inode, l->value->known, l->value->blocks,
               l->value->clients);
    }
    for (c = s->clients; c; c = c->next) {
        print_client(c->value);
    }
}

int tool_status(const char *socket, bool json)
{
    g_autoptr(GString) text = g_string_new("");
    int fd = connect_to(socket);
    DedupStoreStatus *s = NULL;
    QObject *object;
    Visitor *v;

    ask(fd, DEDUP_MSG_ASK_STATUS);
    do {
        if (!get_reply(fd, DEDUP_MSG_STATUS)) {
            return 1;
        }
        g_string_append(text, reply.bytes + sizeof(reply.status));
    } while (reply.status.flags & DEDUP_STATUS_MORE);
    if (json) {
        printf("%s\n", text->str);
        return 0;
    }
    object = qobject_from_json(text->str, &error_fatal);
    v = qobject_input_visitor_new(object);
    visit_type_DedupStoreStatus(v, NULL, &s, &error_fatal);
    print_status(s);
    qapi_free_DedupStoreStatus(s);
    visit_free(v);
    qobject_unref(object);
    return 0;
}

int tool_reclaim(const char *socket)
{
    int fd = connect_to(socket);

    ask(fd, DEDUP_MSG_RECLAIM);
    if (!get_reply(fd, DEDUP_MSG_RECLAIMED)) {
        return 1;
    }
    printf("%u frames were dropped\n", reply.header.count);
    return 0;
}
