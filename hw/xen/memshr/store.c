/*
 * Xen store of dedup-share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Frames are pages of a store domain, nominated for sharing.  This file makes
 * and drops them; give.c gives them to the guest.
 */

#include "qemu/osdep.h"
#include "exec/address-spaces.h"
#include "exec/memory.h"
#include "hw/qdev-core.h"
#include "hw/xen/xen_native.h"
#include "qapi/error.h"
#include "qemu/lockable.h"
#include "qemu/module.h"
#include "system/xen.h"
#include "memshr.h"
#include "trace.h"

/* --- opening, closing ---------------------------------------------------- */

static uint64_t xen_store_host_frames(void)
{
    xc_interface *xc = xc_interface_open(NULL, NULL, 0);
    xc_physinfo_t info = { 0 };

    if (xc) {
        xc_physinfo(xc, &info);
        xc_interface_close(xc);
    }
    return info.total_pages;
}

static bool open_handles(DedupStore *s, Error **errp)
{
    s->xc = xc_interface_open(NULL, NULL, 0);
    s->fmem = xenforeignmemory_open(NULL, 0);
    if (s->xc && s->fmem) {
        return xen_calls_init(&s->calls, errp);
    }
    error_setg_errno(errp, errno, "store: cannot talk to Xen");
    return false;
}

static void close_handles(DedupStore *s)
{
    xen_calls_destroy(&s->calls);
    if (s->fmem) {
        xenforeignmemory_close(s->fmem);
    }
    if (s->xc) {
        xc_interface_close(s->xc);
    }
    g_free(s);
}

/*
 * From now on a page that is given would not be sent: who gives looks at
 * global_dirty_tracking with the lock held, so after this nobody does.
 */
static bool dirty_tracking_starts(MemoryListener *listener, Error **errp)
{
    DedupStore *s = container_of(listener, DedupStore, listener);

    QEMU_LOCK_GUARD(&s->lock);
    return true;
}

static DedupStore *xen_store_open(const char *group, int dirfd,
                                  uint32_t nframes, bool create,
                                  DedupStoreId *id, Error **errp)
{
    DedupStore *s = g_new0(DedupStore, 1);

    if (!open_handles(s, errp)) {
        close_handles(s);
        return NULL;
    }
    xen_memshr_gfns_open(s->xc);
    if (!(create ? xen_store_domain_create(&s->domain, s->xc, s->fmem, group,
                                           nframes, id, errp)
                 : xen_store_domain_attach(&s->domain, s->xc, s->fmem, nframes,
                                           id, errp))) {
        close_handles(s);
        return NULL;
    }
    qemu_mutex_init(&s->lock);
    s->listener = (MemoryListener) {
        .name = "dedup-share", .log_global_start = dirty_tracking_starts,
    };
    memory_listener_register(&s->listener, &address_space_memory);
    trace_xen_memshr_store(group, s->domain.domid, create);
    return s;
}

static void xen_store_close(DedupStore *s, bool last)
{
    memory_listener_unregister(&s->listener);
    xen_memshr_grants_close(s);
    xen_store_domain_detach(&s->domain, s->fmem);
    if (last) {
        xen_store_domain_destroy(s->xc, s->domain.domid);
    }
    qemu_mutex_destroy(&s->lock);
    close_handles(s);
}

static void xen_store_reap(const uint8_t uuid[16])
{
    xc_interface *xc = xc_interface_open(NULL, NULL, 0);

    if (xc) {
        xen_store_domain_reap(xc, uuid);
        xc_interface_close(xc);
    }
}

/* --- which guest pages can be replaced ----------------------------------- */

static bool xen_store_resolve(DedupStore *s, MemoryRegion *mr,
                              uint64_t offset, DedupDest *dest)
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
static bool gfn_exists(DedupStore *s, uint64_t gfn)
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
static bool gfn_is_ram(DedupStore *s, uint64_t gfn, DedupDest *dest)
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
         xen_store_resolve(s, section.mr, section.offset_within_region, dest);
    memory_region_unref(section.mr);
    return ok;
}

static bool xen_store_resolve_grant(DedupStore *s, uint32_t ref, uint16_t peer,
                                    DedupDest *dest)
{
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

static void xen_store_grants_changed(DedupStore *s)
{
    QEMU_LOCK_GUARD(&s->lock);
    xen_memshr_grants_close(s);
}

/* --- filling ------------------------------------------------------------- */

static void slots_to_gfns(const uint32_t *slots, unsigned n, xen_pfn_t *gfns)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        gfns[i] = xen_store_gfn(slots[i]);
    }
}

/* Map frames; all of them, or NULL with errno set. */
static void *map_frames(DedupStore *s, const xen_pfn_t *gfns, unsigned n,
                        int prot)
{
    int errs[DEDUP_BATCH] = { 0 };
    void *window = xenforeignmemory_map(s->fmem, s->domain.domid, prot, n,
                                        gfns, errs);
    unsigned i;

    xen_memshr_count_calls(s, n, 3);    /* mmap, ioctl, and munmap later */
    for (i = 0; window && i < n; i++) {
        if (errs[i]) {
            xenforeignmemory_unmap(s->fmem, window, n);
            errno = EFAULT;
            window = NULL;
        }
    }
    return window;
}

/* Copy @buf into the frames, through a mapping that ends before they seal. */
static int write_frames(DedupStore *s, const xen_pfn_t *gfns, unsigned n,
                        const void *buf)
{
    void *window = map_frames(s, gfns, n, PROT_READ | PROT_WRITE);

    if (!window) {
        return -errno;
    }
    memcpy(window, buf, (size_t)n * XC_PAGE_SIZE);
    return xenforeignmemory_unmap(s->fmem, window, n) ? -errno : 0;
}

static int seal_frames(DedupStore *s, const xen_pfn_t *gfns, unsigned n,
                       uint64_t *words)
{
    int ret = 0;
    unsigned i;

    for (i = 0; i < n; i++) {
        xen_calls_nominate(&s->calls, s->domain.domid, gfns[i]);
    }
    xen_calls_make(&s->calls);
    for (i = 0; i < n; i++) {
        ret = ret ?: s->calls.rc[i];
        words[i] = xen_calls_handle(&s->calls, i);
    }
    return ret;
}

/* Returns how many of the frames, from the first on, are gone. */
static unsigned remove_frames(DedupStore *s, xen_pfn_t *gfns, unsigned n)
{
    int rc = xc_domain_decrease_reservation(s->xc, s->domain.domid, n, 0,
                                            gfns);

    xen_memshr_count_calls(s, 1, 1);
    return MAX(rc, 0);
}

static int xen_store_fill(DedupStore *s, const uint32_t *slots, unsigned n,
                          const void *buf, uint64_t *words)
{
    xen_pfn_t gfns[DEDUP_BATCH];
    int made, ret;

    QEMU_LOCK_GUARD(&s->lock);
    slots_to_gfns(slots, n, gfns);
    xen_memshr_count_calls(s, 1, 1);
    made = xc_domain_populate_physmap(s->xc, s->domain.domid, n, 0, 0, gfns);
    if (made < (int)n) {
        ret = -ENOMEM;
    } else {
        ret = write_frames(s, gfns, n, buf);
        ret = ret ?: seal_frames(s, gfns, n, words);
    }
    if (ret && made > 0 && remove_frames(s, gfns, made) != made) {
        ret = -ENOTRECOVERABLE;
    }
    trace_xen_memshr_fill(n, ret ? 0 : n);
    return ret;
}

static unsigned xen_store_evict(DedupStore *s, const uint32_t *slots,
                                unsigned n)
{
    xen_pfn_t gfns[DEDUP_BATCH];

    QEMU_LOCK_GUARD(&s->lock);
    slots_to_gfns(slots, n, gfns);
    return remove_frames(s, gfns, n);
}

/*
 * A frame that nobody shares has one reference, the store domain's.  Whatever
 * else Xen says, the frame stays.
 */
static uint64_t xen_store_in_use(DedupStore *s, const uint32_t *slots,
                                 unsigned n)
{
    uint64_t used = 0;
    unsigned i;

    QEMU_LOCK_GUARD(&s->lock);
    for (i = 0; i < n; i++) {
        xen_calls_count(&s->calls, s->domain.domid, xen_store_gfn(slots[i]));
    }
    xen_calls_make(&s->calls);
    for (i = 0; i < n; i++) {
        used |= (uint64_t)(s->calls.rc[i] != 1) << i;
    }
    return used;
}

/* Is there a page?  Without one it cannot be mapped. */
static bool is_populated(DedupStore *s, xen_pfn_t gfn)
{
    void *window = map_frames(s, &gfn, 1, PROT_READ);

    if (window) {
        xenforeignmemory_unmap(s->fmem, window, 1);
    }
    return window;
}

static bool xen_store_recover(DedupStore *s, uint32_t slot)
{
    xen_pfn_t gfn = xen_store_gfn(slot);

    QEMU_LOCK_GUARD(&s->lock);
    return !is_populated(s, gfn) ||
           (remove_frames(s, &gfn, 1) == 1 && !is_populated(s, gfn));
}

/* Sealed frames may be mapped by anyone who only reads them. */
static int xen_store_peek(DedupStore *s, const uint32_t *slots, unsigned n,
                          void *buf)
{
    xen_pfn_t gfns[DEDUP_BATCH];
    void *window;

    QEMU_LOCK_GUARD(&s->lock);
    slots_to_gfns(slots, n, gfns);
    window = map_frames(s, gfns, n, PROT_READ);
    if (!window) {
        return -errno;
    }
    memcpy(buf, window, (size_t)n * XC_PAGE_SIZE);
    return xenforeignmemory_unmap(s->fmem, window, n) ? -errno : 0;
}

static void xen_store_counters(DedupStore *s, DedupStoreCounters *c)
{
    QEMU_LOCK_GUARD(&s->lock);
    *c = s->counters;
    c->hypercalls = s->calls.hypercalls + s->other_hypercalls;
    c->system_calls = s->calls.system_calls + s->other_system_calls;
}

static const DedupStoreOps xen_store_ops = {
    .kind = DEDUP_SHARE_STORE_XEN,
    .has_words = true,
    .applies = xen_memshr_applies,
    .probe = xen_memshr_probe,
    .host_frames = xen_store_host_frames,
    .open = xen_store_open,
    .close = xen_store_close,
    .reap = xen_store_reap,
    .resolve = xen_store_resolve,
    .resolve_grant = xen_store_resolve_grant,
    .grants_changed = xen_store_grants_changed,
    .held = xen_memshr_held,
    .let_go = xen_memshr_let_go,
    .fill = xen_store_fill,
    .peek = xen_store_peek,
    .give = xen_memshr_give,
    .in_use = xen_store_in_use,
    .evict = xen_store_evict,
    .recover = xen_store_recover,
    .counters = xen_store_counters,
};

static void xen_store_register(void)
{
    dedup_store_register(&xen_store_ops);
}

type_init(xen_store_register);
