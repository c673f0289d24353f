/*
 * dedup-share: tests of guest pages that map frames
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The "guest's memory" is a piece of anonymous memory, the frames are those of
 * a file: slot n holds the content n.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/memfd.h"
#include "block/dedup-share/held.h"
#include "dedup-guest-ram.h"

#define NFRAMES 1024
#define NPAGES 1024
#define PAGE DEDUP_BLOCK_SIZE

static DedupHeld *held;
static uint8_t *guest;          /* NPAGES */

/* What the frame @slot holds. */
static void make_content(uint8_t *buf, uint64_t slot)
{
    uint64_t *p = (uint64_t *)buf;
    int i;

    for (i = 0; i < PAGE / 8; i++) {
        p[i] = slot * 0x9e3779b97f4a7c15ULL + i;
    }
}

static void check_content(const uint8_t *page, uint64_t slot)
{
    uint8_t want[PAGE];

    make_content(want, slot);
    g_assert_cmpmem(page, PAGE, want, PAGE);
}

static void setup(void)
{
    DedupMsgWelcome w = {
        .store = DEDUP_STORE_KIND_LINUX, .nslots = NFRAMES, .uuid = { 1 },
    };
    int fd = qemu_memfd_create("frames", NFRAMES * PAGE, false, 0, 0,
                               &error_abort);
    uint8_t page[PAGE];
    unsigned i, done;

    for (i = 0; i < NFRAMES; i++) {
        make_content(page, i);
        g_assert_cmpint(pwrite(fd, page, PAGE, (off_t)i * PAGE), ==, PAGE);
    }
    held = dedup_held_new(fd, &w, &error_abort);
    for (i = 0; i < NFRAMES; i++) {
        DedupMsgFrame f = {
            .answer = DEDUP_ANSWER_FRAME, .slot = i, .generation = 1,
        };

        g_assert_true(dedup_held_add(held, i + 1, &f, 1, false, &done));
        g_assert_cmpint(done, ==, 1);
    }
    guest = dedup_guest_ram_new(NPAGES * PAGE);
}

static void teardown(void)
{
    dedup_guest_ram_free();
    dedup_held_unref(held);
}

static void give(uint32_t slot, unsigned page, unsigned n)
{
    g_assert_true(dedup_held_give(held, slot, guest + page * PAGE, n));
}

static void dont_give(uint32_t slot, unsigned page, unsigned n)
{
    g_assert_false(dedup_held_give(held, slot, guest + page * PAGE, n));
}

/* Mappings of the frames, as the kernel counts them. */
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
             strstr(lines[i], "memfd:frames");
    }
    return n;
}

static void test_give(void)
{
    unsigned i;

    setup();
    give(100, 8, 64);
    for (i = 0; i < 64; i++) {
        check_content(guest + (8 + i) * PAGE, 100 + i);
    }
    g_assert_cmpint(count_maps(), ==, 1);
    memset(guest + 9 * PAGE, 0x77, PAGE);       /* the guest writes */
    check_content(guest + 8 * PAGE, 100);
    give(100, 200, 64);                         /* the frames are unchanged */
    check_content(guest + 201 * PAGE, 101);
    g_assert_cmphex(guest[9 * PAGE], ==, 0x77);
    give(105, 9, 1);                            /* onto what is given */
    check_content(guest + 9 * PAGE, 105);
    g_assert_cmpint(dedup_guest_ram_advised(), >=, 3);
    teardown();
}

/* Where it may not be mapped it is copied, also to what is no guest's. */
static void test_copy(void)
{
    g_autofree uint8_t *buf = g_malloc(2 * PAGE + 1);

    setup();
    dedup_guest_ram_permit(false);
    dont_give(7, 0, 4);
    g_assert_cmpint(dedup_held_copy(held, 7, 0, guest, 4 * PAGE), ==, 0);
    check_content(guest + 3 * PAGE, 10);
    g_assert_cmpint(count_maps(), ==, 0);
    dedup_guest_ram_permit(true);
    g_assert_false(dedup_held_give(held, 9, buf + 1, 1));
    g_assert_cmpint(dedup_held_copy(held, 9, 0, buf + 1, 2 * PAGE), ==, 0);
    check_content(buf + 1 + PAGE, 10);
    give(7, NPAGES - 4, 4);                     /* up to the end */
    give(7, NPAGES - 4, 4);
    teardown();
}

/* What is counted is what the kernel has; a budget is kept. */
static void test_mappings(void)
{
    uint64_t used, most;
    unsigned i, before;

    setup();
    give(0, 0, 128);
    g_assert_cmpint(count_maps(), ==, 1);
    give(128, 128, 128);                        /* what follows is merged */
    g_assert_cmpint(count_maps(), ==, 1);
    for (i = 0; i < 128; i += 2) {
        give(255 - i, i, 1);
    }
    dedup_given_mappings(&used, &most);
    before = count_maps();
    g_assert_cmpint(used, ==, before + 1);      /* boundaries: one more */
    dedup_given_set_budget(before);
    dont_give(512, 512, 1);
    dont_give(600, 600, 64);
    dedup_given_set_budget(before * 5 / 4 + 1);
    dont_give(512, 512, 1);                     /* the long runs first */
    give(600, 600, 64);
    for (i = 0; i < 128; i += 2) {
        check_content(guest + i * PAGE, 255 - i);
        check_content(guest + (i + 1) * PAGE, i + 1);
    }
    dedup_given_set_budget(most);
    teardown();
}

/* Memory that is discarded shows no frame. */
static void test_drop(void)
{
    static const uint8_t zeroes[PAGE];
    unsigned i;

    setup();
    memset(guest, 0x55, 100 * PAGE);
    give(0, 10, 32);
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

static void release_any(void *opaque, const uint32_t *slots, unsigned n,
                        uint64_t serial)
{
}

/* Let go of what the guest does not use; how much is held then. */
static unsigned trim(void)
{
    dedup_held_trim(held, release_any, NULL);
    return dedup_held_count(held);
}

/* A frame is let go when the guest has overwritten it, and not before. */
static void test_used(void)
{
    unsigned i;

    setup();
    give(0, 0, 64);
    /* a page that was never touched is one that the guest has */
    g_assert_cmpint(trim(), ==, 64);
    for (i = 0; i < 64; i++) {
        check_content(guest + i * PAGE, i);
    }
    g_assert_cmpint(trim(), ==, 64);
    memset(guest + 10 * PAGE, 0x99, 5 * PAGE);
    g_assert_cmpint(trim(), ==, 59);
    give(200, 0, 4);                            /* in place of others */
    dedup_given_drop(guest + 20 * PAGE, 10 * PAGE);
    g_assert_cmpint(trim(), ==, 59 - 4 - 10);
    for (i = 30; i < 64; i++) {
        check_content(guest + i * PAGE, i);
    }
    teardown();
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/dedup/given/give", test_give);
    g_test_add_func("/dedup/given/copy", test_copy);
    g_test_add_func("/dedup/given/mappings", test_mappings);
    g_test_add_func("/dedup/given/drop", test_drop);
    g_test_add_func("/dedup/given/used", test_used);
    return g_test_run();
}
