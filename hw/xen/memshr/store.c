/*
 * Xen store of dedup-share: the guest, and stores of daemons
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Frames are pages of a store domain, nominated for sharing.  A store daemon
 * makes and drops them; give.c gives them to the guest.  Which of them are in
 * use is Xen's to say, so that a guest keeps what it has whatever becomes of
 * this process and of the daemon.
 *
 * A daemon that ends may zero frames that this process holds and no guest has
 * yet.  Sharing names their handles, which Xen refuses then; who copies looks
 * afterwards whether they are still shared.
 */

#include "qemu/osdep.h"
#include "exec/address-spaces.h"
#include "exec/memory.h"
#include "hw/qdev-core.h"
#include "hw/xen/dedup-share-disk.h"
#include "hw/xen/xen_native.h"
#include "qapi/error.h"
#include "qemu/lockable.h"
#include "qemu/module.h"
#include "system/xen.h"
#include "memshr.h"
#include "trace.h"

/* --- the guest ------------------------------------------------------------ */

static XenGuest guest;
static bool guest_is_open;

XenGuest *xen_memshr_guest(void)
{
    return &guest;
}

/*
 * From now on a page that is given would not be sent: who gives looks at
 * global_dirty_tracking with the lock held, so after this nobody does.
 */
static bool dirty_tracking_starts(MemoryListener *listener, Error **errp)
{
    QEMU_LOCK_GUARD(&guest.lock);
    return true;
}

/* What the guest has been given belongs to the process: it stays. */
bool xen_memshr_guest_open(Error **errp)
{
    if (guest_is_open) {
        return true;
    }
    guest.xc = xc_interface_open(NULL, NULL, 0);
    guest.fmem = xenforeignmemory_open(NULL, 0);
    if (!guest.xc || !guest.fmem) {
        error_setg_errno(errp, errno, "store: cannot talk to Xen");
    } else if (xen_calls_init(&guest.calls, errp)) {
        xen_memshr_gfns_open(guest.xc);
        qemu_mutex_init(&guest.lock);
        guest.listener = (MemoryListener) {
            .name = "dedup-share", .log_global_start = dirty_tracking_starts,
        };
        memory_listener_register(&guest.listener, &address_space_memory);
        guest_is_open = true;
        return true;
    }
    g_clear_pointer(&guest.fmem, xenforeignmemory_close);
    g_clear_pointer(&guest.xc, xc_interface_close);
    return false;
}

bool xen_memshr_guest_is_ending(void)
{
    xc_domaininfo_t info;
    int there;

    if (!qatomic_read(&guest.is_ending)) {
        there = xen_get_domain_info(guest.xc, xen_domid, &info);
        if (there == 0 || (there == 1 && info.flags & XEN_DOMINF_dying)) {
            qatomic_set(&guest.is_ending, true);
        }
    }
    return qatomic_read(&guest.is_ending);
}

bool dedup_share_guest_is_ending(void)
{
    return qatomic_read(&guest.is_ending);
}

/* --- stores --------------------------------------------------------------- */

/* What the daemon says is a claim.  With the lock held. */
static bool is_store_domain(uint32_t domid)
{
    xc_domaininfo_t info;

    return xen_get_domain_info(guest.xc, domid, &info) == 1 &&
           info.flags & XEN_DOMINF_hvm_guest &&
           info.flags & XEN_DOMINF_xs_domain &&
           !(info.flags & XEN_DOMINF_dying);
}

static DedupStore *xen_store_attach(uint32_t domid, Error **errp)
{
    xen_pfn_t gfn = XEN_STORE_GFN_PIN;
    DedupStore *store;
    bool is_store;
    void *pin;

    WITH_QEMU_LOCK_GUARD(&guest.lock) {
        is_store = is_store_domain(domid);
        /* without an array for errors it succeeds as a whole or fails */
        pin = is_store ? xenforeignmemory_map(guest.fmem, domid, PROT_READ, 1,
                                              &gfn, NULL) : NULL;
    }
    if (!is_store) {
        error_setg(errp, "store: domain %" PRIu32 ", which the store daemon "
                   "names, is no store domain", domid);
        return NULL;
    }
    if (!pin) {
        error_setg_errno(errp, errno, "store: this domain cannot map the "
                         "memory of the store domain %" PRIu32 "; it takes a "
                         "PV dom0, use store=off elsewhere", domid);
        return NULL;
    }
    store = g_new0(DedupStore, 1);
    store->domid = domid;
    store->pin = pin;
    trace_xen_memshr_attach(domid);
    return store;
}

static void xen_store_detach(DedupStore *store)
{
    xen_memshr_gfns_forget(store);
    WITH_QEMU_LOCK_GUARD(&guest.lock) {
        xenforeignmemory_unmap(guest.fmem, store->pin, 1);
    }
    g_free(store);
}

/* Which of @n gfns of @domid share their page?  With the lock held. */
static void find_shared(uint32_t domid, const uint64_t *gfns, unsigned n,
                        bool *shared)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        xen_calls_count(&guest.calls, domid, gfns[i]);
    }
    xen_calls_make(&guest.calls);
    for (i = 0; i < n; i++) {
        shared[i] = guest.calls.rc[i] >= 1;
    }
}

/* Map frames; all of them, or NULL with errno set.  With the lock held. */
static void *map_frames(DedupStore *store, const uint64_t *gfns, unsigned n)
{
    int errs[DEDUP_BATCH] = { 0 };
    void *window = xenforeignmemory_map(guest.fmem, store->domid, PROT_READ, n,
                                        gfns, errs);
    unsigned i;

    xen_memshr_count_calls(&guest, n, 3);   /* mmap, ioctl, and munmap later */
    for (i = 0; window && i < n; i++) {
        if (errs[i]) {
            xenforeignmemory_unmap(guest.fmem, window, n);
            errno = EFAULT;
            window = NULL;
        }
    }
    return window;
}

/* At most DEDUP_BATCH frames. */
static int copy_some(DedupStore *store, uint32_t slot, size_t skip, void *buf,
                     size_t bytes)
{
    unsigned i, n = DIV_ROUND_UP(skip + bytes, XC_PAGE_SIZE);
    uint64_t gfns[DEDUP_BATCH];
    bool shared[DEDUP_BATCH];
    char *window;

    for (i = 0; i < n; i++) {
        gfns[i] = xen_store_gfn(slot + i);
    }
    QEMU_LOCK_GUARD(&guest.lock);
    window = map_frames(store, gfns, n);
    if (!window) {
        return -errno;
    }
    memcpy(buf, window + skip, bytes);
    xenforeignmemory_unmap(guest.fmem, window, n);
    /* a daemon zeroes no frame before it is unshared, and seals none again */
    find_shared(store->domid, gfns, n, shared);
    for (i = 0; i < n; i++) {
        if (!shared[i]) {
            return -ESTALE;
        }
    }
    return 0;
}

static int xen_store_copy(DedupStore *store, uint32_t slot, size_t skip,
                          void *buf, size_t bytes)
{
    size_t some;
    int ret = 0;

    while (bytes && !ret) {
        slot += skip / XC_PAGE_SIZE;
        skip %= XC_PAGE_SIZE;
        some = MIN(bytes, DEDUP_BATCH * XC_PAGE_SIZE - skip);
        ret = copy_some(store, slot, skip, buf, some);
        buf = (char *)buf + some;
        bytes -= some;
        skip += some;
    }
    return ret;
}

/* Who wants to know which frames the guest has. */
typedef struct Asker {
    void (*used)(void *opaque, uint32_t slot);
    void *opaque;
} Asker;

static void look_at_gfns(void *opaque, const uint64_t *gfns,
                         const uint32_t *slots, unsigned n, bool *gone)
{
    bool shared[DEDUP_BATCH];
    Asker *a = opaque;
    unsigned i;

    WITH_QEMU_LOCK_GUARD(&guest.lock) {
        find_shared(xen_domid, gfns, n, shared);
    }
    for (i = 0; i < n; i++) {
        gone[i] = !shared[i];
        if (shared[i]) {
            a->used(a->opaque, slots[i]);
        }
    }
}

static void xen_store_each_used(DedupStore *store,
                                void (*used)(void *opaque, uint32_t slot),
                                void *opaque)
{
    Asker a = { .used = used, .opaque = opaque };

    xen_memshr_gfns_each(store, DEDUP_BATCH, look_at_gfns, &a);
}

/* --- which guest pages can be replaced ----------------------------------- */

static bool xen_store_resolve(MemoryRegion *mr, uint64_t offset,
                              DedupDest *dest)
{
    /*
     * The guest's main memory, whose offsets are guest physical addresses;
     * not the frame buffer, whose changes Xen tracks, nor ROM.  During live
     * migration Xen tracks all of it, and does not see a page given.
     */
    if (global_dirty_tracking || !memory_region_is_ram(mr) ||
        memory_region_is_rom(mr) ||
        strcmp(memory_region_name(mr), "xen.ram")) {
        return false;
    }
    *dest = (DedupDest) { .gfn = offset >> XC_PAGE_SHIFT };
    return true;
}

/* Can there be a page?  It would cost memory to remember others. */
static bool gfn_exists(XenGuest *s, uint64_t gfn)
{
    xen_pfn_t max;

    if (gfn >= MEMSHR_MAX_GFNS) {
        return false;
    }
    QEMU_LOCK_GUARD(&s->lock);
    if (gfn > s->max_gfn) {
        xen_memshr_count_calls(s, 1, 1);
        if (!xc_domain_maximum_gpfn(s->xc, xen_domid, &max)) {
            s->max_gfn = max;
        }
    }
    return gfn <= s->max_gfn;
}

/* Is @gfn the guest's main memory, as far as QEMU knows?  Xen has the say. */
static bool gfn_is_ram(XenGuest *s, uint64_t gfn, DedupDest *dest)
{
    MemoryRegionSection section;
    bool ok;

    if (object_dynamic_cast(qdev_get_machine(), "xenpv-machine")) {
        /* it knows no guest memory */
        return !global_dirty_tracking && gfn_exists(s, gfn);
    }
    section = memory_region_find(get_system_memory(), gfn << XC_PAGE_SHIFT,
                                 XC_PAGE_SIZE);
    if (!section.mr) {
        return false;
    }
    ok = int128_eq(section.size, int128_make64(XC_PAGE_SIZE)) &&
         xen_store_resolve(section.mr, section.offset_within_region, dest);
    memory_region_unref(section.mr);
    return ok;
}

static bool xen_store_resolve_grant(uint32_t ref, uint16_t peer,
                                    DedupDest *dest)
{
    XenGuest *s = xen_memshr_guest();
    uint64_t gfn;
    bool ok;

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        ok = xen_memshr_grant_gfn(s, ref, peer, &gfn);
    }
    if (!ok || !gfn_is_ram(s, gfn, dest)) {
        return false;
    }
    *dest = (DedupDest) {
        .gfn = gfn, .by_grant = true, .ref = ref, .peer = peer,
    };
    return true;
}

static void xen_store_grants_changed(void)
{
    XenGuest *s = xen_memshr_guest();

    QEMU_LOCK_GUARD(&s->lock);
    xen_memshr_grants_close(s);
}

/* --- the ops -------------------------------------------------------------- */

static void xen_store_counters(DedupStoreCounters *c)
{
    QEMU_LOCK_GUARD(&guest.lock);
    *c = guest.counters;
    c->hypercalls = guest.calls.hypercalls + guest.other_hypercalls;
    c->system_calls = guest.calls.system_calls + guest.other_system_calls;
}

static const DedupStoreOps xen_store_ops = {
    .kind = DEDUP_SHARE_STORE_XEN,
    .applies = xen_memshr_applies,
    .probe = xen_memshr_probe,
    .attach = xen_store_attach,
    .detach = xen_store_detach,
    .copy = xen_store_copy,
    .resolve = xen_store_resolve,
    .resolve_grant = xen_store_resolve_grant,
    .grants_changed = xen_store_grants_changed,
    .held = xen_memshr_held,
    .let_go = xen_memshr_let_go,
    .give = xen_memshr_give,
    .take_back = xen_memshr_take_back,
    .each_used = xen_store_each_used,
    .counters = xen_store_counters,
};

static void xen_store_register(void)
{
    dedup_store_register(&xen_store_ops);
}

type_init(xen_store_register);
