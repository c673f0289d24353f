/*
 * dedup-share: how a connection to a store daemon begins
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_SHARE_GREET_H
#define DEDUP_SHARE_GREET_H

#include "dedup-store/protocol.h"

/*
 * Connect to the store daemon at @path, say HELLO with @token, and check the
 * WELCOME, its peer, and the frames' file that it passes.  Returns the socket,
 * which does not block, and the file in *frames; both are the caller's.
 * -errno with *errp set on error; -ENOENT: nobody listens there, or who did has
 * just ended.  Takes @limit_ms at most, and ends if @stop_fd, unless it is -1,
 * is readable.
 */
int dedup_greet(const char *path, DedupStoreKind kind,
                const uint8_t token[DEDUP_TOKEN_SIZE], unsigned limit_ms,
                int stop_fd, DedupMsgWelcome *welcome, int *frames,
                Error **errp);

/*
 * Receive a message of at most @size bytes, which it is if the return value
 * says so.  *fd is a descriptor that came with it, or -1.  0: the end; -EAGAIN:
 * none now; -EPROTO: it was longer, or had more descriptors; other -errno.
 */
ssize_t dedup_receive(int sock, void *buf, size_t size, int *fd);

#endif /* DEDUP_SHARE_GREET_H */
