/*
 * dedup-share: tests of images that share physical blocks
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * On XFS and btrfs, which are made in files and mounted, in a mount namespace
 * of their own.  Skipped where that cannot be.  The nodes are real ones.
 */

#include "qemu/osdep.h"
#include <sched.h>
#include <sys/mount.h>
#include <glib/gstdio.h>
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "block/block-global-state.h"
#include "block/dedup-share/extents.h"
#include "block/dedup-share/layer.h"
#include "block/dedup-share/group.h"
#include "block/dedup-share/linux.h"
#include "block/dedup-share/map.h"
#include "block/dedup-share/stats.h"
#include "system/block-backend.h"
#include "dedup-guest-ram.h"

#define PAGE DEDUP_BLOCK_SIZE
#define BLOCKS 128
#define SIZE (BLOCKS * PAGE)

static char *top;               /* a directory on a tmpfs */
static char *mnt;               /* where the file system is mounted */

/* --- files -------------------------------------------------------------- */

static int G_GNUC_PRINTF(1, 2) try_run(const char *format, ...)
{
    g_autofree char *command = NULL;
    va_list ap;

    va_start(ap, format);
    command = g_strdup_vprintf(format, ap);
    va_end(ap);
    g_test_message("%s", command);
    return system(command);
}

#define run(...) g_assert_cmpint(try_run(__VA_ARGS__), ==, 0)

static char *path(const char *name)
{
    return g_build_filename(mnt, name, NULL);
}

/* Until files have keys. */
static void settle(void)
{
    g_usleep(1100 * 1000);
}

static void make_bytes(uint8_t *bytes, uint32_t seed)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(seed);
    unsigned i;

    for (i = 0; i < SIZE / 4; i++) {
        ((uint32_t *)bytes)[i] = g_rand_int(rand);
    }
}

static void make_file(const char *name, const uint8_t *bytes)
{
    g_autofree char *p = path(name);

    g_assert_true(g_file_set_contents(p, (const char *)bytes, SIZE, NULL));
}

static void copy_file(const char *from, const char *to)
{
    run("cp --reflink=always %s/%s %s/%s && sync -f %s", mnt, from, mnt, to,
        mnt);
}

/* --- nodes -------------------------------------------------------------- */

static BlockBackend *open_as(const char *name, const char *format, bool write)
{
    g_autofree char *file = path(name);
    g_autofree char *options =
        g_strdup_printf("json:{\"driver\":\"dedup-share\",\"store\":\"xen\","
                        "\"index-dir\":\"%s/index\",\"store-size\":4194304,"
                        "\"file\":{\"driver\":\"%s\",\"file\":{\"driver\":"
                        "\"file\",\"filename\":\"%s\"}}}", top, format, file);
    BlockBackend *blk = blk_new(qemu_get_aio_context(),
                                BLK_PERM_CONSISTENT_READ |
                                (write ? BLK_PERM_WRITE : 0),
                                BLK_PERM_CONSISTENT_READ |
                                BLK_PERM_WRITE_UNCHANGED);
    BlockDriverState *bs = bdrv_open(options, NULL, NULL,
                                     write ? BDRV_O_RDWR : 0, &error_abort);

    blk_insert_bs(blk, bs, &error_abort);
    bdrv_unref(bs);
    return blk;
}

static BlockBackend *open_raw(const char *name, bool write)
{
    return open_as(name, "raw", write);
}

/* Read all, which must be @want.  Returns how many blocks were read below. */
static unsigned read_all(BlockBackend *blk, const uint8_t *want)
{
    g_autofree uint8_t *buf = g_malloc(SIZE);
    DedupShareStats *s;
    static uint64_t before;
    uint64_t after;
    unsigned i;

    s = dedup_share_stats(blk_bs(blk));
    before = s->bytes_filled + s->bytes_passed;
    qapi_free_DedupShareStats(s);
    for (i = 0; i < SIZE; i += 8 * PAGE) {
        g_assert_cmpint(blk_pread(blk, i, 8 * PAGE, buf + i, 0), ==, 0);
    }
    for (i = 0; i < BLOCKS; i++) {
        g_assert_cmpmem(buf + i * PAGE, PAGE, want + i * PAGE, PAGE);
    }
    s = dedup_share_stats(blk_bs(blk));
    after = s->bytes_filled + s->bytes_passed;
    qapi_free_DedupShareStats(s);
    return (after - before) / PAGE;
}

static void write_block(BlockBackend *blk, uint8_t *bytes, unsigned block)
{
    uint8_t *at = bytes + block * PAGE;

    at[block] ^= 0xff;
    g_assert_cmpint(blk_pwrite(blk, block * PAGE, PAGE, at, 0), ==, 0);
}

static void close_all(BlockBackend **blks, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        blk_unref(blks[i]);
    }
}

/* --- what is found ------------------------------------------------------ */

/* Copies of a base that is only read, themselves read or written to. */
static void test_copies(void)
{
    g_autofree uint8_t *bytes = g_malloc(SIZE);
    g_autofree uint8_t *theirs = NULL;
    BlockBackend *b[4];

    make_bytes(bytes, 1);
    theirs = g_memdup2(bytes, SIZE);
    make_file("a", bytes);
    copy_file("a", "b");
    copy_file("a", "c");
    settle();
    b[0] = open_raw("a", false);
    g_assert_cmpint(read_all(b[0], bytes), ==, BLOCKS);
    b[1] = open_raw("b", false);
    g_assert_cmpint(read_all(b[1], bytes), ==, 0);
    b[2] = open_raw("c", true);
    g_assert_cmpint(read_all(b[2], bytes), ==, 0);

    write_block(b[2], theirs, 5);
    g_assert_cmpint(read_all(b[2], theirs), ==, 1);
    g_assert_cmpint(read_all(b[2], theirs), ==, 0);
    g_assert_cmpint(read_all(b[0], bytes), ==, 0);

    /* a copy of what is being written to */
    blk_flush(b[2]);
    copy_file("c", "d");
    settle();
    b[3] = open_raw("d", false);
    g_assert_cmpint(read_all(b[3], theirs), ==, 1);
    close_all(b, 4);
}

/* The one that others share with is written to, and was first. */
static void test_writer(void)
{
    g_autofree uint8_t *bytes = g_malloc(SIZE);
    g_autofree uint8_t *theirs = NULL;
    BlockBackend *b[3];

    make_bytes(bytes, 2);
    theirs = g_memdup2(bytes, SIZE);
    make_file("a", bytes);
    copy_file("a", "b");
    settle();
    b[0] = open_raw("a", true);
    g_assert_cmpint(read_all(b[0], theirs), ==, BLOCKS);
    write_block(b[0], theirs, 7);
    write_block(b[0], theirs, 64);
    b[1] = open_raw("b", false);
    g_assert_cmpint(read_all(b[1], bytes), ==, 2);  /* the dirty ones */

    /* made after it: its blocks 7 and 64 are those that were written */
    blk_flush(b[0]);
    copy_file("a", "c");
    settle();
    b[2] = open_raw("c", false);
    g_assert_cmpint(read_all(b[2], theirs), ==, 2);
    g_assert_cmpint(read_all(b[0], theirs), ==, 2);
    close_all(b, 3);
}

/* An image whose copies are not whole: blocks of its own in between. */
static void test_parts(void)
{
    g_autofree uint8_t *bytes = g_malloc(SIZE);
    g_autofree uint8_t *theirs = NULL;
    BlockBackend *b[2];
    unsigned i;

    make_bytes(bytes, 3);
    make_file("a", bytes);
    copy_file("a", "b");
    theirs = g_memdup2(bytes, SIZE);
    for (i = 0; i < BLOCKS; i += 10) {
        theirs[i * PAGE] ^= 1;
        run("printf '\\%03o' | dd of=%s/b bs=1 seek=%u conv=notrunc "
            "status=none", theirs[i * PAGE], mnt, i * PAGE);
    }
    run("sync -f %s", mnt);
    settle();
    b[0] = open_raw("a", false);
    read_all(b[0], bytes);
    b[1] = open_raw("b", false);
    g_assert_cmpint(read_all(b[1], theirs), ==, DIV_ROUND_UP(BLOCKS, 10));
    close_all(b, 2);
}

static void make_qcow2(const char *name, const uint8_t *bytes)
{
    g_autofree char *p = path(name);
    BlockBackend *blk;

    bdrv_img_create(p, "qcow2", NULL, NULL, NULL, SIZE, 0, true, &error_abort);
    blk = open_as(name, "qcow2", true);
    g_assert_cmpint(blk_pwrite(blk, 0, SIZE, bytes, 0), ==, 0);
    blk_unref(blk);
    /* XFS cannot say of a part of a block that it is shared */
    run("truncate -s %%4096 %s && sync -f %s", p, mnt);
}

static void test_qcow2(void)
{
    g_autofree uint8_t *bytes = g_malloc(SIZE);
    g_autofree uint8_t *theirs = NULL;
    BlockBackend *b[4];

    make_bytes(bytes, 4);
    theirs = g_memdup2(bytes, SIZE);
    make_qcow2("a", bytes);
    copy_file("a", "b");
    copy_file("a", "c");
    settle();
    b[0] = open_as("a", "qcow2", false);
    g_assert_cmpint(read_all(b[0], bytes), ==, BLOCKS);
    b[1] = open_as("b", "qcow2", false);
    g_assert_cmpint(read_all(b[1], bytes), ==, 0);
    /* a raw image has its blocks elsewhere */
    b[2] = open_as("b", "raw", false);
    blk_unref(b[2]);
    b[2] = open_as("c", "qcow2", true);         /* by content only */
    g_assert_cmpint(read_all(b[2], bytes), ==, BLOCKS);
    write_block(b[2], theirs, 100);
    /* the whole cluster is its own from now on */
    g_assert_cmpint(read_all(b[2], theirs), ==, 16);
    blk_flush(b[2]);
    copy_file("c", "d");
    settle();
    b[3] = open_as("d", "qcow2", false);
    read_all(b[3], theirs);
    read_all(b[1], bytes);
    close_all(b, 4);
}

/* --- full copies -------------------------------------------------------- */

static uint64_t frames_of(BlockBackend *blk)
{
    DedupShareStats *s = dedup_share_stats(blk_bs(blk));
    uint64_t frames = s->store_stats->frames;

    qapi_free_DedupShareStats(s);
    return frames;
}

/* Two guests write to copies of their own; then one rewrites a tenth. */
static void test_full_copies(void)
{
    g_autofree uint8_t *bytes = g_malloc(SIZE);
    g_autofree uint8_t *theirs = NULL;
    g_autoptr(GRand) rand = g_rand_new_with_seed(9);
    BlockBackend *b[2];
    bool rewritten[BLOCKS] = { 0 };
    unsigned i, n = 0;

    make_bytes(bytes, 9);
    theirs = g_memdup2(bytes, SIZE);
    make_file("a", bytes);
    make_file("b", bytes);
    b[0] = open_raw("a", true);
    b[1] = open_raw("b", true);
    g_assert_cmpint(read_all(b[0], bytes), ==, BLOCKS);
    g_assert_cmpint(read_all(b[1], bytes), ==, BLOCKS);
    /* one frame a block: of BLOCKS that could be saved, so many are */
    g_assert_cmpint(2 * BLOCKS - frames_of(b[0]), >=, BLOCKS * 0.97);
    g_assert_cmpint(read_all(b[1], bytes), ==, 0);

    while (n < BLOCKS / 10) {
        i = g_rand_int_range(rand, 0, BLOCKS);
        if (!rewritten[i]) {
            rewritten[i] = true;
            write_block(b[1], theirs, i);
            n++;
        }
    }
    g_assert_cmpint(read_all(b[1], theirs), ==, n);
    g_assert_cmpint(read_all(b[0], bytes), ==, 0);
    g_test_message("frames: %" PRIu64 ", of %u blocks and %u rewritten",
                   frames_of(b[0]), BLOCKS, n);
    g_assert_cmpint(2 * BLOCKS - frames_of(b[0]), >=, (BLOCKS - n) * 0.94);
    close_all(b, 2);
}

/* --- identity ----------------------------------------------------------- */

static void expect_key(const char *file, DedupLayerKey want,
                       char key[DEDUP_LAYER_KEY_SIZE])
{
    const char *why;

    g_assert_cmpint(dedup_layer_key_of_path(file, "raw", key, &why), ==, want);
}

/* A file is replaced, and both are open: neither is taken for the other. */
static void test_replaced(void)
{
    g_autofree uint8_t *bytes = g_malloc(SIZE);
    g_autofree uint8_t *others = g_malloc(SIZE);
    BlockBackend *b[3];
    int write;

    make_bytes(bytes, 11);
    make_bytes(others, 12);
    for (write = 0; write < 2; write++) {
        make_file("a", bytes);
        settle();
        b[0] = open_raw("a", write);
        read_all(b[0], bytes);
        make_file("new", others);
        run("mv %s/new %s/a", mnt, mnt);
        settle();
        b[1] = open_raw("a", write);
        read_all(b[1], others);
        make_file("b", bytes);
        b[2] = open_raw("b", false);            /* a drained section for all */
        read_all(b[2], bytes);
        read_all(b[0], bytes);
        read_all(b[1], others);
        close_all(b, 3);
    }
}

/* One file by several names; others that look the same. */
static void test_identity(void)
{
    g_autofree uint8_t *bytes = g_malloc(SIZE);
    g_autofree char *a = path("a"), *b = path("b"), *bound = path("bound/a");
    g_autofree char *device = NULL;
    char key[DEDUP_LAYER_KEY_SIZE], other[DEDUP_LAYER_KEY_SIZE];

    make_bytes(bytes, 10);
    make_file("a", bytes);
    run("ln %s %s && mkdir %s/bound && mount --bind %s %s/bound", a, b, mnt,
        mnt, mnt);
    settle();
    expect_key(a, DEDUP_KEY_SHARED, key);
    expect_key(b, DEDUP_KEY_SHARED, other);
    g_assert_cmpstr(key, ==, other);            /* a hard link */
    expect_key(bound, DEDUP_KEY_SHARED, other);
    g_assert_cmpstr(key, ==, other);            /* a bind mount */
    run("umount %s/bound", mnt);

    /* restored over itself, with its times and its size; truncated and back */
    run("cp -p %s %s/saved && cp -p %s/saved %s", a, mnt, mnt, a);
    settle();
    expect_key(a, DEDUP_KEY_SHARED, other);
    g_assert_cmpstr(key, !=, other);
    memcpy(key, other, sizeof(key));
    run("touch -r %s %s/stamp && truncate -s 0 %s && truncate -s %u %s && "
        "touch -r %s/stamp %s", a, mnt, a, SIZE, a, mnt, a);
    settle();
    expect_key(a, DEDUP_KEY_SHARED, other);
    g_assert_cmpstr(key, !=, other);
    /* replaced by one with the same times and size */
    memcpy(key, other, sizeof(key));
    run("cp -p %s %s/new && mv %s/new %s", a, mnt, mnt, a);
    settle();
    expect_key(a, DEDUP_KEY_SHARED, other);
    g_assert_cmpstr(key, !=, other);

    device = g_strdup("/dev/loop0");            /* what we are mounted from */
    expect_key(device, DEDUP_KEY_NONE, other);
}

/* --- what must not be found --------------------------------------------- */

/* Do two files have, or did they have, a block of the disk in common? */
static bool overlap(const GArray *x, const GArray *y)
{
    unsigned i, j;

    for (i = 0; i < x->len; i++) {
        for (j = 0; j < y->len; j++) {
            const DedupExtent *a = &g_array_index(x, DedupExtent, i);
            const DedupExtent *b = &g_array_index(y, DedupExtent, j);

            if (a->physical < b->physical + b->length &&
                b->physical < a->physical + a->length) {
                return true;
            }
        }
    }
    return false;
}

static GArray *extents_of(const char *name)
{
    g_autofree char *p = path(name);
    struct stat st;

    g_assert_cmpint(stat(p, &st), ==, 0);
    return dedup_extents_get(p, st.st_dev, st.st_ino);
}

/*
 * A's blocks are freed and get other bytes, in files that share them.  Its map
 * is still there, with frames.
 */
static void test_reused(void)
{
    g_autofree uint8_t *bytes = g_malloc(SIZE);
    g_autofree uint8_t *others = g_malloc(SIZE);
    g_autoptr(GArray) old = NULL;
    BlockBackend *b[4];
    unsigned i, reused = 0;

    make_bytes(bytes, 5);
    make_bytes(others, 6);
    make_file("keep", bytes);           /* so that the group stays */
    make_file("a", bytes);
    copy_file("a", "b");
    settle();
    b[0] = open_raw("keep", false);
    b[1] = open_raw("a", false);
    read_all(b[1], bytes);
    blk_unref(b[1]);
    old = extents_of("a");
    run("rm %s/a %s/b && sync -f %s && sync -f %s", mnt, mnt, mnt, mnt);
    for (i = 0; i < 8; i++) {           /* one of them gets the blocks */
        g_autofree char *name = g_strdup_printf("n%u", i);
        g_autofree char *copy = g_strdup_printf("m%u", i);

        make_file(name, others);
        copy_file(name, copy);
    }
    make_file("a", others);             /* under the old name, too */
    copy_file("a", "b");
    settle();
    for (i = 0; i < 8; i++) {
        g_autofree char *copy = g_strdup_printf("m%u", i);

        g_autoptr(GArray) now = extents_of(copy);

        reused += overlap(old, now);
        b[1] = open_raw(copy, false);
        read_all(b[1], others);
        blk_unref(b[1]);
    }
    g_test_message("%u of 8 files have blocks of the old one", reused);
    g_assert_cmpint(reused, >, 0);
    b[1] = open_raw("b", false);
    read_all(b[1], others);
    close_all(b, 2);
}

/* As the writer would record what it has read; the store has it. */
static void fill_map(DedupGroup *g, DedupMap *map, const uint8_t *bytes)
{
    unsigned i;

    for (i = 0; i < BLOCKS; i++) {
        DedupDigest d = dedup_digest(&g->index, bytes + i * PAGE);
        DedupFrameId id;

        g_assert_true(dedup_map_back(map, i));
        g_assert_true(dedup_hash_find(&g->index, &d, &id));
        g_assert_true(dedup_map_record(map, i, (DedupFrameId) { 0 }, id));
    }
}

/*
 * The file of a writer that lives, in another process, is replaced under its
 * name, by a copy of what the next image is a copy of.
 */
static void test_writer_replaced(void)
{
    g_autofree uint8_t *bytes = g_malloc(SIZE);
    g_autofree uint8_t *others = g_malloc(SIZE);
    g_autofree char *a = path("a");
    char key[DEDUP_LAYER_KEY_SIZE];
    DedupMapLayer layer = {
        .key = key, .nblocks = BLOCKS, .path = a, .writer = true,
    };
    DedupGroup *g;
    DedupMap *map;
    struct stat st;
    const char *why;
    BlockBackend *b[2];

    make_bytes(bytes, 13);
    make_bytes(others, 14);
    make_file("golden", bytes);
    copy_file("golden", "a");
    make_file("golden2", others);
    copy_file("golden2", "b");
    settle();
    b[0] = open_raw("golden", false);           /* the group stays */
    b[1] = open_raw("a", true);
    blk_unref(b[1]);
    g_assert_cmpint(dedup_layer_key_of_path(a, "raw", key, &why), ==,
                    DEDUP_KEY_SHARED);
    g_assert_cmpint(stat(a, &st), ==, 0);
    layer.dev = st.st_dev;
    layer.ino = st.st_ino;
    g = dedup_group_find("default");
    map = dedup_map_open(&g->index, g->dir.fd, &layer, &error_abort);
    read_all(b[0], bytes);
    fill_map(g, map, bytes);

    run("mv %s/a %s/old", mnt, mnt);
    copy_file("golden2", "a");
    settle();
    b[1] = open_raw("b", false);
    read_all(b[1], others);
    dedup_map_close(map);
    close_all(b, 2);
}

/* A is changed in place by somebody else after its frames were made. */
static void test_changed(void)
{
    g_autofree uint8_t *bytes = g_malloc(SIZE);
    g_autofree uint8_t *others = NULL;
    BlockBackend *b[3];

    make_bytes(bytes, 7);
    others = g_memdup2(bytes, SIZE);
    make_file("keep", bytes);
    make_file("a", bytes);
    settle();
    b[0] = open_raw("keep", false);
    b[1] = open_raw("a", false);
    read_all(b[1], bytes);
    blk_unref(b[1]);
    /* in place, as nobody shares its blocks yet; the times put back */
    others[9 * PAGE] ^= 0x40;
    run("touch -r %s/a %s/stamp; printf '\\%03o' | dd of=%s/a bs=1 seek=%u "
        "conv=notrunc status=none; touch -r %s/stamp %s/a; sync -f %s", mnt,
        mnt, others[9 * PAGE], mnt, 9 * PAGE, mnt, mnt, mnt);
    copy_file("a", "b");
    settle();
    b[1] = open_raw("b", false);
    read_all(b[1], others);
    b[2] = open_raw("a", false);
    read_all(b[2], others);
    close_all(b, 3);
}

/*
 * Inodes without room for fractions of seconds: the image has no key.  Its
 * blocks are found all the same, each time it is opened, by their content.
 */
static void test_coarse(void)
{
    g_autofree uint8_t *bytes = g_malloc(SIZE);
    g_autofree char *a = path("a");
    char key[DEDUP_LAYER_KEY_SIZE];
    DedupShareStats *s;
    const char *why;
    BlockBackend *b[2];

    make_bytes(bytes, 8);
    make_file("a", bytes);
    make_file("b", bytes);
    settle();
    g_assert_cmpint(dedup_layer_key_of_path(a, "raw", key, &why), ==,
                    DEDUP_KEY_PRIVATE);
    b[0] = open_raw("a", false);
    g_assert_cmpint(read_all(b[0], bytes), ==, BLOCKS);
    g_assert_cmpint(read_all(b[0], bytes), ==, 0);
    b[1] = open_raw("b", false);
    g_assert_cmpint(read_all(b[1], bytes), ==, BLOCKS);
    s = dedup_share_stats(blk_bs(b[1]));
    g_assert_cmpint(s->blocks_matched, ==, BLOCKS);
    qapi_free_DedupShareStats(s);
    close_all(b, 2);
}

/* --- file systems ------------------------------------------------------- */

static const char *why_not;

static bool make_fs(const char *type)
{
    g_autofree char *image = g_build_filename(top, "fs.img", NULL);
    const char *options = !strcmp(type, "xfs") ? "-q -m reflink=1" :
                          !strcmp(type, "ext4") ? "-q -I 128" : "-q";

    if (!strcmp(type, "tmpfs")) {
        return true;            /* it is one */
    }
    run("truncate -s 400M %s", image);
    if (try_run("mkfs.%s %s %s >/dev/null 2>&1", type, options, image)) {
        why_not = "cannot make the file system";
        return false;
    }
    if (try_run("mount -o loop %s %s 2>/dev/null", image, mnt)) {
        why_not = "cannot mount the file system";
        return false;
    }
    return true;
}

static void on_fs(const char *type, void (*test)(void))
{
    const char *base = g_file_test("/dev/shm", G_FILE_TEST_IS_DIR) ? "/dev/shm"
                                                                   : "/run";

    top = g_strdup_printf("%s/test-dedup-XXXXXX", base);
    g_assert_nonnull(g_mkdtemp(top));
    mnt = g_build_filename(top, "mnt", NULL);
    g_assert_cmpint(g_mkdir(mnt, 0700), ==, 0);
    if (make_fs(type)) {
        test();
        dedup_groups_leave();
        try_run("umount %s 2>/dev/null", mnt);
    } else {
        g_test_skip(why_not);
    }
    run("rm -r %s", top);
    g_free(mnt);
    g_free(top);
}

typedef struct Case {
    const char *type;
    void (*test)(void);
} Case;

static void run_case(const void *opaque)
{
    const Case *c = opaque;

    on_fs(c->type, c->test);
}

static void add(const char *type, const char *name, void (*test)(void))
{
    g_autofree char *full = g_strdup_printf("/dedup/reflink/%s/%s", type, name);
    Case *c = g_new(Case, 1);

    *c = (Case) { type, test };
    g_test_add_data_func_full(full, c, run_case, g_free);
}

/* Reflinks are known where QEMUs keep the store themselves, as on Xen. */
static DedupStoreOps store_ops;

int main(int argc, char **argv)
{
    static const char *const types[] = { "xfs", "btrfs" };
    unsigned i;

    /* before there are threads; without, what cannot be mounted is skipped */
    if (!unshare(CLONE_NEWNS)) {
        mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL);
    }
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    bdrv_init();
    store_ops = dedup_linux_store_ops;
    store_ops.kind = DEDUP_SHARE_STORE_XEN;
    dedup_store_register(&store_ops);
    dedup_guest_ram_new(0);             /* all is copied */
    for (i = 0; i < ARRAY_SIZE(types); i++) {
        add(types[i], "copies", test_copies);
        add(types[i], "writer", test_writer);
        add(types[i], "parts", test_parts);
        add(types[i], "qcow2", test_qcow2);
        add(types[i], "reused", test_reused);
        add(types[i], "changed", test_changed);
        add(types[i], "writer-replaced", test_writer_replaced);
        add(types[i], "identity", test_identity);
    }
    add("ext4", "coarse", test_coarse);
    add("tmpfs", "full-copies", test_full_copies);
    add("tmpfs", "replaced", test_replaced);
    return g_test_run();
}
