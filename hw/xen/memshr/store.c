/*
 * Xen store of dedup-share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Frames are pages of a store domain, nominated for sharing.  To give one:
 *
 *   the guest's page is private    nominate it, share the frame onto it.  If
 *                                  the guest writes in between, Xen finds the
 *                                  handle invalid and refuses.
 *   ... and was never given        the same, without asking first
 *   it is shared                   take it out of the guest's physmap, plug
 *                                  the frame into the hole.  Sharing onto it
 *                                  would move every other sharer and then
 *                                  panic the host.
 *
 * Whether a page is shared is known for certain, see memshr.h: pages that
 * were never given are private, for others Xen is asked, and meanwhile nobody
 * else gives to the page.
 *
 * A hole is never left: if the plug fails, a fresh page is put there; if there
 * is no memory, the store's spare frame, which needs none.
 */

#include "qemu/osdep.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "hw/xen/xen_native.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/module.h"
#include "system/xen.h"
#include "memshr.h"
#include "trace.h"

struct DedupStore {
    XenStoreDomain domain;
    xc_interface *xc;
    xenforeignmemory_handle *fmem;

    QemuMutex lock;             /* protects all below; held for a batch */
    XenMemshrCalls calls;
    DedupStoreCounters counters;
    uint64_t other_hypercalls;
    uint64_t other_system_calls;
};

/* Account for @n calls made through libxenctrl or libxenforeignmemory. */
static void count_calls(DedupStore *s, unsigned n, unsigned system_calls)
{
    s->other_hypercalls += n;
    s->other_system_calls += system_calls;
}

/* --- probing, opening, closing ------------------------------------------ */

static void explain_control(int err, Error **errp)
{
    switch (err) {
    case ENOSYS:
        error_setg(errp, "store: this Xen was built without memory sharing; "
                   "it needs CONFIG_MEM_SHARING, or use store=off");
        break;
    case EOPNOTSUPP:
        error_setg(errp, "store: this Xen shares memory only on Intel "
                   "processors with VMX and EPT; use store=off on this host");
        break;
    case EXDEV:
        error_setg(errp, "store: domain %u has a device passed through, and "
                   "its memory cannot be shared; remove the device or use "
                   "store=off", xen_domid);
        break;
    default:
        error_setg_errno(errp, err, "store: Xen refused to share memory of "
                         "domain %u; use store=off", xen_domid);
    }
}

static bool probe_domain(xc_interface *xc, Error **errp)
{
    xc_dominfo_t info;

    if (xc_domain_getinfo(xc, xen_domid, 1, &info) != 1 ||
        info.domid != xen_domid) {
        error_setg(errp, "store: there is no domain %u", xen_domid);
    } else if (!info.hvm) {
        error_setg(errp, "store: domain %u is a PV guest; only the memory of "
                   "HVM and PVH guests can be shared, use store=off",
                   xen_domid);
    } else if (xc_memshr_control(xc, xen_domid, 1)) {
        explain_control(errno, errp);
    } else {
        return true;
    }
    return false;
}

static bool xen_store_probe(Error **errp)
{
    xc_interface *xc;
    bool ok;

    /* -blockdev comes before the accelerator: xen_enabled() is yet to be */
    if (!xen_domid || xen_mode == XEN_EMULATE) {
        error_setg(errp, "store: this QEMU is not the device model of a Xen "
                   "guest; use store=off");
        return false;
    }
    if (xen_domid_restrict) {
        error_setg(errp, "store: dm_restrict confines this QEMU to its own "
                   "guest, but the store is another domain; set dm_restrict=0 "
                   "or use store=off");
        return false;
    }
    xc = xc_interface_open(NULL, NULL, 0);
    if (!xc) {
        error_setg_errno(errp, errno, "store: cannot talk to Xen");
        return false;
    }
    ok = probe_domain(xc, errp);
    xc_interface_close(xc);
    return ok;
}

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
        return xen_memshr_calls_init(&s->calls, errp);
    }
    error_setg_errno(errp, errno, "store: cannot talk to Xen");
    return false;
}

static void close_handles(DedupStore *s)
{
    if (s->calls.xcall) {
        xen_memshr_calls_destroy(&s->calls);
    }
    if (s->fmem) {
        xenforeignmemory_close(s->fmem);
    }
    if (s->xc) {
        xc_interface_close(s->xc);
    }
    g_free(s);
}

static DedupStore *xen_store_open(const char *group, uint32_t nframes,
                                  bool create, DedupStoreId *id, Error **errp)
{
    DedupStore *s = g_new0(DedupStore, 1);

    if (!open_handles(s, errp) ||
        !xen_memshr_domain_open(xen_domid, s->xc, errp)) {
        close_handles(s);
        return NULL;
    }
    if (!(create ? xen_store_domain_create(&s->domain, s->xc, s->fmem, group,
                                           nframes, id, errp)
                 : xen_store_domain_attach(&s->domain, s->xc, nframes, id,
                                           errp))) {
        close_handles(s);
        return NULL;
    }
    qemu_mutex_init(&s->lock);
    trace_xen_memshr_store(group, s->domain.domid, create);
    return s;
}

static void xen_store_close(DedupStore *s, bool last)
{
    if (last) {
        xen_store_domain_destroy(s->xc, s->domain.domid);
    }
    qemu_mutex_destroy(&s->lock);
    close_handles(s);
}

static void xen_store_reap(const DedupStoreId *id)
{
    xc_interface *xc = xc_interface_open(NULL, NULL, 0);

    if (xc) {
        xen_store_domain_reap(xc, id);
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
    dest->gfn = offset >> XC_PAGE_SHIFT;
    return true;
}

/* --- filling -------------------------------------------------------------- */

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

    count_calls(s, n, 3);               /* mmap, ioctl, and munmap later */
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
        xen_memshr_nominate(&s->calls, s->domain.domid, gfns[i]);
    }
    xen_memshr_calls_make(&s->calls);
    for (i = 0; i < n; i++) {
        ret = ret ?: s->calls.rc[i];
        words[i] = xen_memshr_handle(&s->calls, i);
    }
    return ret;
}

/* Returns how many of the frames, from the first on, are gone. */
static unsigned remove_frames(DedupStore *s, xen_pfn_t *gfns, unsigned n)
{
    int rc = xc_domain_decrease_reservation(s->xc, s->domain.domid, n, 0,
                                            gfns);

    count_calls(s, 1, 1);
    return MAX(rc, 0);
}

static int xen_store_fill(DedupStore *s, const uint32_t *slots, unsigned n,
                          const void *buf, uint64_t *words)
{
    xen_pfn_t gfns[DEDUP_BATCH];
    int made, ret;

    QEMU_LOCK_GUARD(&s->lock);
    slots_to_gfns(slots, n, gfns);
    count_calls(s, 1, 1);
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

/* --- giving ------------------------------------------------------------- */

static DedupResult result_of(long rc)
{
    switch (rc) {
    case 0:
        return DEDUP_GIVEN;
    case -E2BIG:
        return DEDUP_MAPPED;
    case XENMEM_SHARING_OP_C_HANDLE_INVALID:
        return DEDUP_CHANGED;
    case XENMEM_SHARING_OP_S_HANDLE_INVALID:
        return DEDUP_EVICTED;
    default:
        return DEDUP_FAILED;
    }
}

static void finish(DedupGive *g, const char *how, long rc)
{
    g->result = result_of(rc);
    trace_xen_memshr_give(g->dest.gfn, g->slot, how, rc);
}

/* The pages are private: nominate them all, then share onto each. */
static void give_plain(DedupStore *s, DedupGive **gives, unsigned n)
{
    XenMemshrCalls *c = &s->calls;
    DedupGive *nominated[DEDUP_BATCH];
    uint64_t handles[DEDUP_BATCH];
    unsigned i, m = 0;

    for (i = 0; i < n; i++) {
        xen_memshr_nominate(c, xen_domid, gives[i]->dest.gfn);
    }
    xen_memshr_calls_make(c);
    for (i = 0; i < n; i++) {
        if (c->rc[i]) {
            finish(gives[i], "nominate", c->rc[i]);
        } else {
            handles[m] = xen_memshr_handle(c, i);
            nominated[m++] = gives[i];
        }
    }
    for (i = 0; i < m; i++) {
        xen_memshr_share(c, s->domain.domid, xen_store_gfn(nominated[i]->slot),
                         nominated[i]->word, xen_domid,
                         nominated[i]->dest.gfn, handles[i]);
    }
    xen_memshr_calls_make(c);
    for (i = 0; i < m; i++) {
        finish(nominated[i], "share", c->rc[i]);
        s->counters.given_plain += c->rc[i] == 0;
    }
}

/* The plug into @gfn failed: put something there, so that it is RAM again. */
static void fill_hole(DedupStore *s, uint64_t gfn)
{
    xen_pfn_t pfn = gfn;
    int rc;

    count_calls(s, 1, 1);
    rc = xc_domain_populate_physmap_exact(s->xc, xen_domid, 1, 0, 0, &pfn);
    trace_xen_memshr_hole(gfn, "populate", rc);
    if (rc) {
        count_calls(s, 1, 1);
        rc = xc_memshr_add_to_physmap(s->xc, s->domain.domid,
                                      xen_store_gfn(s->domain.nframes),
                                      s->domain.spare_handle, xen_domid, gfn);
        trace_xen_memshr_hole(gfn, "spare", rc);
    }
    if (rc) {
        error_report("dedup-share: domain %u has lost its frame 0x%" PRIx64
                     ": no memory, and no spare frame: %s", xen_domid, gfn,
                     strerror(errno));
    }
}

/* The pages are shared: replace each. */
static void give_replace(DedupStore *s, DedupGive **gives, unsigned n)
{
    XenMemshrCalls *c = &s->calls;
    uint64_t gfns[DEDUP_BATCH];
    unsigned i;

    if (!n) {
        return;
    }
    for (i = 0; i < n; i++) {
        gfns[i] = gives[i]->dest.gfn;
    }
    xen_memshr_decrease(c, xen_domid, gfns, n);
    for (i = 0; i < n; i++) {
        xen_memshr_plug(c, s->domain.domid, xen_store_gfn(gives[i]->slot),
                        gives[i]->word, xen_domid, gfns[i]);
    }
    xen_memshr_calls_make(c);
    for (i = 0; i < n; i++) {
        long rc = c->rc[i + 1];

        finish(gives[i], "plug", rc);
        s->counters.given_replaced += rc == 0;
        /* those that were taken out are the first rc[0] */
        if (rc && (long)i < c->rc[0]) {
            fill_hole(s, gfns[i]);
        }
    }
}

/* Sort pages that were given before by what Xen says they are now. */
static void ask(DedupStore *s, DedupGive **given, unsigned n,
                DedupGive **private, unsigned *nprivate,
                DedupGive **shared, unsigned *nshared)
{
    XenMemshrCalls *c = &s->calls;
    unsigned i;

    for (i = 0; i < n; i++) {
        xen_memshr_count(c, xen_domid, given[i]->dest.gfn);
    }
    xen_memshr_calls_make(c);
    for (i = 0; i < n; i++) {
        if (c->rc[i] >= 1) {
            shared[(*nshared)++] = given[i];
        } else if (c->rc[i] == -EINVAL) {
            private[(*nprivate)++] = given[i];
        } else {
            finish(given[i], "count", c->rc[i] ?: -EIO);
        }
    }
}

static void give_begun(DedupStore *s, DedupGive **fresh, unsigned nfresh,
                       DedupGive **given, unsigned ngiven)
{
    DedupGive *private[DEDUP_BATCH], *shared[DEDUP_BATCH];
    unsigned nprivate = 0, nshared = 0;
    uint64_t before = s->calls.hypercalls;

    ask(s, given, ngiven, private, &nprivate, shared, &nshared);
    before += ngiven - nprivate;        /* what asking for the others took */
    give_plain(s, fresh, nfresh);
    give_plain(s, private, nprivate);
    s->counters.plain_hypercalls += s->calls.hypercalls - before;
    give_replace(s, shared, nshared);
}

static void xen_store_give(DedupStore *s, DedupGive *gives, unsigned n)
{
    DedupGive *fresh[DEDUP_BATCH], *given[DEDUP_BATCH];
    unsigned i, nfresh = 0, ngiven = 0;
    uint64_t before;

    QEMU_LOCK_GUARD(&s->lock);
    if (global_dirty_tracking) {        /* may have begun after resolve() */
        for (i = 0; i < n; i++) {
            gives[i].result = DEDUP_NOT_RAM;
        }
        return;
    }
    before = s->calls.system_calls + s->other_system_calls;
    for (i = 0; i < n; i++) {
        switch (xen_memshr_gfn_begin(gives[i].dest.gfn)) {
        case XEN_MEMSHR_GFN_BUSY:
            gives[i].result = DEDUP_BUSY;
            continue;
        case XEN_MEMSHR_GFN_FRESH:
            fresh[nfresh++] = &gives[i];
            break;
        case XEN_MEMSHR_GFN_GIVEN:
            given[ngiven++] = &gives[i];
            break;
        }
        xen_memshr_mapcache_forget(gives[i].dest.gfn);
    }
    give_begun(s, fresh, nfresh, given, ngiven);
    for (i = 0; i < nfresh; i++) {
        xen_memshr_gfn_end(fresh[i]->dest.gfn);
    }
    for (i = 0; i < ngiven; i++) {
        xen_memshr_gfn_end(given[i]->dest.gfn);
    }
    s->counters.give_system_calls += s->calls.system_calls +
                                     s->other_system_calls - before;
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
    .probe = xen_store_probe,
    .host_frames = xen_store_host_frames,
    .open = xen_store_open,
    .close = xen_store_close,
    .reap = xen_store_reap,
    .resolve = xen_store_resolve,
    .fill = xen_store_fill,
    .peek = xen_store_peek,
    .give = xen_store_give,
    .evict = xen_store_evict,
    .counters = xen_store_counters,
};

static void xen_store_register(void)
{
    dedup_store_register(&xen_store_ops);
}

type_init(xen_store_register);
