/*
 * Xen store of dedup-share: giving frames to the guest
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * To give a frame:
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
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "system/xen.h"
#include "memshr.h"
#include "trace.h"

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

/*
 * Nominating a page in a 2 MiB mapping splits that.  If the domain has no page
 * left for its page tables, Xen 4.17 runs into a BUG() then.  So the mapping is
 * split beforehand, by a call that can fail.
 */
static bool split_region(DedupStore *s, uint64_t gfn)
{
    int rc;

    if (xen_memshr_region_is_split(gfn)) {
        return true;
    }
    xen_memshr_count_calls(s, 1, 1);
    rc = xen_set_mem_type(xen_domid, HVMMEM_ram_rw, gfn, 1);
    trace_xen_memshr_split(gfn, rc ? errno : 0);
    if (rc == 0) {
        xen_memshr_region_set_split(gfn);
    }
    return rc == 0;
}

/* Is @gfn in the region of one of @gives? */
static bool region_is_in(uint64_t gfn, DedupGive **gives, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        if (gives[i]->dest.gfn / MEMSHR_REGION_GFNS ==
            gfn / MEMSHR_REGION_GFNS) {
            return true;
        }
    }
    return false;
}

/*
 * Of @gives, keep those that can be nominated; returns how many.  To be called
 * right before they are: a guest can make large mappings again.
 */
static unsigned split_regions(DedupStore *s, DedupGive **gives, unsigned n)
{
    unsigned i, kept = 0;

    for (i = 0; i < n; i++) {
        if (region_is_in(gives[i]->dest.gfn, gives, kept) ||
            split_region(s, gives[i]->dest.gfn)) {
            gives[kept++] = gives[i];
        } else {
            finish(gives[i], "split", -ENOMEM);
        }
    }
    return kept;
}

/*
 * The pages are private: nominate them all, then share onto each.  Returns how
 * many were given.
 */
static unsigned give_private(DedupStore *s, DedupGive **gives, unsigned n)
{
    XenMemshrCalls *c = &s->calls;
    DedupGive *nominated[DEDUP_BATCH];
    uint64_t handles[DEDUP_BATCH];
    unsigned i, m = 0, given = 0;

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
        given += c->rc[i] == 0;
    }
    return given;
}

/* The plug into @gfn failed: put something there, so that it is RAM again. */
static void fill_hole(DedupStore *s, uint64_t gfn)
{
    xen_pfn_t pfn = gfn;
    int rc;

    xen_memshr_count_calls(s, 1, 1);
    rc = xc_domain_populate_physmap_exact(s->xc, xen_domid, 1, 0, 0, &pfn);
    trace_xen_memshr_hole(gfn, "populate", rc ? errno : 0);
    if (rc) {
        xen_memshr_count_calls(s, 1, 1);
        rc = xc_memshr_add_to_physmap(s->xc, s->domain.domid,
                                      xen_store_gfn(s->domain.nframes),
                                      s->domain.spare_handle, xen_domid, gfn);
        trace_xen_memshr_hole(gfn, "spare", rc ? errno : 0);
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

static void give_fresh(DedupStore *s, DedupGive **fresh, unsigned n)
{
    uint64_t before;

    n = split_regions(s, fresh, n);
    before = s->calls.hypercalls;
    s->counters.given_fresh += give_private(s, fresh, n);
    s->counters.fresh_hypercalls += s->calls.hypercalls - before;
}

static void give_again(DedupStore *s, DedupGive **given, unsigned n)
{
    DedupGive *private[DEDUP_BATCH], *shared[DEDUP_BATCH];
    unsigned nprivate = 0, nshared = 0;

    ask(s, given, n, private, &nprivate, shared, &nshared);
    nprivate = split_regions(s, private, nprivate);
    s->counters.given_again += give_private(s, private, nprivate);
    give_replace(s, shared, nshared);
}

/* A page that is granted: is it still? */
static bool is_granted(DedupStore *s, const DedupDest *dest)
{
    uint64_t gfn;

    return !dest->by_grant ||
           (xen_memshr_grant_gfn(s, dest->ref, dest->peer, &gfn) &&
            gfn == dest->gfn);
}

/* Begin with each page: those that were never given, and the others. */
static void begin(DedupStore *s, DedupGive *gives, unsigned n,
                  DedupGive **fresh, unsigned *nfresh,
                  DedupGive **given, unsigned *ngiven)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        if (!is_granted(s, &gives[i].dest)) {
            gives[i].result = DEDUP_GRANT;
            continue;
        }
        switch (xen_memshr_gfn_begin(gives[i].dest.gfn)) {
        case XEN_MEMSHR_GFN_BUSY:
            gives[i].result = DEDUP_BUSY;
            break;
        case XEN_MEMSHR_GFN_FULL:
            gives[i].result = DEDUP_STORE_FULL;
            break;
        case XEN_MEMSHR_GFN_FRESH:
            fresh[(*nfresh)++] = &gives[i];
            break;
        case XEN_MEMSHR_GFN_GIVEN:
            given[(*ngiven)++] = &gives[i];
            break;
        }
    }
}

bool xen_memshr_held(DedupStore *s, const DedupDest *dest)
{
    bool held;

    xen_memshr_mapcache_lock();
    held = xen_memshr_mapcache_has(dest->gfn, true);
    xen_memshr_mapcache_unlock();
    return held;
}

void xen_memshr_let_go(DedupStore *s, const DedupDest *dest)
{
    QEMU_LOCK_GUARD(&s->lock);
    xen_memshr_mapcache_lock();
    xen_memshr_count_calls(s, 0, xen_memshr_mapcache_forget(dest->gfn));
    xen_memshr_mapcache_unlock();
}

/*
 * QEMU must not have a page mapped that is given: it would be refused, or, if
 * it is replaced, QEMU would go on writing to a page that the guest no longer
 * has.  Of @gives, keep those that are not mapped; returns how many.
 */
static unsigned unmap(DedupStore *s, DedupGive **gives, unsigned n)
{
    unsigned i, kept = 0;

    for (i = 0; i < n; i++) {
        uint64_t gfn = gives[i]->dest.gfn;

        if (bql_locked()) {
            xen_memshr_count_calls(s, 0, xen_memshr_mapcache_forget(gfn));
        }
        if (xen_memshr_mapcache_has(gfn, false)) {
            finish(gives[i], "map cache", -E2BIG);
        } else {
            gives[kept++] = gives[i];
        }
    }
    return kept;
}

static void end(DedupGive **gives, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        xen_memshr_gfn_end(gives[i]->dest.gfn);
    }
}

void xen_memshr_give(DedupStore *s, DedupGive *gives, unsigned n)
{
    DedupGive *fresh[DEDUP_BATCH], *given[DEDUP_BATCH], *begun[DEDUP_BATCH];
    unsigned i, nfresh = 0, ngiven = 0, nbegun;
    uint64_t hypercalls, system_calls;

    QEMU_LOCK_GUARD(&s->lock);
    if (global_dirty_tracking) {        /* may have begun after resolve() */
        for (i = 0; i < n; i++) {
            gives[i].result = DEDUP_NOT_RAM;
        }
        return;
    }
    hypercalls = s->calls.hypercalls + s->other_hypercalls;
    system_calls = s->calls.system_calls + s->other_system_calls;
    begin(s, gives, n, fresh, &nfresh, given, &ngiven);
    /* the lists get shorter below, and all that was begun must end */
    memcpy(begun, fresh, nfresh * sizeof(*begun));
    memcpy(begun + nfresh, given, ngiven * sizeof(*begun));
    nbegun = nfresh + ngiven;
    xen_memshr_mapcache_lock();
    give_fresh(s, fresh, unmap(s, fresh, nfresh));
    give_again(s, given, unmap(s, given, ngiven));
    xen_memshr_mapcache_unlock();
    end(begun, nbegun);
    s->counters.give_hypercalls += s->calls.hypercalls + s->other_hypercalls -
                                   hypercalls;
    s->counters.give_system_calls += s->calls.system_calls +
                                     s->other_system_calls - system_calls;
}
