/*
 * qemu-dedup-store: what frames are made of
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A slot has a frame or nothing.  Who calls sees to it that one thread at a
 * time uses a slot, and that a frame which has been named to somebody is
 * retired before its slot is written again or dropped.
 *
 * All functions are for any thread, without the store's lock, unless they say
 * something else.
 */

#ifndef DEDUP_STORE_FRAMES_H
#define DEDUP_STORE_FRAMES_H

#include "dedup-store/protocol.h"

/* A kind of frames; the functions get what open() has returned. */
typedef struct FramesOps {
    DedupStoreKind kind;

    /* Bytes of memory that stores can be made of. */
    uint64_t (*host_memory)(void);

    /*
     * Make @nslots slots, without memory, for @group.  @place is where the
     * daemon listens: no two daemons have the same one at once.  NULL with
     * *errp set on error.
     */
    void *(*open)(const char *group, const char *place, uint32_t nslots,
                  Error **errp);

    /*
     * Let go of them.  What was not dropped stays, if a guest can have it, for
     * the next daemon at that place.
     */
    void (*close)(void *frames);

    /*
     * Fill in what the client process @pid is told; returns the descriptor for
     * it, which the caller closes, or -1.
     */
    int (*welcome)(void *frames, pid_t pid, DedupMsgWelcome *w);

    /*
     * Make @n frames from @slot on.  0 or -errno; -ENOMEM and -ENOSPC if there
     * is no room.  After an error the slots hold nothing that can be read.
     */
    int (*write)(void *frames, uint32_t slot, unsigned n, const void *buf);

    /* Copy @n frames from @slot on.  0 or -errno. */
    int (*read)(void *frames, uint32_t slot, unsigned n, void *buf);

    /*
     * Frames that no client holds: idle[i] says whether nobody uses slots[i].
     * Nobody can from then on.  NULL: what no client holds nobody uses, and
     * nothing outlives close().
     */
    void (*retire)(void *frames, const uint32_t *slots, unsigned n, bool *idle);

    /* Give memory of @n slots from @slot on back to the host.  0 or -errno. */
    int (*drop)(void *frames, uint32_t slot, unsigned n);

    /* Bytes that the slots have.  Also with the store's lock held. */
    uint64_t (*memory)(void *frames);

    /*
     * Bytes that frames of earlier daemons have, which guests still use: so
     * many slots must be empty.  Also with the lock held.  NULL: they are not
     * known.
     */
    uint64_t (*old_memory)(void *frames);

    /*
     * A CLAIM (protocol.h) of process @pid, of @n slots.  Of two connections,
     * whose claims may be handled in any order, the later one has the greater
     * number.  Calls on @fd, which stays the caller's, may hang.  NULL: there
     * are none.
     */
    void (*claim)(void *frames, pid_t pid, uint64_t connection, int fd,
                  const DedupMsgClaim *m, const uint32_t *slots, unsigned n);

    /* What a client shares a frame by.  Also with the lock held.  NULL: 0. */
    uint64_t (*handle)(void *frames, uint32_t slot);

    /* Is the host short of the memory that frames are made of? */
    bool (*is_short)(void *frames);

    /* Has somebody taken them away?  NULL: nobody can. */
    bool (*are_lost)(void *frames);
} FramesOps;

extern const FramesOps frames_linux;
extern const FramesOps frames_xen;      /* if CONFIG_DEDUP_STORE_XEN */

typedef struct Frames {
    const FramesOps *ops;
    void *opaque;               /* of the ops */
    uint32_t nslots;
} Frames;

/* Make them; see FramesOps.open. */
static inline bool frames_open(Frames *f, const FramesOps *ops,
                               const char *group, const char *place,
                               uint32_t nslots, Error **errp)
{
    f->ops = ops;
    f->nslots = nslots;
    f->opaque = ops->open(group, place, nslots, errp);
    return f->opaque;
}

static inline void frames_close(Frames *f)
{
    f->ops->close(f->opaque);
}

static inline int frames_write(Frames *f, uint32_t slot, unsigned n,
                               const void *buf)
{
    return f->ops->write(f->opaque, slot, n, buf);
}

static inline int frames_read(Frames *f, uint32_t slot, unsigned n, void *buf)
{
    return f->ops->read(f->opaque, slot, n, buf);
}

static inline void frames_retire(Frames *f, const uint32_t *slots, unsigned n,
                                 bool *idle)
{
    if (f->ops->retire) {
        f->ops->retire(f->opaque, slots, n, idle);
    } else {
        memset(idle, true, n);
    }
}

static inline int frames_drop(Frames *f, uint32_t slot, unsigned n)
{
    return f->ops->drop(f->opaque, slot, n);
}

static inline uint64_t frames_memory(Frames *f)
{
    return f->ops->memory(f->opaque);
}

static inline uint64_t frames_old_memory(Frames *f)
{
    return f->ops->old_memory ? f->ops->old_memory(f->opaque) : 0;
}

static inline uint64_t frames_handle(const Frames *f, uint32_t slot)
{
    return f->ops->handle ? f->ops->handle(f->opaque, slot) : 0;
}

static inline bool frames_are_short(Frames *f)
{
    return f->ops->is_short(f->opaque);
}

static inline bool frames_are_lost(Frames *f)
{
    return f->ops->are_lost && f->ops->are_lost(f->opaque);
}

#endif /* DEDUP_STORE_FRAMES_H */
