/*
 * qemu-dedup-store: the domain that owns the frames on Xen, and its pages
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * An HVM domain without kernel and device model, and with a vCPU that never
 * runs: without any, tools that ask for its state would bring Xen down.
 */

#include "qemu/osdep.h"
#include <xenctrl.h>
#include <xen/hvm/hvm_op.h>
#include <xenstore.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/error-report.h"
#include "qemu/units.h"
#include "../trace.h"
#include "domain.h"

bool xen_host_open(XenHost *h, Error **errp)
{
    memset(h, 0, sizeof(*h));
    h->xc = xc_interface_open(NULL, NULL, 0);
    h->fmem = xenforeignmemory_open(NULL, 0);
    h->dmod = xendevicemodel_open(NULL, 0);
    if (h->xc && h->fmem && h->dmod) {
        return xen_calls_init(&h->calls, errp);
    }
    error_setg_errno(errp, errno, "--store: cannot talk to Xen; a Xen store is "
                     "for dom0");
    return false;
}

void xen_host_close(XenHost *h)
{
    xen_calls_destroy(&h->calls);
    if (h->dmod) {
        xendevicemodel_close(h->dmod);
    }
    if (h->fmem) {
        xenforeignmemory_close(h->fmem);
    }
    if (h->xc) {
        xc_interface_close(h->xc);
    }
}

static int get_info(const XenStoreDomain *d, xc_domaininfo_t *info)
{
    return xen_get_domain_info(d->host->xc, d->domid, info);
}

bool xen_store_domain_is_there(const XenStoreDomain *d)
{
    xc_domaininfo_t info;

    return get_info(d, &info) == 1 && !(info.flags & XEN_DOMINF_dying);
}

bool xen_store_domain_is_gone(const XenStoreDomain *d)
{
    xc_domaininfo_t info;
    int there = get_info(d, &info);

    return there == 0 || (there == 1 && info.flags & XEN_DOMINF_dying);
}

/* --- pages ---------------------------------------------------------------- */

unsigned xen_pages_populate(XenStoreDomain *d, xen_pfn_t *gfns, unsigned n)
{
    int made = xc_domain_populate_physmap(d->host->xc, d->domid, n, 0, 0,
                                          gfns);

    return MAX(made, 0);
}

/* Map pages; those with an error must not be touched.  NULL with errno set. */
static void *map_pages(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                       int prot, int *errs)
{
    memset(errs, 0, n * sizeof(*errs));
    return xenforeignmemory_map(d->host->fmem, d->domid, prot, n, gfns, errs);
}

/* Copy between pages and a buffer, all or nothing. */
static int copy_pages(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                      int prot, void *to, const void *from)
{
    int errs[XEN_PAGES_MAX], ret = 0;
    void *window = map_pages(d, gfns, n, prot, errs);
    unsigned i;

    if (!window) {
        return -errno;
    }
    for (i = 0; i < n; i++) {
        ret = ret ?: -abs(errs[i]);
    }
    if (!ret) {
        memcpy(to ?: window, from ?: window, (size_t)n * XC_PAGE_SIZE);
    }
    if (xenforeignmemory_unmap(d->host->fmem, window, n)) {
        ret = ret ?: -errno;
    }
    return ret;
}

int xen_pages_write(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                    const void *buf)
{
    return copy_pages(d, gfns, n, PROT_READ | PROT_WRITE, NULL, buf);
}

int xen_pages_read(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                   void *buf)
{
    return copy_pages(d, gfns, n, PROT_READ, buf, NULL);
}

int xen_pages_seal(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                   uint64_t *handles)
{
    XenCalls *c = &d->host->calls;
    unsigned i;
    int ret = 0;

    for (i = 0; i < n; i++) {
        xen_calls_nominate(c, d->domid, gfns[i]);
    }
    xen_calls_make(c);
    for (i = 0; i < n; i++) {
        handles[i] = c->rc[i] ? 0 : xen_calls_handle(c, i);
        ret = ret ?: c->rc[i] ?: handles[i] ? 0 : -EIO;
    }
    return ret;
}

/* Make @n pages from @gfn on, which only the domain has, private. */
static bool make_private(XenStoreDomain *d, xen_pfn_t gfn, unsigned n)
{
    return !xendevicemodel_set_mem_type(d->host->dmod, d->domid, HVMMEM_ram_rw,
                                        gfn, n);
}

void xen_pages_retire(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                      XenPage *pages)
{
    XenCalls *c = &d->host->calls;
    unsigned i, run;

    memset(pages, 0, n * sizeof(*pages));
    QEMU_BUILD_BUG_ON(XEN_PAGE_USED != 0);
    if (!xen_store_domain_is_there(d)) {
        return;
    }
    for (i = 0; i < n; i++) {
        xen_calls_count(c, d->domid, gfns[i]);
    }
    xen_calls_make(c);
    for (i = 0; i < n; i++) {
        pages[i] = c->rc[i] == 1 ? XEN_PAGE_RETIRED :
                   c->rc[i] == -EINVAL ? XEN_PAGE_UNSHARED : XEN_PAGE_USED;
    }
    for (i = 0; i < n; i += run) {
        for (run = 0; i + run < n && pages[i + run] == XEN_PAGE_RETIRED &&
             gfns[i + run] == gfns[i] + run; run++) {
            /* gfns that follow each other */
        }
        if (run && !make_private(d, gfns[i], run)) {
            /* whatever became of them, the next look tells */
            memset(pages + i, 0, run * sizeof(*pages));
        }
        run = MAX(run, 1);
    }
}

/* Zero those that there are; they are put at the front of *there. */
static unsigned zero_pages(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                           unsigned *there)
{
    int errs[XEN_PAGES_MAX];
    char *window = map_pages(d, gfns, n, PROT_READ | PROT_WRITE, errs);
    unsigned i, found = 0;

    for (i = 0; window && i < n; i++) {
        if (!errs[i]) {
            memset(window + i * XC_PAGE_SIZE, 0, XC_PAGE_SIZE);
            there[found++] = i;
        }
    }
    if (window && xenforeignmemory_unmap(d->host->fmem, window, n)) {
        return 0;
    }
    return found;
}

void xen_pages_free(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                    bool *freed)
{
    xen_pfn_t list[XEN_PAGES_MAX];
    unsigned there[XEN_PAGES_MAX], found, i, done = 0;
    int rc;

    memset(freed, false, n);
    found = n && xen_store_domain_is_there(d) ? zero_pages(d, gfns, n, there)
                                              : 0;
    for (i = 0; i < found; i++) {
        list[i] = gfns[there[i]];
    }
    while (done < found) {
        rc = xc_domain_decrease_reservation(d->host->xc, d->domid,
                                            found - done, 0, list + done);
        rc = MIN(MAX(rc, 0), (int)(found - done));
        for (i = done; i < done + rc; i++) {
            freed[there[i]] = true;
        }
        done += rc + 1;         /* behind one that could not be */
    }
}

/* --- the domain ----------------------------------------------------------- */

void xen_store_uuid(const char *group, const char *place, uint8_t uuid[16])
{
    g_autofree char *name = g_strdup_printf("qemu-dedup-store %s %s", group,
                                            place);
    g_autoptr(GChecksum) sum = g_checksum_new(G_CHECKSUM_SHA256);
    uint8_t digest[32];
    size_t size = sizeof(digest);

    g_checksum_update(sum, (const uint8_t *)name, -1);
    g_checksum_get_digest(sum, digest, &size);
    memcpy(uuid, digest, 16);
    uuid[6] = (uuid[6] & 0x0f) | 0x80;          /* version 8: of our own */
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
}

static char *xenstore_path(uint32_t domid)
{
    return g_strdup_printf("/local/domain/%" PRIu32, domid);
}

static void set_name(uint32_t domid, const char *group, const char *suffix)
{
    g_autofree char *dir = xenstore_path(domid);
    g_autofree char *path = g_strconcat(dir, "/name", NULL);
    g_autofree char *name = g_strconcat("dedup-share-", group, suffix, NULL);
    struct xs_handle *xs = xs_open(0);

    if (xs) {
        xs_write(xs, XBT_NULL, path, name, strlen(name));
        xs_close(xs);
    }
}

void xen_store_domain_leave(XenStoreDomain *d)
{
    if (d->pin) {
        xenforeignmemory_unmap(d->host->fmem, d->pin, 1);
        d->pin = NULL;
    }
}

/* It has no frame. */
static void destroy_domain(XenStoreDomain *d)
{
    g_autofree char *dir = xenstore_path(d->domid);
    struct xs_handle *xs = xs_open(0);
    int rc;

    xen_store_domain_leave(d);
    rc = xc_domain_destroy(d->host->xc, d->domid);
    trace_dedup_store_xen_destroy(d->domid, rc ? errno : 0);
    if (xs) {
        xs_rm(xs, XBT_NULL, dir);
        xs_close(xs);
    }
}

/* Map the page that is there for it. */
static bool pin_domain(XenStoreDomain *d)
{
    xen_pfn_t gfn = XEN_STORE_GFN_PIN;

    /* without an array for errors it succeeds as a whole or fails */
    d->pin = xenforeignmemory_map(d->host->fmem, d->domid, PROT_READ, 1, &gfn,
                                  NULL);
    return d->pin;
}

/* A bare domain, without memory. */
static bool make_domain(XenStoreDomain *d, const uint8_t uuid[16])
{
    struct xen_domctl_createdomain config = {
        /* one of the toolstack's own, which `xl shutdown -a` leaves alone */
        .flags = XEN_DOMCTL_CDF_hvm | XEN_DOMCTL_CDF_hap |
                 XEN_DOMCTL_CDF_xs_domain,
        .max_vcpus = 1,
        .max_grant_frames = 1,
        .grant_opts = XEN_DOMCTL_GRANT_version(1),
        /* no emulation at all is refused */
        .arch.emulation_flags = XEN_X86_EMU_LAPIC,
    };

    QEMU_BUILD_BUG_ON(sizeof(config.handle) != 16);
    memcpy(config.handle, uuid, sizeof(config.handle));
    d->domid = 0;
    return !xc_domain_create(d->host->xc, &d->domid, &config);
}

/* Page tables of the domain: a page for 512 frames, and the levels above. */
static uint64_t paging_pool(uint32_t nslots)
{
    return ROUND_UP((uint64_t)nslots / 512 * XC_PAGE_SIZE, MiB) + 2 * MiB;
}

/* Let it hold the frames. */
static bool equip_domain(XenStoreDomain *d, uint32_t nslots)
{
    xc_interface *xc = d->host->xc;
    xen_pfn_t gfn = XEN_STORE_GFN_PIN;
    uint64_t max_kb = ((uint64_t)nslots + 64) * (XC_PAGE_SIZE / KiB);

    return !xc_domain_max_vcpus(xc, d->domid, 1) &&
           !xc_set_paging_mempool_size(xc, d->domid, paging_pool(nslots)) &&
           !xc_memshr_control(xc, d->domid, 1) &&
           !xc_domain_setmaxmem(xc, d->domid, max_kb) &&
           !xc_domain_populate_physmap_exact(xc, d->domid, 1, 0, 0, &gfn);
}

static void explain_equip(uint32_t nslots, Error **errp)
{
    switch (errno) {
    case ENOSYS:
        error_setg(errp, "--store: this Xen was built without memory sharing; "
                   "it needs CONFIG_MEM_SHARING");
        break;
    case EOPNOTSUPP:
        error_setg(errp, "--store: this Xen shares memory only on Intel "
                   "processors with VMX and EPT");
        break;
    default:
        error_setg_errno(errp, errno, "--size: Xen has no memory for a store "
                         "of %" PRIu64 " bytes, or cannot share memory; try a "
                         "smaller one", (uint64_t)nslots * XC_PAGE_SIZE);
    }
}

bool xen_store_domain_create(XenStoreDomain *d, XenHost *h, const char *group,
                             const uint8_t uuid[16], uint32_t nslots,
                             Error **errp)
{
    *d = (XenStoreDomain) { .host = h };
    if (!make_domain(d, uuid)) {
        error_setg_errno(errp, errno, "--store: Xen refused to make the store "
                         "domain");
        return false;
    }
    if (!equip_domain(d, nslots)) {
        explain_equip(nslots, errp);
        destroy_domain(d);
        return false;
    }
    if (!pin_domain(d)) {
        error_setg_errno(errp, errno, "--store: this domain cannot map the "
                         "memory of the store domain; it takes a PV dom0");
        destroy_domain(d);
        return false;
    }
    set_name(d->domid, group, "");
    trace_dedup_store_xen_create(d->domid, nslots);
    return true;
}

static bool is_that(const xc_domaininfo_t *info, const uint8_t uuid[16])
{
    return !(info->flags & XEN_DOMINF_dying) &&
           info->flags & XEN_DOMINF_hvm_guest &&
           !memcmp(info->handle, uuid, sizeof(info->handle));
}

bool xen_store_domain_find(XenStoreDomain *d, XenHost *h, const char *group,
                           const uint8_t uuid[16], uint32_t *domid)
{
    xc_domaininfo_t info;

    while (xc_domain_getinfolist(h->xc, *domid, 1, &info) == 1) {
        *domid = info.domain + 1;
        if (!is_that(&info, uuid)) {
            continue;
        }
        *d = (XenStoreDomain) { .host = h, .domid = info.domain };
        /* pinned first: then it stays the one that is looked at */
        if (pin_domain(d) && get_info(d, &info) == 1 && is_that(&info, uuid)) {
            set_name(d->domid, group, "-draining");
            return true;
        }
        if (get_info(d, &info) == 1 && is_that(&info, uuid) &&
            !info.tot_pages && !info.shr_pages) {
            destroy_domain(d);
        } else {
            xen_store_domain_leave(d);
        }
    }
    return false;
}

uint64_t xen_store_domain_count(const XenStoreDomain *d)
{
    xc_domaininfo_t info;
    int there = get_info(d, &info);

    /* shared pages are not its own: Xen counts them by themselves */
    return there < 0 ? UINT32_MAX :
           there && info.tot_pages ? info.tot_pages + info.shr_pages - 1 : 0;
}

/* --- draining ------------------------------------------------------------- */

/* How many of @n gfns have a page; those that nobody uses are freed. */
static unsigned drain_some(XenStoreDomain *d, xen_pfn_t gfn, unsigned n,
                           unsigned *freed)
{
    xen_pfn_t gfns[XEN_PAGES_MAX] = { 0 }, list[XEN_PAGES_MAX];
    XenPage pages[XEN_PAGES_MAX];
    bool done[XEN_PAGES_MAX];
    unsigned i, nlist = 0, there;

    for (i = 0; i < n; i++) {
        gfns[i] = gfn + i;
    }
    xen_pages_retire(d, gfns, n, pages);
    for (i = 0; i < n; i++) {
        if (pages[i] != XEN_PAGE_USED) {
            list[nlist++] = gfns[i];
        }
    }
    there = n - nlist;
    xen_pages_free(d, list, nlist, done);
    for (i = 0; i < nlist; i++) {
        there += done[i];
        *freed += done[i];
    }
    return there;
}

void xen_store_domain_drain(XenStoreDomain *d, uint64_t *left, const bool *stop)
{
    uint64_t want = xen_store_domain_count(d), seen = 0;
    unsigned freed = 0;
    xen_pfn_t gfn, last;

    *left = want;
    if (xen_store_domain_is_gone(d)) {
        xen_store_domain_leave(d);
        *left = 0;
        return;
    }
    if (xc_domain_maximum_gpfn(d->host->xc, d->domid, &last) < 0) {
        return;
    }
    for (gfn = XEN_STORE_GFN_BASE; gfn <= last && seen < want;
         gfn += XEN_PAGES_MAX) {
        if (qatomic_read(stop)) {
            return;
        }
        seen += drain_some(d, gfn, MIN(XEN_PAGES_MAX, last - gfn + 1), &freed);
    }
    *left = xen_store_domain_count(d);
    trace_dedup_store_xen_drain(d->domid, freed, *left);
    if (!*left) {
        destroy_domain(d);
    }
}

void xen_store_domain_end(XenStoreDomain *d)
{
    if (xen_store_domain_is_there(d) && !xen_store_domain_count(d)) {
        destroy_domain(d);
    } else {
        xen_store_domain_leave(d);
    }
}
