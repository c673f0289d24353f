/*
 * dedup-share: tests of the Linux store, and of who holds its frames
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The "guest's memory" is a piece of anonymous memory.  Another process of the
 * group is a second table of holders over the same file: its lock is its own,
 * as it has opened the file anew.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "block/block-global-state.h"
#include "block/dedup-share/given.h"
#include "block/dedup-share/linux.h"
#include "block/dedup-share/reclaim.h"
#include "dedup-guest-ram.h"

#define NFRAMES 1024
#define NPAGES 1024
#define PAGE DEDUP_BLOCK_SIZE

static DedupGroup *group;
static char *root;
static uint8_t *guest;          /* NPAGES */

static void setup(void)
{
    DedupGroupConfig config = {
        .name = "unit", .store = DEDUP_SHARE_STORE_LINUX,
        .has_size = true, .size = NFRAMES * PAGE,
    };

    root = g_strdup("/dev/shm/test-dedup-XXXXXX");
    g_assert_nonnull(g_mkdtemp(root));
    config.root = root;
    g_assert_true(dedup_group_check(&config, &error_abort));
    group = dedup_group_get(&config, &error_abort);
    guest = dedup_guest_ram_new(NPAGES * PAGE);
}

static void teardown(void)
{
    dedup_guest_ram_free();
    dedup_group_put(group);
    g_assert_cmpint(rmdir(root), ==, 0);      /* nothing left behind */
    g_free(root);
}

/* What a frame of block @number holds. */
static void make_content(uint8_t *buf, uint64_t number)
{
    uint64_t *p = (uint64_t *)buf;
    int i;

    for (i = 0; i < PAGE / 8; i++) {
        p[i] = number * 0x9e3779b97f4a7c15ULL + i;
    }
}

static void check_content(const uint8_t *page, uint64_t number)
{
    uint8_t want[PAGE];

    make_content(want, number);
    g_assert_cmpmem(page, PAGE, want, PAGE);
}

/* Make frames of the blocks first..., as a miss would; the ids into @ids. */
static void fill(uint64_t first, unsigned n, DedupFrameId *ids)
{
    g_autofree uint32_t *slots = g_new(uint32_t, n);
    g_autofree uint64_t *words = g_new(uint64_t, n);
    g_autofree uint8_t *buf = g_malloc(n * PAGE);
    DedupHold hold;
    unsigned i;

    for (i = 0; i < n; i++) {
        make_content(buf + i * PAGE, first + i);
    }
    g_assert_cmpint(dedup_index_alloc(&group->index, slots, n), ==, n);
    dedup_hold_begin(&group->holders, &hold, slots, n);
    g_assert_cmpint(group->ops->fill(group->store, slots, n, buf, words), ==,
                    0);
    for (i = 0; i < n; i++) {
        DedupDigest digest = dedup_digest(&group->index, buf + i * PAGE);

        ids[i] = dedup_index_seal(&group->index, slots[i], words[i], &digest);
    }
    dedup_hold_end(&hold);
}

static bool sealed(DedupFrameId id)
{
    uint64_t word;

    return dedup_index_get(&group->index, id, &word);
}

/* Evict frames, also such as were used lately, and free their slots. */
static unsigned evict(unsigned want)
{
    uint32_t slots[DEDUP_BATCH];
    unsigned i, n = dedup_evict(group, slots, want);

    for (i = 0; i < n; i++) {
        g_assert_cmpint(group->ops->evict(group->store, &slots[i], 1), ==, 1);
        dedup_index_release(&group->index, slots[i]);
    }
    return n;
}

/* Give frames to the pages first...; all are given or copied. */
static void give(const DedupFrameId *ids, unsigned first, unsigned n,
                 DedupResult want)
{
    g_autofree DedupGive *gives = g_new0(DedupGive, n);
    DedupHold hold;
    unsigned i;

    for (i = 0; i < n; i++) {
        gives[i].dest.host = guest + (first + i) * PAGE;
        gives[i].slot = ids[i].slot;
        gives[i].result = DEDUP_FAILED;
        dedup_hold_begin(&group->holders, &hold, &ids[i].slot, 1);
        dedup_hold_end(&hold);
    }
    group->ops->give(group->store, gives, n);
    for (i = 0; i < n; i++) {
        g_assert_cmpint(gives[i].result, ==, want);
    }
}

static void trim(void)
{
    uint32_t trims = qatomic_read(&group->index.hdr->trims_wanted);
    int i;

    dedup_trim_now(group);
    g_assert_cmpint(qatomic_read(&group->index.hdr->trims_wanted), ==, trims);
    for (i = 0; i < NPAGES; i++) {
        /* a look, so that all that is mapped is there */
        (void)*(volatile uint8_t *)(guest + i * PAGE);
    }
}

/* Mappings of the guest's memory, as the kernel counts them. */
static unsigned count_maps(void)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    unsigned n = 0;
    int i;

    g_assert(g_file_get_contents("/proc/self/maps", &text, NULL, NULL));
    lines = g_strsplit(text, "\n", -1);
    for (i = 0; lines[i]; i++) {
        uint64_t from, to;

        n += sscanf(lines[i], "%" SCNx64 "-%" SCNx64, &from, &to) == 2 &&
             to > (uintptr_t)guest &&
             from < (uintptr_t)guest + NPAGES * PAGE &&
             strstr(lines[i], "/frames");
    }
    return n;
}

/* --- giving -------------------------------------------------------------- */

static void test_give(void)
{
    DedupFrameId ids[64];
    unsigned i;

    setup();
    fill(100, 64, ids);
    give(ids, 8, 64, DEDUP_GIVEN);
    for (i = 0; i < 64; i++) {
        check_content(guest + (8 + i) * PAGE, 100 + i);
    }
    g_assert_cmpint(count_maps(), ==, 1);
    memset(guest + 9 * PAGE, 0x77, PAGE);       /* the guest writes */
    check_content(guest + 8 * PAGE, 100);
    give(ids, 200, 64, DEDUP_GIVEN);            /* the frames are unchanged */
    check_content(guest + 201 * PAGE, 101);
    g_assert_cmphex(guest[9 * PAGE], ==, 0x77);
    give(ids + 5, 9, 1, DEDUP_GIVEN);           /* onto what is given */
    check_content(guest + 9 * PAGE, 105);
    g_assert_cmpint(dedup_guest_ram_advised(), >=, 3);
    teardown();
}

/* Where it may not be mapped it is copied, also to what is no guest's. */
static void test_copy(void)
{
    DedupFrameId ids[4];
    uint8_t *buf = g_malloc(PAGE + 1);
    DedupGive one = { .dest.host = buf + 1 };

    setup();
    fill(7, 4, ids);
    dedup_guest_ram_permit(false);
    give(ids, 0, 4, DEDUP_COPIED);
    check_content(guest + 3 * PAGE, 10);
    g_assert_cmpint(count_maps(), ==, 0);
    dedup_guest_ram_permit(true);
    one.slot = ids[2].slot;
    group->ops->give(group->store, &one, 1);
    g_assert_cmpint(one.result, ==, DEDUP_COPIED);
    check_content(buf + 1, 9);
    give(ids, NPAGES - 4, 4, DEDUP_GIVEN);      /* up to the end */
    give(ids, NPAGES - 4, 4, DEDUP_GIVEN);
    g_free(buf);
    teardown();
}

/* What is counted is what the kernel has; a budget is kept. */
static void test_mappings(void)
{
    DedupFrameId ids[256];
    uint64_t used, most;
    unsigned i, before;

    setup();
    fill(0, 256, ids);
    give(ids, 0, 128, DEDUP_GIVEN);
    g_assert_cmpint(count_maps(), ==, 1);
    give(ids + 128, 128, 128, DEDUP_GIVEN);     /* what follows is merged */
    g_assert_cmpint(count_maps(), ==, 1);
    for (i = 0; i < 128; i += 2) {
        give(ids + 255 - i, i, 1, DEDUP_GIVEN);
    }
    dedup_given_mappings(&used, &most);
    before = count_maps();
    g_assert_cmpint(used, ==, before + 1);      /* boundaries: one more */
    dedup_given_set_budget(before);
    give(ids, 512, 1, DEDUP_COPIED);
    give(ids, 600, 64, DEDUP_COPIED);
    dedup_given_set_budget(before * 5 / 4 + 1);
    give(ids, 512, 1, DEDUP_COPIED);            /* the long runs first */
    give(ids, 600, 64, DEDUP_GIVEN);
    for (i = 0; i < 128; i += 2) {
        check_content(guest + i * PAGE, 255 - i);
        check_content(guest + (i + 1) * PAGE, i + 1);
    }
    teardown();
}

/* Memory that is discarded shows no frame. */
static void test_drop(void)
{
    static const uint8_t zeroes[PAGE];
    DedupFrameId ids[32];
    unsigned i;

    setup();
    fill(0, 32, ids);
    memset(guest, 0x55, 100 * PAGE);
    give(ids, 10, 32, DEDUP_GIVEN);
    guest[20 * PAGE] = 1;                       /* a copy: also that */
    g_assert_cmpint(dedup_given_drop(guest + 15 * PAGE, 10 * PAGE), ==, 0);
    madvise(guest + 15 * PAGE, 10 * PAGE, MADV_DONTNEED);
    for (i = 0; i < 100; i++) {
        uint8_t *page = guest + i * PAGE;

        if (i >= 15 && i < 25) {
            g_assert_cmpmem(page, PAGE, zeroes, PAGE);
        } else if (i >= 10 && i < 42) {
            check_content(page, i - 10);
        } else {
            g_assert_cmphex(page[123], ==, 0x55);
        }
    }
    g_assert_cmpint(dedup_given_drop(guest + 50 * PAGE, PAGE), ==, 0);
    g_assert_cmphex(guest[50 * PAGE], ==, 0x55);
    g_assert_cmpint(count_maps(), ==, 2);
    g_assert_cmpint(dedup_given_drop(guest, NPAGES * PAGE), ==, 0);
    g_assert_cmpint(count_maps(), ==, 0);
    teardown();
}

/* --- who holds what ------------------------------------------------------ */

/* Frames go when the guest has overwritten them, and not before. */
static void test_evict(void)
{
    DedupFrameId ids[64], again;
    unsigned i;

    setup();
    fill(0, 64, ids);
    give(ids, 0, 64, DEDUP_GIVEN);
    g_assert_cmpint(evict(64), ==, 0);     /* just used */
    trim();
    g_assert_cmpint(evict(64), ==, 0);     /* mapped */
    memset(guest + 10 * PAGE, 0x99, 5 * PAGE);
    g_assert_cmpint(evict(64), ==, 0);     /* not known yet */
    trim();
    g_assert_cmpint(evict(64), ==, 5);
    for (i = 0; i < 64; i++) {
        g_assert_cmpint(sealed(ids[i]), ==, i < 10 || i >= 15);
    }
    fill(5000, 1, &again);
    g_assert_cmpint(again.slot, ==, ids[10].slot);
    g_assert_cmpint(again.generation, ==, ids[10].generation + 2);
    for (i = 0; i < 64; i++) {
        if (i < 10 || i >= 15) {
            check_content(guest + i * PAGE, i);
        } else {
            g_assert_cmphex(guest[i * PAGE], ==, 0x99);
        }
    }
    teardown();
}

/* A page that was never touched is one that the guest has. */
static void test_untouched(void)
{
    DedupFrameId ids[8];

    setup();
    fill(0, 8, ids);
    give(ids, 0, 8, DEDUP_GIVEN);
    dedup_trim_now(group);
    g_assert_cmpint(evict(8), ==, 0);
    dedup_given_drop(guest, 8 * PAGE);
    dedup_trim_now(group);
    g_assert_cmpint(evict(8), ==, 8);
    teardown();
}

static void open_other(DedupHolders *other)
{
    g_assert_true(dedup_holders_open(other, group->dir.fd, NFRAMES, true, false,
                                     &error_abort));
    g_assert_true(dedup_holders_take_row(other, dedup_bury, group,
                                         &error_abort));
}

/* Another process holds frames, then it is dead. */
static void test_other(void)
{
    DedupHolders other;
    DedupHold hold;
    DedupFrameId ids[8];

    setup();
    fill(0, 8, ids);
    open_other(&other);
    g_assert_cmpint(other.row, ==, 1);
    dedup_hold_begin(&other, &hold, &ids[3].slot, 1);
    dedup_hold_end(&hold);
    trim();
    g_assert_cmpint(evict(8), ==, 7);
    g_assert_true(sealed(ids[3]));
    dedup_holders_close(&other);                /* its row stays behind */
    g_assert_cmpint(evict(8), ==, 0);
    trim();
    g_assert_cmpint(evict(8), ==, 1);
    open_other(&other);
    g_assert_cmpint(other.row, ==, 1);          /* the row is used again */
    dedup_holders_close(&other);
    teardown();
}

/* A request that goes on while a trim begins keeps what it holds. */
static void test_request(void)
{
    DedupFrameId ids[8];
    DedupHold before, during;

    setup();
    fill(0, 8, ids);
    dedup_trim_now(group);
    dedup_hold_begin(&group->holders, &before, &ids[0].slot, 1);
    dedup_trim_begin(&group->holders);
    g_assert_false(dedup_trim_alone(&group->holders));
    dedup_hold_begin(&group->holders, &during, &ids[1].slot, 1);
    dedup_hold_more(&group->holders, &before, &ids[2].slot, 1);
    dedup_hold_end(&before);
    g_assert_true(dedup_trim_alone(&group->holders));
    dedup_trim_end(&group->holders);
    g_assert_cmpint(evict(8), ==, 6);
    g_assert_false(sealed(ids[0]));             /* its request is over */
    g_assert_true(sealed(ids[1]));
    g_assert_true(sealed(ids[2]));
    dedup_hold_end(&during);
    trim();
    g_assert_cmpint(evict(8), ==, 2);
    teardown();
}

/*
 * Threads that read frames, each with a row of its own or sharing one, while
 * others evict and fill.  What was found sealed must stay what it was.
 */
#define BLOCKS 64            /* few, so that they meet */
#define READERS 3

static uint64_t the_map[BLOCKS];                /* generation << 32 | slot */
static bool stop_all;
static unsigned checked, was_gone;

/*
 * A frame that is held can be about to be evicted, for a moment, until who
 * would evict it has seen that.
 */
static bool stays_sealed(DedupFrameId id)
{
    int64_t end = g_get_monotonic_time() + 10 * G_USEC_PER_SEC;

    while (!sealed(id) && g_get_monotonic_time() < end) {
        g_thread_yield();
    }
    return sealed(id);
}

static void *reader(void *opaque)
{
    DedupHolders *h = opaque;
    g_autofree uint8_t *window = g_malloc(PAGE);
    GRand *rand = g_rand_new();
    DedupHold hold;

    while (!qatomic_read(&stop_all)) {
        uint64_t block = g_rand_int_range(rand, 0, BLOCKS);
        uint64_t entry = qatomic_load_acquire(&the_map[block]);
        DedupFrameId id = { .slot = entry, .generation = entry >> 32 };

        dedup_hold_begin(h, &hold, &id.slot, 1);
        if (sealed(id)) {
            g_assert_cmpint(group->ops->peek(group->store, &id.slot, 1,
                                             window), ==, 0);
            check_content(window, block);
            g_assert_true(stays_sealed(id));
            qatomic_inc(&checked);
        } else {
            qatomic_inc(&was_gone);
        }
        dedup_hold_end(&hold);
    }
    g_rand_free(rand);
    return NULL;
}

static void *filler(void *opaque)
{
    GRand *rand = g_rand_new();
    DedupFrameId id;

    while (!qatomic_read(&stop_all)) {
        uint64_t block = g_rand_int_range(rand, 0, BLOCKS);

        if (qatomic_read(&group->index.hdr->nsealed) > BLOCKS) {
            evict(16);
        } else {
            fill(block, 1, &id);
            qatomic_store_release(&the_map[block],
                                  (uint64_t)id.generation << 32 | id.slot);
        }
    }
    g_rand_free(rand);
    return NULL;
}

static void forget_row(DedupHolders *h)
{
    dedup_trim_begin(h);
    while (!dedup_trim_alone(h)) {
        g_usleep(10);
    }
    dedup_trim_end(h);
}

static void test_race(void)
{
    QemuThread threads[READERS + 2];
    DedupHolders other;
    int64_t end = g_get_monotonic_time() + 2 * G_USEC_PER_SEC;
    int i;

    setup();
    memset(the_map, 0, sizeof(the_map));
    stop_all = false;
    checked = was_gone = 0;
    open_other(&other);
    for (i = 0; i < READERS; i++) {
        qemu_thread_create(&threads[i], "reader", reader,
                           i ? &other : &group->holders, QEMU_THREAD_JOINABLE);
    }
    for (; i < READERS + 2; i++) {
        qemu_thread_create(&threads[i], "filler", filler, NULL,
                           QEMU_THREAD_JOINABLE);
    }
    while (g_get_monotonic_time() < end) {
        forget_row(&other);
        dedup_trim_now(group);
    }
    qatomic_set(&stop_all, true);
    for (i = 0; i < READERS + 2; i++) {
        qemu_thread_join(&threads[i]);
    }
    g_test_message("%u frames read, %u were gone, %" PRIu64 " evicted",
                   checked, was_gone, stat64_get(&group->evicted));
    g_assert_cmpint(checked, >, 1000);
    g_assert_cmpint(was_gone, >, 10);
    g_assert_cmpint(stat64_get(&group->evicted), >, 100);
    dedup_holders_close(&other);
    teardown();
}

/* --- the group ----------------------------------------------------------- */

/* A process whose guest uses frames stays when its last node is closed. */
static void test_stay(void)
{
    DedupGroupConfig config = {
        .name = "unit", .store = DEDUP_SHARE_STORE_LINUX,
    };
    DedupFrameId ids[4];
    DedupGroup *same;

    setup();
    config.root = root;
    fill(0, 4, ids);
    give(ids, 0, 4, DEDUP_GIVEN);
    dedup_group_put(group);
    check_content(guest, 0);
    same = dedup_group_get(&config, &error_abort);
    g_assert_true(same == group);
    dedup_group_put(group);
    dedup_groups_leave();                       /* as at exit */
    g_assert_cmpint(rmdir(root), ==, 0);
    check_content(guest + 3 * PAGE, 3);         /* the files are gone */
    dedup_guest_ram_free();
    g_free(root);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    bdrv_init();
    dedup_store_register(&dedup_linux_store_ops);
    g_test_add_func("/dedup/linux/give", test_give);
    g_test_add_func("/dedup/linux/copy", test_copy);
    g_test_add_func("/dedup/linux/mappings", test_mappings);
    g_test_add_func("/dedup/linux/drop", test_drop);
    g_test_add_func("/dedup/linux/evict", test_evict);
    g_test_add_func("/dedup/linux/untouched", test_untouched);
    g_test_add_func("/dedup/linux/other", test_other);
    g_test_add_func("/dedup/linux/request", test_request);
    g_test_add_func("/dedup/linux/race", test_race);
    g_test_add_func("/dedup/linux/stay", test_stay);
    return g_test_run();
}
