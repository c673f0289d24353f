/*
 * dedup-share: tests of reads that ask a store daemon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Real nodes, and the real daemon.  What is read is compared with what was
 * written; what was read from images, with the node's counters.
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qom/object.h"
#include "block/block-global-state.h"
#include "block/block_int-common.h"
#include "block/dedup-share/linux/probe.h"
#include "dedup-daemon.h"
#include "dedup-guest-ram.h"
#include "dedup-nodes.h"

#define PAGE DEDUP_BLOCK_SIZE
#define SIZE (2 * MiB)
#define BLOCKS (SIZE / PAGE)
#define SHARE_ALL "\"share\":\"all\","
#define ZEROES 40               /* a block of zeroes */

static char *dir, *sock;
static const char *more;        /* options */
static uint8_t *guest;          /* SIZE */
static uint8_t *bytes;          /* what the base image holds */
static GPid pid;

static char *file(const char *name)
{
    return g_build_filename(dir, name, NULL);
}

static void setup(void)
{
    g_autofree char *image = NULL;
    unsigned i;

    dir = g_strdup_printf("%s/dedup-asked-XXXXXX", g_get_tmp_dir());
    g_assert_nonnull(g_mkdtemp(dir));
    sock = file("sock");
    guest = dedup_guest_ram_new(SIZE);
    bytes = g_malloc(SIZE);
    for (i = 0; i < SIZE / 4; i++) {
        ((uint32_t *)bytes)[i] = g_test_rand_int();
    }
    memset(bytes + ZEROES * PAGE, 0, PAGE);
    image = file("image");
    g_assert_true(g_file_set_contents(image, (char *)bytes, SIZE, NULL));
    pid = dedup_daemon_start(sock, "16M");
    more = "";
}

static void teardown(void)
{
    const char *const names[] = { "image", "base", "overlay", "copy" };
    unsigned i;

    dedup_guest_ram_free();
    dedup_daemon_end(pid, sock, SIGTERM);
    for (i = 0; i < ARRAY_SIZE(names); i++) {
        g_autofree char *path = file(names[i]);

        g_unlink(path);
    }
    g_assert_cmpint(g_rmdir(dir), ==, 0);       /* nothing left behind */
    g_free(dir);
    g_free(sock);
    g_free(bytes);
}

static BlockBackend *G_GNUC_PRINTF(2, 3) open_over(bool write,
                                                   const char *below, ...)
{
    g_autofree char *child = NULL;
    va_list ap;

    va_start(ap, below);
    child = g_strdup_vprintf(below, ap);
    va_end(ap);
    return dedup_nodes_open(sock, more, write, child);
}

static BlockBackend *open_image(void)
{
    return open_over(false, "{\"driver\":\"raw\",\"file\":{\"driver\":"
                     "\"file\",\"filename\":\"%s/image\"}}", dir);
}

/* Of raw format, and the guest's own. */
static BlockBackend *open_own(const char *name)
{
    return open_over(true, "{\"driver\":\"raw\",\"file\":{\"driver\":"
                     "\"file\",\"filename\":\"%s/%s\"}}", dir, name);
}

static uint64_t image_bytes(BlockBackend *blk)
{
    return STAT(blk, bytes_filled) + STAT(blk, bytes_passed);
}

static void request_done(void *opaque, int ret)
{
    *(int *)opaque = ret;
}

static void read_vector(BlockBackend *blk, int64_t offset, QEMUIOVector *qiov)
{
    int ret = 1;

    blk_aio_preadv(blk, offset, qiov, 0, request_done, &ret);
    while (ret > 0) {
        aio_poll(qemu_get_aio_context(), true);
    }
    g_assert_cmpint(ret, ==, 0);
}

/* To the same place in the guest. */
static void read_now(BlockBackend *blk, int64_t offset, int64_t size)
{
    QEMUIOVector qiov;

    memset(guest + offset, 0x55, size);
    qemu_iovec_init_buf(&qiov, guest + offset, size);
    read_vector(blk, offset, &qiov);
    g_assert_cmpmem(guest + offset, size, bytes + offset, size);
}

static void write_now(BlockBackend *blk, int64_t offset, int64_t size)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, bytes + offset, size);
    int ret = 1;

    memset(bytes + offset, g_test_rand_int() | 1, size);
    blk_aio_pwritev(blk, offset, &qiov, 0, request_done, &ret);
    while (ret > 0) {
        aio_poll(qemu_get_aio_context(), true);
    }
    g_assert_cmpint(ret, ==, 0);
}

/* --- tests ---------------------------------------------------------------- */

/* What one has read costs the next one nothing. */
static void test_raw(void)
{
    BlockBackend *a, *b;

    setup();
    a = open_image();
    read_now(a, 0, SIZE);
    g_assert_cmpint(STAT(a, blocks_missed), ==, BLOCKS);
    g_assert_cmpint(STAT(a, blocks_given), ==, BLOCKS - 1);
    g_assert_cmpint(STAT(a, bytes_passed), ==, 0);
    blk_unref(a);
    b = open_image();
    read_now(b, 0, SIZE);
    g_assert_cmpint(STAT(b, blocks_hit), ==, BLOCKS);
    g_assert_cmpint(STAT(b, blocks_given), ==, BLOCKS - 1);
    g_assert_cmpint(image_bytes(b), ==, 0);
    /* a write is the guest's own */
    memset(guest, 0x66, PAGE);
    read_now(b, PAGE, PAGE);
    g_assert_cmphex(guest[0], ==, 0x66);
    dedup_guest_ram_permit(false);              /* then it is copied */
    read_now(b, 0, SIZE);
    g_assert_cmpint(image_bytes(b), ==, 0);
    dedup_guest_ram_permit(true);
    blk_unref(b);
    teardown();
}

/* Requests of all shapes. */
static void test_shapes(void)
{
    g_autofree uint8_t *other = g_malloc(SIZE);
    BlockBackend *blk;
    unsigned i, j;

    setup();
    blk = open_image();
    for (i = 0; i < 200; i++) {
        int64_t offset = g_test_rand_int_range(0, SIZE / 512 - 1) * 512;
        int64_t size = g_test_rand_int_range(1, MIN((SIZE - offset) / 512,
                                                    600) + 1) * 512;
        int64_t shift = i % 3 ? 0 : g_test_rand_int_range(0, 8) * 512;
        QEMUIOVector qiov;
        int64_t at = 0;

        memset(other, 0x55, SIZE);
        qemu_iovec_init(&qiov, 8);
        for (j = 0; at < size; j++) {
            int64_t n = MIN(size - at, g_test_rand_int_range(1, 64) *
                            (j % 2 ? 512 : PAGE));
            bool mine = j % 3;

            qemu_iovec_add(&qiov, (mine ? guest : other) +
                           MIN((offset + at + shift) & ~511,
                               SIZE - n), n);
            at += n;
        }
        read_vector(blk, offset, &qiov);
        for (at = 0; at < size; at += 512) {
            uint8_t got[512];

            qemu_iovec_to_buf(&qiov, at, got, 512);
            /* places may overlap at the end: then the last one counts */
            if (offset + size + shift < SIZE - 256 * KiB) {
                g_assert_cmpmem(got, 512, bytes + offset + at, 512);
            }
        }
        qemu_iovec_destroy(&qiov);
    }
    g_assert_cmpint(STAT(blk, blocks_copied), >, 0);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, 0);
    blk_unref(blk);
    teardown();
}

static void create(const char *name, const char *format, const char *backing)
{
    g_autofree char *path = file(name);
    g_autofree char *base = backing ? file(backing) : NULL;

    bdrv_img_create(path, format, base, backing ? format : NULL, NULL, SIZE,
                    BDRV_O_RDWR, true, &error_abort);
}

static BlockBackend *open_plain(const char *name)
{
    g_autofree char *path = file(name);
    QDict *options = qdict_new();

    qdict_put_str(options, "driver", "qcow2");
    return blk_new_open(path, NULL, options, BDRV_O_RDWR, &error_abort);
}

static BlockBackend *open_overlay(void)
{
    return open_over(true, "{\"driver\":\"qcow2\",\"file\":{\"driver\":"
                     "\"file\",\"filename\":\"%s/overlay\"}}", dir);
}

/* A qcow2 base's blocks are found in its file; its overlay's are not. */
static void test_qcow2(void)
{
    BlockBackend *blk;
    int64_t before;
    unsigned i;

    setup();
    create("base", "qcow2", NULL);
    blk = open_plain("base");
    memset(bytes, 0, SIZE);
    for (i = 0; i < 24; i++) {          /* clusters in no order */
        write_now(blk, (i * 11 % 32) * 64 * KiB, 64 * KiB);
    }
    blk_unref(blk);
    create("overlay", "qcow2", "base");
    blk = open_overlay();
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, blocks_missed), ==, 24 * 16);
    before = STAT(blk, bytes_filled);
    write_now(blk, 64 * KiB, 3 * PAGE);
    write_now(blk, 512 * KiB + 512, 1024);
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, bytes_filled), ==, before);
    blk_unref(blk);
    blk = open_overlay();               /* of the next guest, so to say */
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, bytes_filled), ==, 0);
    g_assert_cmpint(STAT(blk, blocks_missed), ==, 0);
    blk_unref(blk);
    teardown();
}

/* The daemon dies, and comes back, while somebody reads. */
static void test_killed(void)
{
    BlockBackend *blk;

    setup();
    blk = open_image();
    read_now(blk, 0, SIZE / 2);
    dedup_daemon_end(pid, sock, SIGKILL);
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, SIZE);
    pid = dedup_daemon_start(sock, "16M");
    do {
        read_now(blk, 0, SIZE);
        g_usleep(10 * 1000);
    } while (STAT(blk, bytes_filled) < SIZE / 2 + SIZE);
    blk_unref(blk);
    teardown();
}

static void await_memory(uint64_t size)
{
    while (dedup_daemon_memory(sock) != size) {
        g_usleep(20 * 1000);
    }
}

/* The frames of a daemon that has died stay while the guest has them. */
static void test_old_frames(void)
{
    BlockBackend *blk;
    unsigned i;

    setup();
    blk = open_image();
    read_now(blk, 0, SIZE);
    memset(guest, 0x66, SIZE / 2);
    for (i = 0; i < 2; i++) {
        dedup_daemon_end(pid, sock, SIGKILL);
        pid = dedup_daemon_start(sock, "16M");
        await_memory(SIZE / 2);
        g_assert_cmpmem(guest + SIZE / 2, SIZE / 2, bytes + SIZE / 2, SIZE / 2);
    }
    read_now(blk, 0, SIZE / 4);
    memset(guest, 0x66, SIZE);
    dedup_daemon_reclaim(sock);
    await_memory(0);
    blk_unref(blk);
    teardown();
}

/* The node is gone, and the guest maps frames: the daemons hear of that. */
static void test_removed(void)
{
    BlockBackend *blk;
    unsigned i;

    setup();
    blk = open_image();
    read_now(blk, 0, SIZE);
    blk_unref(blk);
    memset(guest, 0x66, SIZE / 2);
    dedup_daemon_reclaim(sock);
    await_memory(SIZE / 2);
    for (i = 0; i < 2; i++) {
        dedup_daemon_end(pid, sock, SIGKILL);
        pid = dedup_daemon_start(sock, "16M");
        memset(guest + SIZE / 2, 0x66, SIZE / 4 * i);
        await_memory(SIZE / 2 - SIZE / 4 * i);
    }
    blk = open_image();
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, blocks_given), ==, BLOCKS - 1);
    blk_unref(blk);
    memset(guest, 0x66, SIZE);
    dedup_daemon_reclaim(sock);
    await_memory(0);
    teardown();
}

/* Somebody writes to the image meanwhile: nothing old is read. */
static void test_changed(void)
{
    g_autofree char *path = NULL;
    BlockBackend *blk;
    int fd;

    setup();
    path = file("image");
    blk = open_image();
    read_now(blk, 0, SIZE);
    fd = open(path, O_WRONLY);
    memset(bytes + 7 * PAGE, 0x77, 3 * PAGE);
    g_assert_cmpint(pwrite(fd, bytes + 7 * PAGE, 3 * PAGE, 7 * PAGE), ==,
                    3 * PAGE);
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, SIZE);
    close(fd);
    blk_unref(blk);
    blk = open_image();
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, 0);
    blk_unref(blk);
    teardown();
}

/* The image that QEMU has open is meant, not what has its name by now. */
static void test_replaced(void)
{
    g_autofree char *path = NULL;
    g_autofree char *zeroes = g_malloc0(SIZE);
    BlockBackend *blk;

    setup();
    path = file("image");
    blk = open_image();
    g_assert_true(g_file_set_contents(path, zeroes, SIZE, NULL));
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, blocks_given), ==, BLOCKS - 1);
    blk_unref(blk);
    teardown();
}

/* A node between image and file that may change bytes: not shared. */
static void test_filtered(void)
{
    BlockBackend *blk;

    setup();
    blk = open_over(false, "{\"driver\":\"raw\",\"file\":{\"driver\":"
                    "\"blkdebug\",\"image\":{\"driver\":\"file\","
                    "\"filename\":\"%s/image\"}}}", dir);
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, SIZE);
    g_assert_cmpint(STAT(blk, blocks_given), ==, 0);
    blk_unref(blk);
    teardown();
}

/* A limit on what is read is no limit on what is there. */
static void test_throttled(void)
{
    BlockBackend *a, *b;

    setup();
    a = open_over(false, "{\"driver\":\"raw\",\"file\":{\"driver\":"
                  "\"throttle\",\"throttle-group\":\"limits\",\"file\":{"
                  "\"driver\":\"file\",\"filename\":\"%s/image\"}}}", dir);
    read_now(a, 0, SIZE);
    g_assert_cmpint(STAT(a, bytes_filled), ==, 0);
    g_assert_cmpint(STAT(a, bytes_passed), ==, SIZE);
    g_assert_cmpint(STAT(a, blocks_missed), ==, 0);
    b = open_image();
    read_now(b, 0, SIZE);
    read_now(a, 0, SIZE);
    g_assert_cmpint(STAT(a, bytes_passed), ==, SIZE);
    g_assert_cmpint(STAT(a, blocks_given), ==, BLOCKS - 1);
    blk_unref(a);
    blk_unref(b);
    teardown();
}

/* A socket's name stands for where it was when the node was opened. */
static void test_relative(void)
{
    g_autofree char *before = g_get_current_dir();
    QDict *options = qdict_new();
    BlockBackend *blk;
    char *path;

    setup();
    path = sock;
    g_assert_cmpint(chdir(dir), ==, 0);
    sock = (char *)"sock";
    blk = open_image();
    sock = path;
    g_assert_cmpint(chdir("/"), ==, 0);
    qdict_put_str(options, "admission", "second-read");
    bdrv_reopen(blk_bs(blk), options, true, &error_abort);
    read_now(blk, 0, SIZE);
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, blocks_given), ==, BLOCKS - 1);
    g_assert_cmpint(chdir(before), ==, 0);
    blk_unref(blk);
    teardown();
}

/* An image that may not be opened anew is read in the ordinary way. */
static void test_unopenable(void)
{
    g_autofree char *image = NULL;
    BlockBackend *blk;

    if (geteuid()) {
        g_test_skip("it takes root");
        return;
    }
    setup();
    image = file("image");
    g_assert_cmpint(chmod(image, 0600), ==, 0);
    blk = open_image();
    g_assert_cmpint(seteuid(65534), ==, 0);     /* as QEMU's -run-with user= */
    read_now(blk, 0, SIZE);
    read_now(blk, 0, SIZE);
    g_assert_cmpint(seteuid(0), ==, 0);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, 2 * SIZE);
    g_assert_cmpint(NOT_GIVEN(blk, no_layer), ==, 2 * BLOCKS);
    read_now(blk, 0, SIZE);             /* it is not tried again and again */
    g_assert_cmpint(STAT(blk, bytes_passed), ==, 3 * SIZE);
    blk_unref(blk);
    teardown();
}

/* A part of a file, which does not begin at a block. */
static void test_offset(void)
{
    BlockBackend *blk;
    unsigned i;

    setup();
    for (i = 0; i < 2; i++) {
        int64_t skip = i ? 3 * 512 : 5 * PAGE;
        QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, guest, 64 * PAGE);

        blk = open_over(false, "{\"driver\":\"raw\",\"offset\":%" PRId64
                        ",\"file\":{\"driver\":\"file\","
                        "\"filename\":\"%s/image\"}}", skip, dir);
        read_vector(blk, 0, &qiov);
        g_assert_cmpmem(guest, 64 * PAGE, bytes + skip, 64 * PAGE);
        g_assert_cmpint(STAT(blk, blocks_given), ==, i ? 0 : 63);
        blk_unref(blk);
    }
    teardown();
}

/* --- tests: share=all ----------------------------------------------------- */

static void copy_image(void)
{
    g_autofree char *copy = file("copy");

    g_assert_true(g_file_set_contents(copy, (char *)bytes, SIZE, NULL));
}

/* Equal blocks of images that guests write to are one frame. */
static void test_copies(void)
{
    BlockBackend *a, *b;
    unsigned i;

    setup();
    copy_image();
    more = SHARE_ALL;
    a = open_own("image");
    read_now(a, 0, SIZE);
    g_assert_cmpint(STAT(a, blocks_matched), ==, 0);
    g_assert_cmpint(STAT(a, blocks_given), ==, BLOCKS - 1);
    b = open_own("copy");
    read_now(b, 0, SIZE);
    g_assert_cmpint(STAT(b, blocks_matched), ==, BLOCKS - 1);
    g_assert_cmpint(STAT(b, blocks_given), ==, BLOCKS - 1);
    g_assert_cmpint(image_bytes(b), ==, SIZE);
    /* what one writes is not the other's */
    write_now(b, 7 * PAGE, 3 * PAGE);
    read_now(b, 0, SIZE);
    for (i = 0; i < 100; i++) {
        int64_t at = g_test_rand_int_range(0, BLOCKS) * PAGE;

        write_now(b, at, PAGE / 2);
        read_now(b, at & ~(64 * KiB - 1), 64 * KiB);
    }
    read_now(b, 0, SIZE);
    blk_unref(a);
    blk_unref(b);
    teardown();
}

/* By default they are the guests' own. */
static void test_not_put(void)
{
    BlockBackend *a;

    setup();
    a = open_own("image");
    read_now(a, 0, SIZE);
    g_assert_cmpint(STAT(a, bytes_passed), ==, SIZE);
    g_assert_cmpint(STAT(a, bytes_filled), ==, 0);
    blk_unref(a);
    teardown();
}

/* Where no place in a file is known, or the daemon may not read it. */
static void test_put_filtered(void)
{
    BlockBackend *a, *b;

    setup();
    more = SHARE_ALL;
    a = open_image();
    b = open_over(false, "{\"driver\":\"raw\",\"file\":{\"driver\":"
                  "\"blkdebug\",\"image\":{\"driver\":\"file\","
                  "\"filename\":\"%s/image\"}}}", dir);
    read_now(a, 0, SIZE / 2);           /* leased, and read by the daemon */
    g_assert_cmpint(STAT(a, blocks_matched), ==, 0);
    read_now(b, 0, SIZE);
    g_assert_cmpint(STAT(b, blocks_matched), ==, BLOCKS / 2 - 1);
    g_assert_cmpint(STAT(b, blocks_given), ==, BLOCKS - 1);
    blk_unref(a);
    blk_unref(b);
    teardown();
}

/* An overlay's blocks are put, its base's are asked for. */
static void test_put_overlay(void)
{
    BlockBackend *blk;
    unsigned i;

    setup();
    more = SHARE_ALL;
    create("base", "qcow2", NULL);
    blk = open_plain("base");
    memset(bytes, 0, SIZE);
    write_now(blk, 0, SIZE / 2);
    blk_unref(blk);
    create("overlay", "qcow2", "base");
    blk = open_overlay();
    for (i = 0; i < 16; i++) {
        write_now(blk, i * 128 * KiB, 64 * KiB);
    }
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, blocks_missed), ==, (8 + 16) * 16);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, SIZE - (8 + 16) * 64 * KiB);
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, blocks_hit), ==, 8 * 16);
    blk_unref(blk);
    teardown();
}

static BlockDriverState *file_of(BlockBackend *blk)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();
    return blk_bs(blk)->file->bs->file->bs;
}

static void set_encrypted(BlockBackend *blk)
{
    file_of(blk)->encrypted = true;
    blk_drain(blk);                     /* the layers are looked at anew */
}

static void test_encrypted(void)
{
    BlockBackend *blk;

    setup();
    more = SHARE_ALL;
    blk = open_own("image");
    set_encrypted(blk);
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, SIZE);
    more = SHARE_ALL "\"share-encrypted\":true,";
    blk_unref(blk);
    blk = open_own("image");
    set_encrypted(blk);
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, blocks_given), ==, BLOCKS - 1);
    blk_unref(blk);
    teardown();
}

/* The bytes that were read stay right, whatever becomes of the daemon. */
static void test_put_killed(void)
{
    BlockBackend *blk;

    setup();
    more = SHARE_ALL;
    blk = open_own("image");
    read_now(blk, 0, SIZE / 2);
    dedup_daemon_stop(pid);
    read_now(blk, 0, SIZE);             /* waits for the limit, once */
    g_assert_cmpint(STAT(blk, blocks_given), <, BLOCKS);
    kill(pid, SIGCONT);
    do {
        read_now(blk, 0, SIZE);
    } while (STAT(blk, blocks_given) < 2 * BLOCKS);
    dedup_daemon_end(pid, sock, SIGKILL);
    read_now(blk, 0, SIZE);
    pid = dedup_daemon_start(sock, "16M");
    blk_unref(blk);
    teardown();
}

/* Every block of the image is another one then. */
static void change_image(BlockBackend *blk)
{
    static uint64_t stamp;
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, bytes, SIZE);
    unsigned i;
    int ret = 1;

    for (i = 0; i < BLOCKS; i++) {
        *(uint64_t *)(bytes + i * PAGE) = ++stamp;
    }
    blk_aio_pwritev(blk, 0, &qiov, 0, request_done, &ret);
    while (ret > 0) {
        aio_poll(qemu_get_aio_context(), true);
    }
    g_assert_cmpint(ret, ==, 0);
}

/* Content that nobody else has is not put for ever; until some matches. */
static void test_back_off(void)
{
    BlockBackend *blk;
    uint64_t before, filled;
    unsigned i;

    setup();
    more = SHARE_ALL;
    blk = open_own("image");
    for (i = 0; i < 512; i++) {         /* the patience */
        g_assert_cmpint(NOT_GIVEN(blk, unmatched), ==, 0);
        change_image(blk);
        read_now(blk, 0, SIZE);
    }
    filled = STAT(blk, bytes_filled);
    for (i = 0; i < 64; i++) {
        before = NOT_GIVEN(blk, unmatched);
        change_image(blk);
        read_now(blk, 0, SIZE);
        g_assert_cmpint(NOT_GIVEN(blk, unmatched), ==, before + BLOCKS);
    }
    /* nothing is read twice for a probe */
    g_assert_cmpint(STAT(blk, bytes_filled), ==, filled);
    do {                                /* what is probed matches */
        before = NOT_GIVEN(blk, unmatched);
        read_now(blk, 0, SIZE);
        g_usleep(1000);                 /* the store was full */
    } while (NOT_GIVEN(blk, unmatched) > before);
    read_now(blk, 0, SIZE);
    g_assert_cmpint(NOT_GIVEN(blk, unmatched), ==, before);
    /* it is patient for less, now; and for all of it, once more has matched */
    for (i = 0; i < 64 && NOT_GIVEN(blk, unmatched) == before; i++) {
        change_image(blk);
        read_now(blk, 0, SIZE);
    }
    g_assert_cmpint(i, ==, 64);
    blk_unref(blk);
    teardown();
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    module_call_init(MODULE_INIT_QOM);
    qemu_init_main_loop(&error_abort);
    bdrv_init();
    dedup_store_register(&dedup_linux_store_ops);
    object_new_with_props("throttle-group", object_get_objects_root(),
                          "limits", &error_abort, "x-iops-total", "10000",
                          NULL);
    g_test_add_func("/dedup/asked/raw", test_raw);
    g_test_add_func("/dedup/asked/shapes", test_shapes);
    g_test_add_func("/dedup/asked/qcow2", test_qcow2);
    g_test_add_func("/dedup/asked/killed", test_killed);
    g_test_add_func("/dedup/asked/old-frames", test_old_frames);
    g_test_add_func("/dedup/asked/removed", test_removed);
    g_test_add_func("/dedup/asked/changed", test_changed);
    g_test_add_func("/dedup/asked/replaced", test_replaced);
    g_test_add_func("/dedup/asked/filtered", test_filtered);
    g_test_add_func("/dedup/asked/throttled", test_throttled);
    g_test_add_func("/dedup/asked/unopenable", test_unopenable);
    g_test_add_func("/dedup/asked/offset", test_offset);
    g_test_add_func("/dedup/asked/relative", test_relative);
    g_test_add_func("/dedup/put/copies", test_copies);
    g_test_add_func("/dedup/put/base", test_not_put);
    g_test_add_func("/dedup/put/filtered", test_put_filtered);
    g_test_add_func("/dedup/put/overlay", test_put_overlay);
    g_test_add_func("/dedup/put/encrypted", test_encrypted);
    g_test_add_func("/dedup/put/killed", test_put_killed);
    g_test_add_func("/dedup/put/back-off", test_back_off);
    return g_test_run();
}
