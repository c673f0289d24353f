/*
 * Xen store of dedup-share: the guest's grant table
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A PV disk's request names guest pages by grant references.  The entry of the
 * guest's grant table says which gfn that is.  The table is the guest's memory,
 * and the guest may write anything there at any time.  So what is read from it
 * is only ever used as a page of that guest: the worst that a guest gets by
 * lying is a frame in a page of its own that it did not mean.
 *
 * Nothing is marked in the table: that would be Xen's to do, for a mapping, and
 * a page that is mapped cannot be nominated.  So an entry is read again right
 * before the page is given.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/error-report.h"
#include "hw/xen/xen_native.h"
#include "system/xen.h"
#include "memshr.h"

/*
 * An entry of version 2, for a whole page: grant_entry_v2_t of Xen's public
 * grant_table.h, which declares it for some versions of the interface only.
 */
typedef struct GrantEntryV2 {
    uint16_t flags;
    uint16_t domid;
    uint32_t pad;
    uint64_t frame;
} GrantEntryV2;

#define V2_GTF_sub_page (1U << 8)

/* Frames are mapped as references need them; no guest has more than this. */
#define MAX_FRAMES 4096

void xen_memshr_grants_close(XenGuest *s)
{
    if (s->grants.resource) {
        xen_memshr_count_calls(s, 0, 1);
        xenforeignmemory_unmap_resource(s->fmem, s->grants.resource);
    }
    memset(&s->grants, 0, sizeof(s->grants));
}

static unsigned get_version(XenGuest *s)
{
    if (!s->grants.version) {
        xen_memshr_count_calls(s, 1, 1);
        return xc_gnttab_get_version(s->xc, xen_domid);
    }
    return s->grants.version;
}

/* Map so much of the table that the entry of @ref is in it. */
static bool grants_map(XenGuest *s, uint32_t ref)
{
    unsigned version = get_version(s);
    size_t size = version == 2 ? sizeof(GrantEntryV2)
                               : sizeof(grant_entry_v1_t);
    uint64_t frames = (uint64_t)ref * size / XC_PAGE_SIZE + 1;
    xenforeignmemory_resource_handle *resource;
    void *table = NULL;

    if (version < 1 || version > 2 || frames > MAX_FRAMES) {
        return false;
    }
    xen_memshr_count_calls(s, frames, 2);       /* mmap, ioctl */
    resource = xenforeignmemory_map_resource(
        s->fmem, xen_domid, XENMEM_resource_grant_table,
        XENMEM_resource_grant_table_id_shared, 0, frames, &table, PROT_READ,
        0);
    if (!resource) {
        return false;
    }
    xen_memshr_grants_close(s);
    s->grants = (XenMemshrGrants) {
        .resource = resource, .version = version, .table = table,
        .nrefs = frames * (XC_PAGE_SIZE / size),
    };
    return true;
}

/* May @peer write to the page, all of it, and is it the guest's own? */
static bool flags_ok(uint16_t flags, uint16_t domid, uint16_t peer)
{
    const uint16_t no = GTF_readonly | V2_GTF_sub_page;

    return (flags & GTF_type_mask) == GTF_permit_access && !(flags & no) &&
           domid == peer;
}

static bool read_v1(const XenMemshrGrants *g, uint32_t ref, uint16_t peer,
                    uint64_t *gfn)
{
    const uint64_t *table = g->table;
    union {
        uint64_t word;
        grant_entry_v1_t entry;
    } u = { .word = qatomic_read(&table[ref]) };     /* seen as one */

    QEMU_BUILD_BUG_ON(sizeof(u.entry) != sizeof(u.word));
    *gfn = u.entry.frame;
    return flags_ok(u.entry.flags, u.entry.domid, peer);
}

static bool read_v2(const XenMemshrGrants *g, uint32_t ref, uint16_t peer,
                    uint64_t *gfn)
{
    const GrantEntryV2 *e = (const GrantEntryV2 *)g->table + ref;
    uint16_t flags = qatomic_read(&e->flags);
    uint16_t domid = qatomic_read(&e->domid);

    *gfn = qatomic_read(&e->frame);
    return flags_ok(flags, domid, peer);
}

bool xen_memshr_grant_gfn(XenGuest *s, uint32_t ref, uint16_t peer,
                          uint64_t *gfn)
{
    XenMemshrGrants *g = &s->grants;

    if (ref >= g->nrefs && !grants_map(s, ref)) {
        return false;
    }
    return g->version == 2 ? read_v2(g, ref, peer, gfn)
                           : read_v1(g, ref, peer, gfn);
}
