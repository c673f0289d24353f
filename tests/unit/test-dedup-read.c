/*
 * dedup-share: tests of reads of several parts, and of reads that pass through
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The nodes are real ones, and so is the store daemon.  A driver of our own has
 * reads wait, so that those in flight can be counted; no time is measured.
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "block/block-global-state.h"
#include "block/block_int-common.h"
#include "block/dedup-share/linux/probe.h"
#include "block/dedup-share/parallel.h"
#include "dedup-daemon.h"
#include "dedup-guest-ram.h"
#include "dedup-nodes.h"

#define PAGE DEDUP_BLOCK_SIZE
#define PART (DEDUP_READ_BLOCKS * PAGE)
#define PARTS 6
#define SIZE (PARTS * PART)

#define SHARE_ALL "\"share\":\"all\","

static char *dir, *sock;
static const char *more;        /* options */
static GPid pid;
static uint8_t *guest;          /* SIZE */
static uint8_t *bytes;          /* what the image holds */

/* --- nodes --------------------------------------------------------------- */

static void setup(void)
{
    g_autofree char *image = NULL;
    unsigned i;

    dir = g_strdup_printf("%s/dedup-read-XXXXXX", g_get_tmp_dir());
    g_assert_nonnull(g_mkdtemp(dir));
    sock = g_build_filename(dir, "sock", NULL);
    more = "";
    pid = dedup_daemon_start(sock, "16M");
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
    dedup_daemon_end(pid, sock, SIGTERM);
    g_unlink(image);
    g_unlink(overlay);
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

static BlockBackend *open_count(void)
{
    return open_over(false, "{\"driver\":\"test-count\"}");
}

/* --- a driver that counts ------------------------------------------------- */

static unsigned statuses, reads, in_flight;
static int64_t fail_at = -1;
static bool hold;               /* reads wait */
static CoQueue held;

static int coroutine_fn count_preadv(BlockDriverState *bs, int64_t offset,
                                     int64_t size, QEMUIOVector *qiov,
                                     BdrvRequestFlags flags)
{
    reads++;
    in_flight++;
    if (hold) {
        qemu_co_queue_wait(&held, NULL);
    }
    in_flight--;
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

/* Wait until so many reads are in flight, and no more can be. */
static void wait_in_flight(unsigned n)
{
    while (in_flight < n) {
        aio_poll(qemu_get_aio_context(), true);
    }
    while (aio_poll(qemu_get_aio_context(), false)) {
        /* that is all that can be done without them */
    }
    g_assert_cmpint(in_flight, ==, n);
}

static void coroutine_fn release_entry(void *opaque)
{
    qemu_co_queue_restart_all(&held);
}

static void release(bool hold_more)
{
    hold = hold_more;
    qemu_coroutine_enter(qemu_coroutine_create(release_entry, NULL));
}

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
    more = SHARE_ALL;
    blk = open_count();
    hold = true;
    submit(&q, blk, 0, SIZE);
    wait_in_flight(SIZE / PAGE / DEDUP_PUT_BLOCKS);
    release(false);
    wait_for(&q);
    g_assert_cmpint(q.ret, ==, 0);
    g_assert_cmpmem(guest, SIZE, bytes, SIZE);
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
    more = SHARE_ALL;
    blk = open_count();
    hold = true;
    submit(&q, blk, 3 * 512, SIZE - 5 * 512);
    wait_in_flight(SIZE / PAGE / DEDUP_PUT_BLOCKS);
    release(true);
    wait_in_flight(2);                  /* of the first and the last block */
    release(false);
    wait_for(&q);
    g_assert_cmpint(q.ret, ==, 0);
    g_assert_cmpmem(guest + 3 * 512, SIZE - 5 * 512, bytes + 3 * 512,
                    SIZE - 5 * 512);
    blk_unref(blk);
    teardown();
}

/*
 * A read of @n times three pages, of which the second is in two pieces; they
 * are where they were.
 */
static void submit_pieces(Request *q, BlockBackend *blk, struct iovec *iov,
                          unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        uint8_t *at = guest + i * 3 * PAGE;

        iov[4 * i] = (struct iovec) { at, PAGE };
        iov[4 * i + 1] = (struct iovec) { at + PAGE, 512 };
        iov[4 * i + 2] = (struct iovec) { at + PAGE + 512, PAGE - 512 };
        iov[4 * i + 3] = (struct iovec) { at + 2 * PAGE, PAGE };
    }
    qemu_iovec_init_external(&q->qiov, iov, 4 * n);
    q->ret = 1;
    blk_aio_preadv(blk, 0, &q->qiov, 0, request_done, q);
}

/* What has no whole page to go to is read when what is put is in place. */
static void test_rests(void)
{
    struct iovec iov[24];
    BlockBackend *blk;
    Request q;

    setup();
    more = SHARE_ALL;
    blk = open_count();
    memset(guest, 0x55, 18 * PAGE);
    hold = true;
    submit_pieces(&q, blk, iov, 6);
    wait_in_flight(7);          /* the first block; pairs; and the last */
    release(true);
    wait_in_flight(6);
    release(false);
    wait_for(&q);
    g_assert_cmpint(q.ret, ==, 0);
    g_assert_cmpmem(guest, 18 * PAGE, bytes, 18 * PAGE);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, 6 * PAGE);
    blk_unref(blk);
    teardown();
}

/* --- reads that pass through --------------------------------------------- */

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

/* What is put is found by its content: nobody is asked where it is. */
static void test_put(void)
{
    BlockBackend *blk;

    setup();
    more = SHARE_ALL;
    blk = open_over(false, "{\"driver\":\"test-count\"}");
    reads = statuses = 0;
    read_now(blk, 0, SIZE);
    g_assert_cmpint(statuses, ==, 0);
    g_assert_cmpint(reads, ==, SIZE / PAGE / DEDUP_PUT_BLOCKS);
    g_assert_cmpint(STAT(blk, blocks_given), ==, SIZE / PAGE);
    /* a large read that fails below fails, when all of it has ended */
    fail_at = SIZE / 2;
    g_assert_cmpint(blk_pread(blk, 0, SIZE, guest, 0), ==, -EIO);
    fail_at = -1;
    read_now(blk, 0, SIZE);
    blk_unref(blk);
    teardown();
}

static void create_overlay(const char *name)
{
    g_autofree char *path = g_build_filename(dir, name, NULL);

    bdrv_img_create(path, "qcow2", NULL, NULL, NULL, SIZE, BDRV_O_RDWR, true,
                    &error_abort);
}

/* What is below a base that takes part does not, and is not asked. */
static void test_tail(void)
{
    g_autofree char *base = NULL;
    BlockBackend *blk;

    setup();
    create_overlay("overlay");
    base = g_strdup_printf("{\"driver\":\"qcow2\",\"file\":{\"driver\":"
                           "\"file\",\"filename\":\"%s/overlay\"},"
                           "\"backing\":{\"driver\":\"test-count\"}}", dir);
    blk = open_over(false, "%s", base);
    reads = statuses = 0;
    read_now(blk, 0, SIZE);
    read_now(blk, 512, 1024);
    g_assert_cmpint(statuses, ==, 0);
    g_assert_cmpint(STAT(blk, blocks_given), ==, 0);
    blk_unref(blk);
    teardown();
}

/* --- what a request may take --------------------------------------------- */

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

/*
 * A guest can have many large requests in flight, each of many parts and runs;
 * without a bound it can have QEMU abort for want of a coroutine's stack.
 */
static void test_bound(void)
{
    enum { N = SIZE / PAGE / 3 };
    g_autofree struct iovec *iov = g_new(struct iovec, 8 * 4 * N);
    Request q[8];
    BlockBackend *blk;
    unsigned i, mappings;

    setup();
    more = SHARE_ALL;
    blk = open_count();
    mappings = count_mappings();
    hold = true;
    for (i = 0; i < ARRAY_SIZE(q); i++) {
        submit_pieces(&q[i], blk, iov + i * 4 * N, N);
    }
    while (in_flight < DEDUP_PARALLEL_ALL / 2) {
        aio_poll(qemu_get_aio_context(), true);
    }
    while (aio_poll(qemu_get_aio_context(), false)) {
        /* more would be read now */
    }
    g_assert_cmpint(in_flight, <=, DEDUP_PARALLEL_ALL + ARRAY_SIZE(q));
    /* of a coroutine: a stack, its guard, and a buffer */
    g_assert_cmpint(count_mappings() - mappings, <=,
                    3 * (DEDUP_PARALLEL_ALL + ARRAY_SIZE(q)));
    release(false);
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
    more = SHARE_ALL;
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
    qemu_co_queue_init(&held);
    g_test_add_func("/dedup/read/bound", test_bound);
    g_test_add_func("/dedup/read/drained/tail", test_drained_tail);
    g_test_add_func("/dedup/read/drained/layer", test_drained_layer);
    g_test_add_func("/dedup/read/parallel", test_parallel);
    g_test_add_func("/dedup/read/parts", test_parts);
    g_test_add_func("/dedup/read/ragged", test_ragged);
    g_test_add_func("/dedup/read/rests", test_rests);
    g_test_add_func("/dedup/read/no-layer", test_no_layer);
    g_test_add_func("/dedup/read/put", test_put);
    g_test_add_func("/dedup/read/tail", test_tail);
    return g_test_run();
}
