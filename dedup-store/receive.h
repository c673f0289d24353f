/*
 * qemu-dedup-store: the threads that wait for what clients say
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Receivers all wait at one epoll descriptor, and the kernel wakes one of them
 * for what is ready.  It has that handled, with the server's lock.  If a read
 * or a put was begun by it, the receiver carries that out itself, without the
 * lock: nobody else has to be woken for it.
 *
 * Invariants
 *
 * - One thread at a time handles something.  What a client says is handled in
 *   its order.
 * - There is always a receiver that waits, or is about to.  One that has none
 *   behind it, and cannot start any, leaves its work to others.
 *
 * All functions are called with the server's lock held, unless they say
 * something else.
 */

#ifndef DEDUP_STORE_RECEIVE_H
#define DEDUP_STORE_RECEIVE_H

#include "fill.h"

/* A descriptor that is watched. */
typedef struct Watch Watch;

/* Its events, of epoll_ctl(2).  It is watched again after watch_set(). */
typedef void WatchFunc(void *opaque, uint32_t events);

/*
 * Have @ready called when any of @events, or EPOLLHUP or EPOLLERR, is true of
 * @fd.  NULL with errno set if the kernel does not watch it.
 */
Watch *watch_new(int fd, uint32_t events, WatchFunc *ready, void *opaque);

/* Watch for @events from now on; 0: only for EPOLLHUP and EPOLLERR. */
void watch_set(Watch *w, uint32_t events);

/* It is not called any more.  The descriptor stays the caller's. */
void watch_free(Watch *w);

/* Start the first receiver. */
void receivers_start(Fills *fills);

/* They end when they have done what they are at. */
void receivers_stop(void);

/* Have all ended?  Then nothing is left of them. */
bool receivers_ended(void);

#endif /* DEDUP_STORE_RECEIVE_H */
