/*
 * dedup-share index: frame table and block maps
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See index.h for the layout and what must hold.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/crc32c.h"
#include "qemu/cutils.h"
#include "index.h"

enum {
    FRAME_FREE,
    FRAME_FILLING,
    FRAME_SEALED,
    FRAME_RETIRED,
    FRAME_EVICTING,
};

#define REMEDY "; end the QEMUs of that group and remove the directory, " \
               "or choose another group or index-dir"

static uint64_t frame_tag(uint32_t generation, uint32_t state)
{
    return (uint64_t)generation << 32 | state;
}

static uint32_t tag_generation(uint64_t tag)
{
    return tag >> 32;
}

/* A new file of @size zeroes with @header in front; < 0 with errno set. */
static int make_file(int dirfd, const char *name, size_t size,
                     const void *header, size_t header_size)
{
    int fd = openat(dirfd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    int err;

    if (fd < 0) {
        return -1;
    }
    errno = ENOSPC;             /* if less is written than was to be */
    if (ftruncate(fd, size) < 0 ||
        pwrite(fd, header, header_size, 0) != header_size) {
        err = errno;
        unlinkat(dirfd, name, 0);
        close(fd);
        errno = err;
        return -1;
    }
    return fd;
}

/* Open a file that is there already and has exactly *size bytes, if not 0. */
static int open_file(int dirfd, const char *name, size_t *size)
{
    int fd = openat(dirfd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    struct stat st;

    if (fd < 0) {
        return -1;
    }
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) ||
        st.st_size < DEDUP_HEADER_SIZE || (*size && *size != st.st_size)) {
        close(fd);
        errno = EINVAL;
        return -1;
    }
    *size = st.st_size;
    return fd;
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
    } else if (populate && madvise(base, size, MADV_POPULATE_WRITE) < 0) {
        err = errno == EFAULT ? ENOSPC : errno;
        munmap(base, size);
        base = NULL;
    }
    errno = err;
    return base;
}

static uint32_t index_crc(const DedupIndexHeader *hdr)
{
    return crc32c(~0u, (const uint8_t *)hdr,
                  offsetof(DedupIndexHeader, crc));
}

static bool index_make(DedupIndex *index, int dirfd, const char *what,
                       uint32_t nframes, const DedupStoreId *store,
                       Error **errp)
{
    DedupIndexHeader hdr = {
        .magic = DEDUP_INDEX_MAGIC,
        .version = DEDUP_INDEX_VERSION,
        .nframes = nframes,
        .frames_offset = DEDUP_HEADER_SIZE,
        .store = *store,
    };
    int fd;

    hdr.size = ROUND_UP(DEDUP_HEADER_SIZE + nframes * sizeof(DedupFrame),
                        DEDUP_HEADER_SIZE);
    hdr.crc = index_crc(&hdr);
    fd = make_file(dirfd, "index.new", hdr.size, &hdr, sizeof(hdr));
    index->hdr = fd < 0 ? NULL : map_index(fd, hdr.size, true);
    if (index->hdr && !renameat(dirfd, "index.new", dirfd, "index")) {
        return true;
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

/* Is what was mapped an index of ours?  @size: what was mapped. */
static bool index_check(const DedupIndexHeader *hdr, size_t size,
                        const char *what, Error **errp)
{
    if (hdr->magic != DEDUP_INDEX_MAGIC) {
        error_setg(errp, "index-dir: '%s' holds an 'index' that is not "
                   "dedup-share's" REMEDY, what);
    } else if (hdr->version != DEDUP_INDEX_VERSION) {
        error_setg(errp, "index-dir: '%s' was made by another version of "
                   "dedup-share (format %" PRIu32 ", this QEMU has %d)"
                   REMEDY, what, hdr->version, DEDUP_INDEX_VERSION);
    } else if (hdr->crc != index_crc(hdr) || hdr->size != size ||
               hdr->frames_offset != DEDUP_HEADER_SIZE ||
               (size - DEDUP_HEADER_SIZE) / sizeof(DedupFrame) <
               hdr->nframes) {
        error_setg(errp, "index-dir: '%s' holds a damaged or truncated index"
                   REMEDY, what);
    } else {
        return true;
    }
    return false;
}

static bool index_attach(DedupIndex *index, int dirfd, const char *what,
                         uint32_t nframes, Error **errp)
{
    size_t size = 0;
    int fd = open_file(dirfd, "index", &size);

    index->hdr = fd < 0 ? NULL : map_index(fd, size, false);
    if (!index->hdr) {
        if (errno == EINVAL) {
            error_setg(errp, "index-dir: '%s' holds a damaged or truncated "
                       "index" REMEDY, what);
        } else {
            error_setg_errno(errp, errno, "Could not open the index in '%s'",
                             what);
        }
        return false;
    }
    if (!index_check(index->hdr, size, what, errp)) {
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
    return true;
}

bool dedup_index_map(DedupIndex *index, int dirfd, const char *what,
                     bool create, uint32_t nframes, const DedupStoreId *store,
                     Error **errp)
{
    bool ok = create ? index_make(index, dirfd, what, nframes, store, errp)
                     : index_attach(index, dirfd, what, nframes, errp);

    if (ok) {
        index->frames = (void *)index->hdr + DEDUP_HEADER_SIZE;
        /* kept here: nobody can make us read beyond the mapping later */
        index->nframes = index->hdr->nframes;
    }
    return ok;
}

void dedup_index_unmap(DedupIndex *index)
{
    munmap(index->hdr,
           ROUND_UP(DEDUP_HEADER_SIZE + index->nframes * sizeof(DedupFrame),
                    DEDUP_HEADER_SIZE));
    memset(index, 0, sizeof(*index));
}

/*
 * Pop a slot off the free list, whose head carries a count of pops so that a
 * slot that was taken and returned meanwhile is noticed.
 */
static bool free_list_pop(DedupIndex *index, uint32_t *slot)
{
    uint64_t head = qatomic_read(&index->hdr->free_list);

    for (;;) {
        uint32_t first = head;
        uint64_t next, seen;

        if (!first || first > index->nframes) {
            return false;
        }
        next = (uint32_t)qatomic_read(&index->frames[first - 1].word);
        next |= ((head >> 32) + 1) << 32;
        seen = qatomic_cmpxchg(&index->hdr->free_list, head, next);
        if (seen == head) {
            *slot = first - 1;
            return true;
        }
        head = seen;
    }
}

static void free_list_push(DedupIndex *index, uint32_t slot)
{
    uint64_t head = qatomic_read(&index->hdr->free_list);

    for (;;) {
        uint64_t seen;

        qatomic_set(&index->frames[slot].word, (uint32_t)head);
        seen = qatomic_cmpxchg(&index->hdr->free_list, head,
                               (head & ~(uint64_t)UINT32_MAX) | (slot + 1));
        if (seen == head) {
            return;
        }
        head = seen;
    }
}

/* Take up to @n slots that were never used; they follow each other. */
static unsigned fresh_slots(DedupIndex *index, uint32_t *slots, unsigned n)
{
    uint32_t next = qatomic_read(&index->hdr->next_slot);

    while (next < index->nframes) {
        unsigned i, take = MIN(n, index->nframes - next);
        uint32_t seen = qatomic_cmpxchg(&index->hdr->next_slot, next,
                                        next + take);
        if (seen == next) {
            for (i = 0; i < take; i++) {
                slots[i] = next + i;
            }
            return take;
        }
        next = seen;
    }
    return 0;
}

unsigned dedup_index_alloc(DedupIndex *index, uint32_t *slots, unsigned n)
{
    unsigned i, got = fresh_slots(index, slots, n);

    while (got < n && free_list_pop(index, &slots[got])) {
        got++;
    }
    for (i = 0; i < got; i++) {
        DedupFrame *f = &index->frames[slots[i]];
        uint32_t generation = tag_generation(qatomic_read(&f->tag));

        qatomic_set(&f->tag, frame_tag(MAX(generation, 1), FRAME_FILLING));
    }
    return got;
}

DedupFrameId dedup_index_seal(DedupIndex *index, uint32_t slot, uint64_t word)
{
    DedupFrame *f = &index->frames[slot];
    uint32_t generation = tag_generation(qatomic_read(&f->tag));

    qatomic_set(&f->word, word);
    qatomic_store_release(&f->tag, frame_tag(generation, FRAME_SEALED));
    qatomic_inc(&index->hdr->nsealed);
    return (DedupFrameId) { .slot = slot, .generation = generation };
}

bool dedup_index_get(DedupIndex *index, DedupFrameId id, uint64_t *word)
{
    DedupFrame *f;
    uint64_t want = frame_tag(id.generation, FRAME_SEALED);

    if (!id.generation || id.slot >= index->nframes) {
        return false;
    }
    f = &index->frames[id.slot];
    if (qatomic_load_acquire(&f->tag) != want) {
        return false;
    }
    *word = qatomic_read(&f->word);
    smp_rmb();          /* the tag is read again after what it vouches for */
    return qatomic_read(&f->tag) == want;
}

void dedup_index_release(DedupIndex *index, uint32_t slot)
{
    DedupFrame *f = &index->frames[slot];
    uint64_t tag = qatomic_read(&f->tag);
    uint32_t generation = tag_generation(tag);

    if ((uint32_t)tag == FRAME_SEALED || (uint32_t)tag == FRAME_EVICTING) {
        qatomic_dec(&index->hdr->nsealed);
    }
    if (generation == UINT32_MAX) {
        qatomic_set(&f->tag, frame_tag(generation, FRAME_RETIRED));
        return;
    }
    qatomic_set(&f->tag, frame_tag(generation + 1, FRAME_FREE));
    smp_wmb();          /* the tag is gone before the word changes its sense */
    free_list_push(index, slot);
}

bool dedup_index_evict_begin(DedupIndex *index, uint32_t slot)
{
    DedupFrame *f = &index->frames[slot];
    uint64_t tag = qatomic_read(&f->tag);

    /* a full barrier: who held the slot before has been heard of after it */
    return (uint32_t)tag == FRAME_SEALED &&
           qatomic_cmpxchg(&f->tag, tag,
                           frame_tag(tag_generation(tag), FRAME_EVICTING))
           == tag;
}

void dedup_index_evict_cancel(DedupIndex *index, uint32_t slot)
{
    DedupFrame *f = &index->frames[slot];

    qatomic_set(&f->tag, frame_tag(tag_generation(qatomic_read(&f->tag)),
                                   FRAME_SEALED));
}

/* The word of a map that stands for @id. */
static uint64_t entry_of(DedupFrameId id)
{
    return (uint64_t)id.generation << 32 | id.slot;
}

static uint32_t map_crc(const DedupMapHeader *hdr)
{
    uint32_t crc = crc32c(~0u, (const uint8_t *)&hdr->nblocks,
                          sizeof(hdr->nblocks));

    return crc32c(crc, (const uint8_t *)hdr->key, sizeof(hdr->key));
}

static bool map_check(const DedupMapHeader *hdr, const char *key,
                      uint64_t nblocks)
{
    return hdr->magic == DEDUP_MAP_MAGIC &&
           hdr->version == DEDUP_INDEX_VERSION &&
           hdr->nblocks == nblocks && hdr->crc == map_crc(hdr) &&
           !strncmp(hdr->key, key, sizeof(hdr->key));
}

/* A map under a name of its own, renamed unless somebody was faster. */
static int map_make(int dirfd, const char *name, size_t size,
                    const DedupMapHeader *hdr)
{
    g_autofree char *tmp = g_strdup_printf("map-new-%d-%s", getpid(),
                                           hdr->key);
    int fd, err;

    unlinkat(dirfd, tmp, 0);    /* of a killed process that had our pid */
    fd = make_file(dirfd, tmp, size, hdr, sizeof(*hdr));
    if (fd < 0) {
        return -1;
    }
    if (linkat(dirfd, tmp, dirfd, name, 0) < 0) {
        err = errno;
        close(fd);
        fd = -1;
        unlinkat(dirfd, tmp, 0);
        errno = err;
        return -1;
    }
    unlinkat(dirfd, tmp, 0);
    return fd;
}

/* Open or make the file of a map. */
static int map_file(int dirfd, const char *name, size_t size,
                    const DedupMapHeader *hdr)
{
    int fd = open_file(dirfd, name, &size);

    if (fd < 0 && errno == ENOENT) {
        fd = map_make(dirfd, name, size, hdr);
        if (fd < 0 && errno == EEXIST) {
            fd = open_file(dirfd, name, &size);
        }
    }
    return fd;
}

DedupMap *dedup_map_open(int dirfd, const char *key, uint64_t nblocks,
                         Error **errp)
{
    g_autofree char *name = g_strdup_printf("map-%s", key);
    g_autofree DedupMap *map = g_new0(DedupMap, 1);
    DedupMapHeader hdr = {
        .magic = DEDUP_MAP_MAGIC,
        .version = DEDUP_INDEX_VERSION,
        .nblocks = nblocks,
    };
    size_t size = ROUND_UP(DEDUP_HEADER_SIZE + nblocks * sizeof(uint64_t),
                           DEDUP_HEADER_SIZE);
    int fd;

    pstrcpy(hdr.key, sizeof(hdr.key), key);
    hdr.crc = map_crc(&hdr);
    fd = map_file(dirfd, name, size, &hdr);
    if (fd < 0 || !dedup_sparse_open(&map->file, fd, size)) {
        error_setg_errno(errp, errno, "Could not open block map '%s'", name);
        return NULL;
    }
    if (!dedup_sparse_back(&map->file, 0)) {
        error_setg_errno(errp, errno, "No memory in the tmpfs for block map "
                         "'%s'", name);
    } else if (!map_check(map->file.base, key, nblocks)) {
        error_setg(errp, "Block map '%s' is damaged", name);
    } else {
        map->nblocks = nblocks;
        map->entries = map->file.base + DEDUP_HEADER_SIZE;
        return g_steal_pointer(&map);
    }
    dedup_sparse_close(&map->file);
    return NULL;
}

void dedup_map_close(DedupMap *map)
{
    dedup_sparse_close(&map->file);
    g_free(map);
}

bool dedup_map_back(DedupMap *map, uint64_t block)
{
    return block >= map->nblocks ||
           dedup_sparse_back(&map->file, DEDUP_HEADER_SIZE +
                                         block * sizeof(uint64_t));
}

DedupFrameId dedup_map_lookup(DedupMap *map, uint64_t block)
{
    uint64_t entry;

    if (block >= map->nblocks) {
        return (DedupFrameId) { 0 };
    }
    entry = qatomic_load_acquire(&map->entries[block]);
    return (DedupFrameId) { .slot = entry, .generation = entry >> 32 };
}

bool dedup_map_record(DedupMap *map, uint64_t block, DedupFrameId old,
                      DedupFrameId id)
{
    uint64_t was = entry_of(old);

    return block < map->nblocks &&
           qatomic_cmpxchg(&map->entries[block], was, entry_of(id)) == was;
}
