/*
 * dedup-share index: the file and the frame table
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See index.h for the layout and what must hold.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitops.h"
#include "qemu/crc32c.h"
#include "qemu/host-utils.h"
#include "qemu/xxhash.h"
#include "files.h"
#include "index.h"
#include "trace.h"

/* A word of bits is for so many slots. */
QEMU_BUILD_BUG_ON(BITS_PER_LONG != 64);

#define REMEDY "; end the QEMUs of that group and remove the directory, " \
               "or choose another group or index-dir"

/* --- the file ----------------------------------------------------------- */

/* Where the arrays are.  Returns the size of the file. */
static size_t lay_out(DedupIndex *index, uint32_t nframes, bool words)
{
    size_t nbits = DIV_ROUND_UP(nframes, BITS_PER_LONG) * sizeof(long);
    void *at = (void *)index->hdr + DEDUP_HEADER_SIZE;

    index->nframes = nframes;
    index->nbuckets = dedup_hash_buckets(nframes);
    index->hash = at;           /* each bucket is within one cache line */
    at += (size_t)index->nbuckets * DEDUP_BUCKET * sizeof(uint32_t);
    index->tags = at;
    at += nframes * sizeof(uint64_t);
    index->digests = at;
    at += nframes * sizeof(uint64_t);
    index->words = words ? at : NULL;
    at += words ? nframes * sizeof(uint64_t) : 0;
    index->free = at;
    at += nbits;
    index->used = at;
    at += nbits;
    return ROUND_UP(at - (void *)index->hdr, DEDUP_HEADER_SIZE);
}

static size_t file_size(uint32_t nframes, bool words)
{
    DedupIndex nowhere = { 0 };

    return lay_out(&nowhere, nframes, words);
}

static uint32_t index_crc(const DedupIndexHeader *hdr)
{
    return crc32c(~0u, (const uint8_t *)hdr,
                  offsetof(DedupIndexHeader, crc));
}

static uint64_t make_tag(DedupIndex *index, uint32_t slot, uint32_t generation,
                         unsigned member, DedupFrameState state);

/* All slots are free. */
static void fill_in(DedupIndex *index)
{
    uint32_t slot;

    for (slot = 0; slot < index->nframes; slot++) {
        index->tags[slot] = make_tag(index, slot, 1, 0, DEDUP_FRAME_FREE);
        index->free[BIT_WORD(slot)] |= BIT_MASK(slot);
    }
    index->hdr->nfree = index->nframes;
}

/*
 * Map all of the index.  Closes @fd.  NULL with errno set.  @populate: make
 * sure of memory for all of it, as a page that the tmpfs has none for would be
 * a SIGBUS to touch.
 */
static void *map_index(int fd, size_t size, bool populate)
{
    void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int err = errno;

    close(fd);
    if (base == MAP_FAILED) {
        base = NULL;
    } else if (populate && !dedup_populate(base, size)) {
        err = errno;
        munmap(base, size);
        base = NULL;
    }
    errno = err;
    return base;
}

bool dedup_index_make(DedupIndex *index, int dirfd, const char *what,
                      uint32_t nframes, bool words, const DedupStoreId *store,
                      Error **errp)
{
    DedupIndexHeader hdr = {
        .magic = DEDUP_INDEX_MAGIC,
        .version = DEDUP_INDEX_VERSION,
        .nframes = nframes,
        .has_words = words,
        .store = *store,
        .size = file_size(nframes, words),
    };
    int fd;

    hdr.seed = dedup_random();
    hdr.crc = index_crc(&hdr);
    unlinkat(dirfd, "index.new", 0);
    fd = dedup_make_file(dirfd, "index.new", hdr.size, &hdr, sizeof(hdr));
    *index = (DedupIndex) { .size = hdr.size, .seed = hdr.seed };
    index->hdr = fd < 0 ? NULL : map_index(fd, hdr.size, true);
    if (index->hdr) {
        lay_out(index, nframes, words);
        fill_in(index);
        if (!renameat(dirfd, "index.new", dirfd, "index")) {
            return true;
        }
    }
    error_setg_errno(errp, errno, "index-dir: could not make the index of %"
                     PRIu64 " bytes in '%s'; choose a smaller store-size or "
                     "an index-dir on a larger tmpfs", hdr.size, what);
    if (index->hdr) {
        munmap(index->hdr, hdr.size);
    }
    unlinkat(dirfd, "index.new", 0);
    return false;
}

/* The first two versions had the number alone. */
static bool is_other_version(const DedupIndexHeader *hdr)
{
    uint32_t v = hdr->version;

    return hdr->magic == DEDUP_INDEX_MAGIC && v != DEDUP_INDEX_VERSION &&
           (v == 1 || v == 2 || ((v ^ v >> 16) & 0xffff) == 0xffff);
}

/* Is what was mapped an index of ours?  @size: what was mapped. */
static bool index_check(DedupIndexHeader *hdr, size_t size,
                        const char *what, bool *damaged, Error **errp)
{
    if (is_other_version(hdr)) {
        error_setg(errp, "index-dir: '%s' was made by another version of "
                   "dedup-share (format %" PRIu32 ", this QEMU has %d)"
                   REMEDY, what, hdr->version & 0xffff,
                   DEDUP_INDEX_VERSION & 0xffff);
        return false;
    }
    *damaged = hdr->magic != DEDUP_INDEX_MAGIC ||
               hdr->version != DEDUP_INDEX_VERSION ||
               hdr->crc != index_crc(hdr) ||
               hdr->size != size || hdr->nframes > DEDUP_MAX_FRAMES ||
               file_size(hdr->nframes, hdr->has_words) != size ||
               qatomic_read(&hdr->damaged);
    if (*damaged) {
        error_setg(errp, "index-dir: the index in '%s' is damaged", what);
        qatomic_set(&hdr->damaged, 1);      /* whoever uses it stops that */
    }
    return !*damaged;
}

bool dedup_index_attach(DedupIndex *index, int dirfd, const char *what,
                        uint32_t nframes, bool *damaged, Error **errp)
{
    size_t size = 0;
    int fd = dedup_open_file(dirfd, "index", &size);

    *damaged = false;
    *index = (DedupIndex) { 0 };
    index->hdr = fd < 0 ? NULL : map_index(fd, size, false);
    if (!index->hdr) {
        *damaged = errno == EINVAL || errno == ENOENT;
        error_setg_errno(errp, errno, "index-dir: could not open the index in "
                         "'%s'", what);
        return false;
    }
    if (!index_check(index->hdr, size, what, damaged, errp)) {
        munmap(index->hdr, size);
        return false;
    }
    if (nframes && nframes != index->hdr->nframes) {
        error_setg(errp, "store-size: the group in '%s' has a store of %"
                   PRIu64 " bytes; say the same, or leave store-size out",
                   what, (uint64_t)index->hdr->nframes * DEDUP_BLOCK_SIZE);
        munmap(index->hdr, size);
        return false;
    }
    index->size = size;
    index->seed = index->hdr->seed;
    lay_out(index, index->hdr->nframes, index->hdr->has_words);
    return true;
}

void dedup_index_unmap(DedupIndex *index)
{
    munmap(index->hdr, index->size);
    memset(index, 0, sizeof(*index));
}

void dedup_index_set_damaged(DedupIndex *index)
{
    if (!qatomic_xchg(&index->hdr->damaged, 1)) {
        trace_dedup_index_damaged(index->nframes);
    }
}

/* --- tags --------------------------------------------------------------- */

/* check << 34 | generation << 14 | member << 3 | state */
enum {
    MEMBER_SHIFT = 3,
    GENERATION_SHIFT = 14,
    CHECK_SHIFT = GENERATION_SHIFT + DEDUP_GENERATION_BITS,
};
QEMU_BUILD_BUG_ON(DEDUP_FRAME__MAX > 1 << MEMBER_SHIFT);
QEMU_BUILD_BUG_ON(DEDUP_MAX_MEMBERS >= 1 << (GENERATION_SHIFT - MEMBER_SHIFT));

static uint64_t checked(DedupIndex *index, uint32_t slot, uint64_t value)
{
    return value | (uint64_t)qemu_xxhash5(index->seed, value, slot) <<
                   CHECK_SHIFT;
}

static uint64_t make_tag(DedupIndex *index, uint32_t slot, uint32_t generation,
                         unsigned member, DedupFrameState state)
{
    return checked(index, slot, (uint64_t)generation << GENERATION_SHIFT |
                                (uint64_t)member << MEMBER_SHIFT | state);
}

static uint32_t tag_generation(uint64_t tag)
{
    return tag >> GENERATION_SHIFT & DEDUP_GENERATION_MAX;
}

static unsigned tag_member(uint64_t tag)
{
    return tag >> MEMBER_SHIFT & MAKE_64BIT_MASK(0, GENERATION_SHIFT -
                                                    MEMBER_SHIFT);
}

/* DEDUP_FRAME_DAMAGED, and all are told, if we did not write @tag. */
static DedupFrameState tag_state(DedupIndex *index, uint32_t slot,
                                 uint64_t tag)
{
    if (checked(index, slot, tag & MAKE_64BIT_MASK(0, CHECK_SHIFT)) != tag) {
        dedup_index_set_damaged(index);
        return DEDUP_FRAME_DAMAGED;
    }
    return tag & MAKE_64BIT_MASK(0, MEMBER_SHIFT);
}

DedupFrameState dedup_index_state(DedupIndex *index, uint32_t slot,
                                  unsigned *member)
{
    uint64_t tag = qatomic_read(&index->tags[slot]);

    *member = tag_member(tag);
    return tag_state(index, slot, tag);
}

/* Change the state of a slot that is not ours yet. */
static bool take(DedupIndex *index, uint32_t slot, DedupFrameState from,
                 DedupFrameState to)
{
    uint64_t tag = qatomic_read(&index->tags[slot]);

    /* a full barrier: who held the slot before has been heard of after it */
    return tag_state(index, slot, tag) == from &&
           qatomic_cmpxchg(&index->tags[slot], tag,
                           make_tag(index, slot, tag_generation(tag),
                                    index->member, to)) == tag;
}

/* Change that of a slot that is ours, if it is in one of the states @from. */
static bool step(DedupIndex *index, uint32_t slot, unsigned from,
                 uint32_t more, unsigned member, DedupFrameState to)
{
    uint64_t tag = qatomic_read(&index->tags[slot]);
    DedupFrameState state = tag_state(index, slot, tag);

    if (!(from & 1u << state)) {
        dedup_index_set_damaged(index);
        return false;
    }
    qatomic_store_release(&index->tags[slot],
                          make_tag(index, slot, tag_generation(tag) + more,
                                   member, to));
    return true;
}

/* --- frames ------------------------------------------------------------- */

/* Take up to @n of the free slots that one word of bits shows. */
static unsigned alloc_word(DedupIndex *index, unsigned long *word,
                           uint32_t first, uint32_t *slots, unsigned n)
{
    unsigned long bits = qatomic_read(word), want = 0;
    unsigned got = 0;

    for (; bits && n; n--, bits &= bits - 1) {
        want |= bits & -bits;
    }
    if (!want) {
        return 0;
    }
    for (want &= qatomic_fetch_and(word, ~want); want; want &= want - 1) {
        uint32_t slot = first + ctz64(want);

        if (slot < index->nframes &&
            take(index, slot, DEDUP_FRAME_FREE, DEDUP_FRAME_FILLING)) {
            slots[got++] = slot;
        }
    }
    return got;
}

unsigned dedup_index_alloc(DedupIndex *index, uint32_t *slots, unsigned n)
{
    uint32_t nwords = DIV_ROUND_UP(index->nframes, BITS_PER_LONG);
    uint32_t at = qatomic_read(&index->hdr->alloc_hand) % nwords, i;
    unsigned got = 0;

    if (!qatomic_read(&index->hdr->nfree)) {
        return 0;
    }
    for (i = 0; i < nwords && got < n; i++, at = (at + 1) % nwords) {
        got += alloc_word(index, &index->free[at], at * BITS_PER_LONG,
                          slots + got, n - got);
        if (got == n) {
            break;              /* there may be more in this word */
        }
    }
    qatomic_set(&index->hdr->alloc_hand, at);
    qatomic_sub(&index->hdr->nfree, got);
    return got;
}

DedupFrameId dedup_index_name(DedupIndex *index, uint32_t slot)
{
    return (DedupFrameId) {
        .slot = slot,
        .generation = tag_generation(qatomic_read(&index->tags[slot])),
    };
}

DedupFrameId dedup_index_seal(DedupIndex *index, uint32_t slot, uint64_t word,
                              const DedupDigest *digest)
{
    DedupFrameId id = dedup_index_name(index, slot);

    qatomic_set(&index->digests[slot], digest->high);
    if (index->words) {
        qatomic_set(&index->words[slot], word);
    }
    if (step(index, slot, 1 << DEDUP_FRAME_FILLING, 0, 0, DEDUP_FRAME_SEALED)) {
        qatomic_inc(&index->hdr->nsealed);
        dedup_index_touch(index, slot);
        dedup_hash_insert(index, digest, slot);
    }
    return id;
}

bool dedup_index_get(DedupIndex *index, DedupFrameId id, uint64_t *word)
{
    uint64_t want, tag;

    if (!id.generation || id.slot >= index->nframes) {
        return false;
    }
    want = make_tag(index, id.slot, id.generation, 0, DEDUP_FRAME_SEALED);
    tag = qatomic_load_acquire(&index->tags[id.slot]);
    if (tag != want) {
        tag_state(index, id.slot, tag);     /* is it ours at all? */
        return false;
    }
    *word = 0;
    if (index->words) {
        *word = qatomic_read(&index->words[id.slot]);
        smp_rmb();      /* the tag is read again after what it vouches for */
        return qatomic_read(&index->tags[id.slot]) == want;
    }
    return true;
}

bool dedup_index_id(DedupIndex *index, uint32_t slot, DedupFrameId *id)
{
    uint64_t tag = qatomic_load_acquire(&index->tags[slot]);

    *id = (DedupFrameId) { .slot = slot, .generation = tag_generation(tag) };
    return tag_state(index, slot, tag) == DEDUP_FRAME_SEALED;
}

static bool test_and_set(unsigned long *bits, uint32_t slot)
{
    unsigned long *word = &bits[BIT_WORD(slot)];

    return qatomic_read(word) & BIT_MASK(slot) ||
           qatomic_fetch_or(word, BIT_MASK(slot)) & BIT_MASK(slot);
}

void dedup_index_touch(DedupIndex *index, uint32_t slot)
{
    test_and_set(index->used, slot);
}

uint64_t dedup_index_used(DedupIndex *index, uint32_t first)
{
    return qatomic_read(&index->used[BIT_WORD(first)]);
}

void dedup_index_clear_used(DedupIndex *index, uint32_t first, uint64_t bits)
{
    unsigned long *word = &index->used[BIT_WORD(first)];

    if (qatomic_read(word) & bits) {
        qatomic_and(word, ~bits);
    }
}

/*
 * Mark a slot as free.  Who is killed in between leaves a count that is too
 * high, never too low: then free slots would not be looked for.  If somebody
 * has just begun to take the slot, no harm is done either.
 */
static void mark_free(DedupIndex *index, uint32_t slot)
{
    qatomic_inc(&index->hdr->nfree);
    if (test_and_set(index->free, slot)) {
        qatomic_dec(&index->hdr->nfree);
    }
}

static bool is_last(DedupIndex *index, uint32_t slot)
{
    return tag_generation(qatomic_read(&index->tags[slot])) ==
           DEDUP_GENERATION_MAX;
}

static const unsigned may_release = 1 << DEDUP_FRAME_FILLING |
                                    1 << DEDUP_FRAME_DROPPING;

static void retire(DedupIndex *index, uint32_t slot)
{
    step(index, slot, may_release, 0, 0, DEDUP_FRAME_RETIRED);
}

void dedup_index_release(DedupIndex *index, uint32_t slot)
{
    if (is_last(index, slot)) {
        retire(index, slot);
    } else if (step(index, slot, may_release, 1, 0, DEDUP_FRAME_FREE)) {
        mark_free(index, slot);
    }
}

bool dedup_index_reuse(DedupIndex *index, uint32_t slot)
{
    if (is_last(index, slot)) {
        retire(index, slot);
        return false;
    }
    return step(index, slot, 1 << DEDUP_FRAME_DROPPING, 1, index->member,
                DEDUP_FRAME_FILLING);
}

bool dedup_index_evict_begin(DedupIndex *index, uint32_t slot)
{
    return take(index, slot, DEDUP_FRAME_SEALED, DEDUP_FRAME_EVICTING);
}

void dedup_index_evict_cancel(DedupIndex *index, uint32_t slot)
{
    step(index, slot, 1 << DEDUP_FRAME_EVICTING, 0, 0, DEDUP_FRAME_SEALED);
}

void dedup_index_evict_commit(DedupIndex *index, uint32_t slot)
{
    if (step(index, slot, 1 << DEDUP_FRAME_EVICTING, 0, index->member,
             DEDUP_FRAME_DROPPING)) {
        qatomic_dec(&index->hdr->nsealed);
    }
}

/* --- what the dead have left -------------------------------------------- */

static bool recover_one(DedupIndex *index, uint32_t slot, DedupSlotFn *idle,
                        DedupSlotFn *drop, void *opaque)
{
    unsigned member;
    DedupFrameState state = dedup_index_state(index, slot, &member);

    if (state == DEDUP_FRAME_EVICTING) {
        if (!idle(opaque, slot)) {
            dedup_index_evict_cancel(index, slot);
            return true;
        }
        dedup_index_evict_commit(index, slot);
    }
    if (drop(opaque, slot)) {
        dedup_index_release(index, slot);
    }
    return true;
}

static bool is_marked(DedupIndex *index, uint32_t slot)
{
    return qatomic_read(&index->free[BIT_WORD(slot)]) & BIT_MASK(slot);
}

unsigned dedup_index_recover(DedupIndex *index, unsigned member,
                             DedupSlotFn *idle, DedupSlotFn *drop,
                             void *opaque)
{
    unsigned recovered = 0, who;
    uint32_t slot;

    for (slot = 0; slot < index->nframes; slot++) {
        DedupFrameState state = dedup_index_state(index, slot, &who);

        if (state == DEDUP_FRAME_FREE && !is_marked(index, slot)) {
            mark_free(index, slot);
        } else if (who == member && state != DEDUP_FRAME_DAMAGED &&
                   state != DEDUP_FRAME_SEALED) {
            recovered += recover_one(index, slot, idle, drop, opaque);
        }
    }
    trace_dedup_index_recover(member, recovered);
    return recovered;
}
