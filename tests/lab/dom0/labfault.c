/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Faults for a device model, or a store daemon, preloaded into it: single
 * operations that it asks of Xen fail or are late.  All others are made, by the real Xen.
 *
 * The file that $LABFAULT names holds the rules, which the scenario changes
 * while the device model runs; faults.py has the other end.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xenctrl.h>
#include <xencall.h>
#include <xendevicemodel.h>
#include <xenforeignmemory.h>

enum kind {
    NONE,
    NOMINATE, SHARE, COUNT,                     /* entries of a multicall */
    MULTICALL,                                  /* the whole */
    STORE_POPULATE, STORE_MAP,                  /* of the store domain */
    PRIVATE, PAUSE,                             /* of the guest */
};

struct rule {
    uint32_t kind;
    int32_t result;     /* of an entry; or errno of a call; 0: as it is */
    uint32_t delay_ms;  /* wait so long before it */
    uint32_t skip;      /* let so many pass first; counts down */
    uint32_t count;     /* then do it to so many; counts down */
    uint32_t done;      /* how many were done */
};

#define RULES 4

static struct rule *rules(void)
{
    static struct rule *r;
    int fd;

    if (!r) {
        fd = open(getenv("LABFAULT"), O_RDWR | O_CLOEXEC);
        r = mmap(NULL, RULES * sizeof(*r), PROT_READ | PROT_WRITE, MAP_SHARED,
                 fd, 0);
        if (r == MAP_FAILED) {
            abort();
        }
        close(fd);
    }
    return r;
}

/* What is to happen to the next operation of a kind: its result, or 0. */
static int apply(enum kind kind)
{
    struct rule *r;

    for (r = rules(); r < rules() + RULES; r++) {
        if (kind == NONE || r->kind != kind || !r->count) {
            continue;
        }
        if (r->skip) {
            r->skip--;
            continue;
        }
        r->count--;
        r->done++;
        usleep(r->delay_ms * 1000);
        return r->result;
    }
    return 0;
}

static enum kind kind_of(const multicall_entry_t *e)
{
    const xen_mem_sharing_op_t *op = (void *)(uintptr_t)e->args[1];

    if (e->args[0] != XENMEM_sharing_op) {
        return NONE;
    }
    return op->op == XENMEM_sharing_op_nominate_gfn ? NOMINATE :
           op->op == XENMEM_sharing_op_share ? SHARE :
           op->op == XENMEM_sharing_op_debug_gfn ? COUNT : NONE;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define NO_HYPERCALL 63
#define MAX_ENTRIES 128

/* Not from a library: libxenctrl makes its calls as multicalls of one, too. */
static bool from_program(const void *caller)
{
    Dl_info info;

    return dladdr(caller, &info) && strstr(info.dli_fname, "/qemu-");
}

int xencall2(xencall_handle *xcall, unsigned int op, uint64_t arg1,
             uint64_t arg2)
{
    multicall_entry_t *entries = (void *)(uintptr_t)arg1;
    uint64_t i;
    int ret, error;
    bool failed[MAX_ENTRIES];
    int results[MAX_ENTRIES];

    if (op != __HYPERVISOR_multicall ||
        !from_program(__builtin_return_address(0))) {
        return REAL(xencall2)(xcall, op, arg1, arg2);
    }
    if (arg2 > MAX_ENTRIES) {
        abort();
    }
    error = apply(MULTICALL);
    if (error) {
        errno = error;
        return -1;
    }
    for (i = 0; i < arg2; i++) {
        results[i] = apply(kind_of(&entries[i]));
        failed[i] = results[i];
        if (failed[i]) {
            entries[i].op = NO_HYPERCALL;
        }
    }
    ret = REAL(xencall2)(xcall, op, arg1, arg2);
    for (i = 0; i < arg2; i++) {
        if (failed[i]) {
            entries[i].result = results[i];
        }
    }
    return ret;
}

#define FAIL(kind, value) do {          \
        int error = apply(kind);        \
        if (error) {                    \
            errno = error;              \
            return value;               \
        }                               \
    } while (0)

int xc_domain_populate_physmap(xc_interface *xch, uint32_t domid,
                               unsigned long nr, unsigned int order,
                               unsigned int flags, xen_pfn_t *extents)
{
    FAIL(STORE_POPULATE, -1);
    return REAL(xc_domain_populate_physmap)(xch, domid, nr, order, flags,
                                            extents);
}

int xc_domain_pause(xc_interface *xch, uint32_t domid)
{
    FAIL(PAUSE, -1);
    return REAL(xc_domain_pause)(xch, domid);
}

void *xenforeignmemory_map(xenforeignmemory_handle *fmem, uint32_t domid,
                           int prot, size_t n, const xen_pfn_t gfns[],
                           int errors[])
{
    FAIL(STORE_MAP, NULL);
    return REAL(xenforeignmemory_map)(fmem, domid, prot, n, gfns, errors);
}

int xendevicemodel_set_mem_type(xendevicemodel_handle *dmod, domid_t domid,
                                uint32_t type, uint64_t gfn, uint32_t n)
{
    FAIL(PRIVATE, -1);
    return REAL(xendevicemodel_set_mem_type)(dmod, domid, type, gfn, n);
}
