/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What scenarios ask Xen, as a shared object for Python's ctypes.
 *
 * Every function returns -errno when it fails.  Nothing here keeps a guest's
 * page mapped, but for lab_map_rw(): a page that anyone has mapped cannot be
 * nominated, so a look that lasted would change what it looks at.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <xenctrl.h>
#include <xenforeignmemory.h>
#include <xenstore.h>

#include "mailbox.h"

#define PAGE 4096

static xc_interface *xc;
static xenforeignmemory_handle *foreign;
static struct xs_handle *store;

struct lab_domain {
    uint32_t domid;
    uint32_t paused, crashed, dying, shutdown;
    uint32_t pad;
    uint64_t pages, shared, max_kib;
};

static int64_t check(int64_t result)
{
    return result < 0 ? -errno : result;
}

/* Also after a fork: the handles of the parent are not ours to use. */
int lab_open(void)
{
    xc = xc_interface_open(NULL, NULL, 0);
    foreign = xenforeignmemory_open(NULL, 0);
    store = xs_open(0);
    return xc && foreign && store ? 0 : -errno;
}

int64_t lab_freed(void)
{
    return check(xc_sharing_freed_pages(xc));
}

int64_t lab_used(void)
{
    return check(xc_sharing_used_frames(xc));
}

int64_t lab_free_pages(void)
{
    xc_physinfo_t info;

    return xc_physinfo(xc, &info) ? -errno : (int64_t)info.free_pages;
}

int64_t lab_claimed_pages(void)
{
    xc_physinfo_t info;

    return xc_physinfo(xc, &info) ? -errno : (int64_t)info.outstanding_pages;
}

/* Fill in up to max domains, from domid first on. */
int lab_domains(uint32_t first, struct lab_domain *out, int max)
{
    xc_dominfo_t *info = calloc(max, sizeof(*info));
    int i, count = check(xc_domain_getinfo(xc, first, max, info));

    for (i = 0; i < count; i++) {
        out[i] = (struct lab_domain) {
            .domid = info[i].domid,
            .paused = info[i].paused,
            .crashed = info[i].crashed,
            .dying = info[i].dying,
            .shutdown = info[i].shutdown,
            .pages = info[i].nr_pages,
            .shared = info[i].nr_shared_pages,
            .max_kib = info[i].max_memkb,
        };
    }
    free(info);
    return count;
}

/* 1 + the number of others for a shared gfn; -EINVAL: it is not shared. */
int lab_references(uint32_t domid, uint64_t gfn)
{
    return check(xc_memshr_debug_gfn(xc, domid, gfn));
}

int lab_set_max_kib(uint32_t domid, uint64_t kib)
{
    return check(xc_domain_setmaxmem(xc, domid, kib));
}

int lab_claim(uint32_t domid, uint64_t pages)
{
    return check(xc_domain_claim_pages(xc, domid, pages));
}

int lab_sharing(uint32_t domid, int enable)
{
    return check(xc_memshr_control(xc, domid, enable));
}

/* Have a guest's page be a frame of a store, as a device model does. */
int lab_share(uint32_t source, uint64_t source_gfn, uint64_t source_handle,
              uint32_t domid, uint64_t gfn)
{
    uint64_t handle;

    if (xc_memshr_nominate_gfn(xc, domid, gfn, &handle)) {
        return -errno;
    }
    return check(xc_memshr_share_gfns(xc, source, source_gfn, source_handle,
                                      domid, gfn, handle));
}

/* Have an HVM domain get pages. */
int lab_populate(uint32_t domid, uint64_t gfn, int count)
{
    int i, rc = xc_set_paging_mempool_size(xc, domid, 4 << 20);

    for (i = 0; i < count && !rc; i++) {
        xen_pfn_t one = gfn + i;

        rc = xc_domain_setmaxmem(xc, domid, (count + 64) * 4) ?:
             xc_domain_populate_physmap_exact(xc, domid, 1, 0, 0, &one);
    }
    return check(rc);
}

/* Of an empty PV domain: take memory until Xen has @leave pages free. */
int lab_take_memory(uint32_t domid, uint64_t leave)
{
    static xen_pfn_t gfns[512];
    int64_t free_pages, got = 1;
    unsigned order, n, i;
    xen_pfn_t next = 0;

    if (xc_domain_setmaxmem(xc, domid, 1ULL << 32)) {
        return -errno;
    }
    for (order = 9; ; ) {
        free_pages = lab_free_pages() - (int64_t)leave;
        n = free_pages > 0 ? free_pages >> order : 0;
        n = n < 512 ? n : 512;
        if (!n || got <= 0) {
            if (!order) {
                return free_pages > 0 ? -ENOMEM : 0;
            }
            order = 0;
            got = 1;
            continue;
        }
        for (i = 0; i < n; i++, next += 1 << order) {
            gfns[i] = next;
        }
        got = xc_domain_populate_physmap(xc, domid, n, order, 0, gfns);
    }
}

int lab_pause(uint32_t domid, int pause)
{
    return check(pause ? xc_domain_pause(xc, domid)
                       : xc_domain_unpause(xc, domid));
}

/*
 * An empty domain, without memory: a PV one, or an HVM one that could have a
 * device passed through.  Returns its domid.
 */
int lab_create(int hvm, int iommu, const void *uuid)
{
    struct xen_domctl_createdomain config = {
        .flags = (hvm ? XEN_DOMCTL_CDF_hvm | XEN_DOMCTL_CDF_hap : 0) |
                 (iommu ? XEN_DOMCTL_CDF_iommu : 0),
        .max_vcpus = 1,
        .max_evtchn_port = 63,
        .max_grant_frames = 1,
        .grant_opts = XEN_DOMCTL_GRANT_version(1),
        .arch.emulation_flags = hvm ? XEN_X86_EMU_LAPIC : 0,
    };
    uint32_t domid = 0;
    int rc;

    memcpy(config.handle, uuid, sizeof(config.handle));
    rc = xc_domain_create(xc, &domid, &config);

    return rc ? check(rc) : domid;
}

int lab_destroy(uint32_t domid)
{
    return check(xc_domain_destroy(xc, domid));
}

static void *map(uint32_t domid, uint64_t gfn, int count, int prot)
{
    xen_pfn_t *gfns = calloc(count, sizeof(*gfns));
    int *errors = calloc(count, sizeof(*errors));
    void *pages;
    int i, error = 0;

    for (i = 0; i < count; i++) {
        gfns[i] = gfn + i;
    }
    pages = xenforeignmemory_map(foreign, domid, prot, count, gfns, errors);
    for (i = 0; pages && i < count; i++) {
        error = error ? error : errors[i];
    }
    if (pages && error) {
        xenforeignmemory_unmap(foreign, pages, count);
        pages = NULL;
        errno = abs(error);
    }
    free(gfns);
    free(errors);
    return pages;
}

/* A lasting read-write mapping (which unshares), for the mailbox. */
void *lab_map_rw(uint32_t domid, uint64_t gfn, int count)
{
    return map(domid, gfn, count, PROT_READ | PROT_WRITE);
}

int lab_unmap(void *pages, int count)
{
    return check(xenforeignmemory_unmap(foreign, pages, count));
}

/* Copy a page out; the mapping is read-only and does not last. */
int lab_peek(uint32_t domid, uint64_t gfn, void *out)
{
    void *page = map(domid, gfn, 1, PROT_READ);

    if (!page) {
        return -errno;
    }
    memcpy(out, page, PAGE);
    return lab_unmap(page, 1);
}

/* As a guest that grants a page would see dom0 do: map RW, write, unmap. */
int lab_poke(uint32_t domid, uint64_t gfn, uint32_t offset,
             const void *data, uint32_t count)
{
    char *page = map(domid, gfn, 1, PROT_READ | PROT_WRITE);

    if (!page) {
        return -errno;
    }
    memcpy(page + offset, data, count);
    return lab_unmap(page, 1);
}

/*
 * The first frames of a domain's grant table, mapped read-write.  Grants are
 * the domain's to make; but nothing keeps its builder from making some for it.
 */
void *lab_map_grants(uint32_t domid, uint32_t frames)
{
    void *table = NULL;

    return xenforeignmemory_map_resource(
        foreign, domid, XENMEM_resource_grant_table,
        XENMEM_resource_grant_table_id_shared, 0, frames, &table,
        PROT_READ | PROT_WRITE, 0) ? table : NULL;
}

/* A port of the domain that dom0 can bind to. */
int lab_event_port(uint32_t domid)
{
    return check(xc_evtchn_alloc_unbound(xc, domid, 0));
}

uint64_t lab_hash(const void *page)
{
    return page_hash(page);
}

void lab_fill(uint32_t *page, uint32_t seed)
{
    uint32_t i;

    for (i = 0; i < PAGE / 4; i++) {
        page[i] = fill_word(seed, i);
    }
}

/* Copy a xenstore value out; its length, or -errno. */
int lab_xenstore_read(const char *path, char *out, uint32_t max)
{
    unsigned int length;
    char *value = xs_read(store, XBT_NULL, path, &length);

    if (!value) {
        return -errno;
    }
    length = length < max ? length : max;
    memcpy(out, value, length);
    free(value);
    return length;
}

int lab_xenstore_write(const char *path, const char *value)
{
    return xs_write(store, XBT_NULL, path, value, strlen(value)) ? 0 : -errno;
}

int lab_xenstore_remove(const char *path)
{
    return xs_rm(store, XBT_NULL, path) ? 0 : -errno;
}
