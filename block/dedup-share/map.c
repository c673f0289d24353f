/*
 * dedup-share block maps: which frame holds a block of a layer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See map.h for what must hold.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/bitops.h"
#include "qemu/crc32c.h"
#include "qemu/cutils.h"
#include "qemu/xxhash.h"
#include "files.h"
#include "map.h"

enum { LOCK_USED, LOCK_WRITER };

/* check << 48 | generation << 28 | slot */
enum {
    GENERATION_SHIFT = DEDUP_SLOT_BITS,
    CHECK_SHIFT = DEDUP_SLOT_BITS + DEDUP_GENERATION_BITS,
};

static uint64_t checked(DedupMap *map, uint64_t block, uint64_t value)
{
    return value | (uint64_t)qemu_xxhash6(map->seed, value, block, block >> 32)
                   << CHECK_SHIFT;
}

/* The word of a map that stands for @id. */
static uint64_t entry_of(DedupMap *map, uint64_t block, DedupFrameId id)
{
    return id.generation
           ? checked(map, block, (uint64_t)id.generation << GENERATION_SHIFT |
                                 id.slot)
           : 0;
}

static uint32_t map_crc(const DedupMapHeader *hdr)
{
    const size_t from = offsetof(DedupMapHeader, nblocks);

    return crc32c(~0u, (const uint8_t *)hdr + from,
                  offsetof(DedupMapHeader, all_dirty) - from);
}

bool dedup_map_header_ok(const DedupMapHeader *hdr)
{
    return hdr->magic == DEDUP_MAP_MAGIC &&
           hdr->version == DEDUP_INDEX_VERSION && hdr->crc == map_crc(hdr) &&
           memchr(hdr->key, 0, sizeof(hdr->key)) &&
           memchr(hdr->path, 0, sizeof(hdr->path));
}

static bool map_check(const DedupMapHeader *hdr, const char *key,
                      uint64_t nblocks)
{
    return dedup_map_header_ok(hdr) && hdr->nblocks == nblocks &&
           !strncmp(hdr->key, key, sizeof(hdr->key));
}

/* Bytes of the dirty bits. */
static size_t dirty_size(uint64_t nblocks)
{
    return ROUND_UP(DIV_ROUND_UP(nblocks, 8), DEDUP_HEADER_SIZE);
}

/* A map under a name of its own, renamed unless somebody was faster. */
static int map_make(int dirfd, const char *name, size_t size,
                    const DedupMapHeader *hdr)
{
    g_autofree char *tmp = g_strdup_printf("map-new-%d-%s", getpid(),
                                           hdr->key);
    int fd, err;

    unlinkat(dirfd, tmp, 0);    /* of a killed process that had our pid */
    fd = dedup_make_file(dirfd, tmp, size, hdr, sizeof(*hdr));
    if (fd < 0) {
        return -1;
    }
    if (linkat(dirfd, tmp, dirfd, name, 0) < 0) {
        err = errno;
        close(fd);
        fd = -1;
        unlinkat(dirfd, tmp, 0);
        errno = err;
    } else {
        unlinkat(dirfd, tmp, 0);
    }
    return fd;
}

/*
 * Open or make the file of a map; one that is not as it should be is replaced.
 */
static int map_file(int dirfd, const char *name, size_t size,
                    const DedupMapHeader *hdr)
{
    int tries, fd = -1;

    for (tries = 0; fd < 0 && tries < 3; tries++) {
        fd = dedup_open_file(dirfd, name, &size);
        if (fd < 0 && errno == EINVAL) {
            unlinkat(dirfd, name, 0);
            errno = ENOENT;
        }
        if (fd < 0 && errno == ENOENT) {
            fd = map_make(dirfd, name, size, hdr);
        }
        if (fd < 0 && errno != EEXIST && errno != ENOENT) {
            break;
        }
    }
    return fd;
}

/* Map the file, and look at its header; 0 or -errno. */
static int map_load(DedupMap *map, int dirfd, const char *name,
                    const DedupMapHeader *hdr)
{
    size_t size = ROUND_UP(DEDUP_HEADER_SIZE + dirty_size(hdr->nblocks) +
                           hdr->nblocks * sizeof(uint64_t), DEDUP_HEADER_SIZE);
    int fd = map_file(dirfd, name, size, hdr);

    map->lock_fd = fd < 0 ? -1 : qemu_dup(fd);
    if (fd < 0 || !dedup_sparse_open(&map->file, fd, size)) {
        return -errno;
    }
    if (!dedup_sparse_back(&map->file, 0)) {
        dedup_sparse_close(&map->file);
        return -ENOSPC;
    }
    if (!map_check(map->file.base, hdr->key, hdr->nblocks)) {
        dedup_sparse_close(&map->file);
        return -EINVAL;
    }
    return 0;
}

static void map_unload(DedupMap *map)
{
    if (map->file.base) {
        dedup_sparse_close(&map->file);
    }
    if (map->lock_fd >= 0) {
        close(map->lock_fd);
    }
}

/* Load it, in place of one that is damaged if need be; 0 or -errno. */
static int map_load_or_make(DedupMap *map, int dirfd, const char *name,
                            const DedupMapHeader *hdr, bool writer)
{
    int ret = map_load(map, dirfd, name, hdr);

    if (ret == -EINVAL) {
        map_unload(map);
        unlinkat(dirfd, name, 0);
        ret = map_load(map, dirfd, name, hdr);
    }
    if (ret == 0) {
        ret = qemu_lock_fd(map->lock_fd, LOCK_USED, 1, false);
    }
    if (ret == 0 && writer) {
        ret = qemu_lock_fd(map->lock_fd, LOCK_WRITER, 1, true);
    }
    if (ret < 0) {
        map_unload(map);
    }
    return ret;
}

DedupMap *dedup_map_open(DedupIndex *index, int dirfd,
                         const DedupMapLayer *layer, Error **errp)
{
    g_autofree char *name = g_strdup_printf("map-%s", layer->key);
    g_autofree DedupMapHeader *hdr = g_new0(DedupMapHeader, 1);
    DedupMap *map = g_new0(DedupMap, 1);
    int ret;

    hdr->magic = DEDUP_MAP_MAGIC;
    hdr->version = DEDUP_INDEX_VERSION;
    hdr->nblocks = layer->nblocks;
    hdr->dev = layer->dev;
    hdr->ino = layer->ino;
    hdr->made = g_get_real_time();
    pstrcpy(hdr->key, sizeof(hdr->key), layer->key);
    if (layer->path && strlen(layer->path) < sizeof(hdr->path)) {
        pstrcpy(hdr->path, sizeof(hdr->path), layer->path);
    }
    hdr->crc = map_crc(hdr);
    ret = map_load_or_make(map, dirfd, name, hdr, layer->writer);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not open block map '%s'", name);
        g_free(map);
        return NULL;
    }
    futimens(map->lock_fd, NULL);               /* for dedup_map_sweep() */
    map->nblocks = layer->nblocks;
    map->dirty = map->file.base + DEDUP_HEADER_SIZE;
    map->entries = (void *)map->dirty + dirty_size(layer->nblocks);
    map->index = index;
    map->key = g_strdup(layer->key);
    map->seed = index->seed ^
                ((uint64_t)crc32c(0, (uint8_t *)hdr->key, sizeof(hdr->key))
                 << 32 |
                 crc32c(~0u, (uint8_t *)hdr->key, sizeof(hdr->key)));
    return map;
}

bool dedup_map_is_of(const DedupMap *map, const char *key)
{
    /* our own copy of the key: others can change the file's */
    return map->key && !strcmp(map->key, key);
}

DedupMap *dedup_map_new(DedupIndex *index, uint64_t nblocks)
{
    DedupMap *map = g_new0(DedupMap, 1);

    if (!dedup_sparse_new(&map->file, MAX(nblocks, 1) * sizeof(uint64_t))) {
        g_free(map);
        return NULL;
    }
    map->lock_fd = -1;
    map->nblocks = nblocks;
    map->entries = map->file.base;
    map->index = index;
    map->seed = dedup_random();
    return map;
}

void dedup_map_close(DedupMap *map)
{
    map_unload(map);
    g_free(map->key);
    g_free(map);
}

/* Where the entry of a block is in the file. */
static size_t place(DedupMap *map, uint64_t block)
{
    return (void *)(map->entries + block) - map->file.base;
}

static bool back_range(DedupMap *map, void *from, void *to)
{
    return dedup_sparse_back(&map->file, from - map->file.base) &&
           dedup_sparse_back(&map->file, to - map->file.base);
}

bool dedup_map_back(DedupMap *map, uint64_t block)
{
    return block >= map->nblocks ||
           dedup_sparse_back(&map->file, place(map, block));
}

DedupFrameId dedup_map_lookup(DedupMap *map, uint64_t block)
{
    uint64_t entry = block < map->nblocks
                     ? qatomic_load_acquire(&map->entries[block]) : 0;

    if (!entry) {
        return (DedupFrameId) { 0 };
    }
    if (checked(map, block, entry & MAKE_64BIT_MASK(0, CHECK_SHIFT)) != entry) {
        dedup_index_set_damaged(map->index);
        return (DedupFrameId) { 0 };
    }
    return (DedupFrameId) {
        .slot = entry & MAKE_64BIT_MASK(0, DEDUP_SLOT_BITS),
        .generation = entry >> GENERATION_SHIFT & DEDUP_GENERATION_MAX,
    };
}

bool dedup_map_record(DedupMap *map, uint64_t block, DedupFrameId old,
                      DedupFrameId id)
{
    uint64_t was = entry_of(map, block, old);

    return block < map->nblocks &&
           qatomic_cmpxchg(&map->entries[block], was,
                           entry_of(map, block, id)) == was;
}

/* Blocks whose bits are in a chunk of the file. */
#define BITS_OF_CHUNK (DEDUP_SPARSE_CHUNK * BITS_PER_BYTE)

void dedup_map_set_dirty(DedupMap *map, uint64_t first, uint64_t n)
{
    DedupMapHeader *hdr = map->file.base;
    uint64_t end = MIN(n, map->nblocks - MIN(first, map->nblocks)) + first;
    uint64_t block, next;

    for (block = first; block < end; block = next) {
        next = MIN(end, ROUND_DOWN(block, BITS_OF_CHUNK) + BITS_OF_CHUNK);
        if (!back_range(map, &map->dirty[BIT_WORD(block)],
                        &map->dirty[BIT_WORD(next - 1)])) {
            qatomic_set(&hdr->all_dirty, 1);
            break;
        }
        bitmap_set_atomic(map->dirty, block, next - block);
    }
    smp_mb();                   /* before the change is submitted */
}

uint64_t dedup_map_clean_run(DedupMap *map, uint64_t first, uint64_t n)
{
    DedupMapHeader *hdr = map->file.base;
    uint64_t end = MIN(n, map->nblocks - MIN(first, map->nblocks)) + first;
    uint64_t block, next, found;

    if (qatomic_read(&hdr->all_dirty)) {
        return 0;
    }
    for (block = first; block < end; block = next) {
        next = MIN(end, ROUND_DOWN(block, BITS_OF_CHUNK) + BITS_OF_CHUNK);
        if (!back_range(map, &map->dirty[BIT_WORD(block)],
                        &map->dirty[BIT_WORD(next - 1)])) {
            break;
        }
        found = find_next_bit(map->dirty, next, block);
        if (found < next) {
            return found - first;
        }
    }
    return block - first;
}

bool dedup_map_has_writer(DedupMap *map)
{
    return qemu_lock_fd_test(map->lock_fd, LOCK_WRITER, 1, true) < 0;
}

void dedup_map_forget(DedupMap *map, uint64_t first, uint64_t n)
{
    uint64_t end = MIN(n, map->nblocks - MIN(first, map->nblocks)) + first;
    uint64_t in_chunk = DEDUP_SPARSE_CHUNK / sizeof(uint64_t);
    uint64_t block, next;

    for (block = first; block < end; block = next) {
        next = MIN(end, ROUND_DOWN(block, in_chunk) + in_chunk);
        if (!dedup_sparse_is_backed(&map->file, place(map, block))) {
            continue;
        }
        for (; block < next; block++) {
            qatomic_set(&map->entries[block], 0);
        }
    }
}

/* --- maps that nobody uses ---------------------------------------------- */

/* So many are kept, for guests to come. */
#define KEEP_UNUSED 64

typedef struct Unused {
    char *name;
    struct timespec opened;
} Unused;

static void unused_free(gpointer p)
{
    g_free(((Unused *)p)->name);
    g_free(p);
}

static gint later_first(gconstpointer a, gconstpointer b)
{
    const Unused *x = *(Unused *const *)a, *y = *(Unused *const *)b;

    if (x->opened.tv_sec != y->opened.tv_sec) {
        return x->opened.tv_sec < y->opened.tv_sec ? 1 : -1;
    }
    return x->opened.tv_nsec < y->opened.tv_nsec ? 1 : -1;
}

/* Note a map if nobody uses it. */
static void add_unused(GPtrArray *all, int dirfd, const char *name)
{
    int fd = openat(dirfd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    struct stat st;
    Unused *u;

    if (fd < 0) {
        return;
    }
    if (!qemu_lock_fd_test(fd, LOCK_USED, 1, true) && !fstat(fd, &st)) {
        u = g_new0(Unused, 1);
        u->name = g_strdup(name);
        u->opened = st.st_mtim;
        g_ptr_array_add(all, u);
    }
    close(fd);
}

void dedup_map_sweep(int dirfd, const char *path)
{
    g_autoptr(GDir) d = g_dir_open(path, 0, NULL);
    g_autoptr(GPtrArray) all = g_ptr_array_new_with_free_func(unused_free);
    const char *name;
    unsigned i;

    while (d && (name = g_dir_read_name(d))) {
        if (g_str_has_prefix(name, "map-")) {
            add_unused(all, dirfd, name);
        }
    }
    g_ptr_array_sort(all, later_first);
    for (i = KEEP_UNUSED; i < all->len; i++) {
        unlinkat(dirfd, ((Unused *)all->pdata[i])->name, 0);
    }
}
