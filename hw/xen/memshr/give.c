/*
 * Xen store of dedup-share: giving frames to the guest
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One way for all pages:
 *
 *   make private   pages that may share already, and one page of each large
 *                  mapping: XEN_DMOP_set_mem_type unshares and splits, leaves
 *                  no hole, and fails where there is no memory
 *   nominate,      of all pages, in one multicall
 *   and count
 *   share          the frames onto those whose page has one reference
 *   make private   again those that were nominated and not shared
 *
 * Invariants
 *
 * - A frame is shared onto a page only if Xen has counted one reference of
 *   that page, after it was nominated.  With two the other holder would get the
 *   frame as well, and with more the host would come down.  Sharing names the
 *   handle that the nomination returned: if the guest has written to the page
 *   meanwhile, or somebody has given it another frame, the handle is gone and
 *   Xen refuses.  So nobody needs to keep others from giving to a page.
 * - A page is nominated only where its mapping is split: Xen would crash if it
 *   had to split it and could not.  Where the guest can make large mappings it
 *   is paused from the split to the nomination.
 * - No page is left nominated that was not shared: if its domain dies while
 *   somebody maps it, Xen crashes.  But once Xen destroys the guest, none is
 *   made private: Xen crashes, too.
 * - Nothing is nominated while Xen is short of memory: it would crash where it
 *   found none.
 * - Whatever fails, the page stays the guest's own RAM, and is read in the
 *   ordinary way.
 *
 * Xen's behaviour is asserted by tests/lab/dom0/xen-facts.c.
 */

#include "qemu/osdep.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "hw/xen/xen_native.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "system/xen.h"
#include "memshr.h"
#include "trace.h"

/* A page on its way. */
typedef struct Page {
    DedupGive *give;
    uint64_t handle;            /* from the nomination */
    bool given_before;          /* by this process, so that it may share */
    bool made_private;
} Page;

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

/* --- making pages private ------------------------------------------------ */

static bool is_same_region(const Page *a, const Page *b)
{
    return a->give->dest.gfn / MEMSHR_REGION_GFNS ==
           b->give->dest.gfn / MEMSHR_REGION_GFNS;
}

/* The pages' gfns follow each other: make them private, in one call. */
static bool make_run_private(XenGuest *s, Page *pages, unsigned n)
{
    uint64_t gfn = pages[0].give->dest.gfn;
    int rc;

    xen_memshr_count_calls(s, 1, 1);
    rc = xen_set_mem_type(xen_domid, HVMMEM_ram_rw, gfn, n);
    trace_xen_memshr_private(gfn, n, rc ? errno : 0);
    return rc == 0;
}

/* Pages of @pages that are to be @wanted and whose gfns follow each other. */
static unsigned count_run(const Page *pages, const bool *wanted, unsigned n)
{
    unsigned run = 1;

    while (run < n && wanted[run] &&
           pages[run].give->dest.gfn == pages[run - 1].give->dest.gfn + 1) {
        run++;
    }
    return run;
}

/* Of @pages, make those private that are @wanted to be, where that works. */
static void make_private(XenGuest *s, Page *pages, const bool *wanted,
                         unsigned n)
{
    unsigned i, j, run;

    for (i = 0; i < n; i += run) {
        run = 1;
        if (!wanted[i]) {
            continue;
        }
        run = count_run(pages + i, wanted + i, n - i);
        if (make_run_private(s, pages + i, run)) {
            for (j = i; j < i + run; j++) {
                pages[j].made_private = true;
                xen_memshr_region_set_split(pages[j].give->dest.gfn);
            }
        }
    }
}

/* Is the mapping of @page split? */
static bool is_split(const Page *page, const Page *pages, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        if (pages[i].made_private && is_same_region(page, &pages[i])) {
            return true;
        }
    }
    return xen_memshr_region_is_split(page->give->dest.gfn);
}

/*
 * Of @pages, keep those that can be nominated; returns how many.  To be called
 * right before they are.
 */
static unsigned prepare(XenGuest *s, Page *pages, unsigned n)
{
    bool wanted[DEDUP_BATCH], ready[DEDUP_BATCH];
    unsigned i, j, kept = 0;

    for (i = 0; i < n; i++) {
        wanted[i] = pages[i].given_before ||
            !xen_memshr_region_is_split(pages[i].give->dest.gfn);
        for (j = 0; j < i && !pages[i].given_before; j++) {
            wanted[i] &= !is_same_region(&pages[i], &pages[j]);
        }
    }
    make_private(s, pages, wanted, n);
    for (i = 0; i < n; i++) {
        ready[i] = (!wanted[i] || pages[i].made_private) &&
                   is_split(&pages[i], pages, n);
    }
    for (i = 0; i < n; i++) {
        if (ready[i]) {
            pages[kept++] = pages[i];
        } else {
            finish(pages[i].give, "private", -ENOMEM);
        }
    }
    return kept;
}

/* --- nominating, counting and sharing ------------------------------------ */

/*
 * What is to be done with a page that Xen has nominated, and then counted
 * @count references of?  True if it can be shared onto.
 */
static bool can_share_onto(const Page *p, long nominated, long count)
{
    DedupGive *g = p->give;

    if (nominated) {
        finish(g, "nominate", nominated);
        return false;
    }
    if (count > 1 && p->handle == g->handle) {
        finish(g, "has it", 0);         /* this very frame */
        return false;
    }
    if (count > 1) {
        g->result = DEDUP_BUSY;         /* somebody else has given it one */
        trace_xen_memshr_give(g->dest.gfn, g->slot, "count", count);
        return false;
    }
    if (count != 1) {
        /* -EINVAL: it is private again, so the guest has written to it */
        finish(g, "count", count == -EINVAL ?
               XENMEM_SHARING_OP_C_HANDLE_INVALID : count ?: -EIO);
    }
    return count == 1;
}

/* Nominate and count; keep those that can be shared onto, at the front. */
static unsigned nominate(XenGuest *s, Page *pages, unsigned n,
                         Page *undecided, unsigned *nundecided)
{
    XenCalls *c = &s->calls;
    unsigned i, kept = 0, changed = 0;

    for (i = 0; i < n; i++) {
        xen_calls_nominate(c, xen_domid, pages[i].give->dest.gfn);
        xen_calls_count(c, xen_domid, pages[i].give->dest.gfn);
    }
    xen_calls_make(c);
    for (i = 0; i < n; i++) {
        pages[i].handle = xen_calls_handle(c, 2 * i);
        s->counters.fresh_hypercalls += pages[i].given_before ? 0 : 2;
        changed += c->rc[2 * i + 1] == -EINVAL;
        if (can_share_onto(&pages[i], c->rc[2 * i], c->rc[2 * i + 1])) {
            pages[kept++] = pages[i];
        } else if (pages[i].give->result == DEDUP_FAILED) {
            undecided[(*nundecided)++] = pages[i];
        }
    }
    if (changed) {
        /* by the guest; or that is being destroyed, which all are to know */
        xen_memshr_count_calls(s, 1, 1);
        xen_memshr_guest_is_ending();
    }
    return kept;
}

/* Share; those that Xen refuses are undecided. */
static void share(XenGuest *s, DedupStore *store, const Page *pages,
                  unsigned n, Page *undecided, unsigned *nundecided)
{
    XenCalls *c = &s->calls;
    unsigned i;

    for (i = 0; i < n; i++) {
        const DedupGive *g = pages[i].give;

        xen_calls_share(c, store->domid, xen_store_gfn(g->slot), g->handle,
                        xen_domid, g->dest.gfn, pages[i].handle);
    }
    xen_calls_make(c);
    for (i = 0; i < n; i++) {
        bool before = pages[i].given_before;

        finish(pages[i].give, "share", c->rc[i]);
        s->counters.fresh_hypercalls += !before;
        if (c->rc[i]) {
            undecided[(*nundecided)++] = pages[i];
        } else if (before) {
            s->counters.given_again++;
        } else {
            s->counters.given_fresh++;
        }
    }
}

/*
 * Pages that were nominated, and may be shared or not: none stays so, unless
 * the guest is being destroyed.  If that fails for want of memory, a page is
 * read in the ordinary way all the same.
 */
static void undo(XenGuest *s, Page *pages, unsigned n)
{
    bool all[DEDUP_BATCH];

    if (!n) {
        return;
    }
    xen_memshr_count_calls(s, 1, 1);
    if (xen_memshr_guest_is_ending()) {
        return;
    }
    memset(all, true, sizeof(all));
    make_private(s, pages, all, n);
}

/* Keep the guest from making large mappings of what has been split. */
static bool pause_guest(XenGuest *s)
{
    if (xen_memshr_regions_stay_split()) {
        return true;
    }
    xen_memshr_count_calls(s, 1, 1);
    return !xc_domain_pause(s->xc, xen_domid);
}

static void unpause_guest(XenGuest *s)
{
    if (!xen_memshr_regions_stay_split()) {
        xen_memshr_count_calls(s, 1, 1);
        if (xc_domain_unpause(s->xc, xen_domid)) {
            error_report("dedup-share: domain %u could not be unpaused: %s",
                         xen_domid, strerror(errno));
        }
    }
}

static void give_pages(XenGuest *s, DedupStore *store, Page *pages, unsigned n)
{
    Page undecided[DEDUP_BATCH];
    unsigned i, nundecided = 0;
    int err;

    if (!n) {
        return;
    }
    if (!pause_guest(s)) {
        err = errno ?: EIO;     /* 0 would mean that they were given */
        for (i = 0; i < n; i++) {
            finish(pages[i].give, "pause", -err);
        }
        return;
    }
    n = prepare(s, pages, n);
    n = nominate(s, pages, n, undecided, &nundecided);
    unpause_guest(s);
    share(s, store, pages, n, undecided, &nundecided);
    undo(s, undecided, nundecided);
}

/* --- which pages --------------------------------------------------------- */

/* A page that is granted: is it still? */
static bool is_granted(XenGuest *s, const DedupDest *dest)
{
    uint64_t gfn;

    return !dest->by_grant ||
           (xen_memshr_grant_gfn(s, dest->ref, dest->peer, &gfn) &&
            gfn == dest->gfn);
}

bool xen_memshr_held(const DedupDest *dest)
{
    bool held;

    xen_memshr_mapcache_lock();
    held = xen_memshr_mapcache_has(dest->gfn, true);
    xen_memshr_mapcache_unlock();
    return held;
}

void xen_memshr_let_go(const DedupDest *dest)
{
    XenGuest *s = xen_memshr_guest();

    QEMU_LOCK_GUARD(&s->lock);
    xen_memshr_mapcache_lock();
    xen_memshr_count_calls(s, 0, xen_memshr_mapcache_forget(dest->gfn));
    xen_memshr_mapcache_unlock();
}

/*
 * QEMU must not have a page mapped that is given: Xen would refuse, or, if it
 * is unshared, QEMU would go on writing to a page that the guest no longer has.
 */
static bool is_mapped(XenGuest *s, uint64_t gfn)
{
    if (bql_locked()) {
        xen_memshr_count_calls(s, 0, xen_memshr_mapcache_forget(gfn));
    }
    return xen_memshr_mapcache_has(gfn, false);
}

/* Choose the pages to be tried; the map cache leaves them out from now on. */
static unsigned choose(XenGuest *s, DedupGive *gives, unsigned n,
                       Page *pages)
{
    unsigned i, npages = 0;

    for (i = 0; i < n; i++) {
        DedupGive *g = &gives[i];

        if (!is_granted(s, &g->dest)) {
            g->result = DEDUP_GRANT;
        } else if (is_mapped(s, g->dest.gfn)) {
            finish(g, "map cache", -E2BIG);
        } else {
            pages[npages++] = (Page) {
                .give = g,
                .given_before = xen_memshr_gfn_given(g->dest.gfn),
            };
            xen_memshr_gfn_set_given(g->dest.gfn);
        }
    }
    return npages;
}

/* Remember which frames the guest has now, for who asks which are in use. */
static void record(DedupStore *store, const DedupGive *gives, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        if (gives[i].result == DEDUP_GIVEN) {
            xen_memshr_gfn_set_frame(gives[i].dest.gfn, store, gives[i].slot);
        }
    }
}

static void refuse_all(DedupGive *gives, unsigned n, DedupResult why)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        gives[i].result = why;
    }
}

void xen_memshr_give(DedupStore *store, DedupGive *gives, unsigned n)
{
    XenGuest *s = xen_memshr_guest();
    Page pages[DEDUP_BATCH];
    uint64_t hypercalls, system_calls;

    QEMU_LOCK_GUARD(&s->lock);
    if (global_dirty_tracking) {        /* may have begun after resolve() */
        refuse_all(gives, n, DEDUP_NOT_RAM);
        return;
    }
    hypercalls = s->calls.hypercalls + s->other_hypercalls;
    system_calls = s->calls.system_calls + s->other_system_calls;
    xen_memshr_count_calls(s, 1, 1);
    if (xen_can_nominate(s->xc)) {
        xen_memshr_mapcache_lock();
        give_pages(s, store, pages, choose(s, gives, n, pages));
        xen_memshr_mapcache_unlock();
        record(store, gives, n);
    } else {
        refuse_all(gives, n, DEDUP_NO_MEMORY);
    }
    s->counters.give_hypercalls += s->calls.hypercalls + s->other_hypercalls -
                                   hypercalls;
    s->counters.give_system_calls += s->calls.system_calls +
                                     s->other_system_calls - system_calls;
}

void xen_memshr_take_back(DedupStore *store, DedupGive *gives, unsigned n)
{
    XenGuest *s = xen_memshr_guest();
    Page pages[DEDUP_BATCH];
    unsigned i, npages = 0;

    for (i = 0; i < n; i++) {
        if (gives[i].result == DEDUP_GIVEN) {
            pages[npages++].give = &gives[i];
            gives[i].result = DEDUP_EVICTED;
        }
    }
    QEMU_LOCK_GUARD(&s->lock);
    undo(s, pages, npages);
}
