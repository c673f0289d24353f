/*
 * qemu-dedup-store: the domain that owns the frames on Xen, and its pages
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A page of a store domain, and who moves it on:
 *
 *   none --xen_pages_populate()--> private --xen_pages_seal()--> shared
 *    ^                              |   ^                          |
 *    '------xen_pages_free()--------'   '----xen_pages_retire()----'
 *
 * Invariants
 *
 * - Only private pages are mapped writable, and no mapping lasts.  Writing to a
 *   shared page would have Xen take it out of the share.
 * - A page is made private again only if Xen counts no other user of it.
 * - What a page held is zeroed before Xen gets it back: Xen clears only pages
 *   of domains that end.
 * - A store domain is destroyed when it has no frame any more.  A frame that
 *   only a guest has would bring Xen down if it were mapped while that guest
 *   ends.
 */

#ifndef DEDUP_STORE_XEN_DOMAIN_H
#define DEDUP_STORE_XEN_DOMAIN_H

#include "dedup-store/xen-calls.h"      /* before other headers of Xen */
#include <xenforeignmemory.h>
#include <xendevicemodel.h>

/* Most pages in one call of the functions below. */
#define XEN_PAGES_MAX 64

/* Handles to Xen.  For one thread at a time. */
typedef struct XenHost {
    xc_interface *xc;
    xenforeignmemory_handle *fmem;
    xendevicemodel_handle *dmod;
    XenCalls calls;
} XenHost;

/* False with *errp set if there is no Xen, or it cannot be talked to. */
bool xen_host_open(XenHost *h, Error **errp);
/* Also a half-open one. */
void xen_host_close(XenHost *h);

/* --- the domain ----------------------------------------------------------- */

typedef struct XenStoreDomain {
    XenHost *host;
    uint32_t domid;
    void *pin;                  /* see XEN_STORE_GFN_PIN */
} XenStoreDomain;

/* What the domains of @group's daemon at @place are known by. */
void xen_store_uuid(const char *group, const char *place, uint8_t uuid[16]);

/*
 * Make a domain for @nslots frames, with the handle @uuid, which xl lists by
 * the name of @group.  False with *errp set on error.
 */
bool xen_store_domain_create(XenStoreDomain *d, XenHost *h, const char *group,
                             const uint8_t uuid[16], uint32_t nslots,
                             Error **errp);

/*
 * The first domain with the handle @uuid from *domid on, which a daemon has
 * left: *d is it, pinned, and *domid is stepped on.  False: there is none.
 * Those that were never finished, and so have no page, are destroyed.
 */
bool xen_store_domain_find(XenStoreDomain *d, XenHost *h, const char *group,
                           const uint8_t uuid[16], uint32_t *domid);

/*
 * Does Xen say that it is there, and not ending?  Somebody may have destroyed
 * it: pages of a domain that ends must not be unshared, which would bring Xen
 * down.  Or does Xen say that it is gone, or ending?  It may say neither.
 */
bool xen_store_domain_is_there(const XenStoreDomain *d);
bool xen_store_domain_is_gone(const XenStoreDomain *d);

/* Frames that the domain has; UINT32_MAX if Xen does not say. */
uint64_t xen_store_domain_count(const XenStoreDomain *d);

/*
 * Free all frames that nobody uses, and destroy the domain if it has none then.
 * *left is how many it has; 0 if it is gone.  *stop, which is atomic, ends that
 * early.
 */
void xen_store_domain_drain(XenStoreDomain *d, uint64_t *left,
                            const bool *stop);

/* Let go of the domain, which stays. */
void xen_store_domain_leave(XenStoreDomain *d);

/* Destroy the domain if it has no frame, else leave it. */
void xen_store_domain_end(XenStoreDomain *d);

/* --- its pages: @n at @gfns, at most XEN_PAGES_MAX ------------------------ */

/* How many, from the first on, are there now. */
unsigned xen_pages_populate(XenStoreDomain *d, xen_pfn_t *gfns, unsigned n);

/* Private ones: copy @buf to them, which is 0 or -errno. */
int xen_pages_write(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                    const void *buf);

/* Copy them to @buf: 0 or -errno. */
int xen_pages_read(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                   void *buf);

/*
 * Nominate private ones: handles[i] is what gfns[i] is shared by, or 0 if it is
 * not, as with -errno.
 */
int xen_pages_seal(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                   uint64_t *handles);

/* What Xen has counted of a page. */
typedef enum XenPage {
    XEN_PAGE_USED,              /* somebody beside the domain has it */
    XEN_PAGE_RETIRED,           /* it was shared, and is private */
    XEN_PAGE_UNSHARED,          /* it was private, or there is none */
} XenPage;

/* Make private those that only the domain has: pages[i] is what gfns[i] is. */
void xen_pages_retire(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                      XenPage *pages);

/*
 * Private ones, and gfns without a page: zero the pages and give them back to
 * Xen.  freed[i]: gfns[i] was one.
 */
void xen_pages_free(XenStoreDomain *d, const xen_pfn_t *gfns, unsigned n,
                    bool *freed);

#endif /* DEDUP_STORE_XEN_DOMAIN_H */
