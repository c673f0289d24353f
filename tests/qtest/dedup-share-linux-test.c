/*
 * QTest of guests that share by the Linux store of dedup-share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What sharing is, on disks of four kinds; and what becomes of the frames.
 */

#include "qemu/osdep.h"

#include "libqtest.h"

#include "dedup-share-guest.c.inc"

typedef struct Config {
    DiskKind kind;
    const char *machine;
} Config;

/* --- tests: what sharing is ---------------------------------------------- */

static void test_give(const void *opaque)
{
    const Config *c = opaque;
    Guest *a = guest_on(c->machine, c->kind);
    Guest *b = guest_on(c->machine, c->kind);
    int64_t before;

    read_blocks(a, 0, 256);
    check_blocks(a, 0, 256);
    g_assert_cmpint(counter(a, "blocks-given"), ==, 256);
    g_assert_cmpint(counter(a, "frames"), ==, 256);
    g_assert_cmpint(smaps(a).bytes, ==, 256 * PAGE);

    before = image_bytes(b);
    read_blocks(b, 0, 256);
    check_blocks(b, 0, 256);
    g_assert_cmpint(image_bytes(b), ==, before);
    g_assert_cmpint(counter(b, "blocks-given"), ==, 256);
    g_assert_cmpint(counter(b, "frames"), ==, 256);
    g_assert_cmpint(smaps(b).bytes, ==, 256 * PAGE);
    g_assert_cmpint(smaps(b).copied, ==, 0);
    /* all of it is one run, in the store and in the guest */
    g_assert_cmpint(smaps(b).mappings, ==, 1);
    g_assert_cmpint(counter(b, "mappings"), ==, 2);

    guest_end(a);
    guest_end(b);
}

static void test_copy_on_write(const void *opaque)
{
    const Config *c = opaque;
    Guest *a = guest_on(c->machine, c->kind);
    Guest *b = guest_on(c->machine, c->kind);

    read_blocks(a, 0, 64);
    read_blocks(b, 0, 64);
    fill(b, 3, 2, 0x11);                /* the guest's processor */
    qtest_writeb(b->qts, b->buf + 7 * PAGE, 0x22);
    check_blocks(a, 0, 64);
    check_blocks(b, 0, 3);
    check_filled(b, 3, 2, 0x11);
    check_blocks(b, 8, 56);
    g_assert_cmpint(smaps(b).copied, ==, 3 * PAGE);
    g_assert_cmpint(smaps(a).copied, ==, 0);

    /* its disk: what is written goes to the overlay, and is read from there */
    port_io(&b->disk, true, b->buf + 3 * PAGE, 3 * (PAGE / SECTOR), PAGE, PAGE);
    fill(b, 3, 1, 0);
    read_blocks(b, 3, 1);
    check_filled(b, 3, 1, 0x11);
    read_blocks(a, 3, 1);
    check_blocks(a, 3, 1);
    fill(a, 0, 64, 0x33);
    read_blocks(a, 0, 64);              /* onto its copies */
    check_blocks(a, 0, 64);
    check_blocks(b, 8, 56);
    guest_end(a);
    check_blocks(b, 8, 56);             /* the frames outlive who read them */
    guest_end(b);
}

/* Reads that are for no whole page, and parts of blocks */
static void test_shapes(const void *opaque)
{
    const Config *c = opaque;
    Guest *a = guest_on(c->machine, c->kind);
    Guest *b = guest_on(c->machine, c->kind);
    uint64_t sector;
    unsigned i;

    read_blocks(a, 0, 64);
    for (i = 0; i < 40; i++) {
        unsigned shift = i % 4 * 512;
        unsigned bytes = (1 + i * 7 % 64) * SECTOR;
        unsigned part = i % 3 ? PAGE : 1536;
        g_autofree uint8_t *got = g_malloc(bytes + 2 * PAGE);

        sector = i * 3;
        qtest_memset(b->qts, b->buf, 0xa5, bytes + 2 * PAGE);
        port_io(&b->disk, false, b->buf + PAGE + shift, sector, bytes, part);
        qtest_memread(b->qts, b->buf, got, bytes + 2 * PAGE);
        g_assert_cmpmem(got + PAGE + shift, bytes, model + sector * SECTOR,
                        bytes);
        g_assert_cmphex(got[PAGE + shift - 1], ==, 0xa5);
        g_assert_cmphex(got[PAGE + shift + bytes], ==, 0xa5);
    }
    g_assert_cmpint(counter(b, "blocks-copied"), >, 0);
    check_blocks(a, 0, 64);
    guest_end(a);
    guest_end(b);
}

/* Memory that cannot be mapped over gets copies, without I/O. */
static void test_copy(const void *opaque)
{
    const Config *c = opaque;
    g_autofree char *machine = g_strdup_printf("%s,memory-backend=m",
                                               c->machine);
    Guest *a = guest_start(machine, c->kind, "store=linux,store-size=8M",
                           "-object memory-backend-memfd,id=m,size=64M");
    Guest *b = guest_on(c->machine, c->kind);
    int64_t before;

    read_blocks(b, 0, 64);
    before = image_bytes(a);
    read_blocks(a, 0, 64);
    check_blocks(a, 0, 64);
    g_assert_cmpint(image_bytes(a), ==, before);
    g_assert_cmpint(counter(a, "blocks-given"), ==, 0);
    g_assert_cmpint(smaps(a).bytes, ==, 0);
    guest_end(a);
    guest_end(b);
}

/* --- tests: what becomes of the frames ------------------------------------ */

#define SMALL "store=linux,store-size=512k"     /* 128 frames */

/* A full store gives up what nobody uses, and nothing else. */
static void test_evict(const void *opaque)
{
    const Config *c = opaque;
    Guest *a = guest_start(c->machine, c->kind, SMALL, "");
    Guest *b = guest_start(c->machine, c->kind, SMALL, "");
    int i;

    read_blocks(b, 0, 32);
    read_blocks(a, 0, 128);
    g_assert_cmpint(counter(a, "frames"), ==, 128);
    fill(a, 64, 64, 0x44);
    for (i = 0; i < 100 && !counter(a, "frames-evicted"); i++) {
        read_blocks(a, 128 + i, 1);         /* full, until it is found out */
        check_blocks(a, 128 + i, 1);
        g_usleep(100 * 1000);
    }
    g_assert_cmpint(counter(a, "frames-evicted"), >, 0);
    for (i = 0; i < 8; i++) {
        read_blocks(a, 256 + i * 16, 16);
        check_blocks(a, 256 + i * 16, 16);
        fill(a, 256 + i * 16, 16, 0x45);
        g_usleep(300 * 1000);
    }
    g_assert_cmpint(counter(a, "frames"), <=, 128);
    check_blocks(a, 0, 64);
    check_blocks(b, 0, 32);
    check_filled(a, 64, 64, 0x44);
    g_assert_cmpint(smaps(b).copied, ==, 0);    /* the very same frames */
    guest_end(a);
    guest_end(b);
}

static void reclaim(Guest *g)
{
    qtest_qmp_assert_success(g->qts, "{ 'execute': 'dedup-share-reclaim' }");
}

/* The store is emptied of what is not used when somebody asks for it. */
static void test_reclaim(void)
{
    Guest *a = guest_simple(DISK_BLK), *b = guest_simple(DISK_BLK);

    read_blocks(a, 0, 128);
    read_blocks(b, 0, 64);
    fill(a, 32, 96, 0x44);
    reclaim(a);
    wait_counter(a, "frames", 64);              /* b has these */
    check_blocks(a, 0, 32);
    check_blocks(b, 0, 64);
    guest_end(b);
    reclaim(a);
    wait_counter(a, "frames", 32);
    check_blocks(a, 0, 32);
    read_blocks(a, 64, 64);                     /* and filled again */
    check_blocks(a, 64, 64);
    guest_end(a);
}

/* Who is killed leaves frames, and its share of them is found to be free. */
static void test_kill(void)
{
    Guest *a = guest_simple(DISK_BLK), *b = guest_simple(DISK_BLK);

    read_blocks(a, 0, 128);
    read_blocks(b, 0, 64);
    guest_kill(a);
    check_blocks(b, 0, 64);
    read_blocks(b, 64, 32);
    g_assert_cmpint(counter(b, "blocks-missed"), ==, 0);
    reclaim(b);
    wait_counter(b, "frames", 96);
    check_blocks(b, 0, 96);
    guest_kill(b);
    a = guest_simple(DISK_BLK);                 /* all were killed */
    read_blocks(a, 0, 64);
    g_assert_cmpint(counter(a, "blocks-missed"), ==, 64);
    check_blocks(a, 0, 64);
    guest_end(a);
}

static void set_store(Guest *g, const char *store)
{
    qtest_qmp_assert_success(g->qts,
        "{ 'execute': 'blockdev-reopen', 'arguments': { 'options': [ {"
        "  'driver': 'dedup-share', 'node-name': 'd0', 'file': 'img',"
        "  'index-dir': %s, 'store-size': %d, 'store': %s } ] } }",
        dir, (int)(512 * KiB), store);
}

/* A node leaves the group, and the guest keeps the frames. */
static void test_leave(void)
{
    Guest *a = guest_start("q35", DISK_BLK, SMALL, "");
    Guest *b = guest_start("q35", DISK_BLK, SMALL, "");
    int i;

    read_blocks(a, 0, 64);
    set_store(a, "off");
    for (i = 0; i < 6; i++) {
        read_blocks(b, 100 + i * 64, 64);
        check_blocks(b, 100 + i * 64, 64);
        fill(b, 100 + i * 64, 64, 0x45);
        reclaim(b);
        g_usleep(500 * 1000);
    }
    check_blocks(a, 0, 64);
    g_assert_cmpint(smaps(a).copied, ==, 0);
    set_store(a, "linux");
    read_blocks(a, 0, 64);
    check_blocks(a, 0, 64);
    g_assert_cmpint(counter(a, "blocks-missed"), ==, 64);   /* the first ones */
    guest_end(b);
    check_blocks(a, 0, 64);
    guest_end(a);
}

/* --- tests: with a store daemon ------------------------------------------- */

/* The daemon keeps the store, and dies; the guests do not notice. */
static void test_daemon(const void *opaque)
{
    const Config *c = opaque;
    g_autofree char *sock = g_build_filename(dir, "sock", NULL);
    g_autofree char *lock = g_strconcat(sock, ".lock", NULL);
    g_autofree char *options = g_strconcat("store=linux,socket=", sock, NULL);
    char *argv[] = { (char *)"./dedup-store/qemu-dedup-store",
                     (char *)"--socket", sock, (char *)"--size",
                     (char *)"16M", NULL };
    Guest *a, *b;
    GPid pid;

    g_assert(g_spawn_async(NULL, argv, NULL, G_SPAWN_DO_NOT_REAP_CHILD, NULL,
                           NULL, &pid, NULL));
    while (!g_file_test(sock, G_FILE_TEST_EXISTS)) {
        g_usleep(1000);
    }
    a = guest_start(c->machine, c->kind, options, "");
    b = guest_start(c->machine, c->kind, options, "");
    read_blocks(a, 0, 256);
    check_blocks(a, 0, 256);
    g_assert_cmpint(counter(a, "blocks-given"), ==, 256);
    g_assert_cmpint(counter(a, "blocks-missed"), ==, 256);
    g_assert_cmpint(counter(a, "frames"), ==, 256);
    g_assert_cmpint(smaps(a).bytes, ==, 256 * PAGE);
    read_blocks(b, 0, 256);
    check_blocks(b, 0, 256);
    g_assert_cmpint(image_bytes(b), ==, 0);
    g_assert_cmpint(counter(b, "blocks-missed"), ==, 0);
    g_assert_cmpint(smaps(b).bytes, ==, 256 * PAGE);
    g_assert_cmpint(smaps(b).copied, ==, 0);

    fill(b, 3, 2, 0x11);                /* its memory, then its disk */
    port_io(&b->disk, true, b->buf + 3 * PAGE, 3 * (PAGE / SECTOR), PAGE, PAGE);
    fill(b, 3, 1, 0);
    read_blocks(b, 3, 1);
    check_filled(b, 3, 1, 0x11);
    read_blocks(a, 3, 1);
    check_blocks(a, 0, 256);

    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    read_blocks(a, 200, 200);
    check_blocks(a, 0, 400);
    check_blocks(b, 5, 251);
    guest_end(a);
    guest_end(b);
    unlink(sock);
    unlink(lock);
}

/* Without Xen, auto is linux. */
static void test_auto(void)
{
    Guest *a = guest_start("q35", DISK_BLK, "store=auto,store-size=8M", "");
    QDict *s = stats(a);

    g_assert_cmpstr(qdict_get_str(s, "store"), ==, "linux");
    qobject_unref(s);
    guest_end(a);
}

/* --- the end ------------------------------------------------------------- */

static void add_disk_tests(const Config *c)
{
    struct {
        const char *name;
        void (*fn)(const void *);
    } tests[] = {
        { "give", test_give },
        { "copy-on-write", test_copy_on_write },
        { "shapes", test_shapes },
        { "copy", test_copy },
        { "evict", test_evict },
        { "daemon", test_daemon },
    };
    int i;

    for (i = 0; i < ARRAY_SIZE(tests); i++) {
        g_autofree char *path = g_strdup_printf("/dedup-share/linux/%s/%s/%s",
                                                c->machine,
                                                port_name(c->kind),
                                                tests[i].name);
        qtest_add_data_func(path, c, tests[i].fn);
    }
}

int main(int argc, char **argv)
{
    static const Config configs[] = {
        { DISK_IDE, "pc" }, { DISK_BLK, "pc" }, { DISK_SCSI, "pc" },
        { DISK_AHCI, "q35" }, { DISK_BLK, "q35" }, { DISK_SCSI, "q35" },
    };
    int i;

    g_test_init(&argc, &argv, NULL);
    if (!have_all()) {
        return 0;
    }
    make_files();
    for (i = 0; i < ARRAY_SIZE(configs); i++) {
        add_disk_tests(&configs[i]);
    }
    qtest_add_func("/dedup-share/linux/reclaim", test_reclaim);
    qtest_add_func("/dedup-share/linux/kill", test_kill);
    qtest_add_func("/dedup-share/linux/leave", test_leave);
    qtest_add_func("/dedup-share/linux/auto", test_auto);
    return remove_files(g_test_run());
}
