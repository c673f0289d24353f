/*
 * QTest of guests that share by the Linux store of dedup-share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What sharing is, on disks of four kinds; and what becomes of the frames.
 */

#include "qemu/osdep.h"

#include <sched.h>
#include <sys/socket.h>
#include <sys/un.h>
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
    write_blocks(b, 3, 1);
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
    Guest *a = guest_start(machine, c->kind, "store=linux",
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

/* Of 128 frames; one client may hold 96 of them. */
#define SMALL "544768"

/* A full store gives up what nobody uses, and nothing else. */
static void test_evict(const void *opaque)
{
    const Config *c = opaque;
    Guest *a, *b;
    int i;

    store_size = SMALL;
    a = guest_on(c->machine, c->kind);
    b = guest_on(c->machine, c->kind);
    read_blocks(b, 0, 32);
    read_blocks(a, 0, 96);
    g_assert_cmpint(counter(a, "frames"), ==, 96);
    fill(a, 32, 64, 0x44);
    for (i = 0; i < 100 && counter(a, "blocks-given") <= 96; i++) {
        read_blocks(a, 128 + i, 1);         /* full, until it is found out */
        check_blocks(a, 128 + i, 1);
        g_usleep(100 * 1000);
    }
    g_assert_cmpint(counter(a, "blocks-given"), >, 96);
    for (i = 0; i < 8; i++) {
        read_blocks(a, 256 + i * 16, 16);
        check_blocks(a, 256 + i * 16, 16);
        fill(a, 256 + i * 16, 16, 0x45);
        g_usleep(300 * 1000);
    }
    g_assert_cmpint(counter(a, "frames"), <=, 96);
    check_blocks(a, 0, 32);
    check_blocks(b, 0, 32);
    check_filled(a, 32, 64, 0x44);
    g_assert_cmpint(smaps(b).copied, ==, 0);    /* the very same frames */
    guest_end(a);
    guest_end(b);
    store_size = "8M";
}

static void reclaim(Guest *g)
{
    qtest_qmp_assert_success(g->qts, "{ 'execute': 'dedup-share-reclaim' }");
}

/* Wait until so many frames are in use, and none is idle. */
static void wait_store(unsigned used)
{
    g_autofree char *want = g_strdup_printf("\"frames-used\": %u,", used);
    g_autofree char *command = g_strdup_printf(
        "./dedup-store/qemu-dedup-store status --json --socket %s", sock);
    int i;

    for (i = 0; ; i++) {
        g_autofree char *text = NULL;

        g_assert_true(g_spawn_command_line_sync(command, &text, NULL, NULL,
                                                NULL));
        if (strstr(text, "\"frames-idle\": 0") && strstr(text, want)) {
            return;
        }
        g_assert_cmpint(i, <, 100);
        g_usleep(100 * 1000);
    }
}

/* The store is emptied of what is not used when somebody asks for it. */
static void test_reclaim(void)
{
    Guest *a = guest_simple(DISK_BLK), *b = guest_simple(DISK_BLK);
    int64_t before;

    read_blocks(a, 0, 128);
    read_blocks(b, 0, 64);
    fill(a, 32, 96, 0x44);
    reclaim(a);
    wait_counter(a, "frames", 32);
    check_blocks(a, 0, 32);
    check_blocks(b, 0, 64);
    wait_store(64);                             /* b has these */
    before = image_bytes(a);
    read_blocks(a, 32, 32);                     /* b has these */
    g_assert_cmpint(image_bytes(a), ==, before);
    read_blocks(a, 64, 64);                     /* and nobody has those */
    g_assert_cmpint(image_bytes(a), ==, before + 64 * PAGE);
    check_blocks(a, 0, 128);
    guest_end(b);
    guest_end(a);
}

/* Who is killed leaves frames, and those that nobody else has go. */
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
    wait_store(96);
    check_blocks(b, 0, 96);
    guest_kill(b);
}

static void set_store(Guest *g, const char *store)
{
    qtest_qmp_assert_success(g->qts,
        "{ 'execute': 'blockdev-reopen', 'arguments': { 'options': [ {"
        "  'driver': 'dedup-share', 'node-name': 'd0', 'file': 'img',"
        "  'socket': %s, 'store': %s } ] } }", sock, store);
}

/* A node leaves the group, and the guest keeps the frames. */
static void test_leave(void)
{
    Guest *a, *b;
    int i;

    store_size = SMALL;
    a = guest_simple(DISK_BLK);
    b = guest_simple(DISK_BLK);
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
    store_size = "8M";
}

/* --- tests: the store daemon ---------------------------------------------- */

/* It dies; the guests do not notice. */
static void test_daemon(const void *opaque)
{
    const Config *c = opaque;
    Guest *a = guest_on(c->machine, c->kind);
    Guest *b = guest_on(c->machine, c->kind);

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
    write_blocks(b, 3, 1);
    fill(b, 3, 1, 0);
    read_blocks(b, 3, 1);
    check_filled(b, 3, 1, 0x11);
    read_blocks(a, 3, 1);
    check_blocks(a, 0, 256);

    store_kill(SIGKILL);
    fill(b, 3, 1, 0);
    read_blocks(b, 3, 1);
    check_filled(b, 3, 1, 0x11);
    read_blocks(a, 200, 200);
    check_blocks(a, 0, 400);
    check_blocks(b, 5, 251);
    guest_end(a);
    guest_end(b);
}

/* Guests that are equal copies of an image hold its blocks once. */
static void test_copies(const void *opaque)
{
    const Config *c = opaque;
    Guest *a = guest_start(c->machine, c->kind, "store=linux,share=all", "");
    Guest *b = guest_start(c->machine, c->kind, "store=linux,share=all", "");

    fill(a, 0, 64, 0);
    read_blocks(a, 0, 64);
    write_blocks(a, 0, 64);
    read_blocks(b, 0, 64);
    write_blocks(b, 0, 64);
    /* both are in the overlays now, which nobody leases */
    fill(a, 0, 64, 0x55);
    fill(b, 0, 64, 0x55);
    read_blocks(a, 0, 64);
    check_blocks(a, 0, 64);
    read_blocks(b, 0, 64);
    check_blocks(b, 0, 64);
    g_assert_cmpint(counter(b, "blocks-given"), ==, 128);
    g_assert_cmpint(counter(b, "blocks-matched"), ==, 64);
    g_assert_cmpint(counter(b, "frames"), ==, 64);
    fill(a, 5, 1, 0x66);                /* and what one writes is its own */
    write_blocks(a, 5, 1);
    read_blocks(b, 0, 64);
    check_blocks(b, 0, 64);
    read_blocks(a, 0, 64);
    check_blocks(a, 0, 5);
    check_filled(a, 5, 1, 0x66);
    check_blocks(a, 6, 58);
    guest_end(a);
    guest_end(b);
}

/* Is @pid, of /proc, the store daemon of our socket? */
static bool is_daemon(const char *pid)
{
    g_autofree char *path = g_strdup_printf("/proc/%s/cmdline", pid);
    g_autofree char *line = NULL;
    size_t size, i;

    if (!g_file_get_contents(path, &line, &size, NULL) || !size ||
        !g_str_has_suffix(line, "/qemu-dedup-store")) {
        return false;
    }
    for (i = 0; i < size; i += strlen(line + i) + 1) {
        if (!strcmp(line + i, sock)) {
            return true;
        }
    }
    return false;
}

/* Processors that the store daemon may use. */
static int count_daemon_cpus(void)
{
    g_autoptr(GDir) proc = g_dir_open("/proc", 0, NULL);
    const char *pid;
    cpu_set_t set;

    do {
        pid = g_dir_read_name(proc);
        g_assert_nonnull(pid);
    } while (!is_daemon(pid));
    g_assert_cmpint(sched_getaffinity(atoi(pid), sizeof(set), &set), ==, 0);
    return CPU_COUNT(&set);
}

/* One that a guest has started ends when nobody has been there for a while. */
static void wait_daemon_end(void)
{
    int i;

    for (i = 0; g_file_test(sock, G_FILE_TEST_EXISTS); i++) {
        g_assert_cmpint(i, <, 300);
        g_usleep(100 * 1000);
    }
}

/*
 * Without Xen, auto is linux; and if no daemon runs, the first guest starts
 * one, which is not pinned as that one is.
 */
static void test_auto(void)
{
    const char *options = "store=auto,store-size=8M";
    cpu_set_t all, one;
    Guest *a, *b;
    QDict *s;

    store_size = NULL;
    g_assert_cmpint(sched_getaffinity(0, sizeof(all), &all), ==, 0);
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    g_assert_cmpint(sched_setaffinity(0, sizeof(one), &one), ==, 0);
    a = guest_start("q35", DISK_BLK, options, "");
    g_assert_cmpint(sched_setaffinity(0, sizeof(all), &all), ==, 0);
    g_assert_cmpint(count_daemon_cpus(), >=, CPU_COUNT(&all));
    b = guest_start("q35", DISK_BLK, "store=linux", "");
    s = stats(a);
    g_assert_cmpstr(qdict_get_str(s, "store"), ==, "linux");
    qobject_unref(s);
    read_blocks(a, 0, 64);
    read_blocks(b, 0, 64);
    check_blocks(b, 0, 64);
    g_assert_cmpint(smaps(b).bytes, ==, 64 * PAGE);
    g_assert_cmpint(image_bytes(b), ==, 0);
    guest_end(a);
    guest_end(b);
    wait_daemon_end();
    store_size = "8M";
}

/* A daemon that has begun to end when somebody connects. */
static void *end_daemon(void *opaque)
{
    int listener = *(int *)opaque;
    int s = accept(listener, NULL, NULL);

    unlink(sock);
    close(s);
    close(listener);
    return NULL;
}

/* Another one is started then. */
static void test_ending(void)
{
    int listener = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    GThread *thread;
    Guest *a;

    store_size = NULL;
    g_strlcpy(addr.sun_path, sock, sizeof(addr.sun_path));
    g_assert_cmpint(bind(listener, (struct sockaddr *)&addr, sizeof(addr)), ==,
                    0);
    g_assert_cmpint(listen(listener, 1), ==, 0);
    thread = g_thread_new("ends", end_daemon, &listener);
    a = guest_start("q35", DISK_BLK, "store=linux,store-size=8M", "");
    g_thread_join(thread);
    read_blocks(a, 0, 64);
    check_blocks(a, 0, 64);
    g_assert_cmpint(smaps(a).bytes, ==, 64 * PAGE);
    guest_end(a);
    wait_daemon_end();
    store_size = "8M";
}

/* None can be started for a guest that runs, or where that is forbidden. */
static void test_not_started(void)
{
    QDict *s, *err;
    Guest *a;

    store_size = NULL;
    a = guest_start("q35", DISK_BLK, "store=auto", "-sandbox on,spawn=deny");
    s = stats(a);
    g_assert_cmpstr(qdict_get_str(s, "store"), ==, "off");
    g_assert_nonnull(strstr(qdict_get_str(s, "reason"), "spawn=deny"));
    qobject_unref(s);
    read_blocks(a, 0, 64);
    check_blocks(a, 0, 64);
    err = qtest_qmp_assert_failure_ref(a->qts,
        "{ 'execute': 'blockdev-add', 'arguments': {"
        "  'driver': 'dedup-share', 'node-name': 'd1', 'file': 'base',"
        "  'socket': %s, 'store': 'linux' } }", sock);
    g_assert_nonnull(strstr(qdict_get_str(err, "desc"), "no store daemon"));
    qobject_unref(err);
    guest_end(a);
    store_size = "8M";
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
        { "copies", test_copies },
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
    qtest_add_func("/dedup-share/linux/ending", test_ending);
    qtest_add_func("/dedup-share/linux/not-started", test_not_started);
    return remove_files(g_test_run());
}
