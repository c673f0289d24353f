/*
 * dedup-share: what reads cost, with the filter and without
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Runs what scripts/bench asks for and prints figures, one a line; that script
 * says what they mean.  "Guest memory" is a piece of this process's.
 *
 *   io MODE ROUNDS OPS DEPTH SIZE IMAGE-SIZE NAME=HOW:FILENAME...
 *       time of a request and of the processor for it, in ns.  The targets take
 *       turns in each round.  MODE: hit (random, all was read before), miss
 *       (each block once, the store is new in each round), unique (the same,
 *       of an image that is written to; in order, and of the last OPS), write.
 *       HOW: give, or copy: frames are not mapped.
 *   share N IMAGE-SIZE HOW:FILENAME
 *       N processes read all of an image, one after the other: processor
 *       time of all, and of the gives alone, and pages shared at the end
 *   crowd N OPS SIZE IMAGE-SIZE HOW:FILENAME
 *       N processes read at random, all at once
 *   ksm N IMAGE
 *       N processes have the image in mergeable memory, until stdin ends
 *
 * If the environment has DEDUP_SOCKET, a store daemon of the size DEDUP_SIZE
 * listens there while it is needed.  Its processor time counts, too.
 */

#include "qemu/osdep.h"
#include <sys/resource.h>
#include <sys/wait.h>
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "block/block-global-state.h"
#include "block/dedup-share/linux/given.h"
#include "block/dedup-share/linux/probe.h"
#include "block/dedup-share/stats.h"
#include "system/block-backend.h"
#include "../unit/dedup-daemon.h"
#include "../unit/dedup-guest-ram.h"

#define PAGE DEDUP_BLOCK_SIZE
#define MAX_DEPTH 32
/* Places to read to.  With so many single pages the mappings do not run out. */
#define MAX_SLOTS 4096

static uint8_t *guest;
static size_t guest_size;

/* --- the store daemon ----------------------------------------------------- */

/*
 * To a virtual machine that has not used it for some time, its host gives free
 * memory a page at a time, with a fault for each: as long as that takes, nobody
 * is measured.  The kernel takes what was freed last.
 */
#define WARM_SIZE (128 * MiB)

static void warm_memory(void)
{
    int fd = memfd_create("warm", MFD_CLOEXEC);
    g_autofree uint8_t *buf = g_malloc0(MiB);
    size_t i;

    for (i = 0; i < WARM_SIZE; i += MiB) {
        g_assert_cmpint(write(fd, buf, MiB), ==, MiB);
    }
    close(fd);
}

static GPid daemon_pid;         /* 0: none runs */
static unsigned clients = 1;    /* that it works for at the same time */

static void daemon_begin(void)
{
    const char *socket = getenv("DEDUP_SOCKET");

    if (socket) {
        warm_memory();
        daemon_pid = dedup_daemon_start(socket, getenv("DEDUP_SIZE"));
    }
}

static void daemon_end(void)
{
    if (daemon_pid) {
        dedup_daemon_end(daemon_pid, getenv("DEDUP_SOCKET"), SIGKILL);
        daemon_pid = 0;
    }
}

static void init(size_t size)
{
    module_call_init(MODULE_INIT_QOM);
    qemu_init_main_loop(&error_fatal);
    bdrv_init();
    dedup_store_register(&dedup_linux_store_ops);
    guest_size = size;
    guest = dedup_guest_ram_new(size);
    memset(guest, 1, size);
}

static uint64_t number(const char *text)
{
    uint64_t value = 0;

    g_assert_cmpint(qemu_strtou64(text, NULL, 0, &value), ==, 0);
    return value;
}

static uint64_t wall(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

/* Of all threads: those that read files count, too; and the store daemon's. */
static uint64_t cpu(void)
{
    struct timespec t, other = { 0 };
    clockid_t clock;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    if (daemon_pid && !clock_getcpuclockid(daemon_pid, &clock)) {
        clock_gettime(clock, &other);
    }
    return t.tv_sec * 1000000000ULL + t.tv_nsec +
           (other.tv_sec * 1000000000ULL + other.tv_nsec) / clients;
}

/* --- requests ------------------------------------------------------ */

typedef struct Target {
    const char *name, *file;
    bool give;
    BlockBackend *blk;
} Target;

typedef struct Run {
    Target *target;
    bool write;
    unsigned size, ops;
    unsigned first;             /* of @order */
    unsigned next, done;
    uint32_t *order;            /* of the image, in units of size */
    unsigned norder;
    uint64_t sum;               /* of what was read: it is looked at */
} Run;

typedef struct Request {
    Run *run;
    QEMUIOVector qiov;
    uint8_t *buf;
} Request;

static void target_parse(Target *t, char *arg)
{
    char *how = strchr(arg, '='), *file;

    t->name = how ? arg : "";
    if (how) {
        *how++ = 0;
    } else {
        how = arg;
    }
    file = strchr(how, ':');
    g_assert(file);
    *file++ = 0;
    t->give = !strcmp(how, "give");
    t->file = file;
}

/* As a device, which does not share its disk with writers. */
static void target_open(Target *t, bool write)
{
    BlockDriverState *bs = bdrv_open(t->file, NULL, NULL,
                                     write ? BDRV_O_RDWR : 0, &error_fatal);

    t->blk = blk_new(qemu_get_aio_context(), BLK_PERM_CONSISTENT_READ |
                     (write ? BLK_PERM_WRITE : 0),
                     BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE_UNCHANGED);
    blk_insert_bs(t->blk, bs, &error_fatal);
    bdrv_unref(bs);
    blk_set_allow_write_beyond_eof(t->blk, false);
}

static void target_close(Target *t)
{
    blk_drain(t->blk);
    dedup_given_drop(guest, guest_size);
    blk_unref(t->blk);
}

static void request_issue(Request *q);

static void request_done(void *opaque, int ret)
{
    Request *q = opaque;
    unsigned i;

    g_assert_cmpint(ret, ==, 0);
    if (!q->run->write) {       /* the guest looks at each page */
        for (i = 0; i < q->run->size; i += PAGE) {
            q->run->sum += *(uint64_t *)(q->buf + i);
        }
    }
    q->run->done++;
    request_issue(q);
}

static void request_issue(Request *q)
{
    Run *r = q->run;
    int64_t offset;
    unsigned slots = MIN(guest_size / r->size, MAX_SLOTS);

    if (r->next == r->ops) {
        return;
    }
    q->buf = guest + (size_t)(r->next % slots) * r->size;
    offset = (int64_t)r->order[(r->first + r->next) % r->norder] * r->size;
    r->next++;
    qemu_iovec_init_buf(&q->qiov, q->buf, r->size);
    if (r->write) {
        blk_aio_pwritev(r->target->blk, offset, &q->qiov, 0, request_done, q);
    } else {
        blk_aio_preadv(r->target->blk, offset, &q->qiov, 0, request_done, q);
    }
}

/* Returns the time of a request, and the processor's into *cpu_ns. */
static double run(Run *r, unsigned depth, double *cpu_ns)
{
    Request requests[MAX_DEPTH];
    uint64_t start = wall(), cpu_start = cpu();
    unsigned i;

    r->next = r->done = 0;
    dedup_guest_ram_permit(r->target->give);
    for (i = 0; i < depth; i++) {
        requests[i].run = r;
        request_issue(&requests[i]);
    }
    while (r->done < r->ops) {
        aio_poll(qemu_get_aio_context(), true);
    }
    *cpu_ns = (double)(cpu() - cpu_start) / r->ops;
    return (double)(wall() - start) / r->ops;
}

static void shuffle(Run *r, uint64_t image)
{
    unsigned i;

    r->norder = image / r->size;
    r->order = g_new(uint32_t, r->norder);
    for (i = 0; i < r->norder; i++) {
        unsigned j = g_random_int_range(0, i + 1);

        r->order[i] = r->order[j];
        r->order[j] = i;
    }
}

/* Read all but the last of @r, in order; from then on, these. */
static void read_first(Run *r, unsigned depth)
{
    unsigned i, ops = r->ops;
    double ns;

    for (i = 0; i < r->norder; i++) {
        r->order[i] = i;
    }
    r->first = 0;
    r->ops = r->norder - ops;
    run(r, depth, &ns);
    r->first = r->ops;
    r->ops = ops;
}

static void read_all(Target *t, uint64_t image)
{
    Run r = { .target = t, .size = 128 * KiB };
    double ns;

    shuffle(&r, image);
    r.ops = r.norder;
    run(&r, 4, &ns);
    g_free(r.order);
}

static void bench_io(int argc, char **argv)
{
    const char *mode = argv[0];
    bool unique = !strcmp(mode, "unique");
    bool miss = unique || !strcmp(mode, "miss");
    unsigned rounds = atoi(argv[1]), depth = atoi(argv[3]), i, j;
    uint64_t image = number(argv[5]);
    unsigned n = argc - 6;
    g_autofree Target *t = g_new0(Target, n);
    Run r = { .ops = atoi(argv[2]), .size = atoi(argv[4]),
              .write = !strcmp(mode, "write") };

    g_assert(!unique || r.ops < image / r.size);

    init(64 * MiB);
    if (!miss) {
        daemon_begin();
    }
    shuffle(&r, image);
    for (i = 0; i < n; i++) {
        target_parse(&t[i], argv[6 + i]);
        if (!miss) {
            target_open(&t[i], r.write);
            if (!r.write) {
                dedup_guest_ram_permit(false);
                read_all(&t[i], image);
            }
        }
    }
    for (i = 0; i < rounds * n; i++) {
        double ns, cpu_ns;

        j = (i / n + i) % n;                    /* another is the first */
        r.target = &t[j];
        if (miss) {
            daemon_begin();
            target_open(&t[j], unique);
        }
        if (unique) {
            read_first(&r, depth);
        }
        ns = run(&r, depth, &cpu_ns);
        if (miss) {
            target_close(&t[j]);
            daemon_end();
        }
        printf("%s %.1f %.1f\n", t[j].name, ns, cpu_ns);
    }
    for (i = 0; i < n && !miss; i++) {
        target_close(&t[i]);
    }
    daemon_end();
    g_free(r.order);
}

/* --- several processes --------------------------------------------------- */

/* Bytes of the guest's that are pages of the store. */
static uint64_t count_shared(void)
{
    g_autofree uint64_t *entries = g_new(uint64_t, guest_size / PAGE);
    int fd = open("/proc/self/pagemap", O_RDONLY);
    uint64_t shared = 0;
    size_t i;

    g_assert_cmpint(pread(fd, entries, guest_size / PAGE * 8,
                          (uintptr_t)guest / PAGE * 8), ==,
                    guest_size / PAGE * 8);
    close(fd);
    for (i = 0; i < guest_size / PAGE; i++) {
        shared += entries[i] >> 61 & entries[i] >> 63 & 1;
    }
    return shared;
}

/* In a child: wait until the parent writes to or closes @fd. */
static void wait_for(int fd)
{
    char c;

    while (read(fd, &c, 1) < 0 && errno == EINTR) {
        continue;
    }
}

static void wait_for_children(int n)
{
    while (n && wait(NULL) > 0) {
        n--;
    }
}

/* What a child does in the end: it stays in the group as long as the others. */
static void child_end(Target *t, int done, int end)
{
    g_assert_cmpint(write(done, "", 1), ==, 1);
    wait_for(end);
    target_close(t);
    exit(0);
}

/* Read all, once in order; print processor time, and the time of the gives. */
static void share_child(Target *t, uint64_t image)
{
    Run r = { .target = t, .size = 128 * KiB };
    DedupShareStats *s;
    double cpu_ns;
    unsigned i;

    init(image);
    target_open(t, false);
    r.ops = r.norder = image / r.size;
    r.order = g_new(uint32_t, r.norder);
    for (i = 0; i < r.norder; i++) {
        r.order[i] = i;
    }
    run(&r, 4, &cpu_ns);
    s = dedup_share_stats(blk_bs(t->blk));
    printf("%.1f %" PRIu64 " %" PRIu64 "\n", cpu_ns * r.ops,
           s->store_stats->time_ns, count_shared());
    qapi_free_DedupShareStats(s);
    fflush(stdout);
}

static void crowd_child(Target *t, unsigned ops, unsigned size, uint64_t image,
                        int ready, int go)
{
    Run r = { .target = t, .size = size, .ops = ops };
    double ns, cpu_ns;

    init(16 * MiB);
    target_open(t, false);
    shuffle(&r, image);
    dedup_guest_ram_permit(false);
    read_all(t, image);
    g_assert_cmpint(write(ready, "", 1), ==, 1);
    wait_for(go);
    ns = run(&r, 1, &cpu_ns);
    printf("%.1f %.1f\n", ns, cpu_ns);
    fflush(stdout);
}

static void bench_share(char **argv)
{
    int i, n = atoi(argv[0]);
    int done[2], end[2];
    Target t;

    target_parse(&t, argv[2]);
    g_assert(!pipe(end) && !pipe(done));
    daemon_begin();
    for (i = 0; i < n; i++) {
        if (!fork()) {
            close(end[1]);
            share_child(&t, number(argv[1]));
            child_end(&t, done[1], end[0]);
        }
        wait_for(done[0]);
    }
    close(end[1]);
    wait_for_children(n);
    daemon_end();
}

static void bench_crowd(char **argv)
{
    int i, n = atoi(argv[0]);
    int ready[2], go[2], end[2];
    Target t;

    target_parse(&t, argv[4]);
    clients = n;
    g_assert(!pipe(ready) && !pipe(go) && !pipe(end));
    daemon_begin();
    for (i = 0; i < n; i++) {
        if (!fork()) {
            close(go[1]);
            close(end[1]);
            crowd_child(&t, atoi(argv[1]), atoi(argv[2]),
                        number(argv[3]), ready[1], go[0]);
            child_end(&t, ready[1], end[0]);
        }
        wait_for(ready[0]);                     /* one fills after the other */
    }
    close(go[1]);
    for (i = 0; i < n; i++) {
        wait_for(ready[0]);
    }
    close(end[1]);
    wait_for_children(n);
    daemon_end();
}

static void bench_ksm(char **argv)
{
    int i, n = atoi(argv[0]);
    int done[2];

    g_assert(!pipe(done));
    for (i = 0; i < n; i++) {
        if (!fork()) {
            struct stat st;
            int fd = open(argv[1], O_RDONLY);
            void *p;

            g_assert(!fstat(fd, &st));
            p = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            madvise(p, st.st_size, MADV_MERGEABLE);
            g_assert_cmpint(read(fd, p, st.st_size), ==, st.st_size);
            g_assert_cmpint(write(done[1], "", 1), ==, 1);
            wait_for(0);
            exit(0);
        }
        wait_for(done[0]);
    }
    printf("ready\n");
    fflush(stdout);
    wait_for_children(n);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (argc > 7 && !strcmp(argv[1], "io")) {
        bench_io(argc - 2, argv + 2);
    } else if (argc == 5 && !strcmp(argv[1], "share")) {
        bench_share(argv + 2);
    } else if (argc == 7 && !strcmp(argv[1], "crowd")) {
        bench_crowd(argv + 2);
    } else if (argc == 4 && !strcmp(argv[1], "ksm")) {
        bench_ksm(argv + 2);
    } else {
        fprintf(stderr, "see the head of dedup-share-bench.c\n");
        return 1;
    }
    return 0;
}
