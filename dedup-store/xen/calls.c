/*
 * qemu-dedup-store: Xen's memory, and many operations in one system call
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A multicall has Xen work through a list of hypercalls.  libxenctrl has no
 * call that does this for memory sharing, so the operations are laid out
 * here, in memory that libxencall pins for the hypervisor.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "dedup-store/xen-calls.h"

#define BUF_SIZE (XEN_CALLS_MAX * (sizeof(multicall_entry_t) +              \
                                   sizeof(xen_mem_sharing_op_t)))
#define BUF_PAGES DIV_ROUND_UP(BUF_SIZE, XC_PAGE_SIZE)

int xen_get_domain_info(xc_interface *xc, uint32_t domid,
                        xc_domaininfo_t *info)
{
    /* the first domain from domid on */
    int n = xc_domain_getinfolist(xc, domid, 1, info);

    return n == 1 ? info->domain == domid : n;
}

bool xen_get_spare_pages(xc_interface *xc, int64_t *spare, uint64_t *total)
{
    xc_physinfo_t info = { 0 };

    if (xc_physinfo(xc, &info)) {
        return false;
    }
    *spare = (int64_t)(info.free_pages - info.outstanding_pages);
    if (total) {
        *total = info.total_pages;
    }
    return true;
}

bool xen_can_nominate(xc_interface *xc)
{
    int64_t spare;

    return xen_get_spare_pages(xc, &spare, NULL) && spare >= XEN_SPARE_FLOOR;
}

bool xen_calls_init(XenCalls *c, Error **errp)
{
    memset(c, 0, sizeof(*c));
    c->xcall = xencall_open(NULL, 0);
    if (!c->xcall) {
        error_setg_errno(errp, errno, "store: cannot make Xen hypercalls");
        return false;
    }
    c->buf = xencall_alloc_buffer_pages(c->xcall, BUF_PAGES);
    if (!c->buf) {
        error_setg_errno(errp, errno, "store: no memory for hypercalls");
        xencall_close(c->xcall);
        c->xcall = NULL;
        return false;
    }
    c->entries = c->buf;
    c->ops = (void *)(c->entries + XEN_CALLS_MAX);
    return true;
}

void xen_calls_destroy(XenCalls *c)
{
    if (c->xcall) {
        xencall_free_buffer_pages(c->xcall, c->buf, BUF_PAGES);
        xencall_close(c->xcall);
    }
}

static unsigned append(XenCalls *c, unsigned long cmd, void *arg)
{
    assert(c->n < XEN_CALLS_MAX);
    c->entries[c->n] = (multicall_entry_t) {
        .op = __HYPERVISOR_memory_op,
        .args = { cmd, (unsigned long)arg },
    };
    return c->n++;
}

static unsigned append_sharing(XenCalls *c, xen_mem_sharing_op_t op)
{
    c->ops[c->n] = op;
    return append(c, XENMEM_sharing_op, &c->ops[c->n]);
}

unsigned xen_calls_nominate(XenCalls *c, uint32_t domid, uint64_t gfn)
{
    return append_sharing(c, (xen_mem_sharing_op_t) {
        .op = XENMEM_sharing_op_nominate_gfn,
        .domain = domid,
        .u.nominate.u.gfn = gfn,
    });
}

unsigned xen_calls_share(XenCalls *c, uint32_t source, uint64_t source_gfn,
                         uint64_t source_handle, uint32_t client,
                         uint64_t client_gfn, uint64_t client_handle)
{
    return append_sharing(c, (xen_mem_sharing_op_t) {
        .op = XENMEM_sharing_op_share,
        .domain = source,
        .u.share.source_gfn = source_gfn,
        .u.share.source_handle = source_handle,
        .u.share.client_domain = client,
        .u.share.client_gfn = client_gfn,
        .u.share.client_handle = client_handle,
    });
}

unsigned xen_calls_count(XenCalls *c, uint32_t domid, uint64_t gfn)
{
    return append_sharing(c, (xen_mem_sharing_op_t) {
        .op = XENMEM_sharing_op_debug_gfn,
        .domain = domid,
        .u.debug.u.gfn = gfn,
    });
}

void xen_calls_make(XenCalls *c)
{
    unsigned i;
    int ret;

    if (!c->n) {
        return;
    }
    ret = xencall2(c->xcall, __HYPERVISOR_multicall,
                   (unsigned long)c->entries, c->n);
    for (i = 0; i < c->n; i++) {
        /* no error of the call itself may look like an operation's answer */
        c->rc[i] = ret < 0 ? -EIO : (long)c->entries[i].result;
    }
    c->hypercalls += c->n;
    c->system_calls++;
    c->n = 0;
}

uint64_t xen_calls_handle(XenCalls *c, unsigned i)
{
    return c->ops[i].u.nominate.handle;
}
