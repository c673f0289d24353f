/*
 * qemu-dedup-store: commands for a running daemon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_STORE_TOOL_H
#define DEDUP_STORE_TOOL_H

/* Print the status of the daemon at @socket; returns an exit code. */
int tool_status(const char *socket, bool json);

/* Have it drop its idle frames; returns an exit code. */
int tool_reclaim(const char *socket);

#endif /* DEDUP_STORE_TOOL_H */
