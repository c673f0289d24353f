/*
 * dedup-share index: which frame has a content
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A table of buckets of eight entries, 4 bytes each: four bits of the digest,
 * and a slot.  A digest has two buckets, and is put into the one with more
 * room.  Nothing is ever taken out: an entry whose frame is gone is found to be
 * stale and overwritten.  If both buckets are full of live ones, one of these
 * is lost, and with it that an equal block is found, nothing else.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/host-utils.h"
#include <xxhash.h>
#include <xxh_x86dispatch.h>
#include "index.h"

/* Three quarters of the entries are used when the store is full. */
uint32_t dedup_hash_buckets(uint32_t nframes)
{
    return DIV_ROUND_UP((uint64_t)nframes * 4, 3 * DEDUP_BUCKET);
}

DedupDigest dedup_digest(DedupIndex *index, const void *block)
{
    XXH128_hash_t h = XXH3_128bits_withSeed_dispatch(block, DEDUP_BLOCK_SIZE,
                                                     index->seed);

    return (DedupDigest) { .low = h.low64, .high = h.high64 };
}

static uint32_t *bucket_of(DedupIndex *index, const DedupDigest *d, int which)
{
    uint32_t bits = which ? d->low >> 32 : d->low;

    return index->hash + ((uint64_t)bits * index->nbuckets >> 32) *
                         DEDUP_BUCKET;
}

static uint32_t make_entry(uint64_t high, uint32_t slot)
{
    return (uint32_t)(high >> 60) << DEDUP_SLOT_BITS | (slot + 1);
}

/* The sealed frame that @entry is for, if it may have the digest @high. */
static bool entry_get(DedupIndex *index, uint32_t entry, uint64_t high,
                      DedupFrameId *id)
{
    uint32_t slot = (entry & MAKE_64BIT_MASK(0, DEDUP_SLOT_BITS)) - 1;

    if (slot >= index->nframes || make_entry(high, slot) != entry ||
        qatomic_read(&index->digests[slot]) != high) {
        return false;
    }
    return dedup_index_id(index, slot, id);
}

bool dedup_hash_find(DedupIndex *index, const DedupDigest *d, DedupFrameId *id)
{
    int which, i;

    for (which = 0; which < 2; which++) {
        uint32_t *b = bucket_of(index, d, which);

        for (i = 0; i < DEDUP_BUCKET; i++) {
            if (entry_get(index, qatomic_read(&b[i]), d->high, id)) {
                return true;
            }
        }
    }
    return false;
}

/* Is there a frame that is found by @entry, as far as can be told from it? */
static bool is_live(DedupIndex *index, uint32_t entry)
{
    uint32_t slot = (entry & MAKE_64BIT_MASK(0, DEDUP_SLOT_BITS)) - 1;
    DedupFrameId id;

    return slot < index->nframes &&
           make_entry(qatomic_read(&index->digests[slot]), slot) == entry &&
           dedup_index_id(index, slot, &id);
}

/* The entries of a bucket that may be overwritten, as bits. */
static unsigned find_room(DedupIndex *index, uint32_t *b, uint32_t *seen)
{
    unsigned room = 0;
    int i;

    for (i = 0; i < DEDUP_BUCKET; i++) {
        seen[i] = qatomic_read(&b[i]);
        if (!is_live(index, seen[i])) {
            room |= 1u << i;
        }
    }
    return room;
}

void dedup_hash_insert(DedupIndex *index, const DedupDigest *d, uint32_t slot)
{
    uint32_t seen[2][DEDUP_BUCKET];
    unsigned room[2];
    int which, i;

    for (which = 0; which < 2; which++) {
        room[which] = find_room(index, bucket_of(index, d, which), seen[which]);
    }
    which = ctpop32(room[1]) > ctpop32(room[0]);
    i = room[which] ? ctz32(room[which]) : d->high % DEDUP_BUCKET;
    /* who was faster has put in something as good */
    qatomic_cmpxchg(&bucket_of(index, d, which)[i], seen[which][i],
                    make_entry(d->high, slot));
}
