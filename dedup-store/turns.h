/*
 * qemu-dedup-store: whose turn it is to read from a disk
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Invariants
 *
 * - A device that is slow, or hangs, keeps no read of another one waiting: each
 *   has so many under way, and no more.
 * - At one device clients take turns, whatever each of them has asked for.
 *
 * Not thread-safe: the caller has a lock.
 */

#ifndef DEDUP_STORE_TURNS_H
#define DEDUP_STORE_TURNS_H

typedef struct Turns Turns;

/* At each device @most jobs are under way. */
Turns *turns_new(unsigned most);

/* Nothing waits. */
void turns_free(Turns *t);

/*
 * May @job, which @who wants done at @device, begin now?  If not, it waits
 * until turns_end() returns it.
 */
bool turns_begin(Turns *t, dev_t device, const void *who, void *job);

/* A job at @device has ended: the one that may begin now, or NULL. */
void *turns_end(Turns *t, dev_t device);

#endif /* DEDUP_STORE_TURNS_H */
