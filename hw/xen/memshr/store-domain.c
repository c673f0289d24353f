/*
 * Xen store of dedup-share: the domain that owns the frames
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * An HVM domain without a running vCPU, kernel or device model.  Slot n of
 * the store is its gfn XEN_STORE_GFN_BASE + n.  The page behind the last slot is
 * never a frame; it is there to be mapped.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/units.h"
#include "hw/xen/xen_native.h"
#include "memshr.h"
#include "trace.h"

/* Page tables of the domain: a page for 512 frames, and the levels above. */
static uint64_t paging_pool(uint32_t nframes)
{
    return ROUND_UP((uint64_t)nframes / 512 * XC_PAGE_SIZE, MiB) + 2 * MiB;
}

static char *xenstore_path(uint32_t domid)
{
    return g_strdup_printf("/local/domain/%" PRIu32, domid);
}

static void set_name(uint32_t domid, const char *group)
{
    g_autofree char *dir = xenstore_path(domid);
    g_autofree char *path = g_strconcat(dir, "/name", NULL);
    g_autofree char *name = g_strconcat("dedup-share-", group, NULL);
    struct xs_handle *xs = xs_open(0);

    if (xs) {
        xs_write(xs, XBT_NULL, path, name, strlen(name));
        xs_close(xs);
    }
}

void xen_store_domain_destroy(xc_interface *xc, uint32_t domid)
{
    g_autofree char *dir = xenstore_path(domid);
    struct xs_handle *xs = xs_open(0);
    int rc = xc_domain_destroy(xc, domid);

    trace_xen_memshr_store_destroy(domid, rc);
    if (xs) {
        xs_rm(xs, XBT_NULL, dir);
        xs_close(xs);
    }
}

int xen_memshr_domain_info(xc_interface *xc, uint32_t domid,
                           xc_domaininfo_t *info)
{
    /* the first domain from domid on */
    int n = xc_domain_getinfolist(xc, domid, 1, info);

    return n == 1 ? info->domain == domid : n;
}

static bool is_that(const xc_domaininfo_t *info, const uint8_t uuid[16])
{
    return !(info->flags & XEN_DOMINF_dying) &&
           !memcmp(info->handle, uuid, sizeof(info->handle));
}

void xen_store_domain_reap(xc_interface *xc, const uint8_t uuid[16])
{
    xc_domaininfo_t info;
    uint32_t next = 0;

    while (xc_domain_getinfolist(xc, next, 1, &info) == 1) {
        if (is_that(&info, uuid)) {
            xen_store_domain_destroy(xc, info.domain);
        }
        next = info.domain + 1;
    }
}

static bool is_there(xc_interface *xc, const DedupStoreId *id)
{
    xc_domaininfo_t info;

    return xen_memshr_domain_info(xc, id->domid, &info) == 1 &&
           is_that(&info, id->uuid);
}

/* Map the page that is there for it; see XenStoreDomain. */
static bool pin(XenStoreDomain *d, xenforeignmemory_handle *fmem)
{
    xen_pfn_t page = xen_store_gfn(d->nframes);

    /* without an array for errors it succeeds as a whole or fails */
    d->pin = xenforeignmemory_map(fmem, d->domid, PROT_READ, 1, &page, NULL);
    return d->pin;
}

bool xen_store_domain_attach(XenStoreDomain *d, xc_interface *xc,
                             xenforeignmemory_handle *fmem, uint32_t nframes,
                             const DedupStoreId *id, Error **errp)
{
    *d = (XenStoreDomain) { .domid = id->domid, .nframes = nframes };
    /* pinned first: then it stays the one that is_there() has looked at */
    if (pin(d, fmem) && is_there(xc, id)) {
        return true;
    }
    xen_store_domain_detach(d, fmem);
    error_setg(errp, "store: the store domain %" PRIu32 " of this group was "
               "destroyed; end the group's guests to get a new one, or choose "
               "another group", id->domid);
    return false;
}

void xen_store_domain_detach(XenStoreDomain *d, xenforeignmemory_handle *fmem)
{
    if (d->pin) {
        xenforeignmemory_unmap(fmem, d->pin, 1);
        d->pin = NULL;
    }
}

/* A bare domain, without memory. */
static bool make_domain(XenStoreDomain *d, xc_interface *xc,
                        const uint8_t uuid[16])
{
    struct xen_domctl_createdomain config = {
        .flags = XEN_DOMCTL_CDF_hvm | XEN_DOMCTL_CDF_hap,
        .max_vcpus = 1,
        .max_grant_frames = 1,
        .grant_opts = XEN_DOMCTL_GRANT_version(1),
        /* no emulation at all is refused */
        .arch.emulation_flags = XEN_X86_EMU_LAPIC,
    };

    QEMU_BUILD_BUG_ON(sizeof(config.handle) != 16);
    memcpy(config.handle, uuid, sizeof(config.handle));
    d->domid = 0;
    return !xc_domain_create(xc, &d->domid, &config);
}

/* Let it hold the frames. */
static bool equip_domain(XenStoreDomain *d, xc_interface *xc)
{
    xen_pfn_t page = xen_store_gfn(d->nframes);
    uint64_t max_kb = ((uint64_t)d->nframes + 64) * (XC_PAGE_SIZE / KiB);

    return !xc_set_paging_mempool_size(xc, d->domid,
                                       paging_pool(d->nframes)) &&
           !xc_memshr_control(xc, d->domid, 1) &&
           !xc_domain_setmaxmem(xc, d->domid, max_kb) &&
           !xc_domain_populate_physmap_exact(xc, d->domid, 1, 0, 0, &page);
}

bool xen_store_domain_create(XenStoreDomain *d, xc_interface *xc,
                             xenforeignmemory_handle *fmem, const char *group,
                             uint32_t nframes, DedupStoreId *id, Error **errp)
{
    *d = (XenStoreDomain) { .nframes = nframes };
    if (!make_domain(d, xc, id->uuid)) {
        error_setg_errno(errp, errno, "store: Xen refused to make the store "
                         "domain");
        return false;
    }
    if (!equip_domain(d, xc)) {
        error_setg_errno(errp, errno, "store: Xen has no memory for a store "
                         "of %" PRIu64 " bytes, or cannot share memory; try a "
                         "smaller store-size",
                         (uint64_t)nframes * XC_PAGE_SIZE);
        xen_store_domain_destroy(xc, d->domid);
        return false;
    }
    if (!pin(d, fmem)) {
        error_setg_errno(errp, errno, "store: this domain cannot map the "
                         "memory of the store domain; it takes a PV dom0, use "
                         "store=off elsewhere");
        xen_store_domain_destroy(xc, d->domid);
        return false;
    }
    set_name(d->domid, group);
    id->domid = d->domid;
    return true;
}
