/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Counts what a device model asks of Xen for the data of PV disks, preloaded
 * into it.  The file that $LABCOUNT names holds the counts; counts.py reads it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xencall.h>
#include <xenctrl.h>
#include <xendevicemodel.h>
#include <xenforeignmemory.h>
#include <xengnttab.h>

struct counts {
    uint64_t hypercalls;        /* each entry of a multicall is one */
    uint64_t system_calls;
    uint64_t copied_segments;
    uint64_t copied_bytes;
};

static struct counts *counts(void)
{
    static struct counts *c;
    int fd;

    if (!c) {
        fd = open(getenv("LABCOUNT"), O_RDWR | O_CLOEXEC);
        c = mmap(NULL, sizeof(*c), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (c == MAP_FAILED) {
            abort();
        }
        close(fd);
    }
    return c;
}

#define ADD(field, n) __atomic_fetch_add(&counts()->field, n, __ATOMIC_RELAXED)
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* libxenctrl's calls come here as well: multicalls of one, or plain ones. */
int xencall2(xencall_handle *xcall, unsigned int op, uint64_t arg1,
             uint64_t arg2)
{
    ADD(hypercalls, op == __HYPERVISOR_multicall ? arg2 : 1);
    ADD(system_calls, 1);
    return REAL(xencall2)(xcall, op, arg1, arg2);
}

/* It takes an mmap and an ioctl, and a munmap later. */
void *xenforeignmemory_map(xenforeignmemory_handle *fmem, uint32_t domid,
                           int prot, size_t n, const xen_pfn_t gfns[],
                           int errors[])
{
    ADD(hypercalls, n);
    ADD(system_calls, 3);
    return REAL(xenforeignmemory_map)(fmem, domid, prot, n, gfns, errors);
}

xenforeignmemory_resource_handle *xenforeignmemory_map_resource(
    xenforeignmemory_handle *fmem, domid_t domid, unsigned int type,
    unsigned int id, unsigned long frame, unsigned long n, void **address,
    int prot, int flags)
{
    ADD(hypercalls, n);
    ADD(system_calls, 3);
    return REAL(xenforeignmemory_map_resource)(fmem, domid, type, id, frame, n,
                                               address, prot, flags);
}

int xendevicemodel_set_mem_type(xendevicemodel_handle *dmod, domid_t domid,
                                uint32_t type, uint64_t gfn, uint32_t n)
{
    ADD(hypercalls, 1);
    ADD(system_calls, 1);
    return REAL(xendevicemodel_set_mem_type)(dmod, domid, type, gfn, n);
}

int xengnttab_grant_copy(xengnttab_handle *xgt, uint32_t n,
                         xengnttab_grant_copy_segment_t *segments)
{
    uint64_t bytes = 0;
    uint32_t i;

    for (i = 0; i < n; i++) {
        bytes += segments[i].len;
    }
    ADD(hypercalls, 1);
    ADD(system_calls, 1);
    ADD(copied_segments, n);
    ADD(copied_bytes, bytes);
    return REAL(xengnttab_grant_copy)(xgt, n, segments);
}
