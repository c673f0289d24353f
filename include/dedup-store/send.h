/*
 * qemu-dedup-store: how its clients and it send a message
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_STORE_SEND_H
#define DEDUP_STORE_SEND_H

#include <sys/socket.h>

/*
 * Send one message on @sock: @asize bytes at @a and, if @b is not NULL, @bsize
 * at @b, with the descriptor @fd if it is not negative.  Does not wait.  False
 * with errno set if it was not sent.
 */
static inline bool dedup_send(int sock, const void *a, size_t asize,
                              const void *b, size_t bsize, int fd)
{
    struct iovec iov[] = { { (void *)a, asize }, { (void *)b, bsize } };
    union {
        struct cmsghdr header;
        uint8_t bytes[CMSG_SPACE(sizeof(int))];
    } control = {};
    struct msghdr msg = { .msg_iov = iov, .msg_iovlen = b ? 2 : 1 };

    if (fd >= 0) {
        msg.msg_control = &control;
        msg.msg_controllen = sizeof(control);
        control.header.cmsg_len = CMSG_LEN(sizeof(int));
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
    }
    return sendmsg(sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
}

#endif /* DEDUP_STORE_SEND_H */
