/*
 * QTest of emulated disks above the dedup-share filter
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Nothing is shared here, as there is no directory for a group: the DMA reads
 * that are offered to the filter are declined and go the ordinary way.  All
 * bytes are compared with a model of the disk, and the filter's counters with
 * what was read.
 */

#include "qemu/osdep.h"

#include "libqtest.h"

#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "dedup-share-disk.c.inc"

#define DISK_MB 4
#define DISK_SIZE (DISK_MB * 1024 * 1024)
#define BUF_SIZE (128 * 1024)

static char *bios, *raw_image, *overlay_image;

typedef struct Config {
    bool ahci;                  /* q35 with AHCI, or pc with IDE */
    bool overlay;               /* qcow2 above the raw image, or that alone */
    const char *store;
} Config;

typedef struct Disk {
    const Config *config;
    QOSState *qs;
    QTestState *qts;
    uint8_t *model;             /* what the disk must hold */
    uint64_t buf;               /* BUF_SIZE and a page, in the guest */
    uint64_t passed;            /* what bytes-passed must be */
    DiskPort port;
} Disk;

/* Images */

static char *temp_file(void)
{
    char *name;
    int fd = g_file_open_tmp("qtest-dedup-share.XXXXXX", &name, NULL);

    g_assert(fd >= 0);
    close(fd);
    return name;
}

/* No two blocks, and no two sectors, are alike. */
static void fill_model(uint8_t *model)
{
    uint64_t i;

    for (i = 0; i < DISK_SIZE; i += 8) {
        stq_le_p(model + i, (i + 8) * 0x9e3779b97f4a7c15ULL);
    }
}

static uint8_t *create_images(const Config *config)
{
    uint8_t *model = g_malloc(DISK_SIZE);

    fill_model(model);
    g_assert(g_file_set_contents(raw_image, (char *)model, DISK_SIZE, NULL));
    if (config->overlay) {
        mkqcow2(overlay_image, DISK_MB);
    }
    return model;
}

static bool have_images(const Config *config)
{
    if (config->overlay && !have_qemu_img()) {
        g_test_skip("QTEST_QEMU_IMG not set or qemu-img missing");
        return false;
    }
    return true;
}

static char *image_args(const Config *config, const char *top)
{
    if (!config->overlay) {
        return g_strdup_printf("-blockdev driver=raw,node-name=%s,"
                               "file.driver=file,file.filename=%s",
                               top, raw_image);
    }
    return g_strdup_printf("-blockdev driver=raw,node-name=base,read-only=on,"
                           "file.driver=file,file.filename=%s "
                           "-blockdev driver=qcow2,node-name=%s,backing=base,"
                           "file.driver=file,file.filename=%s",
                           raw_image, top, overlay_image);
}

/* Counters */

static QDict *dedup_stats(QTestState *qts, const char *node)
{
    QDict *res = qtest_qmp(qts, "{ 'execute': 'query-dedup-stats' }");
    QDict *found = NULL;
    const QListEntry *e;

    g_assert(qdict_haskey(res, "return"));
    QLIST_FOREACH_ENTRY(qdict_get_qlist(res, "return"), e) {
        QDict *s = qobject_to(QDict, qlist_entry_obj(e));

        if (!strcmp(qdict_get_str(s, "node-name"), node)) {
            g_assert(!found);
            found = qobject_ref(s);
        }
    }
    qobject_unref(res);
    return found;
}

static void check_stats(Disk *d)
{
    QDict *s = dedup_stats(d->qts, "d0");

    g_assert(s);
    g_assert_cmpstr(qdict_get_str(s, "store"), ==, "off");
    g_assert(qdict_haskey(s, "reason") == !strcmp(d->config->store, "auto"));
    g_assert_false(qdict_haskey(s, "store-stats"));
    g_assert_cmpint(qdict_get_int(s, "blocks-read"), ==, 0);
    g_assert_cmpint(qdict_get_int(s, "bytes-filled"), ==, 0);
    g_assert_cmpint(qdict_get_int(s, "bytes-passed"), ==, d->passed);
    qobject_unref(s);
}

/* Machines */

/* @below: node options between the filter and the image "img", or none */
static Disk *disk_boot(const Config *config, const char *objects,
                       const char *below)
{
    Disk *d = g_new0(Disk, 1);
    DiskKind kind = config->ahci ? DISK_AHCI : DISK_IDE;
    g_autofree char *image = NULL;
    QDict *s;

    d->config = config;
    d->model = create_images(config);
    image = image_args(config, "img");
    d->qs = qtest_pc_boot("-M %s -nodefaults -bios %s %s %s "
                          "-blockdev driver=dedup-share,node-name=d0,"
                          "socket=/none/sock,store=%s,%s %s",
                          config->ahci ? "q35" : "pc", bios, objects, image,
                          config->store, below ?: "file=img",
                          port_device(kind));
    d->qts = d->qs->qts;
    port_open(&d->port, d->qs, kind);
    d->buf = guest_alloc(&d->qs->alloc, BUF_SIZE + PAGE);
    g_assert_cmphex(d->buf % PAGE, ==, 0);

    /* the disk's geometry was guessed from its first sector */
    s = dedup_stats(d->qts, "d0");
    g_assert(s);
    d->passed = qdict_get_int(s, "bytes-passed");
    g_assert_cmpint(d->passed, <=, PAGE);
    qobject_unref(s);
    return d;
}

static void disk_quit(Disk *d)
{
    port_close(&d->port);
    qtest_shutdown(d->qs);
    g_free(d->model);
    g_free(d);
}

/* Requests */

/* Read to @shift bytes into a page, and see that nothing else changed. */
static void check_read(Disk *d, unsigned shift, uint64_t sector,
                       uint32_t bytes, unsigned part)
{
    g_autofree uint8_t *got = g_malloc(BUF_SIZE + PAGE);
    uint64_t i;

    qtest_memset(d->qts, d->buf, 0xa5, BUF_SIZE + PAGE);
    port_io(&d->port, false, d->buf + shift, sector, bytes, part);
    d->passed += bytes;

    qtest_memread(d->qts, d->buf, got, BUF_SIZE + PAGE);
    g_assert_cmpmem(got + shift, bytes, d->model + sector * SECTOR, bytes);
    for (i = 0; i < BUF_SIZE + PAGE; i++) {
        if (i < shift || i >= shift + bytes) {
            g_assert_cmphex(got[i], ==, 0xa5);
        }
    }
}

static void write_pattern(Disk *d, unsigned shift, uint64_t sector,
                          uint32_t bytes, unsigned part, uint8_t pattern)
{
    uint8_t *data = d->model + sector * SECTOR;
    uint32_t i;

    for (i = 0; i < bytes; i++) {
        data[i] = pattern + i / SECTOR + i % 251;
    }
    qtest_memwrite(d->qts, d->buf + shift, data, bytes);
    port_io(&d->port, true, d->buf + shift, sector, bytes, part);
}

static void check_whole_disk(Disk *d)
{
    uint64_t sector;

    for (sector = 0; sector < DISK_SIZE / SECTOR; sector += 128) {
        check_read(d, 0, sector, 128 * SECTOR, 128 * SECTOR);
    }
}

/* Tests */

static void test_read_write(const void *opaque)
{
    const Config *config = opaque;
    Disk *d;

    if (!have_images(config)) {
        return;
    }
    d = disk_boot(config, "", NULL);
    check_stats(d);

    check_read(d, 0, 0, PAGE, PAGE);                  /* one block */
    check_read(d, 0, 8, 127 * SECTOR, 16 * PAGE);     /* and a part */
    check_read(d, 0, 3, 5 * SECTOR, PAGE);            /* part of a block */
    check_read(d, 0, 1021, 64 * SECTOR, PAGE);        /* off by sectors */
    check_read(d, 512, 1024, 64 * SECTOR, PAGE);      /* off in memory */
    check_read(d, 2, 1024, 64 * SECTOR, 16 * PAGE);
    check_read(d, 0, 2048, 120 * SECTOR, 1536);       /* pages in pieces */
    check_read(d, 512, 2055, 64 * SECTOR, PAGE);      /* off by the same */
    check_read(d, 0, DISK_SIZE / SECTOR - 8, PAGE, PAGE);
    check_stats(d);

    write_pattern(d, 0, 0, PAGE, PAGE, 1);
    write_pattern(d, 2, 4099, 77 * SECTOR, 1024, 2);
    write_pattern(d, 512, 4096, 3 * SECTOR, PAGE, 3);
    write_pattern(d, 0, DISK_SIZE / SECTOR - 1, SECTOR, PAGE, 4);
    check_stats(d);                                   /* writes don't count */
    check_read(d, 0, 4096, 128 * SECTOR, 16 * PAGE);
    check_whole_disk(d);
    check_stats(d);

    if (!config->overlay) {
        g_autofree char *file = NULL;
        size_t size;

        qtest_qmp_assert_success(d->qts, "{ 'execute': 'stop' }");
        g_assert(g_file_get_contents(raw_image, &file, &size, NULL));
        g_assert_cmpmem(file, size, d->model, DISK_SIZE);
    }
    disk_quit(d);
}

/* Several reads in flight at once, as only AHCI can have */
static void test_queue(const void *opaque)
{
    Disk *d = disk_boot(opaque, "", NULL);
    g_autofree uint8_t *got = g_malloc(BUF_SIZE);
    AHCICommand *cmds[16];
    int i;

    for (i = 0; i < ARRAY_SIZE(cmds); i++) {
        cmds[i] = ahci_command_create(READ_FPDMA_QUEUED);
        ahci_command_adjust(cmds[i], (15 - i) * 24, d->buf + i * 2 * PAGE,
                            2 * PAGE, PAGE);
        ahci_command_commit(d->port.ahci, cmds[i], d->port.port);
    }
    for (i = 0; i < ARRAY_SIZE(cmds); i++) {
        ahci_command_issue_async(d->port.ahci, cmds[i]);
    }
    for (i = 0; i < ARRAY_SIZE(cmds); i++) {
        ahci_command_wait(d->port.ahci, cmds[i]);
        ahci_command_free(cmds[i]);
        d->passed += 2 * PAGE;
    }
    qtest_memread(d->qts, d->buf, got, BUF_SIZE);
    for (i = 0; i < ARRAY_SIZE(cmds); i++) {
        g_assert_cmpmem(got + i * 2 * PAGE, 2 * PAGE,
                        d->model + (15 - i) * 24 * SECTOR, 2 * PAGE);
    }
    check_stats(d);
    disk_quit(d);
}

/* QMP: the node's options while the disk is in use */
static void test_reopen(const void *opaque)
{
    Disk *d = disk_boot(opaque, "", NULL);
    QDict *s;
    int i;

    for (i = 0; i < 6; i++) {
        const char *store = i % 2 ? "off" : "auto";

        qtest_qmp_assert_success(d->qts,
            "{ 'execute': 'blockdev-reopen', 'arguments': { 'options': [ {"
            "  'driver': 'dedup-share', 'node-name': 'd0', 'file': 'img',"
            "  'socket': '/none/sock', 'store': %s } ] } }", store);
        s = dedup_stats(d->qts, "d0");
        g_assert(qdict_haskey(s, "reason") == !(i % 2));
        qobject_unref(s);
        write_pattern(d, 0, i * 16, 16 * SECTOR, PAGE, i);
        check_read(d, 0, i * 8, 64 * SECTOR, PAGE);
    }
    check_whole_disk(d);
    check_stats(d);
    disk_quit(d);
}

/* A reset while a read waits below the filter */

#define THROTTLED "-object throttle-group,id=tg,x-iops-read=4"
#define THROTTLE "file.driver=throttle,file.throttle-group=tg,file.file=img"

static bool buf_untouched(Disk *d)
{
    int i;

    for (i = 0; i < PAGE; i += SECTOR) {
        if (qtest_readb(d->qts, d->buf + i) != 0xa5) {
            return false;
        }
    }
    return true;
}

/* Leave a read in flight.  The throttle may let a first one pass. */
static void read_and_wait(Disk *d)
{
    bool waits;
    int i;

    for (i = 0; i < 10; i++) {
        AHCICommand *cmd = NULL;

        qtest_memset(d->qts, d->buf, 0xa5, PAGE);
        d->passed += PAGE;
        if (d->port.ahci) {
            cmd = ahci_request(&d->port, false, d->buf, 16, PAGE, PAGE);
        } else {
            ide_request(&d->port, false, d->buf, 16, PAGE, PAGE);
        }
        g_usleep(20000);
        waits = buf_untouched(d);
        if (cmd) {
            if (!waits) {
                ahci_command_wait(d->port.ahci, cmd);
            }
            ahci_command_free(cmd);
        } else if (!waits) {
            ide_wait(&d->port);
        }
        if (waits) {
            return;
        }
    }
    g_assert_not_reached();
}

static void unthrottle(Disk *d)
{
    qtest_qmp_assert_success(d->qts,
        "{ 'execute': 'qom-set', 'arguments': { 'path': '/objects/tg',"
        "  'property': 'limits',"
        "  'value': { 'iops-read': 0 } } }");
}

static void controller_reset(Disk *d)
{
    if (d->port.ahci) {
        ahci_set(d->port.ahci, AHCI_GHC, AHCI_GHC_HR);
        ahci_clean_mem(d->port.ahci);
        ahci_hba_enable(d->port.ahci);
        ahci_port_clear(d->port.ahci, d->port.port);
    } else {
        QPCIBar control = qpci_legacy_iomap(d->port.ide, IDE_CONTROL);

        qpci_io_writeb(d->port.ide, control, 0, IDE_CONTROL_SRST);
        qpci_io_writeb(d->port.ide, control, 0, 0);
        while (ide_busy(&d->port)) {
            g_usleep(50);
        }
        qpci_io_writeb(d->port.ide, d->port.bmdma, BM_CMD, 0);
    }
}

static void machine_reset(Disk *d)
{
    qtest_system_reset(d->qts);
    if (d->port.ahci) {
        ahci_clean_mem(d->port.ahci);
    }
    port_start(&d->port);
}

static void test_reset(const void *opaque)
{
    const Config *config = opaque;
    void (*const resets[])(Disk *) = { controller_reset, machine_reset };
    int i;

    if (!have_images(config)) {
        return;
    }
    for (i = 0; i < ARRAY_SIZE(resets); i++) {
        Disk *d = disk_boot(config, THROTTLED, THROTTLE);

        read_and_wait(d);
        resets[i](d);
        unthrottle(d);
        write_pattern(d, 0, 16, PAGE, PAGE, 7);
        check_read(d, 0, 8, 16 * PAGE, 16 * PAGE);
        check_whole_disk(d);
        check_stats(d);
        disk_quit(d);
    }
}

/* Nodes that come and go at run time, under a disk that does so, too */
static void test_hotplug(const void *opaque)
{
    const Config *config = opaque;
    QTestState *qts;
    char *hmp;
    QDict *err, *s;
    int i;

    g_free(create_images(config));
    qts = qtest_initf("-M %s -nodefaults -bios %s -device virtio-scsi-pci",
                      config->ahci ? "q35" : "pc", bios);
    for (i = 0; i < 3; i++) {
        hmp = qtest_hmp(qts, "info dedup");
        g_assert_cmpstr(hmp, ==, "There are no dedup-share nodes\r\n");
        g_free(hmp);
        g_assert_null(dedup_stats(qts, "d0"));

        qtest_qmp_assert_success(qts,
            "{ 'execute': 'blockdev-add', 'arguments': {"
            "  'driver': 'dedup-share', 'node-name': 'd0', 'store': %s,"
            "  'file': { 'driver': 'raw', 'node-name': 'img', 'file': {"
            "    'driver': 'file', 'filename': %s } } } }",
            config->store, raw_image);
        qtest_qmp_device_add(qts, "scsi-hd", "disk", "{ 'drive': 'd0' }");
        err = qtest_qmp_assert_failure_ref(qts,
            "{ 'execute': 'blockdev-del', 'arguments': {"
            "  'node-name': 'd0' } }");
        qobject_unref(err);

        s = dedup_stats(qts, "d0");
        g_assert_cmpstr(qdict_get_str(s, "store"), ==, "off");
        qobject_unref(s);
        hmp = qtest_hmp(qts, "info dedup");
        g_assert(g_str_has_prefix(hmp, "d0: group default, store off"));
        g_free(hmp);

        qtest_qmp_device_del(qts, "disk");
        qtest_qmp_assert_success(qts,
            "{ 'execute': 'blockdev-del', 'arguments': {"
            "  'node-name': 'd0' } }");
    }
    qtest_quit(qts);
}

static void add_tests(const Config *config)
{
    const char *disk = port_name(config->ahci ? DISK_AHCI : DISK_IDE);
    const char *image = config->overlay ? "overlay" : "raw";
    struct {
        const char *name;
        void (*fn)(const void *);
        bool any_image, ahci_only;
    } tests[] = {
        { "read-write", test_read_write, true },
        { "queue", test_queue, false, true },
        { "reopen", test_reopen },
        { "reset", test_reset, true },
        { "hotplug", test_hotplug },
    };
    int i;

    for (i = 0; i < ARRAY_SIZE(tests); i++) {
        g_autofree char *path = g_strdup_printf("/dedup-share/%s/%s/%s", disk,
                                                image, tests[i].name);

        if ((tests[i].any_image || !config->overlay) &&
            (!tests[i].ahci_only || config->ahci)) {
            qtest_add_data_func(path, config, tests[i].fn);
        }
    }
}

int main(int argc, char **argv)
{
    static const Config configs[] = {
        { .ahci = true, .overlay = false, .store = "off" },
        { .ahci = true, .overlay = true, .store = "auto" },
        { .ahci = false, .overlay = false, .store = "off" },
        { .ahci = false, .overlay = true, .store = "auto" },
    };
    static const char no_code[256 * 1024];
    int i, ret;

    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_machine("q35") || !qtest_has_machine("pc")) {
        g_test_skip("machines q35 and pc are needed");
        return 0;
    }
    bios = temp_file();         /* nothing runs in it */
    raw_image = temp_file();
    overlay_image = temp_file();
    g_assert(g_file_set_contents(bios, no_code, sizeof(no_code), NULL));
    for (i = 0; i < ARRAY_SIZE(configs); i++) {
        add_tests(&configs[i]);
    }
    ret = g_test_run();
    unlink(bios);
    unlink(raw_image);
    unlink(overlay_image);
    g_free(bios);
    g_free(raw_image);
    g_free(overlay_image);
    return ret;
}
