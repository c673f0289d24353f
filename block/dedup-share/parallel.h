/*
 * dedup-share: the parts of a request, at once
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_SHARE_PARALLEL_H
#define DEDUP_SHARE_PARALLEL_H

#include "qemu/coroutine.h"

/*
 * Most parts of one request that are in flight: as many as QEMU's thread pool
 * has threads.
 */
#define DEDUP_PARALLEL 64

/*
 * Most coroutines that parts have, of all requests of the process.  Parts can
 * have parts, and a guest can have many requests in flight; each coroutine's
 * stack takes two of the mappings that the kernel lets a process have (65530
 * by default), and QEMU aborts when it cannot have a stack.
 */
#define DEDUP_PARALLEL_ALL 256

/* Do part @i of what @opaque is; 0, or -errno. */
typedef int coroutine_fn DedupPartFn(void *opaque, unsigned i);

/*
 * Call @part for 0 ... @n - 1, in this order, each as soon as those before it
 * wait or have ended, and at most DEDUP_PARALLEL at a time.  When there are
 * DEDUP_PARALLEL_ALL coroutines, a part is called as it is, and those behind it
 * wait.  Returns when all that were begun have ended: 0, or the first error,
 * after which none is begun.
 *
 * All run in the caller's AioContext, and in no other thread meanwhile; the
 * caller holds its locks for them, such as the graph's.  A single part is
 * called as it is, without a coroutine of its own or an allocation.
 */
int coroutine_fn dedup_co_all(unsigned n, DedupPartFn *part, void *opaque);

#endif /* DEDUP_SHARE_PARALLEL_H */
