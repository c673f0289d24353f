/*
 * dedup-share: tests of reflink copies that name their origin
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Real nodes, and the real daemon, on the file system of the folder for
 * temporary files.  Where that has no reflink copies only what needs none is
 * tested: tests/check/reflink runs this on XFS and on btrfs.
 *
 * What is read is compared with what a plain read of the copy's file says.
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include <linux/btrfs.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include "qapi/error.h"
#include "qemu/bitmap.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qom/object.h"
#include "block/block-global-state.h"
#include "block/block_int-common.h"
#include "block/dedup-share/extents.h"
#include "block/dedup-share/linux/probe.h"
#include "dedup-daemon.h"
#include "dedup-guest-ram.h"
#include "dedup-nodes.h"

#define PAGE DEDUP_BLOCK_SIZE
#define SIZE (18 * MiB)         /* two windows */
#define BLOCKS (SIZE / PAGE)
#define EDGE (16 * MiB)         /* of the windows */

static char *dir, *sock;
static uint8_t *guest;          /* SIZE */
static GPid pid;

/* Called when the kernel has answered, in whatever thread. */
static void (*on_fiemap)(struct fiemap *map);

int ioctl(int fd, unsigned long request, ...)
{
    va_list ap;
    void *arg;
    int ret;

    va_start(ap, request);
    arg = va_arg(ap, void *);
    va_end(ap);
    ret = syscall(SYS_ioctl, fd, request, arg);
    if (request == FS_IOC_FIEMAP && ret == 0 && on_fiemap) {
        on_fiemap(arg);
    }
    return ret;
}

/* Counts duplicates of descriptors down; the last one fails. */
static int fail_dup;

int fcntl(int fd, int cmd, ...)
{
    va_list ap;
    void *arg;

    va_start(ap, cmd);
    arg = va_arg(ap, void *);
    va_end(ap);
    if (cmd == F_DUPFD_CLOEXEC && fail_dup && --fail_dup == 0) {
        errno = EMFILE;
        return -1;
    }
    return syscall(SYS_fcntl, fd, cmd, arg);
}

/* --- files ---------------------------------------------------------------- */

static char *file(const char *name)
{
    return g_build_filename(dir, name, NULL);
}

static int open_file(const char *name, int flags)
{
    g_autofree char *path = file(name);
    int fd = open(path, flags | O_CLOEXEC, 0600);

    g_assert_cmpint(fd, >=, 0);
    return fd;
}

static void make_file(const char *name)
{
    g_autofree uint32_t *random = g_malloc(SIZE);
    int fd = open_file(name, O_CREAT | O_TRUNC | O_WRONLY);
    unsigned i;

    for (i = 0; i < SIZE / 4; i++) {
        random[i] = g_test_rand_int();
    }
    g_assert_cmpint(write(fd, random, SIZE), ==, SIZE);
    g_assert_cmpint(fsync(fd), ==, 0);
    close(fd);
}

/* As "cp --reflink=always" does it.  False: there are none here. */
static bool make_copy(const char *from, const char *to)
{
    int source = open_file(from, O_RDONLY);
    int target = open_file(to, O_CREAT | O_TRUNC | O_WRONLY);
    int ret = ioctl(target, FICLONE, source);

    g_assert_true(ret == 0 || errno == EOPNOTSUPP);
    close(source);
    close(target);
    return ret == 0;
}

/* By another process than QEMU, so to say; not put on the disk. */
static void change_file(const char *name, int64_t offset, int64_t n)
{
    g_autofree uint8_t *other = g_malloc(n);
    int fd = open_file(name, O_WRONLY);

    memset(other, g_test_rand_int() | 1, n);
    g_assert_cmpint(pwrite(fd, other, n, offset), ==, n);
    close(fd);
}

/* --- nodes ---------------------------------------------------------------- */

static bool setup(void)
{
    dir = g_strdup_printf("%s/dedup-origin-XXXXXX", g_get_tmp_dir());
    g_assert_nonnull(g_mkdtemp(dir));
    sock = file("sock");
    guest = dedup_guest_ram_new(SIZE);
    pid = dedup_daemon_start(sock, "64M");
    make_file("golden");
    return make_copy("golden", "a") && make_copy("golden", "b");
}

static void teardown(void)
{
    const char *const names[] = { "golden", "other", "a", "b", "c", "big" };
    unsigned i;

    dedup_guest_ram_free();
    dedup_daemon_end(pid, sock, SIGTERM);
    for (i = 0; i < ARRAY_SIZE(names); i++) {
        g_autofree char *path = file(names[i]);

        g_unlink(path);
    }
    g_assert_cmpint(g_rmdir(dir), ==, 0);
    g_free(dir);
    g_free(sock);
}

/* Skip the test if there are no reflink copies here. */
#define SETUP_OR_SKIP() \
    do { \
        if (!setup()) { \
            teardown(); \
            g_test_skip("no reflink copies in TMPDIR"); \
            return; \
        } \
    } while (0)

static BlockBackend *open_above(const char *origin, const char *below,
                                const char *name)
{
    g_autofree char *options = g_strdup_printf(
        "\"discard\":\"unmap\",\"origin\":{\"driver\":\"file\",\"filename\":"
        "\"%s/%s\"},", dir, origin);
    g_autofree char *child = g_strdup_printf(below, name, name, dir, name);

    return dedup_nodes_open(sock, options, true, child);
}

#define BELOW "{\"driver\":\"raw\",\"node-name\":\"raw-%s\",\"file\":{" \
              "\"driver\":\"file\",\"node-name\":\"file-%s\"," \
              "\"discard\":\"unmap\",\"filename\":\"%s/%s\"}}"

static BlockBackend *open_of(const char *origin, const char *name)
{
    return open_above(origin, BELOW, name);
}

static BlockBackend *open_copy(const char *name)
{
    return open_of("golden", name);
}

/* The copy without the filter. */
static BlockBackend *open_below(const char *name)
{
    g_autofree char *below = g_strdup_printf("json:" BELOW, name, name, dir,
                                             name);

    return blk_new_open(below, NULL, NULL, BDRV_O_RDWR, &error_abort);
}

static void close_copy(BlockBackend *blk)
{
    blk_flush(blk);
    blk_unref(blk);
}

static void request_done(void *opaque, int ret)
{
    *(int *)opaque = ret;
}

static void wait_for(int *ret)
{
    while (*ret > 0) {
        aio_poll(qemu_get_aio_context(), true);
    }
    g_assert_cmpint(*ret, ==, 0);
}

/* Read, and compare with what the file @name has. */
static void read_now(BlockBackend *blk, const char *name, int64_t offset,
                     int64_t n)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, guest + offset, n);
    g_autofree uint8_t *expected = g_malloc(n);
    int fd = open_file(name, O_RDONLY), ret = 1;

    memset(guest + offset, 0x55, n);
    blk_aio_preadv(blk, offset, &qiov, 0, request_done, &ret);
    wait_for(&ret);
    g_assert_cmpint(pread(fd, expected, n, offset), ==, n);
    close(fd);
    if (memcmp(guest + offset, expected, n)) {
        int64_t i = 0;

        while (guest[offset + i] == expected[i]) {
            i++;
        }
        g_error("%s: wrong byte at %" PRId64, name, offset + i);
    }
}

static void start_write(BlockBackend *blk, QEMUIOVector *qiov, void *buf,
                        int64_t offset, int64_t n, int *ret)
{
    memset(buf, g_test_rand_int() | 1, n);
    qemu_iovec_init_buf(qiov, buf, n);
    *ret = 1;
    blk_aio_pwritev(blk, offset, qiov, 0, request_done, ret);
}

static void write_now(BlockBackend *blk, int64_t offset, int64_t n)
{
    g_autofree uint8_t *buf = g_malloc(n);
    QEMUIOVector qiov;
    int ret;

    start_write(blk, &qiov, buf, offset, n, &ret);
    wait_for(&ret);
}

static uint64_t of_origin(BlockBackend *blk)
{
    g_autoptr(DedupShareStats) s = dedup_share_stats(blk_bs(blk));

    return s->origin->blocks;
}

/* What was known was forgotten: wait until the file was looked at again. */
static void look_again(BlockBackend *blk, const char *name)
{
    uint64_t before = of_origin(blk);
    unsigned i;

    for (i = 0; i < 1000 && of_origin(blk) == before; i++) {
        read_now(blk, name, 0, PAGE);
        g_usleep(1000);
    }
    g_assert_cmpint(of_origin(blk), ==, before + 1);
}

static uint64_t image_bytes(BlockBackend *blk)
{
    return STAT(blk, bytes_filled) + STAT(blk, bytes_passed);
}

/* Why nothing is shared by the origin, or NULL; to be freed. */
static char *reason(BlockBackend *blk)
{
    g_autoptr(DedupShareStats) s = dedup_share_stats(blk_bs(blk));

    return g_strdup(s->origin->reason);
}

/* --- extents: lists that a file system can say, and cannot ---------------- */

static DedupExtents list_of(uint64_t end)
{
    return (DedupExtents) { .end = end };
}

static void add(DedupExtents *x, uint64_t block, uint64_t physical, uint64_t n,
                uint32_t flags)
{
    x->extents[x->n++] = (struct fiemap_extent) {
        .fe_logical = block * PAGE, .fe_physical = physical * PAGE,
        .fe_length = n * PAGE, .fe_flags = flags,
    };
}

#define SHARED FIEMAP_EXTENT_SHARED

/* Blocks of 64 from @first on that are the same, as a mask. */
static uint64_t same_of(const DedupExtents *a, const DedupExtents *b,
                        uint64_t first)
{
    DECLARE_BITMAP(same, 64 + 8) = { 0 };
    uint64_t mask = 0;
    unsigned i;

    dedup_extents_mark_same(a, b, first, 64, same);
    for (i = 0; i < 64; i++) {
        mask |= (uint64_t)test_bit(i, same) << i;
    }
    for (; i < 72; i++) {
        g_assert_false(test_bit(i, same));
    }
    return mask;
}

static void test_extents(void)
{
    DedupExtents a = list_of(64 * PAGE), b = list_of(64 * PAGE);

    g_assert_cmphex(same_of(&a, &b, 0), ==, 0);
    add(&a, 0, 1000, 8, SHARED);
    g_assert_cmphex(same_of(&a, &b, 0), ==, 0);
    add(&b, 0, 1000, 2, SHARED);        /* two extents for one */
    add(&b, 2, 1002, 2, SHARED);
    add(&b, 5, 1006, 1, SHARED);        /* another block of the same extent */
    add(&b, 6, 1006, 60, SHARED | FIEMAP_EXTENT_LAST);
    add(&a, 10, 1010, 2, SHARED);
    add(&a, 20, 1021, 2, SHARED);
    add(&a, 62, 1062, 9, SHARED);
    g_assert_cmphex(same_of(&a, &b, 0), ==, 0xC000000000000CCF);
    g_assert_cmphex(same_of(&b, &a, 0), ==, 0xC000000000000CCF);
    /* what is asked for begins, and ends, in the middle */
    g_assert_cmphex(same_of(&a, &b, 3), ==, 0xC000000000000CCFu >> 3);
    /* one list is not known so far */
    a.end = 11 * PAGE + PAGE / 2;
    g_assert_cmphex(same_of(&a, &b, 0), ==, 0x4CF);
    g_assert_cmphex(same_of(&b, &a, 0), ==, 0x4CF);
}

/* Each flag, alone, means that something is not plain; and so may new ones. */
static void test_flags(void)
{
    unsigned i;

    for (i = 0; i < 32; i++) {
        uint32_t flag = 1u << i;
        bool plain = flag == SHARED || flag == FIEMAP_EXTENT_LAST;
        DedupExtents a = list_of(64 * PAGE), b = list_of(64 * PAGE);

        add(&a, 0, 1000, 8, SHARED | flag);
        add(&b, 0, 1000, 8, SHARED);
        g_assert_cmphex(same_of(&a, &b, 0), ==, plain ? 0xFF : 0);
        g_assert_cmphex(same_of(&b, &a, 0), ==, plain ? 0xFF : 0);
        a.extents[0].fe_flags = flag;
        g_assert_cmphex(same_of(&a, &b, 0), ==, flag == SHARED ? 0xFF : 0);
    }
}

/* A block counts only if all of it is the same. */
static void test_parts(void)
{
    DedupExtents a = list_of(64 * PAGE), b = list_of(64 * PAGE);

    add(&a, 0, 1000, 8, SHARED);
    b.n = 1;
    b.extents[0] = (struct fiemap_extent) {
        .fe_logical = 512, .fe_physical = 1000 * PAGE + 512,
        .fe_length = 4 * PAGE, .fe_flags = SHARED,
    };
    g_assert_cmphex(same_of(&a, &b, 0), ==, 0xE);
    b.extents[0].fe_physical = 1000 * PAGE;
    g_assert_cmphex(same_of(&a, &b, 0), ==, 0);
    b.extents[0].fe_logical = 0;
    b.extents[0].fe_length = PAGE - 1;
    g_assert_cmphex(same_of(&a, &b, 0), ==, 0);
}

/* What no file system should say is worth nothing, and does no harm. */
static void test_cannot_be(void)
{
    static const struct fiemap_extent odd[] = {
        /* empty; before the one before it; overlapping it */
        { .fe_logical = 9 * PAGE, .fe_physical = 1009 * PAGE },
        { .fe_logical = 0, .fe_physical = 1000 * PAGE, .fe_length = PAGE },
        { .fe_logical = 7 * PAGE, .fe_physical = 1007 * PAGE,
          .fe_length = 2 * PAGE },
        /* ends behind the last byte, of the file or the disk */
        { .fe_logical = 9 * PAGE, .fe_physical = 1009 * PAGE,
          .fe_length = UINT64_MAX },
        { .fe_logical = 9 * PAGE, .fe_physical = UINT64_MAX - PAGE,
          .fe_length = 2 * PAGE },
        { .fe_logical = UINT64_MAX - 1, .fe_length = 2 },
    };
    DedupExtents a, b;
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(odd); i++) {
        a = list_of(64 * PAGE);
        b = list_of(64 * PAGE);
        add(&a, 0, 1000, 8, SHARED);
        add(&b, 0, 1000, 8, SHARED);
        a.extents[a.n] = odd[i];
        a.extents[a.n++].fe_flags = SHARED;
        g_assert_cmphex(same_of(&a, &b, 0), ==, 0);
        g_assert_cmphex(same_of(&b, &a, 0), ==, 0);
    }
    /* this one can be, where nothing is asked for */
    a = list_of(UINT64_MAX);
    a.n = 1;
    a.extents[0] = (struct fiemap_extent) {
        .fe_logical = UINT64_MAX - 100, .fe_physical = UINT64_MAX - 100,
        .fe_length = 50, .fe_flags = SHARED,
    };
    g_assert_cmphex(same_of(&a, &a, 0), ==, 0);
}

/* --- copies --------------------------------------------------------------- */

/* What one copy's guest has read costs the next one's nothing. */
static void test_copies(void)
{
    BlockBackend *a, *b;

    SETUP_OR_SKIP();
    a = open_copy("a");
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(STAT(a, blocks_missed), ==, BLOCKS);
    g_assert_cmpint(STAT(a, blocks_given), ==, BLOCKS);
    g_assert_cmpint(STAT(a, bytes_passed), ==, 0);
    g_assert_cmpint(of_origin(a), ==, BLOCKS);
    b = open_copy("b");
    read_now(b, "b", EDGE - 3 * PAGE, 6 * PAGE);        /* of both windows */
    read_now(b, "b", 0, SIZE);
    g_assert_cmpint(STAT(b, blocks_hit), ==, BLOCKS + 6);
    g_assert_cmpint(image_bytes(b), ==, 0);
    g_assert_null(reason(b));
    close_copy(a);
    close_copy(b);
    teardown();
}

/* What was changed between copying and opening, and is in memory only. */
static void test_changed(void)
{
    BlockBackend *a, *b;

    SETUP_OR_SKIP();
    change_file("a", 5 * PAGE, PAGE);
    change_file("a", EDGE - PAGE - 100, PAGE + 200);
    a = open_copy("a");
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, BLOCKS - 4);
    b = open_copy("b");
    read_now(b, "b", 0, SIZE);
    close_copy(a);
    close_copy(b);
    teardown();
}

/* If nothing can be synced, nothing is looked at. */
static void test_no_descriptor(void)
{
    BlockBackend *a, *b;

    SETUP_OR_SKIP();
    b = open_copy("b");
    read_now(b, "b", 0, SIZE);
    change_file("a", EDGE + 5 * PAGE, PAGE);
    a = open_copy("a");
    fail_dup = 2;                       /* the first one is for the lease */
    read_now(a, "a", 0, MiB);
    g_assert_cmpint(fail_dup, ==, 0);
    g_assert_cmpint(of_origin(a), <, MiB / PAGE);       /* it is in parts */
    read_now(a, "a", EDGE, MiB);
    look_again(a, "a");
    read_now(a, "a", EDGE, MiB);
    close_copy(a);
    close_copy(b);
    teardown();
}

/* The same of the origin: what it was copied from is not what it is now. */
static void test_changed_origin(void)
{
    BlockBackend *a;

    SETUP_OR_SKIP();
    change_file("golden", 5 * PAGE, 2 * PAGE);
    a = open_copy("a");
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, BLOCKS - 2);
    close_copy(a);
    teardown();
}

/* More extents in a window than are asked for at once. */
static void test_fragments(void)
{
    const unsigned n = 2 * DEDUP_EXTENTS + 77;
    BlockBackend *a;
    unsigned i;
    int fd;

    SETUP_OR_SKIP();
    for (i = 0; i < n; i++) {
        change_file("a", (2 * i + 1) * PAGE, PAGE);
    }
    fd = open_file("a", O_RDONLY);
    g_assert_cmpint(fsync(fd), ==, 0);
    close(fd);
    a = open_copy("a");
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, BLOCKS - n);
    close_copy(a);
    teardown();
}

static void zero_now(BlockBackend *blk, int64_t offset, int64_t n)
{
    g_assert_cmpint(blk_pwrite_zeroes(blk, offset, n, 0), >=, 0);
}

static void discard_now(BlockBackend *blk, int64_t offset, int64_t n)
{
    g_assert_cmpint(blk_pdiscard(blk, offset, n, 0), ==, 0);
}

typedef struct Range {
    BlockBackend *blk;
    int64_t offset, bytes;
    int ret;
} Range;

static void coroutine_fn copy_range_entry(void *opaque)
{
    Range *r = opaque;

    /* from the other end of the disk */
    r->ret = blk_co_copy_range(r->blk, SIZE - r->offset - r->bytes, r->blk,
                               r->offset, r->bytes, 0, 0);
}

static void copy_range_now(BlockBackend *blk, int64_t offset, int64_t n)
{
    Range r = { .blk = blk, .offset = offset, .bytes = n, .ret = 1 };

    aio_co_enter(qemu_get_aio_context(),
                 qemu_coroutine_create(copy_range_entry, &r));
    wait_for(&r.ret);
}

/* Whatever a guest's write is, its next read has it; others' have not. */
static void test_writes(void)
{
    void (*const kinds[])(BlockBackend *, int64_t, int64_t) = {
        write_now, zero_now, discard_now, copy_range_now,
    };
    BlockBackend *a, *b;
    unsigned i, before;

    SETUP_OR_SKIP();
    a = open_copy("a");
    b = open_copy("b");
    read_now(a, "a", 0, MiB);           /* the other window is not looked at */
    for (i = 0; i < ARRAY_SIZE(kinds); i++) {
        int64_t at = (1 + i) * 64 * KiB;

        kinds[i](a, at, 5 * PAGE);
        read_now(a, "a", at - PAGE, 7 * PAGE);
        kinds[i](a, at + 8 * PAGE + 512, PAGE);         /* parts of two */
        read_now(a, "a", at + 7 * PAGE, 4 * PAGE);
        kinds[i](a, EDGE + at, 3 * PAGE);               /* before the look */
    }
    write_now(a, EDGE - PAGE, 2 * PAGE);        /* in both windows */
    read_now(a, "a", 0, SIZE);
    before = of_origin(a);
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a) - before, ==,
                    BLOCKS - ARRAY_SIZE(kinds) * 10 - 2);
    read_now(b, "b", 0, SIZE);
    g_assert_cmpint(of_origin(b), ==, BLOCKS);
    close_copy(a);
    a = open_copy("a");                 /* it is all found out anew */
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, BLOCKS - ARRAY_SIZE(kinds) * 10 - 2);
    close_copy(a);
    close_copy(b);
    teardown();
}

/* A write that began before the first look, and ends after it. */
static void test_write_meanwhile(void)
{
    g_autofree uint8_t *one = g_malloc(PAGE), *other = g_malloc(PAGE);
    QEMUIOVector first, second;
    BlockBackend *a, *b;
    int done, late;

    SETUP_OR_SKIP();
    b = open_copy("b");                 /* nothing is filled for what is slow */
    read_now(b, "b", 0, MiB);
    a = open_above("golden", "{\"driver\":\"throttle\",\"node-name\":"
                   "\"slow-%s\",\"throttle-group\":\"slow\",\"file\":{"
                   "\"driver\":\"file\",\"node-name\":\"file-%s\","
                   "\"filename\":\"%s/%s\"}}", "a");
    start_write(a, &first, one, 0, PAGE, &done);
    wait_for(&done);
    start_write(a, &second, other, 7 * PAGE, PAGE, &late);     /* it waits */
    read_now(a, "a", 0, MiB);
    g_assert_cmpint(late, ==, 1);
    wait_for(&late);
    read_now(a, "a", 0, MiB);
    g_assert_cmpint(STAT(a, blocks_given), ==, 2 * (MiB / PAGE - 2));
    close_copy(a);
    close_copy(b);
    teardown();
}

/* Where a look is; the worker waits at its @stop_at-th answer. */
static int looks, stop_at;
static QemuEvent stopped, go_on;

static void stop_look(struct fiemap *map)
{
    if (map->fm_extent_count && qatomic_inc_fetch(&looks) == stop_at) {
        qemu_event_set(&stopped);
        qemu_event_wait(&go_on);
    }
}

/* A write between two of the look's questions, whichever they are. */
static void test_write_between(void)
{
    BlockBackend *a;
    QEMUIOVector qiov;
    int ret;

    SETUP_OR_SKIP();
    qemu_event_init(&stopped, false);
    qemu_event_init(&go_on, false);
    for (stop_at = 1; stop_at <= 3; stop_at++) {
        looks = 0;
        qemu_event_reset(&stopped);
        qemu_event_reset(&go_on);
        a = open_copy("a");
        on_fiemap = stop_look;
        qemu_iovec_init_buf(&qiov, guest, 8 * PAGE);
        ret = 1;
        blk_aio_preadv(a, 0, &qiov, 0, request_done, &ret);
        while (qatomic_read(&looks) < stop_at) {
            aio_poll(qemu_get_aio_context(), false);
        }
        qemu_event_wait(&stopped);
        write_now(a, stop_at * 8 * PAGE, 8 * PAGE);
        qemu_event_set(&go_on);
        wait_for(&ret);
        on_fiemap = NULL;
        read_now(a, "a", 0, MiB);
        g_assert_cmpint(of_origin(a), ==, 8 + MiB / PAGE - stop_at * 8);
        close_copy(a);
    }
    qemu_event_destroy(&stopped);
    qemu_event_destroy(&go_on);
    teardown();
}

static void stop_sync(struct fiemap *map)
{
    if (!map->fm_extent_count) {
        qemu_event_set(&stopped);
        qemu_event_wait(&go_on);
    }
}

/*
 * Neither reads nor a drained section wait as long as it takes to sync what the
 * guest has written; and what is written meanwhile is its own.
 */
static void test_slow_sync(void)
{
    BlockBackend *a;

    SETUP_OR_SKIP();
    qemu_event_init(&stopped, false);
    qemu_event_init(&go_on, false);
    a = open_copy("a");
    read_now(a, "a", 0, MiB);
    write_now(a, PAGE, PAGE);
    blk_drain(a);
    on_fiemap = stop_sync;
    read_now(a, "a", 0, MiB);
    qemu_event_wait(&stopped);
    write_now(a, 2 * PAGE, PAGE);
    read_now(a, "a", 0, MiB);
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, MiB / PAGE);
    on_fiemap = NULL;
    blk_drain(a);                       /* the next read begins anew */
    look_again(a, "a");
    qemu_event_set(&go_on);
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, MiB / PAGE + 1 + BLOCKS - 2);

    blk_drain(a);
    qemu_event_reset(&stopped);
    qemu_event_reset(&go_on);
    on_fiemap = stop_sync;
    read_now(a, "a", 0, MiB);
    qemu_event_wait(&stopped);
    on_fiemap = NULL;
    write_now(a, 3 * PAGE, PAGE);
    qemu_event_set(&go_on);
    look_again(a, "a");                 /* of that sync */
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, MiB / PAGE + 2 + 2 * BLOCKS - 2 - 3);

    blk_drain(a);
    qemu_event_reset(&stopped);
    qemu_event_reset(&go_on);
    on_fiemap = stop_sync;
    read_now(a, "a", 0, MiB);
    qemu_event_wait(&stopped);
    on_fiemap = NULL;
    close_copy(a);                      /* it is synced for nobody */
    qemu_event_set(&go_on);
    qemu_event_destroy(&stopped);
    qemu_event_destroy(&go_on);
    teardown();
}

/* What the copy has before and after is not the same, in one block. */
static void move_extent(struct fiemap *map)
{
    if (map->fm_extent_count && qatomic_inc_fetch(&looks) == stop_at) {
        map->fm_extents[0].fe_physical += PAGE;
    }
}

static void test_moved(void)
{
    BlockBackend *a;

    SETUP_OR_SKIP();
    for (stop_at = 1; stop_at <= 3; stop_at++) {
        looks = 0;
        on_fiemap = move_extent;
        a = open_copy("a");
        read_now(a, "a", 0, MiB);
        on_fiemap = NULL;
        g_assert_cmpint(of_origin(a), ==, 0);
        close_copy(a);
    }
    teardown();
}

/* Others that write to the copy in this process are kept off. */
static void test_permissions(void)
{
    BlockBackend *a, *other;
    BlockDriverState *raw;
    Error *err = NULL;

    SETUP_OR_SKIP();
    a = open_copy("a");
    raw = bdrv_lookup_bs(NULL, "raw-a", &error_abort);
    other = blk_new(qemu_get_aio_context(), BLK_PERM_WRITE, BLK_PERM_ALL);
    g_assert_cmpint(blk_insert_bs(other, raw, &err), <, 0);
    g_assert_nonnull(strstr(error_get_pretty(err), "write"));
    error_free(err);
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, BLOCKS);
    blk_unref(other);
    close_copy(a);
    teardown();
}

/* Have the graph below @bs lead to another node. */
static void set_file(BlockDriverState *bs, const char *name)
{
    QDict *options = qdict_new();

    qdict_put_str(options, "file", name);
    bdrv_reopen(bs, options, true, &error_abort);
}

static void write_beside(BlockDriverState *bs, int64_t offset, int64_t n)
{
    BlockBackend *writer = blk_new_with_bs(bs, BLK_PERM_WRITE, BLK_PERM_ALL,
                                           &error_abort);

    write_now(writer, offset, n);
    blk_unref(writer);
}

/* The graph below changes, somebody writes, and it changes back. */
static void test_graph(void)
{
    BlockDriverState *raw, *f, *other;
    BlockBackend *a, *b;

    SETUP_OR_SKIP();
    a = open_copy("a");
    raw = bdrv_lookup_bs(NULL, "raw-a", &error_abort);
    f = bdrv_lookup_bs(NULL, "file-a", &error_abort);
    b = open_copy("b");
    other = bdrv_lookup_bs(NULL, "raw-b", &error_abort);
    bdrv_ref(raw);
    bdrv_ref(f);
    bdrv_ref(other);
    bdrv_ref(bdrv_lookup_bs(NULL, "file-b", &error_abort));
    close_copy(b);

    read_now(a, "a", 0, SIZE);
    set_file(blk_bs(a), "raw-b");
    look_again(a, "b");                 /* it is a copy, too */
    read_now(a, "b", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, 2 * BLOCKS + 1);
    write_beside(raw, 3 * PAGE, 5 * PAGE);
    set_file(blk_bs(a), "raw-a");
    look_again(a, "a");
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, 3 * BLOCKS - 5 + 2);

    /* the same one node further down, of which the filter has no word */
    bdrv_unref(other);
    set_file(raw, "file-b");
    look_again(a, "b");
    read_now(a, "b", 0, SIZE);
    write_beside(f, 30 * PAGE, 5 * PAGE);
    set_file(raw, "file-a");
    look_again(a, "a");
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, 5 * BLOCKS - 15 + 4);
    bdrv_unref(bdrv_lookup_bs(NULL, "file-b", &error_abort));
    bdrv_unref(f);
    bdrv_unref(raw);
    close_copy(a);
    teardown();
}

/* The image is not the whole file any more: its blocks are others. */
static void test_offset(void)
{
    g_autofree uint8_t *expected = g_malloc(PAGE);
    QDict *options = qdict_new();
    g_autofree char *why = NULL;
    BlockBackend *a;
    int fd;

    SETUP_OR_SKIP();
    a = open_copy("a");
    read_now(a, "a", 0, MiB);
    qdict_put_int(options, "offset", MiB);
    bdrv_reopen(bdrv_lookup_bs(NULL, "raw-a", &error_abort), options, true,
                &error_abort);
    g_assert_cmpint(blk_pread(a, 0, PAGE, guest, 0), ==, 0);
    fd = open_file("a", O_RDONLY);
    g_assert_cmpint(pread(fd, expected, PAGE, MiB), ==, PAGE);
    close(fd);
    g_assert_cmpmem(guest, PAGE, expected, PAGE);
    g_assert_cmpint(of_origin(a), ==, MiB / PAGE);
    why = reason(a);
    g_assert_nonnull(why);
    close_copy(a);
    teardown();
}

/* A node on the way lets others write, whatever the filter says. */
static void test_force_share(void)
{
    g_autofree char *options = NULL, *below = NULL;
    BlockBackend *a, *writer;

    SETUP_OR_SKIP();
    below = g_strdup_printf("json:{\"driver\":\"file\",\"node-name\":\"f\","
                            "\"filename\":\"%s/a\"}", dir);
    writer = blk_new_open(below, NULL, NULL, BDRV_O_RDWR, &error_abort);
    options = g_strdup_printf("\"origin\":{\"driver\":\"file\",\"filename\":"
                              "\"%s/golden\"},", dir);
    a = dedup_nodes_open(sock, options, false, "{\"driver\":\"raw\","
                         "\"read-only\":true,\"force-share\":true,"
                         "\"file\":\"f\"}");
    read_now(a, "a", 0, MiB);
    write_now(writer, 3 * PAGE, 5 * PAGE);
    blk_flush(writer);
    read_now(a, "a", 0, MiB);
    g_assert_cmpint(of_origin(a), ==, 0);
    blk_unref(a);
    close_copy(writer);
    teardown();
}

/*
 * Somebody writes while nobody uses the filter.  Who used it last did so
 * through a node above it, so it is not drained for that one's sake.
 */
static void test_unused(void)
{
    BlockDriverState *filter;
    BlockBackend *a, *above, *writer;
    QDict *options = qdict_new();

    SETUP_OR_SKIP();
    a = open_copy("a");
    filter = blk_bs(a);
    bdrv_ref(filter);
    qdict_put_str(options, "driver", "throttle");
    qdict_put_str(options, "throttle-group", "fast");
    qdict_put_str(options, "file", bdrv_get_node_name(filter));
    above = blk_new_open(NULL, NULL, options, 0, &error_abort);
    blk_unref(a);
    read_now(above, "a", 0, MiB);
    blk_unref(above);
    writer = blk_new_with_bs(bdrv_lookup_bs(NULL, "raw-a", &error_abort),
                             BLK_PERM_WRITE, BLK_PERM_ALL, &error_abort);
    write_now(writer, 3 * PAGE, 5 * PAGE);
    /* it stays, as if it went nothing would be left of what was known */
    blk_set_perm(writer, 0, BLK_PERM_ALL, &error_abort);
    a = blk_new_with_bs(filter, BLK_PERM_CONSISTENT_READ, BLK_PERM_ALL,
                        &error_abort);
    look_again(a, "a");
    read_now(a, "a", 0, MiB);
    bdrv_unref(filter);
    blk_unref(writer);
    close_copy(a);
    teardown();
}

/* The filter is put between a disk and who uses it, as PV disks do it. */
static void test_inserted(void)
{
    g_autofree char *golden = NULL;
    QDict *options = qdict_new();
    BlockDriverState *filter;
    BlockBackend *a;

    SETUP_OR_SKIP();
    golden = file("golden");
    a = open_below("a");
    write_now(a, 3 * PAGE, 5 * PAGE);
    qdict_put_str(options, "driver", "dedup-share");
    qdict_put_str(options, "store", "linux");
    qdict_put_str(options, "socket", sock);
    qdict_put_str(options, "file", "raw-a");
    qdict_put_str(options, "origin.driver", "file");
    qdict_put_str(options, "origin.filename", golden);
    filter = bdrv_insert_node(blk_bs(a), options, BDRV_O_RDWR, &error_abort);
    g_assert_true(blk_bs(a) == filter);
    bdrv_unref(filter);
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, BLOCKS - 5);
    write_now(a, 30 * PAGE, 5 * PAGE);
    read_now(a, "a", 0, SIZE);
    close_copy(a);
    teardown();
}

/* Another QEMU has it for a while: the guest is migrated, there and back. */
static void test_inactive(void)
{
    BlockBackend *a;
    unsigned i;

    SETUP_OR_SKIP();
    a = open_copy("a");
    blk_set_force_allow_inactivate(a);
    read_now(a, "a", 0, MiB);
    bdrv_graph_rdlock_main_loop();
    g_assert_cmpint(bdrv_inactivate(blk_bs(a), &error_abort), ==, 0);
    bdrv_graph_rdunlock_main_loop();
    for (i = 0; i < 50; i++) {          /* time enough for a look */
        read_now(a, "a", 0, MiB);
        g_usleep(1000);
    }
    change_file("a", 3 * PAGE, 5 * PAGE);
    read_now(a, "a", 0, MiB);
    change_file("a", 30 * PAGE, 5 * PAGE);
    bdrv_graph_rdlock_main_loop();
    g_assert_cmpint(bdrv_activate(blk_bs(a), &error_abort), ==, 0);
    bdrv_graph_rdunlock_main_loop();
    g_assert_cmpint(of_origin(a), ==, MiB / PAGE);
    look_again(a, "a");
    read_now(a, "a", 0, MiB);
    g_assert_cmpint(of_origin(a), ==, 2 * MiB / PAGE - 10 + 1);
    close_copy(a);
    teardown();
}

/* What is cut off comes back as zeroes. */
static void test_resized(void)
{
    BlockBackend *a;

    SETUP_OR_SKIP();
    a = open_copy("a");
    blk_set_perm(a, BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE | BLK_PERM_RESIZE,
                 BLK_PERM_ALL, &error_abort);
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(blk_truncate(a, 3 * PAGE + 512, true, PREALLOC_MODE_OFF, 0,
                                 &error_abort), ==, 0);
    g_assert_cmpint(blk_truncate(a, SIZE, true, PREALLOC_MODE_OFF, 0,
                                 &error_abort), ==, 0);
    look_again(a, "a");
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, BLOCKS + 1 + 3);
    close_copy(a);
    teardown();
}

/* The origin is changed while its daemon is away: its lease is another one. */
static void test_lease(void)
{
    g_autofree char *why = NULL;
    BlockBackend *a;
    uint64_t before;

    SETUP_OR_SKIP();
    a = open_copy("a");
    read_now(a, "a", 0, MiB);
    change_file("golden", 5 * PAGE, 2 * PAGE);
    while (!(why = reason(a))) {        /* it is told, in time */
        g_usleep(1000);
    }
    read_now(a, "a", 0, MiB);
    before = of_origin(a);
    g_assert_cmpint(STAT(a, bytes_passed), ==, MiB);
    dedup_daemon_end(pid, sock, SIGKILL);
    read_now(a, "a", 0, MiB);
    pid = dedup_daemon_start(sock, "64M");
    do {                                /* the daemon is connected to again */
        read_now(a, "a", 0, PAGE);
        g_usleep(10 * 1000);
    } while (of_origin(a) == before);
    read_now(a, "a", 0, MiB);
    g_assert_cmpint(of_origin(a), ==, before + 1 + MiB / PAGE - 2);
    close_copy(a);
    teardown();
}

/* --- what moves blocks ---------------------------------------------------- */

static int64_t physical(const char *name, int64_t offset)
{
    g_autofree DedupExtents *x = g_new(DedupExtents, 1);
    int fd = open_file(name, O_RDONLY);

    g_assert_cmpint(dedup_extents_sync(fd), ==, 0);
    g_assert_cmpint(dedup_extents_read(fd, offset, offset + PAGE, x), ==, 0);
    close(fd);
    g_assert_cmpint(x->n, ==, 1);
    return x->extents[0].fe_physical + offset - x->extents[0].fe_logical;
}

/* Have the first MiB of "golden" be that of "other", by its reader. */
static void dedupe(void)
{
    g_autofree struct file_dedupe_range *range =
        g_malloc0(sizeof(*range) + sizeof(range->info[0]));
    int golden = open_file("golden", O_RDONLY);
    int other = open_file("other", O_RDONLY);

    range->src_length = MiB;
    range->dest_count = 1;
    range->info[0].dest_fd = golden;
    g_assert_cmpint(ioctl(other, FIDEDUPERANGE, range), ==, 0);
    g_assert_cmpint(range->info[0].status, ==, FILE_DEDUPE_RANGE_SAME);
    close(golden);
    close(other);
}

static void make_other(void)
{
    g_autofree char *from = file("golden"), *to = file("other");
    g_autofree char *content = NULL;
    gsize n;
    int fd;

    g_assert_true(g_file_get_contents(from, &content, &n, NULL));
    g_assert_true(g_file_set_contents(to, content, n, NULL));
    fd = open_file("other", O_RDONLY);
    g_assert_cmpint(fsync(fd), ==, 0);
    close(fd);
}

/*
 * A reader of the leased origin moves its blocks: the old place is the copies'
 * alone, and then one copy's alone, which writes to it.
 */
static void test_dedupe(void)
{
    BlockBackend *a, *b;
    int64_t before;

    SETUP_OR_SKIP();
    make_other();
    a = open_copy("a");
    b = open_copy("b");
    read_now(a, "a", 0, MiB);
    before = physical("golden", 0);
    dedupe();
    g_assert_cmpint(physical("golden", 0), !=, before);
    g_assert_cmpint(physical("b", 0), ==, before);
    read_now(a, "a", 0, MiB);           /* it was found before */
    g_assert_cmpint(of_origin(a), ==, 2 * MiB / PAGE);
    read_now(b, "b", 0, 2 * MiB);       /* its first MiB is found no more */
    g_assert_cmpint(of_origin(b), ==, MiB / PAGE);
    write_now(a, 0, PAGE);
    write_now(b, 0, PAGE);              /* at the old place, maybe */
    write_now(b, 2 * PAGE, PAGE);
    read_now(a, "a", 0, MiB);
    read_now(b, "b", 0, MiB);
    close_copy(a);
    a = open_copy("a");
    read_now(a, "a", 0, SIZE);
    close_copy(a);
    close_copy(b);
    teardown();
}

static bool is_btrfs(void)
{
    struct statfs fs;

    g_assert_cmpint(statfs(dir, &fs), ==, 0);
    return fs.f_type == BTRFS_SUPER_MAGIC;
}

/* btrfs only: the blocks of the origin are written anew for its reader. */
static void test_defrag(void)
{
    struct btrfs_ioctl_defrag_range_args args = {
        .len = UINT64_MAX, .extent_thresh = 1 << 30, .compress_type = 1,
        .flags = BTRFS_DEFRAG_RANGE_COMPRESS | BTRFS_DEFRAG_RANGE_START_IO,
    };
    BlockBackend *a, *b;
    int64_t before;
    int golden;

    SETUP_OR_SKIP();
    if (!is_btrfs()) {
        teardown();
        g_test_skip("XFS has no such operation for readers");
        return;
    }
    a = open_copy("a");
    b = open_copy("b");
    read_now(a, "a", 0, SIZE);
    before = physical("golden", 0);
    golden = open_file("golden", O_RDONLY);
    g_assert_cmpint(ioctl(golden, BTRFS_IOC_DEFRAG_RANGE, &args), >=, 0);
    close(golden);
    g_assert_cmpint(physical("golden", 0), !=, before);
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, 2 * BLOCKS);
    read_now(b, "b", 0, SIZE);
    g_assert_cmpint(of_origin(b), <, BLOCKS);
    write_now(b, 7 * PAGE, 7 * PAGE);
    read_now(a, "a", 0, SIZE);
    read_now(b, "b", 0, SIZE);
    close_copy(a);
    close_copy(b);
    teardown();
}

/* btrfs only: the file system moves all that it has. */
static void test_balance(void)
{
    struct btrfs_ioctl_balance_args args = {
        .flags = BTRFS_BALANCE_DATA | BTRFS_BALANCE_METADATA |
                 BTRFS_BALANCE_SYSTEM | BTRFS_BALANCE_FORCE,
    };
    BlockBackend *a, *b;
    int64_t before;
    unsigned i;
    int fd;

    SETUP_OR_SKIP();
    if (!is_btrfs() || geteuid()) {
        teardown();
        g_test_skip("it takes btrfs, and root");
        return;
    }
    a = open_copy("a");
    b = open_copy("b");
    read_now(a, "a", 0, SIZE);
    before = physical("golden", 0);
    fd = open(dir, O_RDONLY | O_DIRECTORY);
    /* it may come to the same place again */
    for (i = 0; i < 9 && physical("golden", 0) == before; i++) {
        struct btrfs_ioctl_balance_args now = args;

        g_assert_cmpint(ioctl(fd, BTRFS_IOC_BALANCE_V2, &now), ==, 0);
    }
    close(fd);
    g_assert_cmpint(physical("golden", 0), !=, before);
    read_now(a, "a", 0, SIZE);
    g_assert_cmpint(of_origin(a), ==, 2 * BLOCKS);
    read_now(b, "b", 0, SIZE);          /* they were moved together */
    g_assert_cmpint(of_origin(b), ==, BLOCKS);
    g_assert_cmpint(image_bytes(b), ==, 0);
    write_now(b, 7 * PAGE, 7 * PAGE);
    read_now(a, "a", 0, SIZE);
    read_now(b, "b", 0, SIZE);
    close_copy(a);
    close_copy(b);
    teardown();
}

/* --- copies of copies, and no copies -------------------------------------- */

static void test_copy_of_copy(void)
{
    g_autofree char *why = NULL;
    BlockBackend *a, *c;

    SETUP_OR_SKIP();
    a = open_copy("a");
    write_now(a, 5 * PAGE, 2 * PAGE);
    read_now(a, "a", 0, SIZE);
    close_copy(a);
    g_assert_true(make_copy("a", "c"));
    c = open_copy("c");                 /* of the first one's origin */
    write_now(c, 50 * PAGE, 3 * PAGE);
    read_now(c, "c", 0, SIZE);
    g_assert_cmpint(of_origin(c), ==, BLOCKS - 5);
    g_assert_cmpint(STAT(c, bytes_filled), ==, 0);
    close_copy(c);
    /* of what it was copied from, while nobody writes to that */
    c = open_of("a", "c");
    read_now(c, "c", 0, SIZE);
    g_assert_cmpint(of_origin(c), ==, BLOCKS - 3);
    close_copy(c);
    /* QEMU's own lock keeps a guest off, another program is none */
    change_file("a", 9 * PAGE, PAGE);
    {
        int writer = open_file("a", O_RDWR);

        c = open_of("a", "c");
        read_now(c, "c", 0, SIZE);
        g_assert_cmpint(of_origin(c), ==, 0);
        why = reason(c);
        g_assert_nonnull(strstr(why, "somebody writes to it"));
        close_copy(c);
        close(writer);
    }
    teardown();
}

/* Full copies are none that this is for, on whatever file system. */
static void test_full_copy(void)
{
    g_autofree char *why = NULL;
    bool reflinks = setup();
    BlockBackend *blk;

    make_other();
    blk = open_copy("other");
    read_now(blk, "other", 0, SIZE);
    write_now(blk, PAGE, PAGE);
    read_now(blk, "other", 0, SIZE);
    g_assert_cmpint(of_origin(blk), ==, 0);
    g_assert_cmpint(STAT(blk, bytes_passed), ==, 2 * SIZE);
    why = reason(blk);
    g_assert_cmpstr(why, ==, reflinks ? NULL :
                    "the file system is not XFS or btrfs");
    close_copy(blk);
    teardown();
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    module_call_init(MODULE_INIT_QOM);
    qemu_init_main_loop(&error_abort);
    bdrv_init();
    dedup_store_register(&dedup_linux_store_ops);
    object_new_with_props("throttle-group", object_get_objects_root(), "slow",
                          &error_abort, "x-iops-write", "1", NULL);
    object_new_with_props("throttle-group", object_get_objects_root(), "fast",
                          &error_abort, NULL);
    g_test_add_func("/dedup/extents/lists", test_extents);
    g_test_add_func("/dedup/extents/flags", test_flags);
    g_test_add_func("/dedup/extents/parts", test_parts);
    g_test_add_func("/dedup/extents/cannot-be", test_cannot_be);
    g_test_add_func("/dedup/origin/copies", test_copies);
    g_test_add_func("/dedup/origin/changed", test_changed);
    g_test_add_func("/dedup/origin/changed-origin", test_changed_origin);
    g_test_add_func("/dedup/origin/no-descriptor", test_no_descriptor);
    g_test_add_func("/dedup/origin/fragments", test_fragments);
    g_test_add_func("/dedup/origin/writes", test_writes);
    g_test_add_func("/dedup/origin/write-meanwhile", test_write_meanwhile);
    g_test_add_func("/dedup/origin/write-between", test_write_between);
    g_test_add_func("/dedup/origin/slow-sync", test_slow_sync);
    g_test_add_func("/dedup/origin/moved", test_moved);
    g_test_add_func("/dedup/origin/permissions", test_permissions);
    g_test_add_func("/dedup/origin/graph", test_graph);
    g_test_add_func("/dedup/origin/offset", test_offset);
    g_test_add_func("/dedup/origin/force-share", test_force_share);
    g_test_add_func("/dedup/origin/unused", test_unused);
    g_test_add_func("/dedup/origin/inserted", test_inserted);
    g_test_add_func("/dedup/origin/inactive", test_inactive);
    g_test_add_func("/dedup/origin/resized", test_resized);
    g_test_add_func("/dedup/origin/lease", test_lease);
    g_test_add_func("/dedup/origin/dedupe", test_dedupe);
    g_test_add_func("/dedup/origin/defrag", test_defrag);
    g_test_add_func("/dedup/origin/balance", test_balance);
    g_test_add_func("/dedup/origin/copy-of-copy", test_copy_of_copy);
    g_test_add_func("/dedup/origin/full-copy", test_full_copy);
    return g_test_run();
}
