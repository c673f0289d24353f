/*
 * qemu-dedup-store: tests of its tables, and of limits of memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What clients can do to it is tested by tests/hostile.
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "qapi/error.h"
#include "qemu/lockable.h"
#include "qemu/units.h"
#include "../../dedup-store/memory-limit.h"
#include "../../dedup-store/store.h"
#include "../../dedup-store/turns.h"

#define NBLOCKS 16

static Store *store;
static uint8_t *bytes;          /* NBLOCKS different blocks */

static void setup_with(const FramesOps *ops, uint64_t size)
{
    unsigned i;

    store = store_new(ops, "test", "", size, &error_abort);
    bytes = g_malloc(NBLOCKS * BLOCK);
    for (i = 0; i < NBLOCKS * BLOCK / 4; i++) {
        ((uint32_t *)bytes)[i] = g_test_rand_int();
    }
}

static void setup(uint64_t size)
{
    setup_with(&frames_linux, size);
}

static void teardown(void)
{
    store_free(store);
    g_free(bytes);
}

/* The blocks from @first on, which all get a frame. */
static void keep(unsigned first, unsigned n, Kept *kept)
{
    g_autofree uint8_t *there = g_malloc(BLOCK);
    unsigned i;

    store_keep(store, bytes + first * BLOCK, n, 0, kept);
    for (i = 0; i < n; i++) {
        g_assert_cmpint(kept[i].answer, ==, DEDUP_ANSWER_FRAME);
        g_assert_cmpint(frames_read(&store->frames,
                                    frame_slot(store, kept[i].frame), 1,
                                    there), ==, 0);
        g_assert_cmpmem(there, BLOCK, bytes + (first + i) * BLOCK, BLOCK);
    }
}

static void unpin(Kept *kept, unsigned n)
{
    unsigned i;

    QEMU_LOCK_GUARD(&store->lock);
    for (i = 0; i < n; i++) {
        if (kept[i].frame) {
            store_unpin(store, kept[i].frame);
        }
    }
}

/* Equal content is in one frame, in one call and in two; zeroes in none. */
static void test_content(void)
{
    Kept first[NBLOCKS], again[NBLOCKS];

    setup(MiB);
    memcpy(bytes + 5 * BLOCK, bytes + 2 * BLOCK, BLOCK);
    keep(0, NBLOCKS, first);
    g_assert_true(first[5].frame == first[2].frame);
    g_assert_cmpint(store->nsealed, ==, NBLOCKS - 1);
    keep(4, 4, again);
    g_assert_true(again[1].frame == first[2].frame);
    g_assert_cmpint(store->nsealed, ==, NBLOCKS - 1);
    memset(bytes, 0, BLOCK);
    unpin(first, NBLOCKS);
    unpin(again, 4);
    store_keep(store, bytes, 1, 0, first);
    g_assert_cmpint(first[0].answer, ==, DEDUP_ANSWER_ZEROES);
    g_assert_null(first[0].frame);
    teardown();
}

static void test_second_read(void)
{
    Kept kept;

    setup(MiB);
    store_keep(store, bytes, 1, DEDUP_REQUEST_SECOND_READ, &kept);
    g_assert_cmpint(kept.answer, ==, DEDUP_ANSWER_SEEN_ONCE);
    store_keep(store, bytes, 1, DEDUP_REQUEST_SECOND_READ, &kept);
    g_assert_cmpint(kept.answer, ==, DEDUP_ANSWER_FRAME);
    unpin(&kept, 1);
    teardown();
}

/* What is held or pinned stays; what is not goes, the oldest first. */
static void test_holds(void)
{
    Kept kept[NBLOCKS];
    Process *p;
    uint32_t slot, generation;

    setup(MiB);
    keep(0, 4, kept);
    slot = frame_slot(store, kept[1].frame);
    generation = frame_generation(kept[1].frame);
    WITH_QEMU_LOCK_GUARD(&store->lock) {
        p = process_new(store, 1, 1);
        g_assert_true(process_hold(store, p, kept[1].frame, 7, NULL));
        store_unpin(store, kept[1].frame);
        store_unpin(store, kept[2].frame);
        store_unpin(store, kept[3].frame);
    }
    g_assert_cmpint(store_reclaim(store, 1), ==, 1);
    g_assert_cmpint(store_reclaim(store, 100), ==, 1);
    WITH_QEMU_LOCK_GUARD(&store->lock) {
        process_release(store, p, slot, 6);     /* before it was named */
        process_release(store, p, slot + 1, 9); /* one that it has not */
    }
    g_assert_cmpint(store_reclaim(store, 100), ==, 0);
    WITH_QEMU_LOCK_GUARD(&store->lock) {
        process_release(store, p, slot, 7);
        store_unpin(store, kept[0].frame);
        g_assert_nonnull(store_pin(store, slot, generation));
        store_unpin(store, kept[1].frame);
        process_unref(store, p);
    }
    g_assert_cmpint(store_reclaim(store, 100), ==, 2);
    g_assert_cmpint(frames_memory(&store->frames), ==, 0);
    WITH_QEMU_LOCK_GUARD(&store->lock) {
        g_assert_null(store_pin(store, slot, generation));
    }
    teardown();
}

/* A slot that is used again has another name; a process that ends lets go. */
static void test_full(void)
{
    const uint64_t size = 4 * (BLOCK + STORE_OVERHEAD);
    Kept kept[NBLOCKS], none;
    uint32_t slot, generation;
    Process *p;

    setup(size);
    keep(0, 4, kept);
    store_keep(store, bytes + 4 * BLOCK, 1, 0, &none);
    g_assert_cmpint(none.answer, ==, DEDUP_ANSWER_FULL);
    slot = frame_slot(store, kept[0].frame);
    generation = frame_generation(kept[0].frame);
    WITH_QEMU_LOCK_GUARD(&store->lock) {
        p = process_new(store, 1, 1);
        g_assert_true(process_hold(store, p, kept[0].frame, 1, NULL));
        g_assert_true(process_hold(store, p, kept[1].frame, 1, NULL));
        g_assert_true(process_hold(store, p, kept[2].frame, 1, NULL));
        g_assert_false(process_hold(store, p, kept[3].frame, 1, NULL));
    }
    unpin(kept, 3);
    store_keep(store, bytes + 4 * BLOCK, 1, 0, &none);
    g_assert_cmpint(none.answer, ==, DEDUP_ANSWER_FULL);
    WITH_QEMU_LOCK_GUARD(&store->lock) {
        process_unref(store, p);
    }
    keep(4, 3, kept);
    WITH_QEMU_LOCK_GUARD(&store->lock) {
        g_assert_null(store_pin(store, slot, generation));
    }
    g_assert_cmpint(store->evicted, ==, 3);
    teardown();
}

/* A slot that somebody uses whom no client stands for, or -1. */
static int used_slot;

static void fake_retire(void *frames, const uint32_t *slots, unsigned n,
                        bool *idle)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        idle[i] = slots[i] != used_slot;
    }
}

/* What nobody holds and somebody uses stays, and is still found. */
static void test_used(void)
{
    FramesOps ops = frames_linux;
    Kept kept[NBLOCKS], again;
    uint32_t generation;
    unsigned i, full = 0;

    ops.retire = fake_retire;
    setup_with(&ops, 4 * (BLOCK + STORE_OVERHEAD));
    keep(0, 4, kept);
    used_slot = frame_slot(store, kept[1].frame);
    generation = frame_generation(kept[1].frame);
    unpin(kept, 4);
    /* four idle frames, one of which is in use */
    store_keep(store, bytes + 4 * BLOCK, 4, 0, kept);
    for (i = 0; i < 4; i++) {
        full += kept[i].answer == DEDUP_ANSWER_FULL;
        g_assert_true(kept[i].answer != DEDUP_ANSWER_FRAME ||
                      frame_slot(store, kept[i].frame) != used_slot);
    }
    g_assert_cmpint(full, ==, 1);
    unpin(kept, 4);
    keep(1, 1, &again);
    g_assert_cmpint(frame_slot(store, again.frame), ==, used_slot);
    g_assert_cmpint(frame_generation(again.frame), ==, generation);
    g_assert_false(again.made);
    unpin(&again, 1);
    g_assert_cmpint(store_reclaim(store, 100), ==, 3);
    g_assert_cmpint(store->nidle, ==, 1);
    used_slot = -1;
    g_assert_cmpint(store_reclaim(store, 100), ==, 1);
    g_assert_cmpint(store->evicted, ==, 7);
    teardown();

    /* the oldest one is in use: the next is taken */
    setup_with(&ops, 4 * (BLOCK + STORE_OVERHEAD));
    keep(0, 4, kept);
    used_slot = frame_slot(store, kept[0].frame);
    unpin(kept, 4);
    keep(4, 1, kept);
    unpin(kept, 1);
    used_slot = -1;
    teardown();
}

static uint64_t old_frames;

static uint64_t fake_old_memory(void *frames)
{
    return old_frames * BLOCK;
}

/* Earlier daemons' frames take room: of idle frames, not of the store's. */
static void test_old(void)
{
    FramesOps ops = frames_linux;
    Kept kept[NBLOCKS];

    ops.old_memory = fake_old_memory;
    old_frames = 3;
    setup_with(&ops, 4 * (BLOCK + STORE_OVERHEAD));
    keep(0, 1, kept);
    store_keep(store, bytes + BLOCK, 1, 0, kept + 1);
    g_assert_cmpint(kept[1].answer, ==, DEDUP_ANSWER_FULL);
    unpin(kept, 1);
    /* now there is an idle one */
    keep(1, 1, kept);
    g_assert_cmpint(frames_memory(&store->frames), ==, BLOCK);
    old_frames = 2;
    keep(2, 1, kept + 1);
    store_keep(store, bytes + 3 * BLOCK, 1, 0, kept + 2);
    g_assert_cmpint(kept[2].answer, ==, DEDUP_ANSWER_FULL);
    unpin(kept, 2);
    teardown();
}

static uint64_t memory_at_close;

static void fake_close(void *frames)
{
    memory_at_close = frames_linux.memory(frames);
    frames_linux.close(frames);
}

/* A daemon that ends drops what is idle, and no frame that a client holds. */
static void test_end(void)
{
    FramesOps ops = frames_linux;
    Kept kept[NBLOCKS];
    Process *p;

    ops.retire = fake_retire;
    ops.close = fake_close;
    used_slot = -1;
    setup_with(&ops, MiB);
    keep(0, 4, kept);
    used_slot = frame_slot(store, kept[2].frame);
    WITH_QEMU_LOCK_GUARD(&store->lock) {
        p = process_new(store, 1, 1);
        g_assert_true(process_hold(store, p, kept[0].frame, 1, NULL));
    }
    unpin(kept, 4);
    teardown();
    g_assert_cmpint(memory_at_close, ==, 2 * BLOCK);
    used_slot = -1;
    g_hash_table_destroy(p->held);
    g_free(p);
}

/* --- limits -------------------------------------------------------------- */

static void put(const char *root, const char *path, const char *text)
{
    g_autofree char *full = g_strconcat(root, path, NULL);
    g_autofree char *dir = g_path_get_dirname(full);

    g_assert_cmpint(g_mkdir_with_parents(dir, 0700), ==, 0);
    g_assert_true(g_file_set_contents(full, text, -1, NULL));
}

static void test_limits(void)
{
    g_autofree char *root = g_dir_make_tmp("test-dedup-store-XXXXXX", NULL);
    g_autofree char *remove = g_strdup_printf("rm -r %s", root);

    put(root, "/proc/meminfo", "MemFree: 1 kB\nMemTotal:     8388608 kB\n");
    put(root, "/proc/self/cgroup", "");
    g_assert_cmpint(memory_limit_find(root), ==, 8 * GiB);
    /* version 2: the tightest one up the tree */
    put(root, "/proc/self/cgroup", "0::/a/b/c\n");
    put(root, "/sys/fs/cgroup/a/b/c/memory.max", "max\n");
    put(root, "/sys/fs/cgroup/a/b/memory.max", "268435456\n");
    put(root, "/sys/fs/cgroup/a/memory.max", "1073741824\n");
    g_assert_cmpint(memory_limit_find(root), ==, 256 * MiB);
    /* version 1, beside a version 2 without the controller */
    put(root, "/proc/self/cgroup", "9:cpu:/x\n4:freezer,memory:/y\n0::/z\n");
    put(root, "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "9223372036854771712\n");
    put(root, "/sys/fs/cgroup/memory/y/memory.limit_in_bytes", "134217728\n");
    g_assert_cmpint(memory_limit_find(root), ==, 128 * MiB);
    g_assert_cmpint(system(remove), ==, 0);
}

static void check_turns(Turns *t, dev_t device, const char *want)
{
    for (; *want; want++) {
        char *job = turns_end(t, device);

        g_assert_cmpint(job ? *job : '-', ==, *want);
    }
}

/* Clients take turns at a disk, which keeps no other one waiting. */
static void test_turns(void)
{
    static char jobs[] = "abcdefgh";
    Turns *t = turns_new(2);
    const char *x = "x", *y = "y", *z = "z";
    unsigned i;

    g_assert_true(turns_begin(t, 1, x, &jobs[0]));
    g_assert_true(turns_begin(t, 1, x, &jobs[1]));
    for (i = 2; i < 6; i++) {
        g_assert_false(turns_begin(t, 1, x, &jobs[i]));
    }
    g_assert_false(turns_begin(t, 1, y, &jobs[6]));
    g_assert_false(turns_begin(t, 1, z, &jobs[7]));
    g_assert_true(turns_begin(t, 2, x, &jobs[0]));
    check_turns(t, 1, "cghd");
    check_turns(t, 2, "-");
    g_assert_false(turns_begin(t, 1, y, &jobs[6]));
    check_turns(t, 1, "egf--");
    g_assert_true(turns_begin(t, 1, y, &jobs[6]));
    check_turns(t, 1, "-");
    turns_free(t);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/dedup/store/content", test_content);
    g_test_add_func("/dedup/store/second-read", test_second_read);
    g_test_add_func("/dedup/store/holds", test_holds);
    g_test_add_func("/dedup/store/full", test_full);
    g_test_add_func("/dedup/store/used", test_used);
    g_test_add_func("/dedup/store/old", test_old);
    g_test_add_func("/dedup/store/end", test_end);
    g_test_add_func("/dedup/store/limits", test_limits);
    g_test_add_func("/dedup/store/turns", test_turns);
    return g_test_run();
}
