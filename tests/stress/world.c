/*
 * dedup-share: random operations against a plain model
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/fs.h>
#include <sys/ioctl.h>
#include "qapi/error.h"
#include "qemu/bitops.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "block/block-global-state.h"
#include "block/block_int-common.h"
#include "block/snapshot.h"
#include "block/dedup-share/linux/probe.h"
#include "block/dedup-share/stats.h"
#include "qapi/qapi-commands-dedup-share.h"
#include "../unit/dedup-daemon.h"
#include "../unit/dedup-guest-ram.h"
#include "stress.h"

const char *const stress_kinds[16] = {
    "read", "read-many", "write", "zeroes", "discard", "guest-write", "resize",
    "snapshot", "revert", "reopen", "reclaim", "kill",
};

enum {
    READ, READ_MANY, WRITE, ZEROES, DISCARD, GUEST_WRITE, RESIZE, SNAPSHOT,
    REVERT, REOPEN, RECLAIM, KILL, KINDS,
};

/* Of 100000 operations. */
static const unsigned shares[KINDS] = {
    [READ] = 70000, [READ_MANY] = 2000, [WRITE] = 8000, [ZEROES] = 1200,
    [DISCARD] = 1200, [GUEST_WRITE] = 16600, [RESIZE] = 100, [SNAPSHOT] = 25,
    [REVERT] = 25, [REOPEN] = 30, [RECLAIM] = 800, [KILL] = 20,
};

#ifdef CONFIG_LINUX_IO_URING
#define STRESS_AIO "io_uring"   /* no thread is woken for a request */
#else
#define STRESS_AIO "threads"
#endif

/* --- images ------------------------------------------------------------- */

/* One of few contents, so that many blocks are equal; 0 is zeroes. */
static void make_content(uint8_t *page, uint32_t number)
{
    uint64_t *p = (uint64_t *)page;
    unsigned i;

    for (i = 0; i < PAGE / sizeof(*p); i++) {
        p[i] = number * 0x9e3779b97f4a7c15ULL * (i + 1);
    }
}

static unsigned rnd(World *w, unsigned n)
{
    return g_rand_int_range(w->rand, 0, n);
}

static char *base_path(const char *dir, unsigned i)
{
    return g_strdup_printf("%s/base%u.raw", dir, i);
}

/* The first two are copies, the third has a tenth of other blocks. */
static void base_content(uint8_t *bytes, unsigned i)
{
    unsigned block;

    for (block = 0; block < DISK_BLOCKS; block++) {
        bool other = i == 2 && block % 10 == 3;

        make_content(bytes + block * PAGE, block % 7 ? block + 1000 * other
                                                     : 0);
    }
}

void stress_make_bases(const char *dir)
{
    g_autofree uint8_t *bytes = g_malloc(DISK_BLOCKS * PAGE);
    unsigned i;

    for (i = 0; i < BASES; i++) {
        g_autofree char *path = base_path(dir, i);

        base_content(bytes, i);
        g_assert_true(g_file_set_contents(path, (char *)bytes,
                                          DISK_BLOCKS * PAGE, NULL));
    }
}

/* As "cp --reflink" does it, if the file system can. */
static bool make_reflink(const char *from, const char *to)
{
    int source = open(from, O_RDONLY | O_CLOEXEC);
    int target = open(to, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    int ret = ioctl(target, FICLONE, source);

    close(source);
    close(target);
    return ret == 0;
}

/* Have the disk, which is closed, be as it was at first. */
static void disk_copy(World *w, Disk *d)
{
    const uint8_t *base = w->base_bytes[(d - w->disks) % BASES];

    d->size = DISK_BLOCKS * PAGE;
    memcpy(d->bytes, base, d->size);
    d->reflink = make_reflink(d->base, d->file);
    if (!d->reflink) {
        g_assert_true(g_file_set_contents(d->file, (char *)base, d->size,
                                          NULL));
    }
}

static void disk_make(World *w, Disk *d, unsigned i)
{
    unsigned base = i % BASES;

    d->base = base_path(w->dir, base);
    d->qcow2 = i % 2 == 0;
    d->file = g_strdup_printf("%s/disk-%u-%u-%u", w->dir, getpid(), w->number,
                              i);
    d->size = DISK_BLOCKS * PAGE;
    d->bytes = g_memdup2(w->base_bytes[base], d->size);
    if (d->qcow2) {
        bdrv_img_create(d->file, "qcow2", d->base, "raw",
                        (char *)(i % 4 ? "cluster_size=4k" :
                                         "cluster_size=16k"),
                        d->size, 0, true, &error_abort);
    } else {
        disk_copy(w, d);
    }
}

/* The store daemon may just have been killed. */
static BlockDriverState *open_node(World *w, const char *name)
{
    BlockDriverState *bs;
    Error *err = NULL;

    while (true) {
        bs = bdrv_open(name, NULL, NULL, BDRV_O_RDWR | BDRV_O_RESIZE |
                                         BDRV_O_UNMAP, &err);
        if (bs) {
            return bs;
        }
        if (!strstr(error_get_pretty(err), "socket: ")) {
            error_report_err(err);
            abort();
        }
        error_free(err);
        err = NULL;
        g_usleep(1000);
    }
}

static void disk_open(World *w, Disk *d)
{
    g_autofree char *image =
        g_strdup_printf("\"driver\":\"file\",\"aio\":\"%s\","
                        "\"filename\":\"%s\"", STRESS_AIO, d->file);
    g_autofree char *store =
        g_strdup_printf("\"store\":\"linux\",\"socket\":\"%s\","
                        "\"share\":\"%s\"", w->socket,
                        rnd(w, 3) ? "all" : "base");
    g_autofree char *origin = !d->reflink || !rnd(w, 8) ? g_strdup("") :
        g_strdup_printf("\"origin\":{\"driver\":\"file\",\"filename\":"
                        "\"%s\"},", d->base);
    g_autofree char *name =
        g_strdup_printf("json:{\"driver\":\"dedup-share\",\"group\":\"" GROUP
                        "\",%s,\"admission\":\"%s\",%s"
                        "\"file\":{\"driver\":\"%s\",\"discard\":\"unmap\","
                        "\"file\":{%s,\"discard\":\"unmap\"}}}",
                        store, rnd(w, 4) ? "first-read" : "second-read", origin,
                        d->qcow2 ? "qcow2" : "raw", image);
    BlockDriverState *bs;

    /* as a device, which does not share its disk */
    d->blk = blk_new(qemu_get_aio_context(), BLK_PERM_CONSISTENT_READ |
                     BLK_PERM_WRITE | BLK_PERM_RESIZE,
                     BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE_UNCHANGED);
    bs = open_node(w, name);
    blk_insert_bs(d->blk, bs, &error_abort);
    bdrv_unref(bs);
}

/* Add up what the disk's node has done, before it goes. */
static void disk_stats(World *w, Disk *d)
{
    DedupShareStats *s;

    s = d->blk ? dedup_share_stats(blk_bs(d->blk)) : NULL;
    if (s) {
        w->hits += s->blocks_hit;
        w->misses += s->blocks_missed;
        w->matched += s->blocks_matched;
        w->given += s->blocks_given;
        w->copied += s->blocks_copied;
        w->zeroes += s->not_given->zeroes;
        w->of_origin += s->origin ? s->origin->blocks : 0;
        qapi_free_DedupShareStats(s);
    }
}

static void disk_close(World *w, Disk *d)
{
    if (d->blk) {
        disk_stats(w, d);
        blk_drain(d->blk);
        blk_unref(d->blk);
        d->blk = NULL;
    }
}

/* --- operations --------------------------------------------------------- */

static Disk *any_disk(World *w)
{
    return &w->disks[rnd(w, DISKS)];
}

/* A part of a disk; mostly whole blocks. */
static bool any_part(World *w, Disk *d, unsigned most, uint64_t *at,
                     uint64_t *bytes)
{
    uint64_t unit = rnd(w, 4) ? PAGE : 512;
    uint64_t units = d->size / unit;

    if (!units) {
        return false;
    }
    *at = rnd(w, units) * unit;
    *bytes = MIN((1 + rnd(w, most)) * unit, d->size - *at);
    return true;
}

/*
 * A part that may change.  Half of an overlay never does: what it leaves to its
 * base is found by its place there.
 */
static bool any_part_to_change(World *w, Disk *d, unsigned most, uint64_t *at,
                               uint64_t *bytes)
{
    uint64_t end = DISK_BLOCKS * PAGE / 2;

    if (!any_part(w, d, most, at, bytes)) {
        return false;
    }
    if (d->qcow2 && *at + *bytes > end) {
        *at = *at % end;
        *bytes = MIN(*bytes, end - *at);
    }
    return true;
}

static void wrong(World *w, Disk *d, uint64_t at, const uint8_t *got)
{
    uint64_t i = 0;

    while (got[i] == d->bytes[at + i]) {
        i++;
    }
    fprintf(stderr, "WRONG BYTE: process %u, %s, offset %" PRIu64 ": %02x, "
            "not %02x\n", w->number, d->file, at + i, got[i],
            d->bytes[at + i]);
    abort();
}

static void check(World *w, Disk *d, uint64_t at, uint64_t bytes,
                  const uint8_t *got)
{
    if (memcmp(got, d->bytes + at, bytes)) {
        wrong(w, d, at, got);
    }
}

/* Where in the guest's memory; mostly whole pages. */
static uint8_t *any_place(World *w, uint64_t bytes)
{
    uint64_t room = GUEST_PAGES * PAGE - bytes;

    return w->guest + (rnd(w, 8) ? rnd(w, room / PAGE + 1) * PAGE
                                 : rnd(w, room / 512 + 1) * 512);
}

static void do_read(World *w)
{
    Disk *d = any_disk(w);
    uint64_t at, bytes;
    uint8_t *to;

    if (any_part(w, d, 8, &at, &bytes)) {
        dedup_guest_ram_permit(!rnd(w, 6));  /* a mapping takes longest */
        to = any_place(w, bytes);
        g_assert_cmpint(blk_pread(d->blk, at, bytes, to, 0), ==, 0);
        check(w, d, at, bytes, to);
    }
}

typedef struct Aio {
    QEMUIOVector qiov;
    Disk *d;
    uint64_t at, bytes;
    uint8_t *to;
    unsigned *left;
} Aio;

static void aio_done(void *opaque, int ret)
{
    Aio *a = opaque;

    g_assert_cmpint(ret, ==, 0);
    --*a->left;
}

/* Several reads at once, of all disks, to parts of memory that do not meet. */
static void do_read_many(World *w)
{
    Aio aio[4];
    unsigned i, n = 0, left;

    dedup_guest_ram_permit(rnd(w, 4));
    for (i = 0; i < ARRAY_SIZE(aio); i++) {
        Aio *a = &aio[n];

        a->d = any_disk(w);
        a->to = w->guest + i * (GUEST_PAGES / 4) * PAGE;
        a->left = &left;
        n += any_part(w, a->d, 40, &a->at, &a->bytes);
    }
    left = n;
    for (i = 0; i < n; i++) {
        qemu_iovec_init_buf(&aio[i].qiov, aio[i].to, aio[i].bytes);
        blk_aio_preadv(aio[i].d->blk, aio[i].at, &aio[i].qiov, 0, aio_done,
                       &aio[i]);
    }
    while (left) {
        aio_poll(qemu_get_aio_context(), true);
    }
    for (i = 0; i < n; i++) {
        check(w, aio[i].d, aio[i].at, aio[i].bytes, aio[i].to);
    }
}

/* Write new content, or such as there is already. */
static void do_write(World *w)
{
    Disk *d = any_disk(w);
    uint64_t at, bytes, i;
    uint8_t page[PAGE];

    if (!any_part_to_change(w, d, 4, &at, &bytes)) {
        return;
    }
    for (i = 0; i < bytes; i += PAGE) {
        make_content(page, rnd(w, 3) ? rnd(w, DISK_BLOCKS)
                                     : g_rand_int(w->rand));
        memcpy(d->bytes + at + i, page, MIN(PAGE, bytes - i));
    }
    g_assert_cmpint(blk_pwrite(d->blk, at, bytes, d->bytes + at, 0), ==, 0);
}

static void do_zeroes(World *w)
{
    Disk *d = any_disk(w);
    uint64_t at, bytes;

    if (any_part_to_change(w, d, 16, &at, &bytes)) {
        memset(d->bytes + at, 0, bytes);
        g_assert_cmpint(blk_pwrite_zeroes(d->blk, at, bytes,
                                          rnd(w, 2) ? BDRV_REQ_MAY_UNMAP : 0),
                        ==, 0);
    }
}

/* What is discarded has what content it has from then on. */
static void do_discard(World *w)
{
    Disk *d = any_disk(w);
    g_autofree uint8_t *buf = NULL;
    uint64_t at, bytes;

    if (any_part_to_change(w, d, 16, &at, &bytes)) {
        buf = g_malloc(bytes);
        blk_pdiscard(d->blk, at, bytes, 0);
        g_assert_cmpint(blk_pread(d->blk, at, bytes, buf, 0), ==, 0);
        memcpy(d->bytes + at, buf, bytes);
    }
}

/* The guest writes to pages that it may have been given. */
static void do_guest_write(World *w)
{
    uint8_t *at = any_place(w, PAGE);

    memset(at, g_rand_int(w->rand), 1 + rnd(w, PAGE));
}

static void do_resize(World *w)
{
    Disk *d = any_disk(w);
    uint64_t size = (1 + rnd(w, DISK_BLOCKS * 8)) * 512;

    if (d->qcow2) {
        return;
    }
    if (blk_truncate(d->blk, size, false, PREALLOC_MODE_OFF, 0, NULL) < 0) {
        return;
    }
    if (size > d->size) {
        memset(d->bytes + d->size, 0, size - d->size);
    }
    d->size = size;
    g_free(d->snapshot);        /* it would have the old size */
    d->snapshot = NULL;
}

static BlockDriverState *image_node(Disk *d)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();
    return blk_bs(d->blk)->file->bs;
}

static void take_snapshot(BlockDriverState *bs, QEMUSnapshotInfo *sn)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();
    bdrv_snapshot_delete(bs, NULL, "s", NULL);
    g_assert_cmpint(bdrv_snapshot_create(bs, sn), ==, 0);
}

/* Internal ones, which change the image below the filter. */
static void do_snapshot(World *w)
{
    Disk *d = any_disk(w);
    QEMUSnapshotInfo sn = { .id_str = "", .name = "s" };

    if (!d->qcow2) {
        return;
    }
    bdrv_drain_all_begin();
    take_snapshot(image_node(d), &sn);
    bdrv_drain_all_end();
    g_free(d->snapshot);
    d->snapshot = g_memdup2(d->bytes, d->size);
}

static void do_revert(World *w)
{
    Disk *d = any_disk(w);

    if (d->snapshot) {
        bdrv_drain_all_begin();
        g_assert_cmpint(bdrv_snapshot_goto(image_node(d), "s", &error_abort),
                        ==, 0);
        bdrv_drain_all_end();
        memcpy(d->bytes, d->snapshot, d->size);
    }
}

static void do_reclaim(World *w)
{
    if (!rnd(w, 50)) {
        qmp_dedup_share_reclaim(GROUP, NULL);   /* for five seconds */
    }
}

static void do_reopen(World *w)
{
    Disk *d = any_disk(w);

    disk_close(w, d);
    if (d->reflink && rnd(w, 2)) {
        disk_copy(w, d);        /* the guest has written all of it by now */
    }
    disk_open(w, d);
}

/*
 * The store daemon is killed in the middle of all that it does.  Not often: for
 * a second the clients are without one.
 */
static void do_kill(World *w)
{
    if (!rnd(w, 50)) {
        stress_end_daemon(w->socket, rnd(w, 2) ? SIGKILL : SIGTERM);
        stress_start_daemon(w->socket);
    }
}

static void (*const operations[KINDS])(World *w) = {
    [READ] = do_read, [READ_MANY] = do_read_many, [WRITE] = do_write,
    [ZEROES] = do_zeroes, [DISCARD] = do_discard,
    [GUEST_WRITE] = do_guest_write, [RESIZE] = do_resize,
    [SNAPSHOT] = do_snapshot, [REVERT] = do_revert, [RECLAIM] = do_reclaim,
    [REOPEN] = do_reopen, [KILL] = do_kill,
};

void world_step(World *w, bool alone)
{
    unsigned kind = 0, at = rnd(w, 100000);

    while (at >= shares[kind]) {
        at -= shares[kind++];
    }
    if (!alone && kind >= KILL) {
        kind = READ;
    }
    if (w->now) {
        qatomic_set(w->now, kind);
    }
    operations[kind](w);
    w->done[kind]++;
}

static GPid daemon_pid;

void stress_start_daemon(const char *socket)
{
    g_autofree char *size = g_strdup_printf("%u", STORE_SIZE);

    daemon_pid = dedup_daemon_start(socket, size);
}

GPid stress_daemon_pid(void)
{
    return daemon_pid;
}

void stress_end_daemon(const char *socket, int signal)
{
    dedup_daemon_end(daemon_pid, socket, signal);
}

void world_init(World *w, const char *dir, const char *socket, unsigned number,
                uint32_t seed)
{
    unsigned i;

    *w = (World) {
        .dir = dir, .socket = socket, .number = number,
        .rand = g_rand_new_with_seed(seed),
    };
    dedup_store_register(&dedup_linux_store_ops);
    w->guest = dedup_guest_ram_new(GUEST_PAGES * PAGE);
    for (i = 0; i < BASES; i++) {
        w->base_bytes[i] = g_malloc(DISK_BLOCKS * PAGE);
        base_content(w->base_bytes[i], i);
    }
    for (i = 0; i < DISKS; i++) {
        disk_make(w, &w->disks[i], i);
        disk_open(w, &w->disks[i]);
    }
}

void world_destroy(World *w)
{
    unsigned i;

    for (i = 0; i < DISKS; i++) {
        Disk *d = &w->disks[i];

        disk_close(w, d);
        unlink(d->file);
        g_free(d->file);
        g_free((char *)d->base);
        g_free(d->bytes);
        g_free(d->snapshot);
    }
    for (i = 0; i < BASES; i++) {
        g_free(w->base_bytes[i]);
    }
    dedup_guest_ram_free();
    g_rand_free(w->rand);
}
