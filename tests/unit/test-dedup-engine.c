/*
 * dedup-share: tests of the engine, over a store in ordinary memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The store below gives by copying and can be made to fail in each of its
 * steps.  After every read the "guest pages" are completed as a device model
 * would, by an ordinary read of what was not given, and must then hold the
 * image's bytes.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "block/block-global-state.h"
#include "block/dedup-share/engine.h"
#include "block/dedup-share/gather.h"

#define NBLOCKS 256
#define NFRAMES 64

struct DedupStore {
    uint8_t *frames;
    bool sealed[NFRAMES];
    int fill_error;             /* what the next fill fails with */
    int peek_error;
    DedupResult give_result;    /* of the next gives, unless GIVEN */
    bool all_idle;
    void (*during_fill)(uint64_t first, unsigned n);
    int evict_in_give;          /* release the frames while giving them */
    unsigned fills, gives, evicted;
};

static DedupGroup *group;
static DedupStore *store;
static uint8_t *image;
static uint8_t *guest;          /* NBLOCKS pages */
static DedupTracker tracker;
static DedupCounters counters;
static DedupMap *map;

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
    store = g_new0(DedupStore, 1);
    store->frames = g_malloc0(NFRAMES * DEDUP_BLOCK_SIZE);
    return store;
}

static void mem_close(DedupStore *s, bool last)
{
    g_free(s->frames);
    g_free(s);
}

static void mem_reap(const uint8_t uuid[16])
{
}

/* The block that was read to @buf, last. */
static uint64_t last_read;

static int mem_fill(DedupStore *s, const uint32_t *slots, unsigned n,
                    const void *buf, uint64_t *words)
{
    void (*during)(uint64_t first, unsigned n) = s->during_fill;
    unsigned i;

    if (s->fill_error) {
        return s->fill_error;
    }
    s->fills++;
    if (during) {
        s->during_fill = NULL;
        during(last_read, n);
    }
    for (i = 0; i < n; i++) {
        g_assert_false(s->sealed[slots[i]]);    /* sealed frames never change */
        memcpy(s->frames + slots[i] * DEDUP_BLOCK_SIZE,
               buf + i * DEDUP_BLOCK_SIZE, DEDUP_BLOCK_SIZE);
        s->sealed[slots[i]] = true;
        words[i] = slots[i] ^ 0xabcd;
    }
    return 0;
}

/* As another process would, right now. */
static void evict_frame(uint32_t slot)
{
    g_assert_true(dedup_index_evict_begin(&group->index, slot));
    dedup_index_evict_commit(&group->index, slot);
    dedup_index_release(&group->index, slot);
}

static uint64_t mem_in_use(DedupStore *s, const uint32_t *slots, unsigned n)
{
    return s->all_idle ? 0 : UINT64_MAX;
}

static int mem_peek(DedupStore *s, const uint32_t *slots, unsigned n, void *buf)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        memcpy(buf + i * DEDUP_BLOCK_SIZE,
               s->frames + slots[i] * DEDUP_BLOCK_SIZE, DEDUP_BLOCK_SIZE);
        if (s->evict_in_give) {
            evict_frame(slots[i]);
        }
    }
    return s->peek_error;
}

static void mem_give(DedupStore *s, DedupGive *gives, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        uint8_t *page = guest + gives[i].dest.gfn * DEDUP_BLOCK_SIZE;

        g_assert_true(s->sealed[gives[i].slot]);
        g_assert_cmphex(gives[i].word, ==, gives[i].slot ^ 0xabcd);
        s->gives++;
        gives[i].result = s->give_result;
        if (s->evict_in_give) {
            evict_frame(gives[i].slot);
            s->sealed[gives[i].slot] = false;
            memset(page, 0xee, DEDUP_BLOCK_SIZE);
        } else {
            memcpy(page, s->frames + gives[i].slot * DEDUP_BLOCK_SIZE,
                   DEDUP_BLOCK_SIZE);
        }
        if (gives[i].result != DEDUP_GIVEN) {
            memset(page, 0xdd, DEDUP_BLOCK_SIZE);   /* undefined */
        }
    }
}

static unsigned mem_evict(DedupStore *s, const uint32_t *slots, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        g_assert_true(s->sealed[slots[i]]);
        /* nobody else can be evicting it, too */
        g_assert_false(dedup_index_evict_begin(&group->index, slots[i]));
        s->sealed[slots[i]] = false;
        s->evicted++;
    }
    return n;
}

static const DedupStoreOps mem_ops = {
    .kind = DEDUP_SHARE_STORE_XEN,      /* stands in for it */
    .has_words = true,
    .probe = mem_probe,
    .host_frames = mem_host_frames,
    .open = mem_open,
    .close = mem_close,
    .reap = mem_reap,
    .fill = mem_fill,
    .peek = mem_peek,
    .give = mem_give,
    .in_use = mem_in_use,
    .evict = mem_evict,
};

/* What happens while the image is being read */
static void (*during_read)(uint64_t first, unsigned n);
static int read_error;
static unsigned image_reads;
static DedupShareAdmission admission;

static int coroutine_fn read_image(void *opaque, uint64_t first, unsigned n,
                                   void *buf)
{
    image_reads++;
    last_read = first;
    memcpy(buf, image + first * DEDUP_BLOCK_SIZE, n * DEDUP_BLOCK_SIZE);
    if (during_read) {
        during_read(first, n);
    }
    return read_error;
}

static void coroutine_fn give(void *opaque, DedupGive *gives, unsigned n)
{
    mem_give(store, gives, n);
}

static void *alloc(void *opaque, size_t size)
{
    return qemu_try_memalign(DEDUP_BLOCK_SIZE, size);
}

static void free_buf(void *opaque, void *buf)
{
    qemu_vfree(buf);
}

typedef struct Request {
    DedupBlock *blocks;
    unsigned n;
    bool done;
} Request;

static void coroutine_fn read_entry(void *opaque)
{
    Request *q = opaque;
    DedupRange fill;
    DedupRead r = {
        .group = group, .tracker = &tracker, .fill = &fill,
        .counters = &counters, .admission = admission,
        .read = read_image, .alloc = alloc,
        .free = free_buf, .give = give,
    };

    dedup_fill_begin(&tracker, &fill,
                     q->blocks[0].number * DEDUP_BLOCK_SIZE,
                     (int64_t)q->n * DEDUP_BLOCK_SIZE);
    dedup_engine_read(&r, q->blocks, q->n);
    dedup_fill_end(&tracker, &fill);
    q->done = true;
}

/*
 * Read blocks first..first+n-1 into the guest pages of the same numbers,
 * expect every result to be @want, and the guest to see the image's bytes.
 */
static void check_read(uint64_t first, unsigned n, DedupResult want)
{
    g_autofree DedupBlock *blocks = g_new0(DedupBlock, n);
    Request q = { .blocks = blocks, .n = n };
    unsigned i;

    memset(guest, 0x55, NBLOCKS * DEDUP_BLOCK_SIZE);
    for (i = 0; i < n; i++) {
        blocks[i].map = map;
        blocks[i].number = blocks[i].in_map = first + i;
        blocks[i].dest.gfn = first + i;
    }
    qemu_coroutine_enter(qemu_coroutine_create(read_entry, &q));
    g_assert_true(q.done);
    for (i = 0; i < n; i++) {
        uint64_t at = (first + i) * DEDUP_BLOCK_SIZE;

        g_assert_cmpint(blocks[i].result, ==, want);
        if (blocks[i].result != DEDUP_GIVEN) {
            memcpy(guest + at, image + at, DEDUP_BLOCK_SIZE);
        }
        g_assert_cmpint(memcmp(guest + at, image + at, DEDUP_BLOCK_SIZE), ==,
                        0);
    }
}

static char *root;

static void setup(void)
{
    DedupGroupConfig config = {
        .name = "unit", .store = DEDUP_SHARE_STORE_XEN,
        .has_size = true, .size = NFRAMES * DEDUP_BLOCK_SIZE,
    };
    unsigned i;

    root = g_strdup("/dev/shm/test-dedup-XXXXXX");
    g_assert_nonnull(g_mkdtemp(root));
    config.root = root;
    g_assert_true(dedup_group_check(&config, &error_abort));
    group = dedup_group_get(&config, &error_abort);
    map = dedup_map_open(&group->index, group->dir.fd,
                         &(DedupMapLayer) { .key = "layer",
                                            .nblocks = NBLOCKS },
                         &error_abort);
    dedup_tracker_init(&tracker);
    memset(&counters, 0, sizeof(counters));
    image = g_malloc(NBLOCKS * DEDUP_BLOCK_SIZE);
    guest = g_malloc(NBLOCKS * DEDUP_BLOCK_SIZE);
    for (i = 0; i < NBLOCKS * DEDUP_BLOCK_SIZE / 4; i++) {
        ((uint32_t *)image)[i] = g_test_rand_int();
    }
    during_read = NULL;
    read_error = 0;
}

static void teardown(void)
{
    dedup_map_close(map);
    dedup_group_put(group);
    dedup_tracker_destroy(&tracker);
    g_free(image);
    g_free(guest);
    g_assert_cmpint(rmdir(root), ==, 0);      /* nothing left behind */
    g_free(root);
}

static unsigned frames_in_use(void)
{
    return group->index.hdr->nsealed;
}

static void test_miss_then_hit(void)
{
    setup();
    check_read(0, 16, DEDUP_GIVEN);
    g_assert_cmpint(stat64_get(&counters.misses), ==, 16);
    g_assert_cmpint(store->fills, ==, 1);
    /* the image changes behind our back: a hit does not read it */
    during_read = NULL;
    check_read(0, 16, DEDUP_GIVEN);
    g_assert_cmpint(stat64_get(&counters.hits), ==, 16);
    g_assert_cmpint(store->fills, ==, 1);
    g_assert_cmpint(frames_in_use(), ==, 16);
    /* a mixture */
    check_read(8, 16, DEDUP_GIVEN);
    g_assert_cmpint(stat64_get(&counters.hits), ==, 24);
    g_assert_cmpint(stat64_get(&counters.misses), ==, 24);
    teardown();
}

/* Copies from the store: all of the blocks, the right ones, or nothing. */
static bool copy(uint64_t first, unsigned n)
{
    g_autofree DedupBlock *blocks = g_new0(DedupBlock, n);
    g_autofree uint8_t *buf = g_malloc0(n * DEDUP_BLOCK_SIZE);
    unsigned i;
    bool ok;

    for (i = 0; i < n; i++) {
        blocks[i].map = map;
        blocks[i].number = blocks[i].in_map = first + i;
    }
    ok = dedup_engine_copy(group, blocks, n, buf);
    if (ok) {
        g_assert_cmpint(memcmp(buf, image + first * DEDUP_BLOCK_SIZE,
                               n * DEDUP_BLOCK_SIZE), ==, 0);
    }
    return ok;
}

static void test_copy(void)
{
    setup();
    check_read(8, 4, DEDUP_GIVEN);
    g_assert_true(copy(8, 4));
    g_assert_true(copy(10, 1));
    g_assert_false(copy(7, 2));
    g_assert_false(copy(11, 2));
    store->peek_error = -EIO;
    g_assert_false(copy(8, 4));
    store->peek_error = 0;
    store->evict_in_give = 1;
    g_assert_false(copy(9, 1));                 /* evicted while it is copied */
    store->evict_in_give = 0;
    g_assert_false(copy(9, 1));
    g_assert_true(copy(10, 2));
    teardown();
}

static void test_no_layer(void)
{
    DedupMap *real;

    setup();
    real = map;
    map = NULL;
    check_read(3, 4, DEDUP_NO_LAYER);
    map = real;
    g_assert_cmpint(store->gives, ==, 0);
    teardown();
}

static void test_store_full(void)
{
    setup();
    check_read(0, NFRAMES, DEDUP_GIVEN);
    check_read(NFRAMES, 8, DEDUP_STORE_FULL);
    check_read(0, NFRAMES, DEDUP_GIVEN);
    teardown();
}

/* Whatever step fails, nothing is recorded and no slot is lost. */
static void test_fill_fails(void)
{
    setup();
    store->fill_error = -EIO;
    check_read(0, 8, DEDUP_FAILED);
    store->fill_error = -ENOMEM;
    check_read(0, 8, DEDUP_STORE_FULL);
    image_reads = 0;
    check_read(0, 8, DEDUP_STORE_FULL);         /* for a while without a try */
    g_assert_cmpint(image_reads, ==, 0);
    stat64_init(&group->full_until, 0);         /* that is over */
    store->fill_error = 0;
    read_error = -EIO;
    check_read(0, 8, DEDUP_FAILED);
    read_error = 0;
    g_assert_cmpint(frames_in_use(), ==, 0);
    check_read(0, NFRAMES - 8, DEDUP_GIVEN);    /* the slots are there */
    store->fill_error = -ENOTRECOVERABLE;       /* and these must not be */
    check_read(NFRAMES, 8, DEDUP_FAILED);
    store->fill_error = 0;
    check_read(NFRAMES, 8, DEDUP_STORE_FULL);
    teardown();
}

static void test_give_fails(void)
{
    DedupResult r;

    setup();
    for (r = DEDUP_GIVEN + 1; r < DEDUP_RESULT__MAX; r++) {
        store->give_result = r;
        check_read(0, 8, r);
    }
    store->give_result = DEDUP_GIVEN;
    check_read(0, 8, DEDUP_GIVEN);
    teardown();
}

/* An eviction between the look-up and the end of the give is noticed. */
static void test_evicted_in_give(void)
{
    setup();
    store->evict_in_give = 1;
    check_read(0, 8, DEDUP_EVICTED);
    store->evict_in_give = 0;
    check_read(0, 8, DEDUP_GIVEN);
    g_assert_cmpint(store->fills, ==, 2);       /* the stale ids were misses */
    teardown();
}

/* A write while the image is read: the frame is dropped, not recorded. */
static DedupRange the_write;

static void write_during(uint64_t first, unsigned n)
{
    dedup_write_begin(&tracker, &the_write,
                      (first + n - 1) * DEDUP_BLOCK_SIZE + 512, 512);
    image[(first + n - 1) * DEDUP_BLOCK_SIZE + 600] ^= 1;
    dedup_write_end(&tracker, &the_write);
}

static void write_elsewhere(uint64_t first, unsigned n)
{
    dedup_write_begin(&tracker, &the_write,
                      (first + n) * DEDUP_BLOCK_SIZE, 512);
    dedup_write_end(&tracker, &the_write);
}

static void test_write_during_fill(void)
{
    setup();
    during_read = write_during;
    check_read(0, 4, DEDUP_OVERWRITTEN);
    g_assert_cmpint(frames_in_use(), ==, 0);
    g_assert_cmpint(store->evicted, ==, 4);
    during_read = write_elsewhere;
    check_read(0, 4, DEDUP_GIVEN);
    during_read = NULL;
    check_read(0, 4, DEDUP_GIVEN);
    teardown();
}

/* A write that is in flight when the fill begins, and ends within it. */
static void end_write(uint64_t first, unsigned n)
{
    dedup_write_end(&tracker, &the_write);
}

static void test_write_before_fill(void)
{
    setup();
    dedup_write_begin(&tracker, &the_write, 0, 512);
    during_read = end_write;
    check_read(0, 4, DEDUP_OVERWRITTEN);
    during_read = NULL;
    check_read(0, 4, DEDUP_GIVEN);
    teardown();
}

/* Another process records the block while we fill: theirs is given. */
static void fill_faster(uint64_t first, unsigned n)
{
    const uint8_t *data = image + first * DEDUP_BLOCK_SIZE;
    DedupDigest digest = dedup_digest(&group->index, data);
    uint32_t slot;
    uint64_t word;
    DedupFrameId none = { 0 };

    g_assert_cmpint(dedup_index_alloc(&group->index, &slot, 1), ==, 1);
    mem_fill(store, &slot, 1, data, &word);
    g_assert_true(dedup_map_record(map, first, none,
                                   dedup_index_seal(&group->index, slot, word,
                                                    &digest)));
}

static void test_two_fill(void)
{
    setup();
    during_read = fill_faster;
    check_read(0, 4, DEDUP_GIVEN);
    g_assert_cmpint(frames_in_use(), ==, 4);
    g_assert_cmpint(store->evicted, ==, 0);     /* found by its content */
    during_read = NULL;
    store->during_fill = fill_faster;           /* too late for that */
    check_read(8, 4, DEDUP_GIVEN);
    g_assert_cmpint(frames_in_use(), ==, 8);
    g_assert_cmpint(store->evicted, ==, 1);
    check_read(8, 4, DEDUP_GIVEN);
    check_read(0, 4, DEDUP_GIVEN);
    g_assert_cmpint(stat64_get(&counters.hits), ==, 8);
    teardown();
}

/* Ids of frames that are gone, or never were, are misses, and are replaced. */
static void test_wild_map(void)
{
    const DedupFrameId none = { 0 };
    unsigned i;

    setup();
    for (i = 0; i < 8; i++) {
        DedupFrameId wild = { .slot = i % 2 ? 7 : NFRAMES + i,
                              .generation = i + 1 };

        g_assert_true(dedup_map_record(map, i, none, wild));
    }
    check_read(0, 8, DEDUP_GIVEN);
    g_assert_cmpint(stat64_get(&counters.misses), ==, 8);
    check_read(0, 8, DEDUP_GIVEN);
    g_assert_cmpint(stat64_get(&counters.hits), ==, 8);
    g_assert_false(dedup_index_is_damaged(&group->index));
    teardown();
}

/*
 * Frames of four blocks, then something is scribbled over.  Blocks are read in
 * the ordinary way from then on, and who joins the group gets another store.
 */
static void check_damage(void (*scribble)(void), DedupResult want)
{
    DedupGroupConfig c = { .name = "unit", .store = DEDUP_SHARE_STORE_XEN };
    DedupGroup *again;

    setup();
    c.root = root;
    check_read(0, 4, DEDUP_GIVEN);
    scribble();
    check_read(0, 4, want);
    g_assert_true(dedup_index_is_damaged(&group->index));
    check_read(0, 4, DEDUP_FAILED);
    g_assert_false(copy(0, 4));
    again = dedup_group_get(&c, &error_abort);
    g_assert_true(again != group);
    g_assert_false(dedup_index_is_damaged(&again->index));
    g_assert_cmpint(again->index.hdr->nsealed, ==, 0);
    dedup_group_put(again);
    teardown();
}

static void scribble_map(void)
{
    unsigned i;

    for (i = 0; i < 4; i++) {
        map->entries[i] ^= 1ULL << (i * 21);
    }
}

/* An entry that is good, but in another place. */
static void shift_map(void)
{
    memmove(map->entries + 1, map->entries, 8 * sizeof(uint64_t));
    map->entries[0] = map->entries[4];
}

static void scribble_tags(void)
{
    unsigned i;

    for (i = 0; i < NFRAMES; i++) {
        group->index.tags[i] ^= 1ULL << (i % 64);
    }
}

static void clear_tags(void)
{
    memset(group->index.tags, 0, NFRAMES * sizeof(uint64_t));
}

static void test_damage(void)
{
    check_damage(scribble_map, DEDUP_EVICTED);
    check_damage(shift_map, DEDUP_EVICTED);
    check_damage(scribble_tags, DEDUP_STORE_FULL);
    check_damage(clear_tags, DEDUP_STORE_FULL);
}

/* Equal blocks, in one read, in another layer: one frame. */
static void test_content(void)
{
    DedupMap *first, *second;

    setup();
    first = map;
    memcpy(image + 2 * DEDUP_BLOCK_SIZE, image, DEDUP_BLOCK_SIZE);
    memcpy(image + 9 * DEDUP_BLOCK_SIZE, image, DEDUP_BLOCK_SIZE);
    check_read(0, 8, DEDUP_GIVEN);
    g_assert_cmpint(frames_in_use(), ==, 7);    /* a twin in the same read */
    check_read(8, 4, DEDUP_GIVEN);
    g_assert_cmpint(frames_in_use(), ==, 10);
    g_assert_cmpint(stat64_get(&counters.matched), ==, 1);

    second = dedup_map_open(&group->index, group->dir.fd,
                            &(DedupMapLayer) { .key = "copy",
                                               .nblocks = NBLOCKS },
                            &error_abort);
    map = second;
    check_read(0, 12, DEDUP_GIVEN);             /* read and compared */
    g_assert_cmpint(frames_in_use(), ==, 10);
    g_assert_cmpint(stat64_get(&counters.matched), ==, 13);
    image_reads = 0;
    check_read(0, 12, DEDUP_GIVEN);             /* plain hits from then on */
    g_assert_cmpint(image_reads, ==, 0);
    /* a frame that cannot be compared is not used */
    store->peek_error = -EIO;
    map = dedup_map_new(&group->index, NBLOCKS);
    check_read(0, 4, DEDUP_GIVEN);
    g_assert_cmpint(frames_in_use(), >=, 13);
    dedup_map_close(map);
    dedup_map_close(second);
    map = first;
    teardown();
}

/* A block of another content that is said to have the digest of a frame. */
static void test_collision(void)
{
    DedupDigest digest;
    DedupFrameId id;
    uint32_t slot;

    setup();
    check_read(0, 1, DEDUP_GIVEN);
    slot = dedup_map_lookup(map, 0).slot;
    digest = dedup_digest(&group->index, image + 5 * DEDUP_BLOCK_SIZE);
    group->index.digests[slot] = digest.high;
    dedup_hash_insert(&group->index, &digest, slot);
    g_assert_true(dedup_hash_find(&group->index, &digest, &id));
    g_assert_cmpint(id.slot, ==, slot);
    check_read(5, 1, DEDUP_GIVEN);              /* compared, and not it */
    g_assert_cmpint(stat64_get(&counters.matched), ==, 0);
    g_assert_cmpint(dedup_map_lookup(map, 5).slot, !=, slot);
    teardown();
}

/* Zeroes have no frame, and are read once. */
static void test_zeroes(void)
{
    setup();
    memset(image + 4 * DEDUP_BLOCK_SIZE, 0, 4 * DEDUP_BLOCK_SIZE);
    check_read(4, 4, DEDUP_ZEROES);
    g_assert_cmpint(frames_in_use(), ==, 0);
    image_reads = 0;
    check_read(4, 4, DEDUP_ZEROES);
    g_assert_cmpint(image_reads, ==, 0);
    g_assert_true(copy(5, 2));
    check_read(0, 4, DEDUP_GIVEN);
    g_assert_true(copy(2, 4));                  /* half of each */
    g_assert_false(copy(7, 2));
    g_assert_cmpint(stat64_get(&counters.hits), ==, 0);
    teardown();
}

/* Only what is read a second time is kept. */
static void test_second_read(void)
{
    setup();
    admission = DEDUP_SHARE_ADMISSION_SECOND_READ;
    g_assert_true(dedup_seen_open(&group->seen, group->dir.fd, NFRAMES,
                                  &error_abort));
    check_read(0, 8, DEDUP_SEEN_ONCE);
    g_assert_cmpint(frames_in_use(), ==, 0);
    memcpy(image + 20 * DEDUP_BLOCK_SIZE, image, 4 * DEDUP_BLOCK_SIZE);
    check_read(20, 4, DEDUP_GIVEN);             /* whatever block it is */
    check_read(0, 8, DEDUP_GIVEN);
    g_assert_cmpint(frames_in_use(), ==, 8);
    admission = DEDUP_SHARE_ADMISSION_FIRST_READ;
    teardown();
}

/* A full store: idle frames make room, used ones do not. */
static void test_evict(void)
{
    setup();
    check_read(0, NFRAMES, DEDUP_GIVEN);
    check_read(NFRAMES, 8, DEDUP_STORE_FULL);
    store->all_idle = true;
    stat64_init(&group->full_until, 0);
    check_read(NFRAMES, 8, DEDUP_GIVEN);
    g_assert_cmpint(store->evicted, ==, 8);
    g_assert_cmpint(frames_in_use(), ==, NFRAMES);
    check_read(NFRAMES, 8, DEDUP_GIVEN);
    teardown();
}

static void test_group_options(void)
{
    DedupGroupConfig c = {
        .name = "unit", .root = "/dev/shm", .store = DEDUP_SHARE_STORE_XEN,
        .has_size = true,
    };
    static const uint64_t bad[] = { 0, 1, 4095, 4097, UINT64_MAX - 4095,
                                    (1ULL << 32) + 4096 };
    Error *err = NULL;
    int i;

    for (i = 0; i < ARRAY_SIZE(bad); i++) {
        c.size = bad[i];
        g_assert_false(dedup_group_check(&c, &err));
        g_assert_nonnull(strstr(error_get_pretty(err), "store-size"));
        error_free(err);
        err = NULL;
    }
    c.size = 1ULL << 32;
    g_assert_true(dedup_group_check(&c, &error_abort));
    c.root = "relative/path";
    g_assert_false(dedup_group_check(&c, &err));
    g_assert_nonnull(strstr(error_get_pretty(err), "index-dir"));
    error_free(err);
}

/* Two nodes of one process are one member; sizes must agree. */
static void test_group_twice(void)
{
    DedupGroupConfig c = { .name = "unit", .store = DEDUP_SHARE_STORE_XEN };
    DedupGroup *again;
    Error *err = NULL;

    setup();
    c.root = root;
    again = dedup_group_get(&c, &error_abort);
    g_assert_true(again == group);
    dedup_group_put(again);
    c.has_size = true;
    c.size = (NFRAMES + 1) * DEDUP_BLOCK_SIZE;
    g_assert_null(dedup_group_get(&c, &err));
    g_assert_nonnull(strstr(error_get_pretty(err), "store-size"));
    error_free(err);
    teardown();
}

int main(int argc, char **argv)
{
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);
    dedup_store_register(&mem_ops);
    g_test_add_func("/dedup/engine/miss-then-hit", test_miss_then_hit);
    g_test_add_func("/dedup/engine/copy", test_copy);
    g_test_add_func("/dedup/engine/no-layer", test_no_layer);
    g_test_add_func("/dedup/engine/store-full", test_store_full);
    g_test_add_func("/dedup/engine/fill-fails", test_fill_fails);
    g_test_add_func("/dedup/engine/give-fails", test_give_fails);
    g_test_add_func("/dedup/engine/evicted-in-give", test_evicted_in_give);
    g_test_add_func("/dedup/engine/write-during-fill", test_write_during_fill);
    g_test_add_func("/dedup/engine/write-before-fill", test_write_before_fill);
    g_test_add_func("/dedup/engine/two-fill", test_two_fill);
    g_test_add_func("/dedup/engine/wild-map", test_wild_map);
    g_test_add_func("/dedup/engine/damage", test_damage);
    g_test_add_func("/dedup/engine/content", test_content);
    g_test_add_func("/dedup/engine/zeroes", test_zeroes);
    g_test_add_func("/dedup/engine/collision", test_collision);
    g_test_add_func("/dedup/engine/second-read", test_second_read);
    g_test_add_func("/dedup/engine/evict", test_evict);
    g_test_add_func("/dedup/group/options", test_group_options);
    g_test_add_func("/dedup/group/twice", test_group_twice);
    return g_test_run();
}
