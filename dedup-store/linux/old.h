/*
 * qemu-dedup-store: frames of earlier daemons, which guests still map
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The frames of a daemon that has ended are in its file, for as long as anybody
 * maps a page of it.  Clients claim what their guests may map (CLAIM), and the
 * rest is punched.
 *
 * Nobody must lose a page because somebody else has claimed nothing, or is
 * late.  So there is one lock for each client, kept by the kernel: a read lock
 * of a byte of the file, whose number has the client's process in it.  The
 * daemon takes it by the open file description that it passes to the client,
 * and closes that; so the lock lasts as long as the client has the descriptor,
 * or maps any of it.
 *
 * Invariants
 *
 * - Nothing is punched before there is a claim for each lock, and nothing that
 *   any of these has said last.
 * - A claim for a lock is made by the process that the lock is of.  Its parts
 *   are of one connection, and none is of an earlier connection than another.
 * - A daemon that lives has the lock of byte 0, which nobody claims: its file
 *   is not punched by another one, nor counted.  It is a lock for writing,
 *   which no client's description can have.
 * - What claims take is bounded; what is beyond that is as if not claimed.
 * - Only a file that a store daemon of this user has made is touched at all,
 *   whatever a client passes.
 *
 * A thread punches; the others only note claims.
 */

#ifndef DEDUP_STORE_LINUX_OLD_H
#define DEDUP_STORE_LINUX_OLD_H

#include "dedup-store/protocol.h"

/* What a frames' file is called. */
#define FRAMES_FILE_NAME "dedup-store"

/* The lock of the daemon itself. */
#define FRAMES_LOCK_DAEMON 0

/*
 * The lock of the @n-th client, of process @pid.  If that is not known to be a
 * process, nobody can claim for it.
 */
static inline uint64_t frames_lock_of(pid_t pid, uint64_t n)
{
    return (uint64_t)MAX(pid, 0) << 40 | (n & ((1ULL << 40) - 1));
}

/* Take @lock, by the description of @fd.  False if that fails, errno is set. */
bool frames_file_lock(int fd, uint64_t lock);

typedef struct OldFiles OldFiles;

/* @own_fd: the file of this daemon. */
OldFiles *old_files_new(int own_fd);
void old_files_free(OldFiles *old);

/* See FramesOps.claim(). */
void old_files_claim(OldFiles *old, pid_t pid, uint64_t connection, int fd,
                     const DedupMsgClaim *m, const uint32_t *slots, unsigned n);

/* Bytes that the files have.  Any thread, does not block. */
uint64_t old_files_memory(OldFiles *old);

#endif /* DEDUP_STORE_LINUX_OLD_H */
