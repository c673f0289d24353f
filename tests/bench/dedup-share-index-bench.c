/*
 * dedup-share: what the index costs, and what it finds
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Runs what scripts/bench asks for and prints figures, "NAME VALUE..." a line;
 * that script says what they mean.  No frames are filled but by "replay".
 *
 *   lookup FRAMES OPS
 *       ns of a look-up of a random block: ours, in the block map and the frame
 *       table, of GLib's hash table and of QEMU's qht with as many entries
 *   sizes SMALL LARGE OPS
 *       ns of a look-up of ours, among so many frames and among so many
 *   scale FRAMES MS
 *       look-ups a second of one process, and of two at once together
 *   bytes FRAMES MEMBERS
 *       bytes of the index and of who holds what, and of a full block map
 *   hash ROUNDS
 *       ns of the digest of a block, and of a copy of it
 *   replay TRACE GUESTS PERCENT POLICY
 *       guests read what one read once, each a part of it later than the one
 *       before; the store has so many percent of the blocks.  Blocks read, and
 *       those that the store had; and that an ideal LRU of its size would have
 */

#include "qemu/osdep.h"
#include <sys/wait.h>
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "qemu/qht.h"
#include "qemu/units.h"
#include "qemu/xxhash.h"
#include "block/block-global-state.h"
#include "block/dedup-share/engine.h"
#include "block/dedup-share/linux.h"
#include "block/dedup-share/reclaim.h"
#include "../unit/dedup-guest-ram.h"

#define PAGE DEDUP_BLOCK_SIZE

static DedupGroup *group;
static DedupMap *map;
static char *root;

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static void init(void)
{
    qemu_init_main_loop(&error_fatal);
    bdrv_init();
    dedup_store_register(&dedup_linux_store_ops);
    dedup_guest_ram_new(0);             /* all is copied */
    root = g_strdup("/dev/shm/dedup-bench-XXXXXX");
    g_assert(g_mkdtemp(root));
}

static void finish(void)
{
    rmdir(root);
    g_free(root);
}

static DedupGroup *join_group(const char *name, uint32_t frames)
{
    DedupGroupConfig config = {
        .name = name, .root = root, .store = DEDUP_SHARE_STORE_LINUX,
        .has_size = true, .size = (uint64_t)frames * PAGE,
    };

    return dedup_group_get(&config, &error_fatal);
}

static DedupMap *open_map(DedupGroup *g, uint64_t blocks)
{
    DedupMapLayer layer = { .key = "layer", .nblocks = blocks };

    return dedup_map_open(&g->index, g->dir.fd, &layer, &error_fatal);
}

static void open_group(uint32_t frames, uint64_t blocks)
{
    group = join_group("bench", frames);
    map = open_map(group, blocks);
}

static void close_group(void)
{
    dedup_map_close(map);
    dedup_group_put(group);
}

/* Every block has a frame, whose digest is made up. */
static void fill_index(DedupMap *m, uint32_t n)
{
    uint32_t i;

    for (i = 0; i < n; i++) {
        DedupDigest d = {
            .low = i * 0x9e3779b97f4a7c15ULL, .high = i * 0xd6e8feb86659fd93ULL,
        };
        uint32_t slot;

        g_assert(dedup_map_back(m, i));
        g_assert_cmpint(dedup_index_alloc(m->index, &slot, 1), ==, 1);
        dedup_map_record(m, i, (DedupFrameId) { 0 },
                         dedup_index_seal(m->index, slot, 0, &d));
    }
}

static uint32_t *random_blocks(uint32_t n, uint32_t ops)
{
    uint32_t *where = g_new(uint32_t, ops), i;
    g_autoptr(GRand) rand = g_rand_new_with_seed(getpid());

    for (i = 0; i < ops; i++) {
        where[i] = g_rand_int_range(rand, 0, n);
    }
    return where;
}

/* --- look-ups ----------------------------------------------------------- */

static double time_ours(DedupMap *m, const uint32_t *where, uint32_t ops)
{
    uint64_t start = now(), word;
    uint32_t i;

    for (i = 0; i < ops; i++) {
        g_assert(dedup_index_get(m->index, dedup_map_lookup(m, where[i]),
                                 &word));
    }
    return (double)(now() - start) / ops;
}

typedef struct Entry {
    uint64_t block;
    DedupFrameId id;
} Entry;

static bool same_block(const void *a, const void *b)
{
    return ((const Entry *)a)->block == ((const Entry *)b)->block;
}

static double time_ghash(const Entry *entries, uint32_t n,
                         const uint32_t *where, uint32_t ops)
{
    GHashTable *t = g_hash_table_new(g_int64_hash, g_int64_equal);
    uint64_t start;
    uint32_t i;

    for (i = 0; i < n; i++) {
        g_hash_table_insert(t, (void *)&entries[i].block, (void *)&entries[i]);
    }
    start = now();
    for (i = 0; i < ops; i++) {
        uint64_t block = where[i];

        g_assert(g_hash_table_lookup(t, &block));
    }
    start = now() - start;
    g_hash_table_destroy(t);
    return (double)start / ops;
}

static double time_qht(const Entry *entries, uint32_t n, const uint32_t *where,
                       uint32_t ops)
{
    struct qht t;
    uint64_t start;
    uint32_t i;

    qht_init(&t, same_block, n, 0);
    for (i = 0; i < n; i++) {
        qht_insert(&t, (void *)&entries[i], qemu_xxhash2(entries[i].block),
                   NULL);
    }
    start = now();
    for (i = 0; i < ops; i++) {
        Entry want = { .block = where[i] };

        g_assert(qht_lookup(&t, &want, qemu_xxhash2(want.block)));
    }
    start = now() - start;
    qht_destroy(&t);
    return (double)start / ops;
}

static void bench_lookup(uint32_t n, uint32_t ops)
{
    g_autofree uint32_t *where = random_blocks(n, ops);
    g_autofree Entry *entries = g_new0(Entry, n);
    uint32_t i;
    int round;

    open_group(n, n);
    fill_index(map, n);
    time_ours(map, where, ops);                 /* all is touched once */
    for (i = 0; i < n; i++) {
        entries[i].block = i;
    }
    for (round = 0; round < 5; round++) {
        printf("ours %.2f\n", time_ours(map, where, ops));
        printf("ghash %.2f\n", time_ghash(entries, n, where, ops));
        printf("qht %.2f\n", time_qht(entries, n, where, ops));
    }
    close_group();
}

/* Both are there at once, and take turns: what else the host does is fair. */
static void bench_sizes(uint32_t small, uint32_t large, uint32_t ops)
{
    static const char *const names[] = { "small", "large" };
    const uint32_t n[] = { small, large };
    DedupGroup *groups[2];
    DedupMap *maps[2];
    uint32_t *where[2];
    int i, round;

    for (i = 0; i < 2; i++) {
        groups[i] = join_group(names[i], n[i]);
        maps[i] = open_map(groups[i], n[i]);
        fill_index(maps[i], n[i]);
        where[i] = random_blocks(n[i], ops);
    }
    for (round = 0; round < 5; round++) {
        for (i = 0; i < 2; i++) {
            /* what the other has put out of the caches comes back */
            time_ours(maps[i], where[i], ops);
            printf("%s %.2f\n", names[i], time_ours(maps[i], where[i], ops));
        }
    }
    for (i = 0; i < 2; i++) {
        g_free(where[i]);
        dedup_map_close(maps[i]);
        dedup_group_put(groups[i]);
    }
}

/* --- several processes -------------------------------------------------- */

#define RACERS 2
#define SLICE 4096              /* look-ups between two looks at the clock */
#define PLACES (4 * MiB)        /* where to look, a multiple of that */
QEMU_BUILD_BUG_ON(PLACES % (RACERS * SLICE));

/* The children and their parent share this. */
typedef struct Race {
    uint64_t until;             /* set before they start */
    uint64_t done[RACERS];
} Race;

static void racer(Race *race, unsigned i, const uint32_t *where, int ready,
                  int go)
{
    /* each elsewhere: what one looks at is not there for the other yet */
    unsigned first = i * (PLACES / RACERS);
    uint64_t done = 0;
    char c;

    time_ours(map, where, PLACES);              /* no page faults later */
    g_assert_cmpint(write(ready, "", 1), ==, 1);
    close(ready);               /* if another dies the parent sees the end */
    g_assert_cmpint(read(go, &c, 1), ==, 0);
    while (now() < race->until) {
        time_ours(map, where + (first + done) % PLACES, SLICE);
        done += SLICE;
    }
    race->done[i] = done;
    _exit(0);
}

/*
 * Look-ups a second of @n processes, together.  They all end at one time: one
 * that is left alone would be faster than both are together.
 */
static double run_processes(unsigned n, const uint32_t *where, uint64_t ns)
{
    Race *race = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int ready[2], go[2], status;
    uint64_t sum = 0;
    unsigned i;
    char c;

    g_assert(race != MAP_FAILED && !pipe(ready) && !pipe(go));
    for (i = 0; i < n; i++) {
        if (!fork()) {
            close(go[1]);
            racer(race, i, where, ready[1], go[0]);
        }
    }
    close(ready[1]);
    close(go[0]);
    for (i = 0; i < n; i++) {
        g_assert_cmpint(read(ready[0], &c, 1), ==, 1);
    }
    race->until = now() + ns;
    close(go[1]);
    while (wait(&status) > 0) {
        g_assert_cmpint(status, ==, 0);
    }
    for (i = 0; i < n; i++) {
        sum += race->done[i];
    }
    close(ready[0]);
    munmap(race, PAGE);
    return sum * 1e9 / ns;
}

static void bench_scale(uint32_t n, uint32_t ms)
{
    g_autofree uint32_t *where = random_blocks(n, PLACES);
    int round;

    open_group(n, n);
    fill_index(map, n);
    for (round = 0; round < 7; round++) {
        printf("one %.0f\n", run_processes(1, where, ms * 1000000ULL));
        printf("two %.0f\n", run_processes(RACERS, where, ms * 1000000ULL));
    }
    close_group();
}

/* --- bytes -------------------------------------------------------------- */

static uint64_t file_bytes(const char *prefix)
{
    g_autoptr(GDir) d = g_dir_open(group->dir.path, 0, NULL);
    const char *name;
    uint64_t bytes = 0;

    while ((name = g_dir_read_name(d))) {
        if (g_str_has_prefix(name, prefix)) {
            g_autofree char *file = g_build_filename(group->dir.path, name,
                                                     NULL);
            struct stat st;

            g_assert(!stat(file, &st));
            bytes += st.st_blocks * 512;
        }
    }
    return bytes;
}

static void bench_bytes(uint32_t n, unsigned members)
{
    g_autofree DedupHolders *others = g_new0(DedupHolders, members);
    unsigned i;

    open_group(n, n);
    fill_index(map, n);
    for (i = 1; i < members; i++) {
        dedup_holders_open(&others[i], group->dir.fd, n, true, false,
                           &error_fatal);
        dedup_holders_take_row(&others[i], dedup_bury, group, &error_fatal);
    }
    printf("index %" PRIu64 "\nheld %" PRIu64 "\nmap %" PRIu64 "\n",
           file_bytes("index"), file_bytes("held"), file_bytes("map-"));
    for (i = 1; i < members; i++) {
        dedup_holders_close(&others[i]);
    }
    close_group();
}

/* --- hashing ------------------------------------------------------------ */

static void bench_hash(unsigned rounds)
{
    const size_t size = 64 * MiB;
    g_autofree uint8_t *buf = g_malloc(size), *to = g_malloc(size);
    uint64_t sum = 0, start;
    size_t i;

    for (i = 0; i < size; i += sizeof(uint32_t)) {
        *(uint32_t *)(buf + i) = g_random_int();
    }
    memset(to, 1, size);        /* no page faults in the first round */
    open_group(64, 64);
    for (; rounds; rounds--) {
        start = now();
        for (i = 0; i < size; i += PAGE) {
            sum += dedup_digest(&group->index, buf + i).high;
        }
        printf("digest %.1f\n", (double)(now() - start) / (size / PAGE));
        start = now();
        for (i = 0; i < size; i += PAGE) {
            memcpy(to + i, buf + i, PAGE);
        }
        printf("memcpy %.1f\n", (double)(now() - start) / (size / PAGE));
    }
    printf("sum %" PRIu64 " %u\n", sum, to[size / 2]);
    close_group();
}

/* --- a boot trace ------------------------------------------------------- */

static DedupTracker tracker;
static DedupCounters counters;
static DedupShareAdmission admission;

static int coroutine_fn read_image(void *opaque, uint64_t first, unsigned n,
                                   void *buf)
{
    uint64_t i;

    for (i = 0; i < n * PAGE / sizeof(uint64_t); i++) {
        ((uint64_t *)buf)[i] = (first * 512 + i + 1) * 0x9e3779b97f4a7c15ULL;
    }
    return 0;
}

static void coroutine_fn give(void *opaque, DedupGive *gives, unsigned n)
{
    group->ops->give(group->store, gives, n);
}

static void *alloc(void *opaque, size_t size)
{
    return qemu_try_memalign(PAGE, size);
}

static void free_buf(void *opaque, void *buf)
{
    qemu_vfree(buf);
}

static void coroutine_fn read_entry(void *opaque)
{
    static uint8_t page[PAGE];
    uint64_t number = *(uint64_t *)opaque;
    DedupBlock b = {
        .map = map, .number = number, .in_map = number, .dest.host = page,
    };
    DedupRange fill;
    DedupRead r = {
        .group = group, .tracker = &tracker, .fill = &fill,
        .counters = &counters, .admission = admission, .read = read_image,
        .alloc = alloc, .free = free_buf, .give = give,
    };

    if (!dedup_engine_hit(&r, &b, 1)) {
        dedup_fill_begin(&tracker, &fill, number * PAGE, PAGE);
        dedup_engine_read(&r, &b, 1);
        dedup_fill_end(&tracker, &fill);
    }
}

/* Lines are N or N+M: a block, and those that follow it. */
static GArray *load_trace(const char *path, uint32_t *distinct)
{
    g_autoptr(GHashTable) numbers = g_hash_table_new(NULL, NULL);
    GArray *trace = g_array_new(false, false, sizeof(uint64_t));
    FILE *f = fopen(path, "r");
    char line[128];

    g_assert(f);
    while (fgets(line, sizeof(line), f)) {
        uint64_t block, more = 0, i;

        if (sscanf(line, "%" SCNu64 "+%" SCNu64, &block, &more) < 1) {
            continue;                           /* a comment */
        }
        for (i = block; i <= block + more; i++) {
            void *key = (void *)(uintptr_t)(i + 1);
            uint64_t number;

            if (!g_hash_table_contains(numbers, key)) {
                g_hash_table_insert(numbers, key, (void *)(uintptr_t)
                                    g_hash_table_size(numbers));
            }
            number = (uintptr_t)g_hash_table_lookup(numbers, key);
            g_array_append_val(trace, number);
        }
    }
    fclose(f);
    *distinct = g_hash_table_size(numbers);
    return trace;
}

/* Guest i begins when i/n of the trace is over; then all take turns. */
static GArray *interleave(const GArray *trace, unsigned guests)
{
    GArray *all = g_array_new(false, false, sizeof(uint64_t));
    unsigned lag = trace->len / guests, step, i;

    for (step = 0; step < trace->len + lag * (guests - 1); step++) {
        for (i = 0; i < guests; i++) {
            if (step >= i * lag && step - i * lag < trace->len) {
                g_array_append_val(all, g_array_index(trace, uint64_t,
                                                      step - i * lag));
            }
        }
    }
    return all;
}

/* Hits of a cache of @size blocks that drops what was used longest ago. */
static unsigned ideal_lru(const GArray *all, unsigned size)
{
    g_autoptr(GHashTable) links = g_hash_table_new(NULL, NULL);
    GQueue queue = G_QUEUE_INIT;
    unsigned i, hits = 0;

    for (i = 0; i < all->len; i++) {
        void *key = (void *)(uintptr_t)(g_array_index(all, uint64_t, i) + 1);
        GList *link = g_hash_table_lookup(links, key);

        if (link) {
            hits++;
            g_queue_unlink(&queue, link);
            g_queue_push_head_link(&queue, link);
            continue;
        }
        if (queue.length == size) {
            g_hash_table_remove(links, g_queue_pop_tail(&queue));
        }
        g_queue_push_head(&queue, key);
        g_hash_table_insert(links, key, queue.head);
    }
    g_queue_clear(&queue);
    return hits;
}

/* As often as a guest that boots reads so many blocks in a second. */
#define TRIM_EVERY 512

static void bench_replay(const char *path, unsigned guests, unsigned percent)
{
    uint32_t distinct, frames;
    g_autoptr(GArray) trace = load_trace(path, &distinct);
    g_autoptr(GArray) all = interleave(trace, guests);
    unsigned i;

    frames = (uint64_t)distinct * percent / 100;
    open_group(frames, distinct);
    dedup_tracker_init(&tracker);
    if (admission == DEDUP_SHARE_ADMISSION_SECOND_READ) {
        dedup_seen_open(&group->seen, group->dir.fd, frames, &error_fatal);
    }
    for (i = 0; i < all->len; i++) {
        qemu_coroutine_enter(qemu_coroutine_create(read_entry,
            &g_array_index(all, uint64_t, i)));
        if (i % TRIM_EVERY == 0) {
            dedup_trim_now(group);
            stat64_set(&group->full_until, 0);
        }
    }
    printf("reads %u\nblocks %u\n", all->len, distinct);
    printf("ours %" PRIu64 "\nlru %u\n", stat64_get(&counters.hits),
           ideal_lru(all, frames));
    dedup_tracker_destroy(&tracker);
    close_group();
}

static uint64_t number(const char *text)
{
    uint64_t n;

    g_assert(!qemu_strtou64(text, NULL, 0, &n));
    return n;
}

static bool run_mode(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";

    if (argc == 4 && !strcmp(mode, "lookup")) {
        bench_lookup(number(argv[2]), number(argv[3]));
    } else if (argc == 5 && !strcmp(mode, "sizes")) {
        bench_sizes(number(argv[2]), number(argv[3]), number(argv[4]));
    } else if (argc == 4 && !strcmp(mode, "scale")) {
        bench_scale(number(argv[2]), number(argv[3]));
    } else if (argc == 4 && !strcmp(mode, "bytes")) {
        bench_bytes(number(argv[2]), number(argv[3]));
    } else if (argc == 3 && !strcmp(mode, "hash")) {
        bench_hash(number(argv[2]));
    } else if (argc == 6 && !strcmp(mode, "replay")) {
        admission = qapi_enum_parse(&DedupShareAdmission_lookup, argv[5], 0,
                                    &error_fatal);
        bench_replay(argv[2], number(argv[3]), number(argv[4]));
    } else {
        return false;
    }
    return true;
}

int main(int argc, char **argv)
{
    bool known;

    setvbuf(stdout, NULL, _IOLBF, 0);
    init();
    known = run_mode(argc, argv);
    finish();
    if (!known) {
        fprintf(stderr, "see the head of dedup-share-index-bench.c\n");
    }
    return !known;
}
