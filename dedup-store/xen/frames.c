/*
 * qemu-dedup-store: what frames are made of on Xen
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Pages of a store domain, which are nominated for sharing; slot n is its gfn
 * XEN_STORE_GFN_BASE + n.  A client shares a frame onto a page of its guest by
 * the frame's handle.  The guest may outlive the client: Xen's own count of the
 * users of a page has the last word.
 *
 * A daemon that ends leaves its store domain if it has frames.  The next daemon
 * at the same place frees what no guest uses, in a thread of its own, and
 * counts the rest to its memory.
 *
 * Xen cannot free a frame only if nobody uses it: between its count and its
 * being made private a client could share it, and a guest would be the only one
 * that has it.  So a daemon frees no frame that a client holds, not when it
 * ends either; and the next one begins some seconds later, when clients have
 * seen that their daemon is gone, and share nothing of it any more.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/lockable.h"
#include "qemu/thread.h"
#include "../frames.h"
#include "domain.h"

/* Of Xen's memory: so much is to be free, or idle frames go. */
#define FREE_PERCENT 2

/*
 * The thread waits before it begins, and sleeps so long, and ten times as long
 * as it has worked.
 */
#define DRAIN_WAIT_MS 5000
#define DRAIN_MS 1000

enum { NONE, PRIVATE, SHARED };

typedef struct XenFrames {
    uint32_t nslots;
    uint64_t *handles;          /* of SHARED slots */
    uint8_t *states;
    uint32_t npages;            /* atomic: slots that are not NONE */
    uint64_t ndraining;         /* atomic: frames of earlier daemons */

    QemuMutex lock;             /* protects host; held for each operation */
    XenHost host;
    XenStoreDomain domain;

    bool stop;                  /* atomic */
    QemuSemaphore wake;
    QemuThread thread;
    bool has_thread;
    XenHost drain_host;         /* the thread's */
    GArray *old;                /* XenStoreDomain; the thread's */
} XenFrames;

/* --- what earlier daemons have left --------------------------------------- */

static void find_old(XenFrames *f, const char *group, const uint8_t uuid[16])
{
    XenStoreDomain d;
    uint32_t domid = 0;
    uint64_t n = 0;

    while (xen_store_domain_find(&d, &f->drain_host, group, uuid, &domid)) {
        n += xen_store_domain_count(&d);
        g_array_append_val(f->old, d);
    }
    qatomic_set(&f->ndraining, n);
}

static void drain_all(XenFrames *f)
{
    uint64_t sum = 0;
    unsigned i;

    for (i = 0; i < f->old->len; ) {
        XenStoreDomain *d = &g_array_index(f->old, XenStoreDomain, i);
        uint64_t left;

        xen_store_domain_drain(d, &left, &f->stop);
        sum += left;
        if (left) {
            i++;
        } else {
            g_array_remove_index(f->old, i);
        }
    }
    qatomic_set(&f->ndraining, sum);
}

static void *drain_thread(void *opaque)
{
    XenFrames *f = opaque;
    int64_t start, took;

    qemu_sem_timedwait(&f->wake, DRAIN_WAIT_MS);
    while (!qatomic_read(&f->stop) && f->old->len) {
        start = g_get_monotonic_time();
        drain_all(f);
        took = (g_get_monotonic_time() - start) / 1000;
        qemu_sem_timedwait(&f->wake, MAX(DRAIN_MS, MIN(10 * took, 60000)));
    }
    return NULL;
}

static void end_thread(XenFrames *f)
{
    unsigned i;

    if (f->has_thread) {
        qatomic_set(&f->stop, true);
        qemu_sem_post(&f->wake);
        qemu_thread_join(&f->thread);
    }
    for (i = 0; i < f->old->len; i++) {
        xen_store_domain_leave(&g_array_index(f->old, XenStoreDomain, i));
    }
}

/* --- opening, closing ----------------------------------------------------- */

static void free_frames(XenFrames *f)
{
    end_thread(f);
    xen_host_close(&f->drain_host);
    xen_host_close(&f->host);
    qemu_sem_destroy(&f->wake);
    qemu_mutex_destroy(&f->lock);
    g_array_free(f->old, true);
    g_free(f->handles);
    g_free(f->states);
    g_free(f);
}

static void *xen_open(const char *group, const char *place, uint32_t nslots,
                      Error **errp)
{
    XenFrames *f = g_new0(XenFrames, 1);
    uint8_t uuid[16];

    f->nslots = nslots;
    f->handles = g_new0(uint64_t, nslots);
    f->states = g_new0(uint8_t, nslots);
    f->old = g_array_new(false, false, sizeof(XenStoreDomain));
    qemu_mutex_init(&f->lock);
    qemu_sem_init(&f->wake, 0);
    xen_store_uuid(group, place, uuid);
    if (!xen_host_open(&f->host, errp) ||
        !xen_host_open(&f->drain_host, errp)) {
        free_frames(f);
        return NULL;
    }
    find_old(f, group, uuid);
    if (!xen_store_domain_create(&f->domain, &f->host, group, uuid, nslots,
                                 errp)) {
        free_frames(f);
        return NULL;
    }
    if (f->old->len) {
        qemu_thread_create(&f->thread, "drain", drain_thread, f,
                           QEMU_THREAD_JOINABLE);
        f->has_thread = true;
    }
    return f;
}

static void xen_close(void *opaque)
{
    XenFrames *f = opaque;

    xen_store_domain_end(&f->domain);
    free_frames(f);
}

static int xen_welcome(void *opaque, pid_t pid, DedupMsgWelcome *w)
{
    XenFrames *f = opaque;

    w->domid = f->domain.domid;
    return -1;
}

/* --- frames, with the lock held ------------------------------------------- */

static void set_state(XenFrames *f, uint32_t slot, uint8_t state)
{
    qatomic_set(&f->npages, f->npages + (state != NONE) -
                (f->states[slot] != NONE));
    f->states[slot] = state;
    if (state != SHARED) {
        qatomic_set(&f->handles[slot], 0);
    }
}

/* Slots that are SHARED: those that nobody uses are PRIVATE then. */
static void retire(XenFrames *f, const uint32_t *slots, unsigned n)
{
    xen_pfn_t gfns[XEN_PAGES_MAX] = { 0 };
    XenPage pages[XEN_PAGES_MAX];
    unsigned i;

    for (i = 0; i < n; i++) {
        gfns[i] = xen_store_gfn(slots[i]);
    }
    xen_pages_retire(&f->domain, gfns, n, pages);
    for (i = 0; i < n; i++) {
        if (pages[i] != XEN_PAGE_USED) {
            set_state(f, slots[i], PRIVATE);
        }
    }
}

/* Slots that are NONE get a page.  0 or -errno. */
static int populate(XenFrames *f, const uint32_t *slots, unsigned n)
{
    xen_pfn_t gfns[XEN_PAGES_MAX] = { 0 };
    unsigned i, made;

    for (i = 0; i < n; i++) {
        gfns[i] = xen_store_gfn(slots[i]);
    }
    made = xen_pages_populate(&f->domain, gfns, n);
    for (i = 0; i < made; i++) {
        set_state(f, slots[i], PRIVATE);
    }
    return made < n ? -ENOMEM : 0;
}

/* Of @n slots from @slot on, those in @state. */
static unsigned select_slots(XenFrames *f, uint32_t slot, unsigned n,
                             uint8_t state, uint32_t *slots)
{
    unsigned i, found = 0;

    for (i = 0; i < n; i++) {
        if (f->states[slot + i] == state) {
            slots[found++] = slot + i;
        }
    }
    return found;
}

/* Make @n slots from @slot on, which hold nothing, PRIVATE.  0 or -errno. */
static int prepare(XenFrames *f, uint32_t slot, unsigned n)
{
    uint32_t slots[XEN_PAGES_MAX];
    unsigned found = select_slots(f, slot, n, SHARED, slots);
    int ret = 0;

    if (found) {                /* a write that failed has left them so */
        retire(f, slots, found);
        ret = select_slots(f, slot, n, SHARED, slots) ? -EBUSY : 0;
    }
    found = select_slots(f, slot, n, NONE, slots);
    return ret ?: found ? populate(f, slots, found) : 0;
}

static int write_some(XenFrames *f, uint32_t slot, unsigned n, const void *buf)
{
    xen_pfn_t gfns[XEN_PAGES_MAX] = { 0 };
    uint64_t handles[XEN_PAGES_MAX];
    int ret = prepare(f, slot, n);
    unsigned i;

    for (i = 0; i < n; i++) {
        gfns[i] = xen_store_gfn(slot + i);
    }
    ret = ret ?: xen_pages_write(&f->domain, gfns, n, buf);
    if (ret) {
        return ret;
    }
    ret = xen_pages_seal(&f->domain, gfns, n, handles);
    for (i = 0; i < n; i++) {
        if (handles[i]) {
            set_state(f, slot + i, SHARED);
            qatomic_set(&f->handles[slot + i], handles[i]);
        }
    }
    return ret;
}

static void drop_some(XenFrames *f, uint32_t slot, unsigned n)
{
    xen_pfn_t gfns[XEN_PAGES_MAX] = { 0 };
    uint32_t slots[XEN_PAGES_MAX];
    bool freed[XEN_PAGES_MAX];
    unsigned i, found = select_slots(f, slot, n, SHARED, slots);

    if (found) {
        retire(f, slots, found);
    }
    found = select_slots(f, slot, n, PRIVATE, slots);
    for (i = 0; i < found; i++) {
        gfns[i] = xen_store_gfn(slots[i]);
    }
    xen_pages_free(&f->domain, gfns, found, freed);
    for (i = 0; i < found; i++) {
        if (freed[i]) {
            set_state(f, slots[i], NONE);
        }
    }
}

/* --- the ops -------------------------------------------------------------- */

static int xen_write(void *opaque, uint32_t slot, unsigned n, const void *buf)
{
    XenFrames *f = opaque;
    unsigned i, some;
    int ret = 0;

    for (i = 0; i < n && !ret; i += some) {
        some = MIN(n - i, XEN_PAGES_MAX);
        QEMU_LOCK_GUARD(&f->lock);
        ret = !xen_can_nominate(f->host.xc) ? -ENOMEM :
              write_some(f, slot + i, some,
                         (const char *)buf + i * XC_PAGE_SIZE);
    }
    return ret;
}

static int xen_read(void *opaque, uint32_t slot, unsigned n, void *buf)
{
    XenFrames *f = opaque;
    xen_pfn_t gfn;
    unsigned i;
    int ret = 0;

    QEMU_LOCK_GUARD(&f->lock);
    for (i = 0; i < n && !ret; i++) {
        gfn = xen_store_gfn(slot + i);
        ret = xen_pages_read(&f->domain, &gfn, 1,
                             (char *)buf + i * XC_PAGE_SIZE);
    }
    return ret;
}

static void xen_retire(void *opaque, const uint32_t *slots, unsigned n,
                       bool *idle)
{
    XenFrames *f = opaque;
    unsigned i, j, some;

    for (i = 0; i < n; i += some) {
        some = MIN(n - i, XEN_PAGES_MAX);
        QEMU_LOCK_GUARD(&f->lock);
        retire(f, slots + i, some);
        for (j = i; j < i + some; j++) {
            idle[j] = f->states[slots[j]] == PRIVATE;
        }
    }
}

static int xen_drop(void *opaque, uint32_t slot, unsigned n)
{
    XenFrames *f = opaque;
    unsigned i, some;

    for (i = 0; i < n; i += some) {
        some = MIN(n - i, XEN_PAGES_MAX);
        QEMU_LOCK_GUARD(&f->lock);
        drop_some(f, slot + i, some);
    }
    return 0;
}

static uint64_t xen_memory(void *opaque)
{
    XenFrames *f = opaque;

    return (uint64_t)qatomic_read(&f->npages) * XC_PAGE_SIZE;
}

static uint64_t xen_old_memory(void *opaque)
{
    XenFrames *f = opaque;

    return qatomic_read(&f->ndraining) * XC_PAGE_SIZE;
}

static uint64_t xen_handle(void *opaque, uint32_t slot)
{
    XenFrames *f = opaque;

    return qatomic_read(&f->handles[slot]);
}

static uint64_t xen_host_memory(void)
{
    xc_interface *xc = xc_interface_open(NULL, NULL, 0);
    xc_physinfo_t info = { 0 };

    if (xc) {
        xc_physinfo(xc, &info);
        xc_interface_close(xc);
    }
    return info.total_pages * (uint64_t)XC_PAGE_SIZE;
}

static bool xen_is_short(void *opaque)
{
    XenFrames *f = opaque;
    uint64_t total;
    int64_t spare;

    QEMU_LOCK_GUARD(&f->lock);
    return xen_get_spare_pages(f->host.xc, &spare, &total) &&
           spare < (int64_t)MAX(total / 100 * FREE_PERCENT,
                                2 * XEN_SPARE_FLOOR);
}

static bool xen_are_lost(void *opaque)
{
    XenFrames *f = opaque;

    QEMU_LOCK_GUARD(&f->lock);
    return xen_store_domain_is_gone(&f->domain);
}

const FramesOps frames_xen = {
    .kind = DEDUP_STORE_KIND_XEN,
    .host_memory = xen_host_memory,
    .open = xen_open,
    .close = xen_close,
    .welcome = xen_welcome,
    .write = xen_write,
    .read = xen_read,
    .retire = xen_retire,
    .drop = xen_drop,
    .memory = xen_memory,
    .old_memory = xen_old_memory,
    .handle = xen_handle,
    .is_short = xen_is_short,
    .are_lost = xen_are_lost,
};
