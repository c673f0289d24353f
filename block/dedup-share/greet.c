/*
 * dedup-share: how a connection to a store daemon begins
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/magic.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "greet.h"

/* A peer that passes more than one breaks the protocol. */
#define MAX_FDS 4

static int64_t now_ms(void)
{
    return g_get_monotonic_time() / 1000;
}

/* How long a connection may take. */
typedef struct Limit {
    int64_t deadline;           /* ms */
    int stop_fd;                /* -1, or it ends when this is readable */
} Limit;

/* Wait for @sock, or for @ms if it is -1; false when the limit is reached. */
static bool wait_for(const Limit *limit, int sock, int64_t ms)
{
    struct pollfd fds[] = {
        { .fd = sock, .events = POLLIN },
        { .fd = limit->stop_fd, .events = POLLIN },
    };
    int64_t left;

    do {
        left = MAX(limit->deadline - now_ms(), 0);
    } while (poll(fds, ARRAY_SIZE(fds), MIN(left, ms)) < 0 && errno == EINTR);
    return !fds[1].revents && (sock < 0 ? now_ms() < limit->deadline
                                        : fds[0].revents);
}

static void close_fds(const int *fds, unsigned n)
{
    while (n--) {
        close(fds[n]);
    }
}

/* Descriptors of a message: how many, of which so many are in @fds. */
static unsigned take_fds(struct msghdr *msg, int fds[MAX_FDS])
{
    struct cmsghdr *h;
    unsigned n = 0;

    for (h = CMSG_FIRSTHDR(msg); h; h = CMSG_NXTHDR(msg, h)) {
        if (h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS) {
            n = MIN((h->cmsg_len - CMSG_LEN(0)) / sizeof(int), MAX_FDS);
            memcpy(fds, CMSG_DATA(h), n * sizeof(int));
        }
    }
    return n;
}

ssize_t dedup_receive(int sock, void *buf, size_t size, int *fd)
{
    union {
        struct cmsghdr header;
        uint8_t bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
    } control;
    struct iovec iov = { buf, size };
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1,
        .msg_control = &control, .msg_controllen = sizeof(control),
    };
    int fds[MAX_FDS];
    unsigned nfds;
    ssize_t got;

    *fd = -1;
    got = RETRY_ON_EINTR(recvmsg(sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC));
    if (got < 0) {
        return errno == EWOULDBLOCK ? -EAGAIN : -errno;
    }
    nfds = take_fds(&msg, fds);
    if (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC) || nfds > 1) {
        close_fds(fds, nfds);
        return -EPROTO;
    }
    if (nfds) {
        *fd = fds[0];
    }
    return got;
}

/* --- connecting ----------------------------------------------------------- */

static int connect_to(const char *path, const Limit *limit, Error **errp)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int sock, ret;

    if (strlen(path) >= sizeof(addr.sun_path)) {
        error_setg(errp, "socket: '%s' is too long; %zu characters are the "
                   "most", path, sizeof(addr.sun_path) - 1);
        return -EINVAL;
    }
    pstrcpy(addr.sun_path, sizeof(addr.sun_path), path);
    sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    ret = sock < 0 ? -1 : connect(sock, (struct sockaddr *)&addr,
                                  sizeof(addr));
    /* many connect at the same time */
    while (ret < 0 && sock >= 0 && errno == EAGAIN && wait_for(limit, -1, 1)) {
        ret = connect(sock, (struct sockaddr *)&addr, sizeof(addr));
    }
    if (ret < 0) {
        ret = errno == ECONNREFUSED ? -ENOENT : -errno;
        error_setg_errno(errp, errno, "socket: no store daemon listens at "
                         "'%s'; start qemu-dedup-store, or enable its systemd "
                         "unit", path);
        if (sock >= 0) {
            close(sock);
        }
        return ret;
    }
    return sock;
}

/* Who else listens there could have the guest read what he likes. */
static bool check_peer(int sock, const char *path, Error **errp)
{
    g_autofree char *dir = g_path_get_dirname(path);
    struct ucred cred = { .uid = -1 };
    socklen_t size = sizeof(cred);
    struct stat st;

    if (!getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &size) &&
        (cred.uid == 0 || cred.uid == geteuid() ||
         (!stat(dir, &st) && st.st_uid == cred.uid))) {
        return true;
    }
    error_setg(errp, "socket: who listens at '%s' is user %d, and neither "
               "root, nor this user, nor the directory's owner; start the "
               "store daemon as one of these", path, (int)cred.uid);
    return false;
}

static int say_hello(int sock, DedupStoreKind kind,
                     const uint8_t token[DEDUP_TOKEN_SIZE], Error **errp)
{
    DedupMsgHello h = {
        .header.type = DEDUP_MSG_HELLO, .magic = DEDUP_PROTOCOL_MAGIC,
        .version = DEDUP_PROTOCOL_VERSION, .store = kind,
    };

    memcpy(h.token, token, DEDUP_TOKEN_SIZE);
    if (send(sock, &h, sizeof(h), MSG_NOSIGNAL) == sizeof(h)) {
        return 0;
    }
    /* what it has said before it ended the connection is heard next */
    if (errno == EPIPE || errno == ECONNRESET) {
        return 0;
    }
    error_setg_errno(errp, errno, "socket: cannot talk to the store daemon");
    return -EPROTO;
}

/* Is @fd what a guest's memory can be mapped from, and never written by us? */
static bool check_frames(int fd, uint32_t nslots)
{
    int flags = fcntl(fd, F_GETFL);
    struct statfs fs;
    struct stat st;

    return flags >= 0 && (flags & O_ACCMODE) == O_RDONLY &&
           !(flags & O_PATH) && !fstat(fd, &st) && S_ISREG(st.st_mode) &&
           st.st_size == (off_t)nslots * DEDUP_PROTOCOL_BLOCK &&
           !fstatfs(fd, &fs) && fs.f_type == TMPFS_MAGIC;
}

static bool check_welcome(const DedupMsgWelcome *w, ssize_t got,
                          DedupStoreKind kind, int fd)
{
    return got == sizeof(*w) && w->header.type == DEDUP_MSG_WELCOME &&
           !w->header.count && !w->header.request &&
           w->version == DEDUP_PROTOCOL_VERSION && w->store == kind &&
           w->nslots && w->nslots <= INT32_MAX &&
           !buffer_is_zero(w->uuid, sizeof(w->uuid)) &&
           (kind == DEDUP_STORE_KIND_XEN
            ? fd < 0 : fd >= 0 && check_frames(fd, w->nslots));
}

static int hear_welcome(int sock, DedupStoreKind kind, const Limit *limit,
                        DedupMsgWelcome *welcome, int *fd, Error **errp)
{
    union {
        DedupMsgHeader header;
        DedupMsgWelcome welcome;
        DedupMsgRefused refused;
    } m;
    ssize_t got = -EAGAIN;
    int ret = -EPROTO;

    *fd = -1;
    if (wait_for(limit, sock, INT_MAX)) {
        got = dedup_receive(sock, &m, sizeof(m), fd);
    }
    if (got == -ECONNRESET) {       /* what it said comes behind that */
        got = dedup_receive(sock, &m, sizeof(m), fd);
    }
    if (got == -EAGAIN) {
        error_setg(errp, "socket: the store daemon does not answer");
    } else if (!got || got == -ECONNRESET) {
        error_setg(errp, "socket: the store daemon has just ended; try again");
        ret = -ENOENT;
    } else if (got == sizeof(m.refused) &&
               m.header.type == DEDUP_MSG_REFUSED) {
        error_setg(errp, "socket: the store daemon refuses: %.*s",
                   DEDUP_TEXT_MAX, m.refused.text);
    } else if (check_welcome(&m.welcome, got, kind, *fd)) {
        *welcome = m.welcome;
        return 0;
    } else {
        error_setg(errp, "socket: what listens is no store daemon that this "
                   "QEMU knows; start the one of its version");
    }
    if (*fd >= 0) {
        close(*fd);
    }
    return ret;
}

int dedup_greet(const char *path, DedupStoreKind kind,
                const uint8_t token[DEDUP_TOKEN_SIZE], unsigned limit_ms,
                int stop_fd, DedupMsgWelcome *welcome, int *frames,
                Error **errp)
{
    Limit limit = { .deadline = now_ms() + limit_ms, .stop_fd = stop_fd };
    int sock = connect_to(path, &limit, errp);
    int ret = -EPROTO;

    if (sock < 0) {
        return sock;
    }
    if (check_peer(sock, path, errp)) {
        ret = say_hello(sock, kind, token, errp);
    }
    if (!ret) {
        ret = hear_welcome(sock, kind, &limit, welcome, frames, errp);
    }
    if (ret < 0) {
        close(sock);
        return ret;
    }
    return sock;
}
