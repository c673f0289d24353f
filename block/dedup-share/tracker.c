/*
 * dedup-share: which writes and which fills of a disk overlap
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/range.h"
#include "tracker.h"

void dedup_tracker_init(DedupTracker *t)
{
    qemu_mutex_init(&t->lock);
    QLIST_INIT(&t->writes);
    QLIST_INIT(&t->fills);
}

void dedup_tracker_destroy(DedupTracker *t)
{
    assert(QLIST_EMPTY(&t->writes) && QLIST_EMPTY(&t->fills));
    qemu_mutex_destroy(&t->lock);
}

static bool overlap(const DedupRange *a, const DedupRange *b)
{
    return a->bytes && b->bytes &&
           ranges_overlap(a->offset, a->bytes, b->offset, b->bytes);
}

void dedup_write_begin(DedupTracker *t, DedupRange *w, int64_t offset,
                       int64_t bytes)
{
    DedupRange *f;

    *w = (DedupRange) { .offset = offset, .bytes = bytes };
    QEMU_LOCK_GUARD(&t->lock);
    QLIST_FOREACH(f, &t->fills, next) {
        f->tainted |= overlap(f, w);
    }
    QLIST_INSERT_HEAD(&t->writes, w, next);
}

void dedup_write_end(DedupTracker *t, DedupRange *w)
{
    QEMU_LOCK_GUARD(&t->lock);
    QLIST_REMOVE(w, next);
}

void dedup_fill_begin(DedupTracker *t, DedupRange *f, int64_t offset,
                      int64_t bytes)
{
    DedupRange *w;

    *f = (DedupRange) { .offset = offset, .bytes = bytes };
    QEMU_LOCK_GUARD(&t->lock);
    QLIST_FOREACH(w, &t->writes, next) {
        f->tainted |= overlap(f, w);
    }
    QLIST_INSERT_HEAD(&t->fills, f, next);
}

void dedup_fill_end(DedupTracker *t, DedupRange *f)
{
    QEMU_LOCK_GUARD(&t->lock);
    QLIST_REMOVE(f, next);
}

bool dedup_fill_lock(DedupTracker *t, DedupRange *f)
{
    qemu_mutex_lock(&t->lock);
    return !f->tainted;
}

void dedup_fill_unlock(DedupTracker *t)
{
    qemu_mutex_unlock(&t->lock);
}
