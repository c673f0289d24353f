/*
 * dedup-share: random operations against a plain model
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A *world* is one process of a group: a piece of "guest memory", and disks,
 * which are real nodes: the filter over qcow2 overlays and raw copies.  Beside
 * each disk there is the plain array of bytes that it must show.
 */

#ifndef TESTS_STRESS_H
#define TESTS_STRESS_H

#include "system/block-backend.h"
#include "block/dedup-share.h"

#define PAGE DEDUP_BLOCK_SIZE
#define GROUP "stress"

#define DISKS 4
#define BASES 3
/* The store daemon takes no image below 1 MiB. */
#define DISK_BLOCKS 264
#define GUEST_PAGES 512
/* Less than the disks have blocks: there is always something to evict. */
#define STORE_FRAMES 420

typedef struct Disk {
    char *file;
    const char *base;           /* path: it is an overlay of it, or a copy */
    bool qcow2;
    bool reflink;               /* the copy is one of the file system's */
    BlockBackend *blk;          /* NULL: closed */
    uint8_t *bytes;             /* the model, of at most DISK_BLOCKS */
    uint64_t size;
    uint8_t *snapshot;          /* of the model, or NULL */
} Disk;

typedef struct World {
    const char *dir;
    const char *socket;         /* of the store daemon */
    unsigned number;            /* of the process */
    GRand *rand;
    uint8_t *guest;
    uint8_t *base_bytes[BASES];
    Disk disks[DISKS];
    uint64_t done[16];          /* operations, by kind */
    int *now;                   /* NULL, or the kind under way goes here */
    /* Blocks; of disks that are closed by now. */
    uint64_t hits, misses, matched, given, copied, zeroes, of_origin;
} World;

extern const char *const stress_kinds[16];

/* The first kinds: those that a process can be killed in the middle of. */
#define STRESS_KINDS_KILLED 10

/* Make the base images in @dir, which is on a file system with leases. */
void stress_make_bases(const char *dir);

/* The store daemon that listens at @socket, of this program's build. */
void stress_start_daemon(const char *socket);
void stress_end_daemon(const char *socket, int signal);
GPid stress_daemon_pid(void);

/* Bytes that it may have. */
#define STORE_SIZE (STORE_FRAMES * (PAGE + 160))

/* Bytes of all files of frames that @n processes have open, or map. */
uint64_t stress_frames_memory(const pid_t *pids, unsigned n);

void world_init(World *w, const char *dir, const char *socket, unsigned number,
                uint32_t seed);
void world_destroy(World *w);

/*
 * Do one random operation, and abort if a byte is wrong.  @alone: also such as
 * only a process may do that nobody shares the group with.
 */
void world_step(World *w, bool alone);

#endif /* TESTS_STRESS_H */
