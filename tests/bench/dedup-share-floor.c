/*
 * dedup-share: what a miss costs at least
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 *   dedup-share-floor ROUNDS OPS SIZE IMAGE
 *
 * The work of a read that the store daemon has to fill for, done by hand, one
 * after the other: a process asks another one, which reads SIZE bytes of IMAGE
 * by O_DIRECT into frames that have memory already, and looks for zeroes and
 * digests them; then the first one maps the frames over "guest memory", and
 * looks at each page.  Each block is read once in a round, in random order.
 * Prints the ns of a read, a line for each round.
 *
 * There is no index, nothing is checked, and nobody else is served: what the
 * filter and the daemon take more is theirs.
 */

#include "qemu/osdep.h"
#include <sys/socket.h>
#include <sys/wait.h>
#include <xxhash.h>
#include "qemu/cutils.h"

#define PAGE 4096

static unsigned rounds, ops;
static size_t size;
static int frames;              /* a memfd; the n-th read's are at n * size */
static const char *image;

/* As long as a READ of one extent, and an ANSWER of one block. */
typedef struct Message {
    uint64_t words[5];
} Message;

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static void *map_frames(size_t bytes, int flags)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, frames, 0);

    g_assert(p != MAP_FAILED);
    return p;
}

/* The store daemon: read what is asked for, until nobody asks. */
static void serve(int sock)
{
    uint8_t *p = map_frames(ops * size, MAP_SHARED | MAP_POPULATE);
    int fd = open(image, O_RDONLY | O_DIRECT);
    Message m;
    size_t i;

    g_assert_cmpint(fd, >=, 0);
    while (recv(sock, &m, sizeof(m), 0) == sizeof(m)) {
        uint8_t *to = p + m.words[0] * size;

        g_assert_cmpint(pread(fd, to, size, m.words[1] * size), ==, size);
        for (i = 0; i < size; i += PAGE) {
            if (!buffer_is_zero(to + i, PAGE)) {
                m.words[2] += XXH3_128bits(to + i, PAGE).low64;
            }
        }
        g_assert_cmpint(send(sock, &m, sizeof(m), 0), ==, sizeof(m));
    }
    _exit(0);
}

/* QEMU: ask, map, and look; returns something of what was seen. */
static uint64_t read_once(int sock, uint8_t *guest, unsigned n, uint32_t where)
{
    Message m = { .words = { n, where } };
    uint64_t sum = 0;
    uint8_t *to = guest + n * size;
    size_t i;

    g_assert_cmpint(send(sock, &m, sizeof(m), 0), ==, sizeof(m));
    g_assert_cmpint(recv(sock, &m, sizeof(m), 0), ==, sizeof(m));
    g_assert(mmap(to, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
                  frames, n * size) == to);
    for (i = 0; i < size; i += PAGE) {
        sum += *(uint64_t *)(to + i);
    }
    return sum;
}

static void shuffle(uint32_t *order)
{
    unsigned i;

    for (i = 0; i < ops; i++) {
        unsigned j = g_random_int_range(0, i + 1);

        order[i] = order[j];
        order[j] = i;
    }
}

static void run_round(int sock)
{
    g_autofree uint32_t *order = g_new(uint32_t, ops);
    uint8_t *guest = mmap(NULL, ops * size, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    uint64_t start, sum = 0;
    unsigned i;

    g_assert(guest != MAP_FAILED);
    shuffle(order);
    start = now_ns();
    for (i = 0; i < ops; i++) {
        sum += read_once(sock, guest, i, order[i]);
    }
    g_assert(sum);                      /* an image of zeroes is no measure */
    printf("%.1f\n", (double)(now_ns() - start) / ops);
    munmap(guest, ops * size);
}

static unsigned parse(const char *text)
{
    unsigned value = 0;

    g_assert_cmpint(qemu_strtoui(text, NULL, 0, &value), ==, 0);
    return value;
}

int main(int argc, char **argv)
{
    int socks[2];
    unsigned i;

    if (argc != 5) {
        fprintf(stderr, "usage: dedup-share-floor ROUNDS OPS SIZE IMAGE\n");
        return 2;
    }
    rounds = parse(argv[1]);
    ops = parse(argv[2]);
    size = parse(argv[3]);
    image = argv[4];
    frames = memfd_create("floor", MFD_CLOEXEC);
    g_assert_cmpint(ftruncate(frames, ops * size), ==, 0);
    g_assert_cmpint(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, socks), ==, 0);
    if (!fork()) {
        close(socks[0]);
        serve(socks[1]);
    }
    close(socks[1]);
    for (i = 0; i < rounds; i++) {
        run_round(socks[0]);
    }
    close(socks[0]);
    wait(NULL);
    return 0;
}
