/*
 * qemu-dedup-store: fuzzing of what clients say
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The input is a list of messages: a byte that says what descriptors come with
 * it, two bytes of length, and the message.  The first bit of that byte says
 * that a valid HELLO and an image come before all.  The daemon runs in this
 * process; after each input nothing may be left of the client.
 */

#include "qemu/osdep.h"
#include <sys/socket.h>
#include <sys/resource.h>
#include "qapi/error.h"
#include "qemu/lockable.h"
#include "../../dedup-store/server.h"

#define MESSAGES 16

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int image_fd;

static void nothing(void)
{
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    char name[] = "/var/tmp/dedup-store-fuzz-XXXXXX";
    g_autofree uint8_t *content = g_malloc(2 * 1024 * 1024);
    sigset_t set;
    size_t i;
    int fd = mkstemp(name);

    for (i = 0; i < 2 * 1024 * 1024; i++) {
        content[i] = g_random_int();
    }
    g_assert(write(fd, content, 2 * 1024 * 1024) == 2 * 1024 * 1024);
    close(fd);
    image_fd = open(name, O_RDONLY | O_CLOEXEC);
    unlink(name);
    sigemptyset(&set);
    sigaddset(&set, SIGIO);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    server.group = "fuzz";
    server.store = store_new(&frames_linux, "fuzz", "", 8 * 1024 * 1024,
                             &error_abort);
    QTAILQ_INIT(&server.clients);
    server.layers = layers_new(server.store, 60, nothing);
    server.fills = fills_new(server.store, client_answer);
    return 0;
}

static void say(int fd, const void *message, size_t size, const int *fds,
                unsigned nfds)
{
    struct iovec iov = { (void *)message, size };
    uint8_t control[CMSG_SPACE(4 * sizeof(int))]
        QEMU_ALIGNED(sizeof(size_t)) = {};
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

    if (nfds) {
        struct cmsghdr *h = (void *)control;

        msg.msg_control = control;
        msg.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        h->cmsg_level = SOL_SOCKET;
        h->cmsg_type = SCM_RIGHTS;
        h->cmsg_len = CMSG_LEN(nfds * sizeof(int));
        memcpy(CMSG_DATA(h), fds, nfds * sizeof(int));
    }
    sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void be_honest(int fd)
{
    DedupMsgHello hello = {
        .header.type = DEDUP_MSG_HELLO, .magic = DEDUP_PROTOCOL_MAGIC,
        .version = DEDUP_PROTOCOL_VERSION,
    };
    DedupMsgLayer layer = { .header.type = DEDUP_MSG_LAYER };

    say(fd, &hello, sizeof(hello), NULL, 0);
    say(fd, &layer, sizeof(layer), &image_fd, 1);
}

static void run_loop(int fd)
{
    static uint8_t buf[DEDUP_MSG_MAX];

    while (g_main_context_iteration(NULL, false)) {
        /* what the daemon says is not looked at */
        while (recv(fd, buf, sizeof(buf), MSG_DONTWAIT) > 0) {
            continue;
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int ends[2], fds[4] = { image_fd, image_fd, image_fd, image_fd };
    unsigned i;

    g_assert(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    client_new(ends[0]);
    if (size && data[0] & 1) {
        be_honest(ends[1]);
        run_loop(ends[1]);
    }
    for (i = 0; i < MESSAGES && size >= 3; i++) {
        size_t length = MIN(data[1] | data[2] << 8, size - 3);

        say(ends[1], data + 3, length, fds, (data[0] >> 1) % 4);
        run_loop(ends[1]);
        data += 3 + length;
        size -= 3 + length;
    }
    close(ends[1]);
    while (!QTAILQ_EMPTY(&server.clients)) {
        g_main_context_iteration(NULL, true);
    }
    return 0;
}
