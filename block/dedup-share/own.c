/*
 * dedup-share: an image that a guest of this process may write to
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/main-loop.h"
#include "own.h"

/* Changes in the main loop only. */
static QLIST_HEAD(, DedupOwn) owns = QLIST_HEAD_INITIALIZER(owns);

static DedupOwn *find(const DedupOwnId *id)
{
    DedupOwn *o;

    QLIST_FOREACH(o, &owns, next) {
        if (o->id.dev == id->dev && o->id.ino == id->ino) {
            return o;
        }
    }
    return NULL;
}

static bool is_same(const DedupOwn *o, DedupIndex *index, const DedupOwnId *id)
{
    return o->index == index && o->id.nblocks == id->nblocks &&
           !strcmp(o->id.format, id->format);
}

static DedupOwn *make(DedupIndex *index, const DedupOwnId *id, uint64_t unit,
                      DedupMap *keyed)
{
    DedupOwn *o = g_new0(DedupOwn, 1);

    *o = (DedupOwn) {
        .id = *id, .index = index, .unit = unit, .refcnt = 1, .keyed = keyed,
        .map = dedup_map_new(index, id->nblocks),
    };
    o->closed = !o->map;
    if (keyed) {
        o->dirty = bitmap_new(id->nblocks);
    }
    dedup_tracker_init(&o->tracker);
    QLIST_INSERT_HEAD(&owns, o, next);
    return o;
}

DedupOwn *dedup_own_get(DedupIndex *index, const DedupOwnId *id, uint64_t unit,
                        DedupMap *keyed)
{
    DedupOwn *o, *old = find(id);

    GLOBAL_STATE_CODE();
    if (old && is_same(old, index, id)) {
        /* whatever this node's drained section was for, it may have changed */
        dedup_own_change(old, 0, INT64_MAX);
        if (keyed) {
            dedup_map_close(keyed);
        }
        old->refcnt++;
        return old;
    }
    o = make(index, id, unit, keyed);
    if (old) {
        qatomic_set(&old->closed, true);
        qatomic_set(&o->closed, true);
    }
    return o;
}

void dedup_own_put(DedupOwn *own)
{
    GLOBAL_STATE_CODE();
    if (--own->refcnt) {
        return;
    }
    QLIST_REMOVE(own, next);
    if (own->map) {
        dedup_map_close(own->map);
    }
    if (own->keyed) {
        dedup_map_close(own->keyed);
    }
    dedup_tracker_destroy(&own->tracker);
    g_free(own->dirty);
    g_free(own);
}

DedupMap *dedup_own_map(DedupOwn *own, uint64_t block)
{
    if (qatomic_read(&own->closed) || block >= own->id.nblocks) {
        return NULL;
    }
    if (own->keyed &&
        !(qatomic_read(&own->dirty[BIT_WORD(block)]) & BIT_MASK(block))) {
        return own->keyed;
    }
    return own->map;
}

void dedup_own_change(DedupOwn *own, int64_t offset, int64_t bytes)
{
    uint64_t end = MIN((uint64_t)offset + bytes,
                       own->id.nblocks * DEDUP_BLOCK_SIZE);
    uint64_t first, n;

    if (!own->map || offset >= end) {
        return;
    }
    first = ROUND_DOWN(offset, own->unit) / DEDUP_BLOCK_SIZE;
    n = DIV_ROUND_UP(ROUND_UP(end, own->unit), DEDUP_BLOCK_SIZE) - first;
    n = MIN(n, own->id.nblocks - first);
    if (own->keyed) {
        bitmap_set_atomic(own->dirty, first, n);
        dedup_map_set_dirty(own->keyed, first, n);
    }
    dedup_map_forget(own->map, first, n);
}
