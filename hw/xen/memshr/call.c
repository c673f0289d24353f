/*
 * Xen store of dedup-share: many memory operations in one system call
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A multicall has Xen work through a list of hypercalls.  libxenctrl has no
 * call that does this for memory sharing, so the operations are laid out
 * here, in memory that libxencall pins for the hypervisor.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "memshr.h"

#define BUF_SIZE (MEMSHR_MAX_CALLS * (sizeof(multicall_entry_t) +           \
                                      sizeof(xen_mem_sharing_op_t)))
#define BUF_PAGES DIV_ROUND_UP(BUF_SIZE, XC_PAGE_SIZE)

bool xen_memshr_calls_init(XenMemshrCalls *c, Error **errp)
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
    c->ops = (void *)(c->entries + MEMSHR_MAX_CALLS);
    return true;
}

void xen_memshr_calls_destroy(XenMemshrCalls *c)
{
    xencall_free_buffer_pages(c->xcall, c->buf, BUF_PAGES);
    xencall_close(c->xcall);
}

static unsigned append(XenMemshrCalls *c, unsigned long cmd, void *arg)
{
    assert(c->n < MEMSHR_MAX_CALLS);
    c->entries[c->n] = (multicall_entry_t) {
        .op = __HYPERVISOR_memory_op,
        .args = { cmd, (unsigned long)arg },
    };
    return c->n++;
}

static unsigned append_sharing(XenMemshrCalls *c, xen_mem_sharing_op_t op)
{
    c->ops[c->n] = op;
    return append(c, XENMEM_sharing_op, &c->ops[c->n]);
}

unsigned xen_memshr_nominate(XenMemshrCalls *c, uint32_t domid, uint64_t gfn)
{
    return append_sharing(c, (xen_mem_sharing_op_t) {
        .op = XENMEM_sharing_op_nominate_gfn,
        .domain = domid,
        .u.nominate.u.gfn = gfn,
    });
}

unsigned xen_memshr_share(XenMemshrCalls *c, uint32_t source,
                          uint64_t source_gfn, uint64_t source_handle,
                          uint32_t client, uint64_t client_gfn,
                          uint64_t client_handle)
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

unsigned xen_memshr_count(XenMemshrCalls *c, uint32_t domid, uint64_t gfn)
{
    return append_sharing(c, (xen_mem_sharing_op_t) {
        .op = XENMEM_sharing_op_debug_gfn,
        .domain = domid,
        .u.debug.u.gfn = gfn,
    });
}

void xen_memshr_calls_make(XenMemshrCalls *c)
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

uint64_t xen_memshr_handle(XenMemshrCalls *c, unsigned i)
{
    return c->ops[i].u.nominate.handle;
}
