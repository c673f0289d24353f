/*
 * dedup-share: frames of a store daemon that this process may use
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The store daemon keeps what this process *holds*.  A hold begins with the
 * answer that names the frame, and ends when the process says so (RELEASE).
 *
 * Invariants
 *
 * - A frame is mapped or read only while it is held.
 * - A frame is not let go while it is *pinned*, that is, in the use of a
 *   request, or while a page of the guest maps it, or may.
 * - What a request has unpinned it may have given.  So a frame that was
 *   unpinned while a trim was under way is let be until the next one.
 * - A slot that is held names one content: the daemon does not use it again.
 *
 * One object for each store that the process has met.  It outlives the
 * connection, and the daemon, for as long as requests use its frames.
 */

#ifndef DEDUP_SHARE_HELD_H
#define DEDUP_SHARE_HELD_H

#include "block/dedup-share.h"
#include "dedup-store/protocol.h"
#include "linux/given.h"

typedef struct DedupHeld DedupHeld;

/*
 * Frames of the store that @welcome tells of.  Linux: they are in the file @fd,
 * which the object owns from now on; Xen: @fd is -1.  The caller has a
 * reference.  NULL with *errp set if they cannot be used, and @fd is the
 * caller's.
 */
DedupHeld *dedup_held_new(int fd, const DedupMsgWelcome *welcome, Error **errp);
DedupHeld *dedup_held_ref(DedupHeld *h);
void dedup_held_unref(DedupHeld *h);

/* Is it of the store that @welcome tells of, whose frames are in @fd? */
bool dedup_held_is_of(const DedupHeld *h, const DedupMsgWelcome *welcome,
                      int fd);

/* What pages of the guest are given by, see linux/given.h. */
DedupGivenOwner *dedup_held_owner(DedupHeld *h);

/*
 * An answer with this @serial names those of @n frames whose answer is FRAME.
 * If @pin, they are pinned.  False if the number is not greater than those
 * before it.  *done is less than @n if that frame cannot be: no such slot, or
 * one that is held and names something else.
 *
 * Nobody sees the number without the frames: a trim that says that it knows of
 * the answer lets go of none of them.
 */
bool dedup_held_add(DedupHeld *h, uint64_t serial, const DedupMsgFrame *frames,
                    unsigned n, bool pin, unsigned *done);

/* The daemon counts anew, for a process that it does not know any more. */
void dedup_held_restart(DedupHeld *h);

/* Unpin those of @n frames whose answer is FRAME. */
void dedup_held_unpin(DedupHeld *h, const DedupMsgFrame *frames, unsigned n);

/*
 * Map @n frames from @slot on, which are pinned, over guest memory at @host.
 * False if that cannot be, or is not worth it, or on Xen.
 */
bool dedup_held_give(DedupHeld *h, uint32_t slot, void *host, unsigned n);

/*
 * Nobody answers at the other end, or somebody does again.  While nobody does,
 * a daemon may come that takes the store for left behind: nothing is given on
 * Xen.  Any thread.
 */
void dedup_held_set_orphaned(DedupHeld *h, bool orphaned);

/* Xen: DedupStoreOps.give() of @n frames, which are pinned. */
void dedup_held_give_pages(DedupHeld *h, DedupGive *gives, unsigned n);

/*
 * Copy @bytes from @skip on of @slot, which is pinned, or of as many slots as
 * that takes.  0, or -errno.
 */
int dedup_held_copy(DedupHeld *h, uint32_t slot, size_t skip, void *buf,
                    size_t bytes);

/*
 * Let go of all that is neither pinned nor mapped.  @release is called for up
 * to DEDUP_RELEASE_SLOTS slots at a time, without a lock, to say so to the
 * daemon.  Looks at all guest memory: not from a thread that others wait for;
 * one at a time.
 */
typedef void DedupReleaseFn(void *opaque, const uint32_t *slots, unsigned n,
                            uint64_t serial);
void dedup_held_trim(DedupHeld *h, DedupReleaseFn *release, void *opaque);

/*
 * Linux: the daemon has ended.  Call @claim for the slots that this process may
 * still use, up to DEDUP_CLAIM_SLOTS at a time, with the flags of a CLAIM; at
 * least once.  If there are none, the lock on the file is given up.  Not from a
 * thread that others wait for; one at a time.
 *
 * False if it is to be called again, for the next daemon, too: there are such
 * slots, or nobody has punched the file yet.
 */
typedef void DedupClaimFn(void *opaque, int fd, uint64_t lock,
                          const uint32_t *slots, unsigned n, uint32_t flags);
bool dedup_held_claim(DedupHeld *h, DedupClaimFn *claim, void *opaque);

/* Frames that are held. */
uint32_t dedup_held_count(DedupHeld *h);

typedef struct DedupHeldCounters {
    uint64_t frames;            /* held now */
    uint64_t runs;              /* mappings made */
    uint64_t ns;                /* spent on them */
} DedupHeldCounters;

void dedup_held_counters(DedupHeld *h, DedupHeldCounters *c);

#endif /* DEDUP_SHARE_HELD_H */
