/*
 * dedup-share: tests of reads of several parts, and of reads that pass through
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The nodes are real ones, over the Linux store.  A throttle node makes reads
 * wait, so that those in flight can be counted when the request has been
 * submitted; no time is measured.
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "qom/object.h"
#include "block/block-global-state.h"
#include "block/block_int-common.h"
#include "block/dedup-share/group.h"
#include "block/dedup-share/linux.h"
#include "block/dedup-share/parallel.h"
#include "block/dedup-share/stats.h"
#include "system/block-backend.h"
#include "dedup-guest-ram.h"

#define PAGE DEDUP_BLOCK_SIZE
#define PART (DEDUP_BATCH * PAGE)
#define PARTS 6
#define SIZE (PARTS * PART)

static char *dir;
static uint8_t *guest;          /* SIZE */
static uint8_t *bytes;          /* what the image holds */

/* --- nodes --------------------------------------------------------------- */

/* A layer that is only read takes part when its file has settled. */
static void settle(void)
{
    g_usleep(1100 * 1000);
}

static void setup(void)
{
    g_autofree char *image = NULL;
    unsigned i;

    dir = g_strdup("/dev/shm/test-dedup-XXXXXX");
    g_assert_nonnull(g_mkdtemp(dir));
    guest = dedup_guest_ram_new(SIZE);
    bytes = g_malloc(SIZE);
    for (i = 0; i < SIZE / 4; i++) {
        ((uint32_t *)bytes)[i] = g_test_rand_int();
    }
    image = g_build_filename(dir, "image", NULL);
    g_assert_true(g_file_set_contents(image, (char *)bytes, SIZE, NULL));
}

static void teardown(void)
{
    g_autofree char *image = g_build_filename(dir, "image", NULL);
    g_autofree char *overlay = g_build_filename(dir, "overlay", NULL);

    dedup_guest_ram_free();
    dedup_groups_leave();       /* as at exit */
    g_unlink(image);
    g_unlink(overlay);
    g_assert_cmpint(g_rmdir(dir), ==, 0);       /* nothing left behind */
    g_free(dir);
    g_free(bytes);
}

/* A filter node, as a device has it, over the node that @below describes. */
static BlockBackend *G_GNUC_PRINTF(2, 3) open_over(bool write,
                                                   const char *below, ...)
{
    g_autofree char *file = NULL, *options = NULL;
    BlockDriverState *bs;
    BlockBackend *blk;
    va_list ap;

    va_start(ap, below);
    file = g_strdup_vprintf(below, ap);
    va_end(ap);
    options = g_strdup_printf("json:{\"driver\":\"dedup-share\","
                              "\"store\":\"linux\",\"index-dir\":\"%s\","
                              "\"store-size\":%u,\"file\":%s}", dir, 2 * SIZE,
                              file);
    blk = blk_new(qemu_get_aio_context(),
                  BLK_PERM_CONSISTENT_READ | (write ? BLK_PERM_WRITE : 0),
                  BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE_UNCHANGED);
    bs = bdrv_open(options, NULL, NULL, write ? BDRV_O_RDWR : 0, &error_abort);
    blk_insert_bs(blk, bs, &error_abort);
    bdrv_unref(bs);
    return blk;
}

static BlockBackend *open_throttled(bool write)
{
    return open_over(write, "{\"driver\":\"raw\",\"file\":{\"driver\":"
                     "\"throttle\",\"node-name\":\"slow\","
                     "\"throttle-group\":\"limits\",\"file\":{\"driver\":"
                     "\"file\",\"filename\":\"%s/image\"}}}", dir);
}

/* Requests that the throttle node has begun and not ended. */
static unsigned in_flight(void)
{
    return qatomic_read(&bdrv_find_node("slow")->in_flight);
}

static uint64_t get_stat(BlockBackend *blk, size_t offset)
{
    DedupShareStats *s = dedup_share_stats(blk_bs(blk));
    uint64_t value = *(int64_t *)((uint8_t *)s + offset);

    qapi_free_DedupShareStats(s);
    return value;
}

#define STAT(blk, name) get_stat(blk, offsetof(DedupShareStats, name))

/* --- requests ------------------------------------------------------------ */

typedef struct Request {
    QEMUIOVector qiov;
    int ret;                    /* 1: not done yet */
} Request;

static void request_done(void *opaque, int ret)
{
    Request *q = opaque;

    q->ret = ret;
}

static void submit(Request *q, BlockBackend *blk, int64_t offset,
                   int64_t size)
{
    memset(guest + offset, 0x55, size);
    qemu_iovec_init_buf(&q->qiov, guest + offset, size);
    q->ret = 1;
    blk_aio_preadv(blk, offset, &q->qiov, 0, request_done, q);
}

static void wait_for(Request *q)
{
    while (q->ret > 0) {
        aio_poll(qemu_get_aio_context(), true);
    }
}

static void read_now(BlockBackend *blk, int64_t offset, int64_t size)
{
    Request q;

    submit(&q, blk, offset, size);
    wait_for(&q);
    g_assert_cmpint(q.ret, ==, 0);
    g_assert_cmpmem(guest + offset, size, bytes + offset, size);
}

/* --- reads of several parts ---------------------------------------------- */

static void test_parts(void)
{
    BlockBackend *blk;
    Request q;

    setup();
    settle();
    blk = open_throttled(false);
    submit(&q, blk, 0, SIZE);
    g_assert_cmpint(in_flight(), ==, PARTS);
    wait_for(&q);
    g_assert_cmpint(q.ret, ==, 0);
    g_assert_cmpmem(guest, SIZE, bytes, SIZE);
    g_assert_cmpint(STAT(blk, bytes_filled), ==, SIZE);
    /* and nothing is read again */
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, bytes_filled), ==, SIZE);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, 0);
    blk_unref(blk);
    teardown();
}

/* Offsets that are in the middle of blocks, and of pages. */
static void test_ragged(void)
{
    BlockBackend *blk;
    Request q;

    setup();
    settle();
    blk = open_throttled(false);
    submit(&q, blk, 3 * 512, SIZE - 5 * 512);
    /* each part, and what is left of the first and the last block */
    g_assert_cmpint(in_flight(), >=, PARTS);
    wait_for(&q);
    g_assert_cmpint(q.ret, ==, 0);
    g_assert_cmpmem(guest + 3 * 512, SIZE - 5 * 512, bytes + 3 * 512,
                    SIZE - 5 * 512);
    blk_unref(blk);
    teardown();
}

/* What is missed in a part is read at once, too. */
static void test_runs(void)
{
    BlockBackend *blk;
    Request q;
    unsigned i, nruns = 4;

    setup();
    settle();
    blk = open_throttled(false);
    for (i = 0; i < nruns; i++) {
        read_now(blk, i * 16 * PAGE, 8 * PAGE);
    }
    submit(&q, blk, 0, PART);
    g_assert_cmpint(in_flight(), ==, nruns);
    wait_for(&q);
    g_assert_cmpint(q.ret, ==, 0);
    g_assert_cmpmem(guest, PART, bytes, PART);
    g_assert_cmpint(STAT(blk, bytes_filled), ==, PART);
    blk_unref(blk);
    teardown();
}

/* So is what has no whole page to go to, and is not in the store. */
static void test_rests(void)
{
    BlockBackend *blk;
    Request q;
    struct iovec iov[24];
    unsigned i;

    setup();
    settle();
    blk = open_throttled(false);
    /* of three pages, the second is in two pieces; they are where they were */
    for (i = 0; i < ARRAY_SIZE(iov); i += 4) {
        uint8_t *at = guest + i / 4 * 3 * PAGE;

        iov[i] = (struct iovec) { at, PAGE };
        iov[i + 1] = (struct iovec) { at + PAGE, 512 };
        iov[i + 2] = (struct iovec) { at + PAGE + 512, PAGE - 512 };
        iov[i + 3] = (struct iovec) { at + 2 * PAGE, PAGE };
    }
    memset(guest, 0x55, 18 * PAGE);
    qemu_iovec_init_external(&q.qiov, iov, ARRAY_SIZE(iov));
    q.ret = 1;
    blk_aio_preadv(blk, 0, &q.qiov, 0, request_done, &q);
    /* the first block; pairs in between; and the last */
    g_assert_cmpint(in_flight(), ==, 7);
    while (in_flight() > 5) {
        aio_poll(qemu_get_aio_context(), true);
    }
    wait_for(&q);
    g_assert_cmpint(q.ret, ==, 0);
    g_assert_cmpmem(guest, 18 * PAGE, bytes, 18 * PAGE);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, 6 * PAGE);
    blk_unref(blk);
    teardown();
}

/* A write to a block of one part, while all are read. */
static void test_write(void)
{
    const int64_t at = 3 * PART + 7 * PAGE;
    BlockBackend *blk;
    Request q, w;

    setup();
    blk = open_throttled(true);
    submit(&q, blk, 0, SIZE);
    g_assert_cmpint(in_flight(), ==, PARTS);
    memset(bytes + at, 0x77, PAGE);
    qemu_iovec_init_buf(&w.qiov, bytes + at, PAGE);
    w.ret = 1;
    blk_aio_pwritev(blk, at, &w.qiov, 0, request_done, &w);
    wait_for(&q);
    wait_for(&w);
    g_assert_cmpint(q.ret, ==, 0);
    g_assert_cmpint(w.ret, ==, 0);
    read_now(blk, 0, SIZE);
    /* of the part that it overlapped nothing was recorded */
    g_assert_cmpint(STAT(blk, bytes_filled), ==, SIZE + PART);
    blk_unref(blk);
    teardown();
}

/* --- reads that pass through --------------------------------------------- */

static unsigned statuses, reads;
static int64_t fail_at = -1;

static int coroutine_fn count_preadv(BlockDriverState *bs, int64_t offset,
                                     int64_t size, QEMUIOVector *qiov,
                                     BdrvRequestFlags flags)
{
    reads++;
    if (fail_at >= offset && fail_at < offset + size) {
        return -EIO;
    }
    qemu_iovec_from_buf(qiov, 0, bytes + offset, size);
    return 0;
}

static int coroutine_fn count_block_status(BlockDriverState *bs,
                                           bool want_zero, int64_t offset,
                                           int64_t size, int64_t *pnum,
                                           int64_t *map,
                                           BlockDriverState **file)
{
    statuses++;
    *pnum = size;
    *map = offset;
    *file = bs;
    return BDRV_BLOCK_DATA | BDRV_BLOCK_OFFSET_VALID;
}

static int64_t coroutine_fn count_getlength(BlockDriverState *bs)
{
    return SIZE;
}

/* Like a server that is asked for blocks, and counts what it is asked. */
static BlockDriver bdrv_count = {
    .format_name = "test-count",
    .bdrv_co_preadv = count_preadv,
    .bdrv_co_block_status = count_block_status,
    .bdrv_co_getlength = count_getlength,
};

static void check_passed(BlockBackend *blk)
{
    reads = statuses = 0;
    read_now(blk, 0, SIZE);
    read_now(blk, 512, 1024);
    g_assert_cmpint(statuses, ==, 0);
    g_assert_cmpint(STAT(blk, blocks_read), ==, SIZE / PAGE + 1);
    g_assert_cmpint(STAT(blk, blocks_given), ==, 0);
}

static void test_no_layer(void)
{
    BlockBackend *blk;
    Request q;

    setup();
    blk = open_over(false, "{\"driver\":\"test-count\"}");
    check_passed(blk);
    g_assert_cmpint(reads, ==, 2);      /* as they are, not in parts */
    fail_at = SIZE / 2;
    submit(&q, blk, 0, SIZE);
    wait_for(&q);
    g_assert_cmpint(q.ret, ==, -EIO);
    fail_at = -1;
    blk_unref(blk);
    teardown();
}

/* An overlay takes part, and what is below it does not: it is not asked. */
static void test_tail(void)
{
    g_autofree char *overlay = NULL;
    BlockBackend *blk;

    setup();
    overlay = g_build_filename(dir, "overlay", NULL);
    bdrv_img_create(overlay, "qcow2", NULL, NULL, NULL, SIZE, 0, true,
                    &error_abort);
    blk = open_over(true, "{\"driver\":\"qcow2\",\"file\":{\"driver\":"
                    "\"file\",\"filename\":\"%s\"},\"backing\":{\"driver\":"
                    "\"test-count\"}}", overlay);
    check_passed(blk);
    /* what is in the overlay is shared all the same */
    memset(bytes, 0x66, PAGE);
    g_assert_cmpint(blk_pwrite(blk, 0, PAGE, bytes, 0), ==, 0);
    statuses = 0;               /* what qcow2 has asked to write a cluster */
    read_now(blk, 0, PAGE);
    g_assert_cmpint(STAT(blk, blocks_given), ==, 1);
    /* and a large read that fails below fails, when all of it has ended */
    fail_at = SIZE / 2;
    g_assert_cmpint(blk_pread(blk, 0, SIZE, guest, 0), ==, -EIO);
    fail_at = -1;
    read_now(blk, 0, SIZE);
    g_assert_cmpint(statuses, ==, 0);
    blk_unref(blk);
    teardown();
}

/* --- what a request may take --------------------------------------------- */

/* Have every second block of the image in the store. */
static void read_every_second(BlockBackend *blk)
{
    int64_t at;

    for (at = 0; at < SIZE; at += 2 * PAGE) {
        read_now(blk, at, PAGE);
    }
}

static unsigned count_mappings(void)
{
    g_autofree char *maps = NULL;
    unsigned n = 0;
    char *c;

    g_assert_true(g_file_get_contents("/proc/self/maps", &maps, NULL, NULL));
    for (c = maps; *c; c++) {
        n += *c == '\n';
    }
    return n;
}

static BlockBackend *open_fast(void)
{
    return open_over(false, "{\"driver\":\"raw\",\"file\":{\"driver\":"
                     "\"throttle\",\"node-name\":\"slow\","
                     "\"throttle-group\":\"fast\",\"file\":{\"driver\":"
                     "\"file\",\"filename\":\"%s/image\"}}}", dir);
}

/*
 * A guest can have many large requests in flight, each of many parts and runs;
 * without a bound it can have QEMU abort for want of a coroutine's stack.
 */
static void test_bound(void)
{
    Request q[8];
    BlockBackend *blk;
    unsigned i, mappings;

    setup();
    settle();
    blk = open_fast();
    read_every_second(blk);
    mappings = count_mappings();
    for (i = 0; i < ARRAY_SIZE(q); i++) {
        submit(&q[i], blk, 0, SIZE);
    }
    g_assert_cmpint(in_flight(), >=, DEDUP_PARALLEL_ALL / 2);
    g_assert_cmpint(in_flight(), <=, DEDUP_PARALLEL_ALL + ARRAY_SIZE(q));
    /* of a coroutine: a stack, its guard, and a buffer */
    g_assert_cmpint(count_mappings() - mappings, <=,
                    3 * (DEDUP_PARALLEL_ALL + ARRAY_SIZE(q)));
    for (i = 0; i < ARRAY_SIZE(q); i++) {
        wait_for(&q[i]);
        g_assert_cmpint(q[i].ret, ==, 0);
    }
    g_assert_cmpmem(guest, SIZE, bytes, SIZE);
    blk_unref(blk);
    teardown();
}

/* --- a graph that changes ------------------------------------------------ */

/*
 * In a drained section the chain changes, and the layers are found anew only at
 * its end.  Who reads meanwhile, as exports and jobs can, gets what the chain
 * holds then.
 */
static void check_drained(BlockBackend *blk, BlockDriverState *backing)
{
    BlockDriverState *top = bdrv_find_node("top");

    blk_set_disable_request_queuing(blk, true);
    bdrv_drained_begin(blk_bs(blk));
    bdrv_drained_begin(top);
    bdrv_set_backing_hd(top, backing, &error_abort);
    read_now(blk, 0, SIZE);
    bdrv_drained_end(top);
    read_now(blk, 0, SIZE);
    bdrv_drained_end(blk_bs(blk));
    read_now(blk, 0, SIZE);
}

/* A filter node over an empty overlay over the node that @backing describes. */
static BlockBackend *open_overlay(const char *backing)
{
    g_autofree char *overlay = g_build_filename(dir, "overlay", NULL);

    bdrv_img_create(overlay, "qcow2", NULL, NULL, NULL, SIZE, 0, true,
                    &error_abort);
    return open_over(true, "{\"driver\":\"qcow2\",\"node-name\":\"top\","
                     "\"file\":{\"driver\":\"file\",\"filename\":\"%s\"},"
                     "\"backing\":%s}", overlay, backing);
}

/* What was behind the layers that take part is no more in the chain. */
static void test_drained_tail(void)
{
    BlockBackend *blk;

    setup();
    blk = open_overlay("{\"driver\":\"test-count\"}");
    read_now(blk, 0, PAGE);
    memset(bytes, 0, SIZE);
    check_drained(blk, NULL);
    blk_unref(blk);
    teardown();
}

/* A layer whose blocks are in the store is replaced by another. */
static void test_drained_layer(void)
{
    g_autofree char *backing = NULL;
    BlockDriverState *other;
    BlockBackend *blk;

    setup();
    settle();
    backing = g_strdup_printf("{\"driver\":\"raw\",\"file\":{\"driver\":"
                              "\"file\",\"filename\":\"%s/image\"}}", dir);
    blk = open_overlay(backing);
    read_now(blk, 0, SIZE);
    g_assert_cmpint(STAT(blk, bytes_filled), ==, SIZE);
    memset(bytes, 0x33, SIZE);
    other = bdrv_open("json:{\"driver\":\"test-count\"}", NULL, NULL, 0,
                      &error_abort);
    check_drained(blk, other);
    bdrv_unref(other);
    blk_unref(blk);
    teardown();
}

/* --- dedup_co_all() ------------------------------------------------------ */

typedef struct Parallel {
    unsigned n, begun, ended, most;
    unsigned fail;              /* which fails */
    Coroutine *waiting[DEDUP_PARALLEL];
    unsigned nwaiting;
    bool done;
    int ret;
} Parallel;

static int coroutine_fn wait_part(void *opaque, unsigned i)
{
    Parallel *p = opaque;

    g_assert_cmpint(i, ==, p->begun);           /* in this order */
    p->begun++;
    p->most = MAX(p->most, p->begun - p->ended);
    p->waiting[p->nwaiting++] = qemu_coroutine_self();
    qemu_coroutine_yield();
    p->ended++;
    return i == p->fail ? -EBADF : i == p->fail + 1 ? -EIO : 0;
}

static void coroutine_fn parallel_entry(void *opaque)
{
    Parallel *p = opaque;

    p->ret = dedup_co_all(p->n, wait_part, p);
    p->done = true;
}

static void run_parallel(Parallel *p)
{
    qemu_coroutine_enter(qemu_coroutine_create(parallel_entry, p));
    while (p->nwaiting) {                       /* the last one first */
        g_assert_false(p->done);
        qemu_coroutine_enter(p->waiting[--p->nwaiting]);
    }
    g_assert_true(p->done);
    g_assert_cmpint(p->ended, ==, p->begun);
}

static void test_parallel(void)
{
    Parallel none = { .n = 0, .fail = -1 };
    Parallel one = { .n = 1, .fail = 0 };
    Parallel many = { .n = 3 * DEDUP_PARALLEL, .fail = UINT_MAX - 1 };
    Parallel failing = {
        .n = 3 * DEDUP_PARALLEL, .fail = DEDUP_PARALLEL - 2,
    };

    run_parallel(&none);
    g_assert_cmpint(none.ret, ==, 0);
    run_parallel(&one);
    g_assert_cmpint(one.ret, ==, -EBADF);
    run_parallel(&many);
    g_assert_cmpint(many.ret, ==, 0);
    g_assert_cmpint(many.ended, ==, many.n);
    g_assert_cmpint(many.most, ==, DEDUP_PARALLEL);
    run_parallel(&failing);
    /* the last one failed before the other did, and no more was begun */
    g_assert_cmpint(failing.ret, ==, -EIO);
    g_assert_cmpint(failing.begun, ==, DEDUP_PARALLEL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    module_call_init(MODULE_INIT_QOM);
    qemu_init_main_loop(&error_abort);
    bdrv_init();
    bdrv_register(&bdrv_count);
    dedup_store_register(&dedup_linux_store_ops);
    object_new_with_props("throttle-group", object_get_objects_root(),
                          "limits", &error_abort, "x-iops-total", "100",
                          NULL);
    object_new_with_props("throttle-group", object_get_objects_root(),
                          "fast", &error_abort, "x-iops-total", "1000", NULL);
    g_test_add_func("/dedup/read/bound", test_bound);
    g_test_add_func("/dedup/read/drained/tail", test_drained_tail);
    g_test_add_func("/dedup/read/drained/layer", test_drained_layer);
    g_test_add_func("/dedup/read/parallel", test_parallel);
    g_test_add_func("/dedup/read/parts", test_parts);
    g_test_add_func("/dedup/read/ragged", test_ragged);
    g_test_add_func("/dedup/read/runs", test_runs);
    g_test_add_func("/dedup/read/rests", test_rests);
    g_test_add_func("/dedup/read/write", test_write);
    g_test_add_func("/dedup/read/no-layer", test_no_layer);
    g_test_add_func("/dedup/read/tail", test_tail);
    return g_test_run();
}
