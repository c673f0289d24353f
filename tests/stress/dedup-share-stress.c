/*
 * dedup-share: stress tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 *   model DIR OPS SEED
 *       one process does random operations on disks of a group, whose store
 *       daemon is killed
 *   kill DIR SECONDS SEED
 *       16 processes do such operations in one group; every 50 ms one of them
 *       is killed, and another begins; and so is the store daemon, each time
 *       that ten were.  Who is killed is waited for to be in the middle of the
 *       operation, or the system call, whose turn it is.
 *
 * Both end with exit code 0 if no byte was wrong, no operation took longer than
 * a second (kill), no frame is held for nobody in the end, and everything was
 * killed in the middle of everything.  DIR is on a file system with leases.
 */

#include "qemu/osdep.h"
#include <spawn.h>
#include <sys/wait.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "block/block-global-state.h"
#include "../unit/dedup-guest-ram.h"
#include "stress.h"

static void init(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    qemu_init_main_loop(&error_fatal);
    bdrv_init();
}

static void print_done(const World *w)
{
    unsigned i;

    for (i = 0; stress_kinds[i]; i++) {
        printf("  %s %" PRIu64, stress_kinds[i], w->done[i]);
    }
    printf("\n  blocks: hit %" PRIu64 " missed %" PRIu64 " matched %" PRIu64
           " given %" PRIu64 " copied %" PRIu64 " zeroes %" PRIu64
           " of an origin %" PRIu64 "\n", w->hits, w->misses, w->matched,
           w->given, w->copied, w->zeroes, w->of_origin);
}

/* --- model -------------------------------------------------------------- */

static int run_model(const char *dir, const char *socket, uint64_t ops,
                     uint32_t seed)
{
    int64_t start = g_get_monotonic_time(), next = start;
    World w;
    uint64_t i;

    stress_make_bases(dir);
    stress_start_daemon(socket);
    world_init(&w, dir, socket, 0, seed);
    for (i = 0; i < ops; i++) {
        world_step(&w, true);
        if (i % 256 == 0) {
            aio_poll(qemu_get_aio_context(), false);    /* as a main loop */
        }
        if (i % 4096 == 0 && g_get_monotonic_time() >= next) {
            next += 20 * G_USEC_PER_SEC;
            printf("%" PRIu64 " s: %" PRIu64 " operations\n",
                   (g_get_monotonic_time() - start) / G_USEC_PER_SEC, i);
        }
    }
    printf("model: %" PRIu64 " operations, seed %u, no wrong byte\n", ops,
           seed);
    world_destroy(&w);
    print_done(&w);
    stress_end_daemon(socket, SIGTERM);
    return 0;
}

/* --- kill --------------------------------------------------------------- */

#define WORKERS 16
#define KILL_US 50000
#define STALL_US G_USEC_PER_SEC
/* So long it is waited for somebody to be in the middle of something. */
#define FIND_US 500000
#define FIND_CALL_US 1500000
/* What the frames have is within the size so soon after a daemon has died. */
#define MEMORY_US (20 * G_USEC_PER_SEC)
/* In fewer turns than this it may not be met. */
#define TURNS 5

/* What a worker shows of itself, in a file that all have mapped. */
typedef struct Pulse {
    int64_t began;              /* an operation; us, 0: none; atomic */
    int64_t longest;
    uint64_t ops;
    int kind;                   /* of the operation; atomic; -1: none */
} Pulse;

static Pulse *map_pulses(const char *dir)
{
    g_autofree char *path = g_build_filename(dir, "pulses", NULL);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    Pulse *p;

    g_assert_cmpint(ftruncate(fd, WORKERS * sizeof(Pulse)), ==, 0);
    p = mmap(NULL, WORKERS * sizeof(Pulse), PROT_READ | PROT_WRITE,
             MAP_SHARED, fd, 0);
    g_assert(p != MAP_FAILED);
    close(fd);
    return p;
}

static bool stopping;

static void on_term(int sig)
{
    qatomic_set(&stopping, true);
}

static int run_worker(const char *dir, const char *socket, unsigned number,
                      uint32_t seed)
{
    Pulse *p = map_pulses(dir) + number;
    World w;

    sigaction(SIGTERM, &(struct sigaction) { .sa_handler = on_term }, NULL);
    qatomic_set(&p->began, 0);
    world_init(&w, dir, socket, number, seed);
    w.now = &p->kind;
    while (!qatomic_read(&stopping)) {
        int64_t start = g_get_monotonic_time(), took;

        qatomic_set(&p->began, start);
        world_step(&w, false);
        qatomic_set(&p->kind, -1);
        qatomic_set(&p->began, 0);
        took = g_get_monotonic_time() - start;
        p->longest = MAX(p->longest, took);
        p->ops++;
        aio_poll(qemu_get_aio_context(), false);
    }
    world_destroy(&w);
    return 0;
}

static char *program;           /* as it was called */

/* What the store daemon is killed in. */
static const char *const calls[] = {
    "pread64", "pwrite64",      /* of images and frames */
    "fcntl", "openat",          /* of a lease, and of an image */
    "sendmsg", "recvmsg",
};

typedef struct Killer {
    const char *dir, *socket;
    Pulse *pulses;
    pid_t pids[WORKERS];
    GRand *rand;
    unsigned kills, daemon_kills, stalls, failures;
    unsigned in_kind[STRESS_KINDS_KILLED + 1];  /* kills; the last: in none */
    unsigned in_call[ARRAY_SIZE(calls)];
    int64_t longest_back;       /* us: until memory was within the size */
} Killer;

static void start_worker(Killer *k, unsigned i)
{
    g_autofree char *number = g_strdup_printf("%u", i);
    g_autofree char *seed = g_strdup_printf("%u", g_rand_int(k->rand));
    char *argv[] = {
        program, (char *)"worker", (char *)k->dir, number, seed, NULL,
    };

    qatomic_set(&k->pulses[i].began, 0);
    qatomic_set(&k->pulses[i].kind, -1);
    g_assert_cmpint(posix_spawn(&k->pids[i], "/proc/self/exe", NULL, NULL,
                                argv, environ), ==, 0);
}

/* What killed workers leave of their disks would fill the file system. */
static void remove_disks(const char *dir, pid_t pid)
{
    g_autofree char *prefix = g_strdup_printf("disk-%u-", pid);
    g_autoptr(GDir) d = g_dir_open(dir, 0, NULL);
    const char *name;

    while (d && (name = g_dir_read_name(d))) {
        if (g_str_has_prefix(name, prefix)) {
            g_autofree char *path = g_build_filename(dir, name, NULL);

            unlink(path);
        }
    }
}

static void reap(Killer *k, unsigned i, int expected)
{
    int status = 0;

    g_assert_cmpint(waitpid(k->pids[i], &status, 0), ==, k->pids[i]);
    remove_disks(k->dir, k->pids[i]);
    if (expected ? !WIFSIGNALED(status) || WTERMSIG(status) != expected
                 : status) {
        printf("FAILED: process %u ended with status 0x%x\n", i, status);
        k->failures++;
    }
}

static void look_for_stalls(Killer *k)
{
    int64_t now = g_get_monotonic_time();
    unsigned i;

    for (i = 0; i < WORKERS; i++) {
        int64_t began = qatomic_read(&k->pulses[i].began);

        if (began && now - began > STALL_US) {
            printf("STALL: process %u, for %" PRId64 " ms\n", i,
                   (now - began) / 1000);
            k->stalls++;
        }
    }
}

/* One that is in the middle of @kind; or any, if none is for a while. */
static unsigned find_victim(Killer *k, int kind)
{
    unsigned first = g_rand_int_range(k->rand, 0, WORKERS), i;
    int64_t end = g_get_monotonic_time() + FIND_US;

    while (g_get_monotonic_time() < end) {
        for (i = 0; i < WORKERS; i++) {
            if (qatomic_read(&k->pulses[(first + i) % WORKERS].kind) == kind) {
                return (first + i) % WORKERS;
            }
        }
        g_usleep(50);
    }
    return first;
}

static void kill_one(Killer *k)
{
    unsigned i = find_victim(k, k->kills % STRESS_KINDS_KILLED);
    int kind;

    kill(k->pids[i], SIGKILL);
    reap(k, i, SIGKILL);
    k->kills++;
    kind = k->pulses[i].kind;
    k->in_kind[kind < 0 ? STRESS_KINDS_KILLED
                        : MIN(kind, STRESS_KINDS_KILLED)]++;
    start_worker(k, i);
}

static void print_kills(const Killer *k)
{
    unsigned i;

    printf("  killed in:");
    for (i = 0; i < STRESS_KINDS_KILLED; i++) {
        printf(" %s %u", stress_kinds[i], k->in_kind[i]);
    }
    printf(", nothing %u\n", k->in_kind[i]);
    printf("  the store daemon in:");
    for (i = 0; i < ARRAY_SIZE(calls); i++) {
        printf(" %s %u", calls[i], k->in_call[i]);
    }
    printf("\n");
}

/* Was everything killed in the middle of everything, when all had turns? */
static bool was_everything(const Killer *k)
{
    bool all = true;
    unsigned i;

    for (i = 0; k->kills > TURNS * STRESS_KINDS_KILLED &&
                i < STRESS_KINDS_KILLED; i++) {
        all &= k->in_kind[i] > 0;
    }
    for (i = 0; k->daemon_kills > TURNS * ARRAY_SIZE(calls) &&
                i < ARRAY_SIZE(calls); i++) {
        all &= k->in_call[i] > 0;
    }
    if (!all) {
        printf("FAILED: something was never killed in the middle of\n");
    }
    return all;
}

static void report(Killer *k)
{
    uint64_t ops = 0;
    int64_t longest = 0;
    unsigned i;

    for (i = 0; i < WORKERS; i++) {
        ops += k->pulses[i].ops;
        longest = MAX(longest, k->pulses[i].longest);
    }
    printf("kill-test: %u kills, %u of the store daemon, %" PRIu64
           " operations, the longest %" PRId64 " ms, %u stalls, %u failures, "
           "memory back after %" PRId64 " ms\n",
           k->kills, k->daemon_kills, ops,
           longest / 1000, k->stalls, k->failures, k->longest_back / 1000);
    print_kills(k);
}

/* All clients have ended: the daemon knows it, after a moment. */
static bool nothing_is_held(const char *socket)
{
    g_autofree char *command = g_strdup_printf(
        "%s/../../dedup-store/qemu-dedup-store status --json --socket %s",
        g_test_get_dir(G_TEST_BUILT), socket);
    unsigned i;

    for (i = 0; i < 50; i++) {
        g_autofree char *text = NULL;

        if (g_spawn_command_line_sync(command, &text, NULL, NULL, NULL) &&
            strstr(text, "\"frames-used\": 0")) {
            return true;
        }
        g_usleep(100 * 1000);
    }
    printf("FAILED: the store daemon has frames in use for nobody\n");
    return false;
}

/* Has the store daemon ended by itself?  It was not waited for before. */
static bool has_died(void)
{
    siginfo_t info = { 0 };

    g_assert_cmpint(waitid(P_PID, stress_daemon_pid(), &info,
                           WEXITED | WNOHANG | WNOWAIT), ==, 0);
    return info.si_pid;
}

/* Have strace kill the store daemon when it makes @call for the @nth time. */
static bool kill_in_call(const char *call, unsigned nth)
{
    g_autofree char *pid = g_strdup_printf("%d", stress_daemon_pid());
    g_autofree char *inject =
        g_strdup_printf("inject=%s:signal=SIGKILL:when=%u", call, nth);
    const char *argv[] = {
        "strace", "-f", "-qq", "-o", "/dev/null", "-e", inject, "-p", pid,
        NULL,
    };
    int64_t end = g_get_monotonic_time() + FIND_CALL_US;
    GPid tracer;
    bool died;

    g_assert_true(g_spawn_async(NULL, (char **)argv, NULL,
                                G_SPAWN_SEARCH_PATH |
                                G_SPAWN_DO_NOT_REAP_CHILD, NULL, NULL, &tracer,
                                NULL));
    do {
        g_usleep(1000);
        died = has_died();
    } while (!died && g_get_monotonic_time() < end);
    kill(tracer, SIGTERM);
    waitpid(tracer, NULL, 0);
    return died;
}

/* All frames' memory is within the size again, those of dead daemons too. */
static void await_memory(Killer *k)
{
    int64_t begin = g_get_monotonic_time(), took;
    pid_t pids[WORKERS + 2];
    uint64_t size;

    memcpy(pids, k->pids, sizeof(k->pids));
    pids[WORKERS] = getpid();
    pids[WORKERS + 1] = stress_daemon_pid();
    do {
        size = stress_frames_memory(pids, ARRAY_SIZE(pids));
        took = g_get_monotonic_time() - begin;
    } while (size > STORE_SIZE && took < MEMORY_US);
    k->longest_back = MAX(k->longest_back, took);
    if (size > STORE_SIZE) {
        printf("FAILED: %" PRIu64 " bytes of frames, %u may be\n", size,
               STORE_SIZE);
        k->failures++;
    }
}

static void kill_daemon(Killer *k)
{
    unsigned call = k->daemon_kills % ARRAY_SIZE(calls);

    k->in_call[call] += kill_in_call(calls[call],
                                     g_rand_int_range(k->rand, 1, 4));
    stress_end_daemon(k->socket, SIGKILL);
    k->daemon_kills++;
    stress_start_daemon(k->socket);
    await_memory(k);
}

static int run_kill(const char *dir, const char *socket, unsigned seconds,
                    uint32_t seed)
{
    Killer k = {
        .dir = dir, .socket = socket, .pulses = map_pulses(dir),
        .rand = g_rand_new_with_seed(seed),
    };
    int64_t end = g_get_monotonic_time() + (int64_t)seconds * G_USEC_PER_SEC;
    World w;
    unsigned i;
    bool ok;

    stress_make_bases(dir);
    stress_start_daemon(socket);
    world_init(&w, dir, socket, WORKERS, seed);         /* also a member */
    for (i = 0; i < WORKERS; i++) {
        start_worker(&k, i);
    }
    while (g_get_monotonic_time() < end && !k.failures && !k.stalls) {
        g_usleep(KILL_US);
        look_for_stalls(&k);
        kill_one(&k);
        if (k.kills % 10 == 0) {
            kill_daemon(&k);
        }
        if (k.kills % 200 == 0) {
            report(&k);
        }
    }
    g_usleep(2 * G_USEC_PER_SEC);       /* until all know what SIGTERM means */
    for (i = 0; i < WORKERS; i++) {
        kill(k.pids[i], SIGTERM);
    }
    for (i = 0; i < WORKERS; i++) {
        reap(&k, i, 0);
    }
    report(&k);
    world_destroy(&w);
    ok = nothing_is_held(socket);
    stress_end_daemon(socket, SIGTERM);
    return !ok || k.failures || k.stalls || !was_everything(&k);
}

int main(int argc, char **argv)
{
    g_autofree char *socket = NULL;
    uint64_t n, seed;

    program = argv[0];
    g_test_init(&argc, &argv, NULL);
    init();
    if (argc != 5 || qemu_strtou64(argv[3], NULL, 0, &n) ||
        qemu_strtou64(argv[4], NULL, 0, &seed)) {
        fprintf(stderr, "usage: see the head of tests/stress/"
                "dedup-share-stress.c\n");
        return 2;
    }
    socket = g_build_filename(argv[2], "sock", NULL);
    if (!strcmp(argv[1], "model")) {
        return run_model(argv[2], socket, n, seed);
    } else if (!strcmp(argv[1], "kill")) {
        return run_kill(argv[2], socket, n, seed);
    }
    return run_worker(argv[2], socket, n, seed);
}
