/*
 * qemu-dedup-store: which content is in which frame, and who holds it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Invariants
 *
 * - Only this process writes frames.  A frame is written before anybody can
 *   find it, and never after it was sealed.
 * - A frame that is held or pinned is not evicted, nor one that somebody uses
 *   beside (frames.h).  A frame is held before it is named to a client.
 * - (slot, generation) names one content for ever: the generation changes
 *   before the slot is used again, and a slot whose generations are used up is
 *   not.
 * - What is found by its digest is compared, byte by byte.
 * - Frames, and the tables that grow with them, stay within the store's size.
 *
 * A frame's states, and who moves it on:
 *
 *            store_keep()            store_keep()
 *    FREE ----------------> FILLING ---------------> SEALED <-----.
 *     ^                        |                       |          |
 *     |      it failed         |     nobody holds or   v   held   |
 *     +------------------------+     pins it:        idle --------'
 *     +---------------------------- FILLING ---------- |
 *              evicted: by store_keep() that needs a slot, store_reclaim();
 *              it stays SEALED if frames_retire() says that somebody uses it
 *
 * Locks: one, store->lock, a leaf but for GLib's own.  It is not held across
 * I/O, or anything that can wait.
 */

#ifndef DEDUP_STORE_STORE_H
#define DEDUP_STORE_STORE_H

#include "dedup-store/protocol.h"
#include "qemu/queue.h"
#include "qemu/thread.h"
#include "frames.h"

#define BLOCK DEDUP_PROTOCOL_BLOCK

/* Bytes that a frame costs beside its own: tables, the digests' hash table. */
#define STORE_OVERHEAD 160

typedef struct Frame Frame;

/* A process that uses frames; outlives its connection. */
typedef struct Process {
    unsigned refs;              /* its connection, and its being watched */
    int pidfd;                  /* by the server's lock: it is watched */
    struct Watch *watch;        /* ... by this until it ends, or it is NULL */
    pid_t pid;
    uid_t uid;
    uint8_t token[DEDUP_TOKEN_SIZE];
    uint64_t serial;            /* of its last answer */
    GHashTable *held;           /* Frame -> the serial that named it last */
    QTAILQ_ENTRY(Process) next;
} Process;

typedef struct Store {
    Frames frames;
    uint64_t size;
    uint64_t seed;
    uint8_t uuid[16];           /* random: no other store has it */

    QemuMutex lock;             /* protects all below */
    Frame *table;               /* frames.nslots */
    unsigned long *free;        /* a bit a slot */
    uint32_t hint;              /* no slot below is free */
    uint32_t nfree, nsealed, nidle;
    GHashTable *digests;        /* set of Frame, by content */
    QTAILQ_HEAD(, Frame) idle;  /* the one that was used last is the last */
    GHashTable *seen;           /* digests that were seen once */
    QTAILQ_HEAD(, Process) processes;
    uint64_t saved;             /* holders beyond the first, of all frames */
    uint64_t fills, puts, matched, evicted, collisions;
} Store;

/*
 * Punch the free slots, if the file has more memory than the frames need: who
 * reads a hole of it has the kernel make a page there.  Takes the lock.
 */
void store_punch_holes(Store *s);

/* What became of a block; a FRAME is pinned until store_unpin(). */
typedef struct Kept {
    DedupAnswer answer;
    Frame *frame;
    bool made;                  /* no frame had this content */
} Kept;

/*
 * A store of @size bytes in all, of frames of the kind @ops, for @group, whose
 * daemon listens at @place.  NULL with *errp set on error.
 */
Store *store_new(const FramesOps *ops, const char *group, const char *place,
                 uint64_t size, Error **errp);
void store_free(Store *s);

/*
 * Find or make frames of the @n blocks at @buf, at most DEDUP_READ_BLOCKS:
 * those of equal content get one frame.  Does I/O; takes the lock.
 */
void store_keep(Store *s, const uint8_t *buf, unsigned n, uint32_t flags,
                Kept *kept);

/*
 * Try to drop frames that nobody holds, the oldest first, at most @n of them
 * and STORE_RECLAIM_MOST; returns how many were.  Those that somebody uses all
 * the same are the youngest then.  Takes the lock.
 */
#define STORE_RECLAIM_MOST 1024
unsigned store_reclaim(Store *s, unsigned n);

/*
 * Frames that there are too many of, with those of earlier daemons that have
 * become known since.  Takes the lock.
 */
unsigned store_excess(Store *s);

/* --- with the lock held -------------------------------------------------- */

/* The frame that @slot, @generation names, pinned; or NULL. */
Frame *store_pin(Store *s, uint32_t slot, uint32_t generation);
void store_unpin(Store *s, Frame *f);

uint32_t frame_slot(const Store *s, const Frame *f);
uint32_t frame_generation(const Frame *f);

Process *process_new(Store *s, pid_t pid, uid_t uid);
Process *process_find(Store *s, const uint8_t *token);
/* Drop one of its references; the last one ends its holds. */
void process_unref(Store *s, Process *p);

/* @p uses nothing any more. */
void process_release_all(Store *s, Process *p);

/*
 * @p uses @f, as its answer @serial says; *newly, if not NULL: it did not until
 * now.  False if it may hold no more.
 */
bool process_hold(Store *s, Process *p, Frame *f, uint64_t serial,
                  bool *newly);

/* @p has let go of @slot, as of @serial. */
void process_release(Store *s, Process *p, uint32_t slot, uint64_t serial);

#endif /* DEDUP_STORE_STORE_H */
