/*
 * qemu-dedup-store: what it and its clients ask of Xen
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Facts about Xen that are used here were measured on Xen 4.17.5 and are
 * asserted by tests/lab/dom0/xen-facts.c.
 */

#ifndef DEDUP_STORE_XEN_CALLS_H
#define DEDUP_STORE_XEN_CALLS_H

#include <xenctrl.h>
#include <xencall.h>

/* The gfn of slot 0 in the store domain. */
#define XEN_STORE_GFN_BASE 0x10000ULL

/*
 * A page of the store domain that is never a frame; it is there to be mapped
 * read-only.  As long as somebody maps a page that a domain owns (a frame is
 * owned by dom_cow) that domain keeps its domid, even when it was destroyed, so
 * that no other can be taken for it.
 */
#define XEN_STORE_GFN_PIN (XEN_STORE_GFN_BASE - 1)

static inline uint64_t xen_store_gfn(uint32_t slot)
{
    return XEN_STORE_GFN_BASE + slot;
}

/* --- domains -------------------------------------------------------------- */

/* 1: *info is set; 0: there is no such domain; -1: Xen did not say. */
int xen_get_domain_info(xc_interface *xc, uint32_t domid,
                        xc_domaininfo_t *info);

/* --- Xen's memory --------------------------------------------------------- */

/*
 * Pages that are free and that no domain has claimed: less than 0 if more are
 * claimed than free.  *total, if not NULL, is what the host has.  False: Xen
 * did not say.
 */
bool xen_get_spare_pages(xc_interface *xc, int64_t *spare, uint64_t *total);

/*
 * Is there memory for a batch of nominations?  Xen allocates about a hundred
 * bytes for each, and the host comes down where it cannot (Xen 4.17,
 * xen/arch/x86/mm/mem_sharing.c).  Between this look and the nominations others
 * may take memory: so the floor, 16 MiB, is that of thousands of batches.
 */
#define XEN_SPARE_FLOOR 4096
bool xen_can_nominate(xc_interface *xc);

/* --- many memory operations in one system call --------------------------- */

#define XEN_CALLS_MAX 128

/*
 * A list of operations to be made in one multicall, in order.  Not thread
 * safe.  rc[i] is an operation's result: >= 0, or -errno.
 */
typedef struct XenCalls {
    xencall_handle *xcall;
    void *buf;                  /* hypercall-safe memory of all below */
    multicall_entry_t *entries;
    xen_mem_sharing_op_t *ops;
    unsigned n;
    long rc[XEN_CALLS_MAX];
    uint64_t hypercalls;        /* made since init */
    uint64_t system_calls;
} XenCalls;

/* False with *errp set if Xen cannot be called. */
bool xen_calls_init(XenCalls *c, Error **errp);
/* Also if it was not initialised, and is zeroed. */
void xen_calls_destroy(XenCalls *c);

/* Append an operation; they return its number. */
unsigned xen_calls_nominate(XenCalls *c, uint32_t domid, uint64_t gfn);
unsigned xen_calls_share(XenCalls *c, uint32_t source, uint64_t source_gfn,
                         uint64_t source_handle, uint32_t client,
                         uint64_t client_gfn, uint64_t client_handle);
/* Result: how many gfns share the page; -EINVAL: it is not shared. */
unsigned xen_calls_count(XenCalls *c, uint32_t domid, uint64_t gfn);

/* Make them.  If the multicall itself fails, every result is -EIO. */
void xen_calls_make(XenCalls *c);

/* The handle that a nomination returned. */
uint64_t xen_calls_handle(XenCalls *c, unsigned i);

#endif /* DEDUP_STORE_XEN_CALLS_H */
