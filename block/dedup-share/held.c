/*
 * dedup-share: frames of a store daemon that this process may use
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See held.h for what must hold.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/lockable.h"
#include "qemu/stats64.h"
#include "qemu/timer.h"
#include "block/dedup-share.h"
#include "held.h"
#include "trace.h"

typedef struct Slot {
    uint32_t generation;
    uint16_t pins;
    bool held;
    bool used;                  /* pinned or mapped since the trim began */
} Slot;

struct DedupHeld {
    unsigned refs;              /* atomic */
    const DedupStoreOps *ops;   /* Xen; else NULL, and */
    DedupStore *store;
    bool orphaned;              /* atomic */
    int fd;                     /* Linux; else -1 */
    uint64_t file_lock;         /* of this process, on the file */
    uint32_t nslots;
    uint8_t uuid[16];
    DedupGivenOwner owner;
    Stat64 runs, ns;            /* see DedupHeldCounters */
    QemuMutex lock;             /* protects all below; held for moments */
    uint64_t serial;
    uint32_t nheld;
    Slot *slots;                /* memory only for those that were held */
};

DedupHeld *dedup_held_new(int fd, const DedupMsgWelcome *welcome, Error **errp)
{
    const DedupStoreOps *ops = NULL;
    DedupStore *store = NULL;
    DedupHeld *h;

    if (welcome->store == DEDUP_STORE_KIND_XEN) {
        ops = dedup_store_find(DEDUP_SHARE_STORE_XEN);
        store = ops->attach(welcome->domid, errp);
        if (!store) {
            return NULL;
        }
    }
    h = g_new0(DedupHeld, 1);
    h->refs = 1;
    h->ops = ops;
    h->store = store;
    h->fd = fd;
    h->file_lock = welcome->lock;
    h->nslots = welcome->nslots;
    h->slots = g_new0(Slot, h->nslots);
    memcpy(h->uuid, welcome->uuid, sizeof(h->uuid));
    qemu_mutex_init(&h->lock);
    dedup_given_owner_init(&h->owner, fd);
    return h;
}

DedupHeld *dedup_held_ref(DedupHeld *h)
{
    qatomic_inc(&h->refs);
    return h;
}

void dedup_held_unref(DedupHeld *h)
{
    if (qatomic_fetch_dec(&h->refs) == 1) {
        if (h->store) {
            h->ops->detach(h->store);
        } else {
            close(h->fd);       /* pages that map frames keep the file */
        }
        qemu_mutex_destroy(&h->lock);
        g_free(h->slots);
        g_free(h);
    }
}

bool dedup_held_is_of(const DedupHeld *h, const DedupMsgWelcome *welcome,
                      int fd)
{
    struct stat ours, other;

    if (memcmp(h->uuid, welcome->uuid, sizeof(h->uuid))) {
        return false;
    }
    if (h->store) {
        return welcome->store == DEDUP_STORE_KIND_XEN;
    }
    return !fstat(h->fd, &ours) && !fstat(fd, &other) &&
           ours.st_dev == other.st_dev && ours.st_ino == other.st_ino;
}

DedupGivenOwner *dedup_held_owner(DedupHeld *h)
{
    return &h->owner;
}

void dedup_held_restart(DedupHeld *h)
{
    QEMU_LOCK_GUARD(&h->lock);
    h->serial = 0;
}

static bool add_frame(DedupHeld *h, const DedupMsgFrame *frame, bool pin)
{
    Slot *s;

    if (frame->slot >= h->nslots || !frame->generation) {
        return false;
    }
    s = &h->slots[frame->slot];
    if ((s->held && s->generation != frame->generation) ||
        s->pins == UINT16_MAX) {
        return false;
    }
    h->nheld += !s->held;
    s->held = true;
    s->generation = frame->generation;
    s->pins += pin;
    return true;
}

bool dedup_held_add(DedupHeld *h, uint64_t serial, const DedupMsgFrame *frames,
                    unsigned n, bool pin, unsigned *done)
{
    QEMU_LOCK_GUARD(&h->lock);
    *done = 0;
    if (serial <= h->serial) {
        return false;
    }
    h->serial = serial;
    while (*done < n && (frames[*done].answer != DEDUP_ANSWER_FRAME ||
                         add_frame(h, &frames[*done], pin))) {
        ++*done;
    }
    return true;
}

void dedup_held_unpin(DedupHeld *h, const DedupMsgFrame *frames, unsigned n)
{
    unsigned i;

    QEMU_LOCK_GUARD(&h->lock);
    for (i = 0; i < n; i++) {
        if (frames[i].answer == DEDUP_ANSWER_FRAME) {
            Slot *s = &h->slots[frames[i].slot];

            assert(s->pins);
            s->pins--;
            s->used = true;
        }
    }
}

bool dedup_held_give(DedupHeld *h, uint32_t slot, void *host, unsigned n)
{
    int64_t start = get_clock();

    if (h->store || !dedup_given_map(&h->owner, host, slot, n)) {
        return false;
    }
    stat64_add(&h->runs, 1);
    stat64_add(&h->ns, get_clock() - start);
    return true;
}

void dedup_held_give_pages(DedupHeld *h, DedupGive *gives, unsigned n)
{
    assert(h->store);
    h->ops->give(h->store, gives, n);
    if (qatomic_read(&h->orphaned)) {
        h->ops->take_back(h->store, gives, n);
    }
}

void dedup_held_set_orphaned(DedupHeld *h, bool orphaned)
{
    qatomic_set(&h->orphaned, orphaned);
}

int dedup_held_copy(DedupHeld *h, uint32_t slot, size_t skip, void *buf,
                    size_t bytes)
{
    off_t at = (off_t)slot * DEDUP_BLOCK_SIZE + skip;
    ssize_t done;

    assert(at + bytes <= (off_t)h->nslots * DEDUP_BLOCK_SIZE);
    if (h->store) {
        return h->ops->copy(h->store, slot, skip, buf, bytes);
    }
    while (bytes) {
        done = RETRY_ON_EINTR(pread(h->fd, buf, bytes, at));
        if (done <= 0) {
            return done < 0 ? -errno : -EIO;
        }
        buf += done;
        at += done;
        bytes -= done;
    }
    return 0;
}

/* --- trimming ------------------------------------------------------------- */

static void trim_begin(DedupHeld *h)
{
    uint32_t i;

    QEMU_LOCK_GUARD(&h->lock);
    for (i = 0; i < h->nslots; i++) {
        if (h->slots[i].used) {         /* do not touch memory of the others */
            h->slots[i].used = false;
        }
    }
}

static void mark_used(void *opaque, uint32_t slot)
{
    DedupHeld *h = opaque;

    QEMU_LOCK_GUARD(&h->lock);
    h->slots[slot].used = true;
}

/* Let go of some from *next on; step on.  Returns how many. */
static unsigned trim_some(DedupHeld *h, uint32_t *next, uint32_t *slots,
                          uint64_t *serial)
{
    unsigned n = 0;

    QEMU_LOCK_GUARD(&h->lock);
    *serial = h->serial;
    for (; *next < h->nslots && n < DEDUP_RELEASE_SLOTS; (*next)++) {
        Slot *s = &h->slots[*next];

        if (s->held && !s->pins && !s->used) {
            s->held = false;
            h->nheld--;
            slots[n++] = *next;
        }
    }
    return n;
}

void dedup_held_trim(DedupHeld *h, DedupReleaseFn *release, void *opaque)
{
    g_autofree uint32_t *slots = g_new(uint32_t, DEDUP_RELEASE_SLOTS);
    uint32_t next = 0, released = 0;
    uint64_t serial;
    unsigned n;

    trim_begin(h);
    if (h->store) {
        h->ops->each_used(h->store, mark_used, h);
    } else {
        dedup_given_each(&h->owner, mark_used, h);
    }
    while (next < h->nslots) {
        n = trim_some(h, &next, slots, &serial);
        if (n) {
            release(opaque, slots, n, serial);
        }
        released += n;
    }
    trace_dedup_held_trim(released, dedup_held_count(h));
}

/* --- claiming ------------------------------------------------------------- */

static void release_nothing(void *opaque, const uint32_t *slots, unsigned n,
                            uint64_t serial)
{
}

/* Some that are held, from *next on; step on.  Returns how many. */
static unsigned list_some(DedupHeld *h, uint32_t *next, uint32_t *slots)
{
    unsigned n = 0;

    QEMU_LOCK_GUARD(&h->lock);
    for (; *next < h->nslots && n < DEDUP_CLAIM_SLOTS; (*next)++) {
        if (h->slots[*next].held) {
            slots[n++] = *next;
        }
    }
    return n;
}

bool dedup_held_claim(DedupHeld *h, DedupClaimFn *claim, void *opaque)
{
    g_autofree uint32_t *slots = g_new(uint32_t, DEDUP_CLAIM_SLOTS);
    struct flock none = { .l_type = F_UNLCK, .l_whence = SEEK_SET };
    uint32_t next = 0, sum = 0;
    struct stat st;
    unsigned n;

    assert(!h->store);
    dedup_held_trim(h, release_nothing, NULL);
    do {
        bool first = !next;

        n = list_some(h, &next, slots);
        sum += n;
        claim(opaque, h->fd, h->file_lock, slots, n,
              (first ? DEDUP_CLAIM_FIRST : 0) |
              (next == h->nslots ? DEDUP_CLAIM_LAST : 0));
    } while (next < h->nslots);
    if (!sum) {
        /* what is not held is not given: nobody needs to wait for this */
        fcntl(h->fd, F_OFD_SETLK, &none);
    }
    /* a daemon that dies before it punches is told by nobody else */
    return !sum && (fstat(h->fd, &st) < 0 || !st.st_blocks);
}

uint32_t dedup_held_count(DedupHeld *h)
{
    QEMU_LOCK_GUARD(&h->lock);
    return h->nheld;
}

void dedup_held_counters(DedupHeld *h, DedupHeldCounters *c)
{
    *c = (DedupHeldCounters) {
        .frames = dedup_held_count(h),
        .runs = stat64_get(&h->runs), .ns = stat64_get(&h->ns),
    };
}
