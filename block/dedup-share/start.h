/*
 * dedup-share: starting a store daemon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_SHARE_START_H
#define DEDUP_SHARE_START_H

/*
 * Start the store daemon of @group, with @size (0: its default), and wait until
 * it listens at @socket.  It ends some time after its last client.  True also
 * if somebody else is starting one there.  False with *errp set on error.
 *
 * Main loop, before the guest runs: this waits for a process.
 */
bool dedup_start_daemon(const char *group, const char *socket, uint64_t size,
                        Error **errp);

#endif /* DEDUP_SHARE_START_H */
