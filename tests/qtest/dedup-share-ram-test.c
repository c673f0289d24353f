/*
 * QTest of the Linux store of dedup-share, and what else deals with guest RAM
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Each kind of memory, and each user of it, either works with pages that map
 * frames, or has frames copied instead.
 */

#include "qemu/osdep.h"
#include <sys/resource.h>
#include <sys/un.h>

#include "libqtest.h"
#include "qemu/atomic.h"

#include "standard-headers/linux/virtio_balloon.h"
#include "standard-headers/linux/virtio_mem.h"
#include "dedup-share-guest.c.inc"

#define OPTIONS "store=linux"
#define OTHER_DEVFN QPCI_DEVFN(9, 0)

/* --- tests: memory that cannot be mapped over: frames are copied --------- */

static void check_copies(Guest *a)
{
    Guest *b = guest_simple(DISK_BLK);
    int64_t before, copied, hit;

    read_blocks(b, 0, 64);
    before = image_bytes(a);
    copied = counter(a, "blocks-copied");       /* QEMU has read a sector */
    read_blocks(a, 0, 64);
    check_blocks(a, 0, 64);
    g_assert_cmpint(image_bytes(a), ==, before);        /* and no I/O */
    g_assert_cmpint(counter(a, "blocks-copied"), ==, copied + 64);
    g_assert_cmpint(counter(a, "blocks-given"), ==, 0);
    g_assert_cmpint(smaps(a).bytes, ==, 0);
    read_blocks(a, 64, 64);                             /* fills by copying */
    hit = counter(b, "blocks-hit");
    read_blocks(b, 64, 64);
    check_blocks(a, 64, 64);
    check_blocks(b, 64, 64);
    g_assert_cmpint(counter(b, "blocks-hit"), ==, hit + 64);
    guest_end(a);
    guest_end(b);
}

static void test_backend(const void *opaque)
{
    const char *backend = opaque;
    g_autofree char *object = g_strdup_printf("-object %s,id=m,size=64M",
                                              backend);

    check_copies(guest_start("q35,memory-backend=m", DISK_BLK,
                             OPTIONS, object));
}

static void test_locked(void)
{
    struct rlimit limit;

    getrlimit(RLIMIT_MEMLOCK, &limit);
    if (geteuid() && limit.rlim_cur < 1 * GiB) {
        g_test_skip("memory cannot be locked");
        return;
    }
    check_copies(guest_start("q35", DISK_BLK, OPTIONS,
                             "-overcommit mem-lock=on"));
}

/* --- tests: discarding -------------------------------------------------- */

/* A part of the memory was discarded: it is zero, the rest is as it was. */
static void check_discarded(Guest *a, unsigned first, unsigned n)
{
    uint64_t there = 64 * PAGE - n * PAGE;

    check_filled(a, first, n, 0);
    check_blocks(a, 0, first);
    check_blocks(a, first + n, 64 - first - n);
    g_assert_cmpint(smaps(a).bytes, ==, there);
    read_blocks(a, 0, 64);                      /* and it is given again */
    check_blocks(a, 0, 64);
    g_assert_cmpint(smaps(a).bytes, ==, 64 * PAGE);
}

static void test_balloon(void)
{
    Guest *a = guest_start("q35", DISK_BLK, OPTIONS,
                           "-device virtio-balloon-pci,addr=9,"
                           "free-page-reporting=on");
    uint64_t pfn = guest_alloc(&a->qs->alloc, PAGE);
    QVirtioPCIDevice *dev;
    QVirtQueue *vqs[4];
    int i;

    dev = virtio_begin(a->qs, OTHER_DEVFN, vqs, 4);
    read_blocks(a, 0, 64);
    qtest_writeb(a->qts, a->buf + 6 * PAGE, 1); /* one that is a copy */
    for (i = 5; i < 8; i++) {
        qtest_writel(a->qts, pfn, (a->buf + i * PAGE) / PAGE);
        virtio_go(a->qts, dev, vqs[0],
                  qvirtqueue_add(a->qts, vqs[0], pfn, 4, false, false));
    }
    check_discarded(a, 5, 3);

    /* free page reporting */
    virtio_go(a->qts, dev, vqs[3],
              qvirtqueue_add(a->qts, vqs[3], a->buf + 16 * PAGE, 32 * PAGE,
                             true, false));
    check_discarded(a, 16, 32);
    virtio_end(a->qs, dev, vqs, 4);
    guest_end(a);
}

static void mem_request(Guest *a, QVirtioPCIDevice *dev, QVirtQueue *vq,
                        uint64_t page, uint16_t type, uint64_t addr)
{
    struct virtio_mem_req req = {
        .type = cpu_to_le16(type),
        .u.plug.addr = cpu_to_le64(addr),
        .u.plug.nb_blocks = cpu_to_le16(1),
    };
    struct virtio_mem_resp resp = { 0 };
    uint32_t head;

    qtest_memwrite(a->qts, page, &req, sizeof(req));
    head = qvirtqueue_add(a->qts, vq, page, sizeof(req), false, true);
    qvirtqueue_add(a->qts, vq, page + PAGE / 2, sizeof(resp), true, false);
    virtio_go(a->qts, dev, vq, head);
    qtest_memread(a->qts, page + PAGE / 2, &resp, sizeof(resp));
    g_assert_cmpint(le16_to_cpu(resp.type), ==, VIRTIO_MEM_RESP_ACK);
}

static void test_virtio_mem(void)
{
    Guest *a = guest_start("q35", DISK_BLK, OPTIONS,
                           "-m 64M,maxmem=1G "
                           "-object memory-backend-ram,id=m,size=128M "
                           "-device virtio-mem-pci,addr=9,memdev=m,"
                           "requested-size=64M");
    uint64_t page = guest_alloc(&a->qs->alloc, PAGE), addr;
    QVirtioPCIDevice *dev;
    QVirtQueue *vq;

    dev = virtio_begin(a->qs, OTHER_DEVFN, &vq, 1);
    addr = qvirtio_config_readq(&dev->vdev,
                                offsetof(struct virtio_mem_config, addr));
    mem_request(a, dev, vq, page, VIRTIO_MEM_REQ_PLUG, addr);
    a->buf = addr;
    read_blocks(a, 0, 64);
    check_blocks(a, 0, 64);
    g_assert_cmpint(smaps(a).bytes, ==, 64 * PAGE);
    mem_request(a, dev, vq, page, VIRTIO_MEM_REQ_UNPLUG, addr);
    g_assert_cmpint(smaps(a).bytes, ==, 0);
    mem_request(a, dev, vq, page, VIRTIO_MEM_REQ_PLUG, addr);
    check_filled(a, 0, 64, 0);
    read_blocks(a, 0, 64);
    check_blocks(a, 0, 64);
    virtio_end(a->qs, dev, &vq, 1);
    guest_end(a);
}

/* ACPI memory hotplug, docs/specs/acpi_mem_hotplug.rst */
#define DIMM_SLOT 0xa00
#define DIMM_FLAGS 0xa14
#define DIMM_EJECT 0x08

static void plug_dimm(Guest *a)
{
    qtest_qmp_assert_success(a->qts,
        "{ 'execute': 'object-add', 'arguments': { 'id': 'mem1',"
        "  'qom-type': 'memory-backend-ram', 'size': %d } }", (int)(64 * MiB));
    qtest_qmp_assert_success(a->qts,
        "{ 'execute': 'device_add', 'arguments': { 'id': 'dimm1',"
        "  'driver': 'pc-dimm', 'memdev': 'mem1' } }");
}

static uint64_t dimm_addr(Guest *a)
{
    QDict *res = qtest_qmp(a->qts, "{ 'execute': 'query-memory-devices' }");
    QDict *dimm = qobject_to(QDict, qlist_peek(qdict_get_qlist(res,
                                                               "return")));
    uint64_t addr = qdict_get_int(qdict_get_qdict(dimm, "data"), "addr");

    qobject_unref(res);
    return addr;
}

static void unplug_dimm(Guest *a)
{
    qtest_qmp_assert_success(a->qts,
        "{ 'execute': 'device_del', 'arguments': { 'id': 'dimm1' } }");
    qtest_outl(a->qts, DIMM_SLOT, 0);
    qtest_outb(a->qts, DIMM_FLAGS, DIMM_EJECT);
    qtest_qmp_eventwait(a->qts, "DEVICE_DELETED");
    qtest_qmp_assert_success(a->qts,
        "{ 'execute': 'object-del', 'arguments': { 'id': 'mem1' } }");
}

static void test_unplug(void)
{
    Guest *a = guest_start("q35", DISK_BLK, OPTIONS,
                           "-m 64M,slots=2,maxmem=512M");
    int i, tries;

    for (i = 0; i < 3; i++) {
        plug_dimm(a);
        a->buf = dimm_addr(a);
        check_filled(a, 0, 64, 0);
        read_blocks(a, 0, 64);
        check_blocks(a, 0, 64);
        g_assert_cmpint(smaps(a).bytes, ==, 64 * PAGE);
        g_assert_cmpint(counter(a, "mappings"), ==, 2);
        unplug_dimm(a);
        wait_counter(a, "mappings", 0);
        for (tries = 0; smaps(a).bytes; tries++) {      /* after a while */
            g_assert_cmpint(tries, <, 100);
            g_usleep(100 * 1000);
        }
    }
    guest_end(a);
}

/* --- tests: migration, snapshots, dumps --------------------------------- */

static bool has_status(Guest *g, const char *want)
{
    QDict *res = qtest_qmp(g->qts, "{ 'execute': 'query-migrate' }");
    QDict *ret = qdict_get_qdict(res, "return");
    const char *status = qdict_get_try_str(ret, "status");
    bool is;

    is = status && !strcmp(status, want);
    g_assert(!status || strcmp(status, "failed"));
    qobject_unref(res);
    return is;
}

static void wait_status(Guest *g, const char *want)
{
    int i;

    for (i = 0; !has_status(g, want); i++) {
        g_assert_cmpint(i, <, 600);
        g_usleep(50 * 1000);
    }
}

static void set_capability(Guest *g, const char *name)
{
    qtest_qmp_assert_success(g->qts,
        "{ 'execute': 'migrate-set-capabilities', 'arguments': {"
        "  'capabilities': [ { 'capability': %s, 'state': true } ] } }",
        name);
}

static void send_guest(Guest *g, const char *uri)
{
    qtest_qmp_assert_success(g->qts,
        "{ 'execute': 'migrate', 'arguments': { 'uri': %s } }", uri);
}

/* The guest that comes from @uri.  Its memory is where that of @from is. */
static Guest *incoming(Guest *from, const char *uri)
{
    g_autofree char *more = g_strdup_printf("-incoming %s", uri);
    Guest *g = guest_boot("q35", DISK_BLK, OPTIONS, more);

    g->buf = from->buf;
    return g;
}

/* Use the guest that has come, as its own system would go on. */
static void check_goes_on(Guest *g)
{
    uint64_t buf = g->buf;

    port_open(&g->disk, g->qs, DISK_BLK);
    g->buf = buf + 64 * PAGE;
    read_blocks(g, 0, 64);
    check_blocks(g, 0, 64);
    g_assert_cmpint(smaps(g).bytes, ==, 64 * PAGE);
    g->buf = buf;
}

static void test_migrate(void)
{
    Guest *a = guest_start("q35", DISK_BLK, OPTIONS, ""), *c;
    g_autofree char *file = temp_file();
    g_autofree char *uri = g_strdup_printf("file:%s", file);

    read_blocks(a, 0, 64);
    fill(a, 10, 2, 0x66);
    send_guest(a, uri);
    read_blocks(a, 64, 64);                     /* meanwhile */
    wait_status(a, "completed");
    check_blocks(a, 64, 64);
    c = incoming(a, uri);
    wait_status(c, "completed");
    check_blocks(c, 0, 10);
    check_filled(c, 10, 2, 0x66);
    check_blocks(c, 12, 52);
    check_goes_on(c);
    guest_end(a);
    guest_end(c);
    unlink(file);
}

/* A socket that takes what a guest sends */

static int sink_listen(const char *path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int sock = socket(AF_UNIX, SOCK_STREAM, 0);

    g_assert_cmpint(strlen(path), <, sizeof(addr.sun_path));
    strcpy(addr.sun_path, path);
    g_assert(sock >= 0);
    g_assert(!bind(sock, (struct sockaddr *)&addr, sizeof(addr)));
    g_assert(!listen(sock, 1));
    return sock;
}

typedef struct Sink {
    int listener;
    const char *file;
    bool fast;                  /* atomic */
} Sink;

/*
 * Slowly, or it is over too soon; but not so that it stops, as who writes to
 * the memory waits for this.
 */
static void *sink_take(void *opaque)
{
    Sink *sink = opaque;
    g_autofree char *buf = g_malloc(16 * KiB);
    int sock = accept(sink->listener, NULL, NULL);
    FILE *f = fopen(sink->file, "w");
    ssize_t n;

    g_assert(sock >= 0 && f);
    while ((n = read(sock, buf, 16 * KiB)) > 0) {
        g_assert_cmpint(fwrite(buf, 1, n, f), ==, n);
        if (!qatomic_read(&sink->fast)) {
            g_usleep(50 * 1000);
        }
    }
    g_assert_cmpint(n, ==, 0);
    fclose(f);
    close(sock);
    return NULL;
}

/*
 * What the guest, or a read, changes after it has begun is not in it.  It has
 * begun when the guest, which is stopped for it, runs again.
 */
static void test_background_snapshot(void)
{
    Guest *a = guest_start("q35", DISK_BLK, OPTIONS, ""), *c;
    g_autofree char *file = temp_file();
    g_autofree char *path = g_strdup_printf("%s.sock", file);
    g_autofree char *to = g_strdup_printf("unix:%s", path);
    g_autofree char *from = g_strdup_printf("file:%s", file);
    Sink sink = { .listener = sink_listen(path), .file = file };
    GThread *thread = g_thread_new("sink", sink_take, &sink);
    uint64_t given;

    read_blocks(a, 0, 256);
    fill(a, 200, 28, 0x66);                     /* copies */
    given = smaps(a).bytes;
    set_capability(a, "background-snapshot");
    send_guest(a, to);
    qtest_qmp_eventwait(a->qts, "RESUME");
    fill(a, 10, 2, 0x77);
    read_blocks(a, 200, 28);
    read_blocks(a, 256, 64);
    g_assert_true(has_status(a, "active"));     /* it was all meanwhile */
    g_assert_cmpint(smaps(a).bytes, ==, given);
    check_blocks(a, 200, 28);
    check_blocks(a, 256, 64);
    qatomic_set(&sink.fast, true);
    g_thread_join(thread);
    wait_status(a, "completed");
    check_blocks(a, 12, 188);
    check_filled(a, 10, 2, 0x77);
    read_blocks(a, 320, 64);                    /* given again */
    g_assert_cmpint(smaps(a).bytes, ==, given + 64 * PAGE);

    c = incoming(a, from);
    wait_status(c, "completed");
    check_blocks(c, 0, 200);
    check_filled(c, 200, 28, 0x66);
    check_blocks(c, 228, 28);
    check_filled(c, 256, 64, 0);
    guest_end(a);
    guest_end(c);
    close(sink.listener);
    unlink(path);
    unlink(file);
}

static void test_postcopy(void)
{
    Guest *a = guest_start("q35", DISK_BLK, OPTIONS, ""), *c;
    g_autofree char *sock = g_strdup_printf("%s.sock", bios);
    g_autofree char *uri = g_strdup_printf("unix:%s", sock);

    read_blocks(a, 0, 64);
    fill(a, 10, 2, 0x66);
    c = incoming(a, "defer");
    set_capability(a, "postcopy-ram");
    set_capability(c, "postcopy-ram");
    qtest_qmp_assert_success(c->qts,
        "{ 'execute': 'migrate-incoming', 'arguments': { 'uri': %s } }", uri);
    qtest_qmp_assert_success(a->qts,
        "{ 'execute': 'migrate-set-parameters', 'arguments': {"
        "  'max-bandwidth': %d } }", (int)(64 * KiB));
    send_guest(a, uri);
    wait_status(a, "active");
    qtest_qmp_assert_success(a->qts, "{ 'execute': 'migrate-start-postcopy' }");
    wait_status(a, "completed");
    wait_status(c, "completed");
    check_blocks(c, 0, 10);
    check_filled(c, 10, 2, 0x66);
    check_goes_on(c);
    check_blocks(c, 12, 52);
    guest_end(a);
    guest_end(c);
    unlink(sock);
}

static void test_dump(void)
{
    Guest *a = guest_start("q35", DISK_BLK, OPTIONS, "");
    g_autofree char *file = temp_file();
    g_autofree char *protocol = g_strdup_printf("file:%s", file);
    g_autofree char *core = NULL;
    size_t size;
    int i;

    read_blocks(a, 0, 64);
    fill(a, 10, 1, 0x66);
    qtest_qmp_assert_success(a->qts,
        "{ 'execute': 'dump-guest-memory', 'arguments': {"
        "  'paging': false, 'protocol': %s } }", protocol);
    g_assert(g_file_get_contents(file, &core, &size, NULL));
    for (i = 0; i < 64; i++) {
        g_assert_cmpint(!!memmem(core, size, model + i * PAGE, PAGE), ==,
                        i != 10);
    }
    guest_end(a);
    unlink(file);
}

/* With TCG, whose translated code and dirty bits see what is given. */
static void test_tcg(void)
{
    Guest *a = guest_start("q35", DISK_BLK, OPTIONS, "-accel tcg");
    Smaps m;

    read_blocks(a, 0, 64);
    check_blocks(a, 0, 64);
    m = smaps(a);
    g_assert_cmpint(m.bytes, ==, 64 * PAGE);
    g_assert_cmpint(m.forked, ==, 0);           /* as all of the guest's RAM */
    guest_end(a);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (!have_all()) {
        return 0;
    }
    make_files();
    qtest_add_data_func("/dedup-share/ram/memfd",
                        "memory-backend-memfd,share=on", test_backend);
    qtest_add_data_func("/dedup-share/ram/shared",
                        "memory-backend-ram,share=on", test_backend);
    qtest_add_data_func("/dedup-share/ram/file",
                        "memory-backend-file,share=off,mem-path=/dev/shm",
                        test_backend);
    qtest_add_data_func("/dedup-share/ram/preallocated",
                        "memory-backend-ram,prealloc=on", test_backend);
    qtest_add_data_func("/dedup-share/ram/not-reserved",
                        "memory-backend-ram,reserve=off", test_backend);
    qtest_add_func("/dedup-share/ram/locked", test_locked);
    qtest_add_func("/dedup-share/ram/balloon", test_balloon);
    qtest_add_func("/dedup-share/ram/virtio-mem", test_virtio_mem);
    qtest_add_func("/dedup-share/ram/unplug", test_unplug);
    qtest_add_func("/dedup-share/ram/migrate", test_migrate);
    qtest_add_func("/dedup-share/ram/background-snapshot",
                   test_background_snapshot);
    qtest_add_func("/dedup-share/ram/postcopy", test_postcopy);
    qtest_add_func("/dedup-share/ram/dump", test_dump);
    qtest_add_func("/dedup-share/ram/tcg", test_tcg);
    return remove_files(g_test_run());
}
