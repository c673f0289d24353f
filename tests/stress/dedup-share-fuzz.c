/*
 * dedup-share: a fuzz target for hostile files and neighbours
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The input is a program of one-byte operations with their arguments: reads
 * through the engine, evictions, processes that come and die, and in between
 * whatever somebody may do to the group's files: scribble on them while they
 * are mapped, or replace them between two openings.  Nothing may crash, hang or
 * leave its bounds.  (That the bytes are right nobody can promise then.)
 *
 * A file that is made shorter while it is mapped is not tried: to touch it is a
 * SIGBUS, against which a process cannot guard itself.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "block/block-global-state.h"
#include "block/dedup-share/engine.h"
#include "block/dedup-share/holders.h"
#include "block/dedup-share/reclaim.h"
#include "fuzz.h"

#define NFRAMES 96
#define NBLOCKS 160
#define PAGE DEDUP_BLOCK_SIZE
#define MAX_OPERATIONS 64

/* --- a store in memory, which checks what it is asked ------------------- */

static uint8_t frames[NFRAMES][PAGE];

struct DedupStore {
    int dummy;
};
static DedupStore the_store;

static bool mem_probe(Error **errp)
{
    return true;
}

static uint64_t mem_host_frames(void)
{
    return 1 << 20;
}

static DedupStore *mem_open(const char *name, int dirfd, uint32_t nframes,
                            bool create, DedupStoreId *id, Error **errp)
{
    if (nframes != NFRAMES) {
        error_setg(errp, "store: another size");
        return NULL;
    }
    return &the_store;
}

static void mem_close(DedupStore *s, bool last)
{
}

static void mem_reap(const uint8_t uuid[16])
{
}

static int mem_fill(DedupStore *s, const uint32_t *slots, unsigned n,
                    const void *buf, uint64_t *words)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        g_assert_cmpint(slots[i], <, NFRAMES);
        memcpy(frames[slots[i]], buf + i * PAGE, PAGE);
        words[i] = 0;
    }
    return 0;
}

static int mem_peek(DedupStore *s, const uint32_t *slots, unsigned n, void *buf)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        g_assert_cmpint(slots[i], <, NFRAMES);
        memcpy(buf + i * PAGE, frames[slots[i]], PAGE);
    }
    return 0;
}

static void mem_give(DedupStore *s, DedupGive *gives, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        g_assert_cmpint(gives[i].slot, <, NFRAMES);
        memcpy(gives[i].dest.host, frames[gives[i].slot], PAGE);
        gives[i].result = DEDUP_GIVEN;
    }
}

static unsigned mem_evict(DedupStore *s, const uint32_t *slots, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        g_assert_cmpint(slots[i], <, NFRAMES);
    }
    return n;
}

static void mem_each_used(DedupStore *s, void (*used)(void *, uint32_t),
                          void *opaque)
{
    used(opaque, 1);
}

static bool mem_any_used(DedupStore *s)
{
    return false;
}

static const DedupStoreOps mem_ops = {
    .kind = DEDUP_SHARE_STORE_LINUX, .by_host = true, .probe = mem_probe,
    .host_frames = mem_host_frames, .open = mem_open, .close = mem_close,
    .reap = mem_reap, .fill = mem_fill, .peek = mem_peek, .give = mem_give,
    .evict = mem_evict, .each_used = mem_each_used, .any_used = mem_any_used,
};

/* --- the program -------------------------------------------------------- */

typedef struct Input {
    const uint8_t *data;
    size_t size;
} Input;

static unsigned get8(Input *in)
{
    if (!in->size) {
        return 0;
    }
    in->size--;
    return *in->data++;
}

static unsigned get16(Input *in)
{
    unsigned low = get8(in);

    return low | get8(in) << 8;
}

static uint64_t get64(Input *in)
{
    uint64_t v = 0;
    int i;

    for (i = 0; i < 64; i += 8) {
        v |= (uint64_t)get8(in) << i;
    }
    return v;
}

static char *root;
static DedupGroup *group;
static DedupMap *map;
static DedupTracker tracker;
static DedupCounters counters;
static int stay_fd = -1;        /* makes that the group is never empty */

static int coroutine_fn read_image(void *opaque, uint64_t first, unsigned n,
                                   void *buf)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        memset(buf + i * PAGE, (first + i) % 50, PAGE);
    }
    return 0;
}

static void coroutine_fn give(void *opaque, DedupGive *gives, unsigned n)
{
    mem_give(NULL, gives, n);
}

static void *alloc(void *opaque, size_t size)
{
    return qemu_try_memalign(PAGE, size);
}

static void free_buf(void *opaque, void *buf)
{
    qemu_vfree(buf);
}

typedef struct Read {
    uint64_t first;
    unsigned n;
} Read;

static void coroutine_fn read_entry(void *opaque)
{
    static uint8_t pages[DEDUP_BATCH][PAGE];
    Read *q = opaque;
    DedupBlock blocks[DEDUP_BATCH];
    DedupRange fill;
    DedupRead r = {
        .group = group, .tracker = &tracker, .fill = &fill,
        .counters = &counters, .read = read_image, .alloc = alloc,
        .free = free_buf, .give = give,
    };
    unsigned i;

    for (i = 0; i < q->n; i++) {
        blocks[i] = (DedupBlock) {
            .map = map, .number = q->first + i, .in_map = q->first + i,
            .dest.host = pages[i],
        };
    }
    if (!dedup_engine_hit(&r, blocks, q->n)) {
        dedup_fill_begin(&tracker, &fill, q->first * PAGE, q->n * PAGE);
        dedup_engine_read(&r, blocks, q->n);
        dedup_fill_end(&tracker, &fill);
    }
    dedup_engine_copy(group, blocks, q->n, pages);
}

static void do_read(Input *in)
{
    Read q = { .first = get8(in) % NBLOCKS, .n = 1 + get8(in) % 16 };

    qemu_coroutine_enter(qemu_coroutine_create(read_entry, &q));
    stat64_set(&group->full_until, 0);
}

/* Scribble on what is mapped. */
static void do_scribble(Input *in)
{
    struct {
        void *base;
        size_t size;
    } places[] = {
        { group->index.hdr, group->index.size },
        { group->index.hdr, 256 },
        { group->index.tags, NFRAMES * 8 },
        { map->file.base, 4096 },
        { map->entries, NBLOCKS * 8 },
        { group->holders.base, DEDUP_HEADER_SIZE + group->holders.row_size },
    };
    unsigned i = get8(in) % ARRAY_SIZE(places);
    size_t at = get16(in) * 8 % ROUND_DOWN(places[i].size, 8);
    uint64_t v = get64(in);

    qatomic_set((uint64_t *)(places[i].base + at), v);
}

static void do_evict(Input *in)
{
    uint32_t slots[DEDUP_BATCH];
    unsigned n = dedup_evict(group, slots, 1 + get8(in) % DEDUP_BATCH);

    while (n) {
        dedup_index_release(&group->index, slots[--n]);
    }
    if (get8(in) & 1) {
        dedup_evict_all(group);
    }
}

static void do_trim(Input *in)
{
    dedup_trim_now(group);
}

/* Another process comes, takes slots, and dies. */
static void do_other(Input *in)
{
    DedupHolders other;
    DedupIndex index = group->index;
    DedupHold hold;
    uint32_t slots[8];
    unsigned n = get8(in) % 8;

    if (!dedup_holders_open(&other, group->dir.fd, NFRAMES, true, false,
                            NULL)) {
        return;
    }
    if (dedup_holders_take_row(&other, dedup_bury, group, NULL)) {
        index.member = other.row + 1;
        n = dedup_index_alloc(&index, slots, n);
        dedup_hold_begin(&other, &hold, slots, n);
        dedup_hold_end(&hold);
        dedup_index_evict_begin(&index, get8(in) % NFRAMES);
    }
    dedup_holders_close(&other);
}

/* --- opening, and files that are replaced ------------------------------- */

static bool open_all(void)
{
    DedupGroupConfig config = {
        .name = "fuzz", .root = root, .store = DEDUP_SHARE_STORE_LINUX,
        .has_size = true, .size = NFRAMES * PAGE,
    };
    DedupMapLayer layer = { .key = "layer", .nblocks = NBLOCKS };

    group = dedup_group_get(&config, NULL);
    if (!group) {
        return false;
    }
    map = dedup_map_open(&group->index, group->dir.fd, &layer, NULL);
    if (!map) {
        dedup_group_put(group);
        group = NULL;
    }
    return map;
}

static void close_all(void)
{
    if (map) {
        dedup_map_close(map);
        map = NULL;
    }
    if (group) {
        dedup_group_put(group);
        group = NULL;
    }
}

static char *file_path(unsigned which)
{
    static const char *const names[] = { "index", "map-layer", "held" };

    return g_build_filename(root, "fuzz", names[which % ARRAY_SIZE(names)],
                            NULL);
}

static void replace_file(Input *in)
{
    g_autofree char *path = file_path(get8(in));
    unsigned how = get8(in), at = get16(in);
    uint64_t v = get64(in);
    int fd = open(path, O_RDWR);

    if (fd < 0) {
        return;
    }
    if (how & 1) {
        g_assert_cmpint(pwrite(fd, &v, sizeof(v), at * 4), ==, sizeof(v));
    }
    if (how & 2) {
        g_assert_cmpint(ftruncate(fd, v % 65536), ==, 0);
    }
    close(fd);
    if (how & 4) {
        unlink(path);
    }
}

/* Files change while nobody has them open; then they are opened. */
static void do_reopen(Input *in)
{
    unsigned n = get8(in) % 4;

    close_all();
    while (n--) {
        replace_file(in);
    }
    open_all();
}

static void (*const operations[])(Input *in) = {
    do_read, do_read, do_scribble, do_scribble, do_evict, do_trim, do_other,
    do_reopen,
};

static void remove_group(void)
{
    g_autofree char *path = g_build_filename(root, "fuzz", NULL);
    g_autoptr(GDir) d = g_dir_open(path, 0, NULL);
    const char *name;

    while (d && (name = g_dir_read_name(d))) {
        g_autofree char *file = g_build_filename(path, name, NULL);

        unlink(file);
    }
    rmdir(path);
}

/* A member that never leaves, so that the files stay. */
static void stay(void)
{
    g_autofree char *path = g_build_filename(root, "fuzz", "lock", NULL);

    stay_fd = open(path, O_RDWR | O_CLOEXEC);
    g_assert_cmpint(qemu_lock_fd(stay_fd, 1, 1, false), ==, 0);
}

static void remove_root(void)
{
    remove_group();
    rmdir(root);
}

static void init(void)
{
    qemu_init_main_loop(&error_abort);
    bdrv_init();
    dedup_store_register(&mem_ops);
    dedup_tracker_init(&tracker);
    root = g_strdup("/dev/shm/fuzz-dedup-XXXXXX");
    g_assert_nonnull(g_mkdtemp(root));
    atexit(remove_root);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Input in = { .data = data, .size = size };
    unsigned i;

    if (!root) {
        init();
    }
    g_assert_true(open_all());
    stay();
    for (i = 0; in.size && i < MAX_OPERATIONS && group; i++) {
        operations[get8(&in) % ARRAY_SIZE(operations)](&in);
    }
    close_all();
    close(stay_fd);
    remove_group();
    return 0;
}
