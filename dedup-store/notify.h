/*
 * qemu-dedup-store: what the service manager is told
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See sd_notify(3).  Nothing is told if nobody wants to know.
 */

#ifndef DEDUP_STORE_NOTIFY_H
#define DEDUP_STORE_NOTIFY_H

/*
 * False with *errp set if the service manager waits to be told, and this
 * program was built without libsystemd.
 */
bool notify_check(Error **errp);

/* Clients can come. */
void notify_ready(void);

/* The main loop runs.  Often enough: each second. */
void notify_alive(void);

/* It ends. */
void notify_stopping(void);

#endif /* DEDUP_STORE_NOTIFY_H */
