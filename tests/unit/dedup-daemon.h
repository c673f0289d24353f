/*
 * dedup-share: a store daemon for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_DAEMON_H
#define DEDUP_DAEMON_H

/*
 * Start qemu-dedup-store of this build with @size (as of --size) at @socket,
 * and wait until it listens.
 */
GPid dedup_daemon_start(const char *socket, const char *size);

/* Stop all of its threads; SIGCONT has them go on. */
void dedup_daemon_stop(GPid pid);

/* End it with @signal, and remove what it may have left. */
void dedup_daemon_end(GPid pid, const char *socket, int signal);

/* Have it drop what nobody uses, and its clients let go. */
void dedup_daemon_reclaim(const char *socket);

/* Bytes of memory that it says its frames have, and those of earlier ones. */
uint64_t dedup_daemon_memory(const char *socket);

#endif /* DEDUP_DAEMON_H */
