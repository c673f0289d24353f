/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * xen-facts DOMID DOMID: what the Xen store takes for granted about Xen.
 *
 * Takes two tiny guests, makes a store domain, and prints a line for each
 * fact: "ok" or "WRONG".  Exits with 1 if any was wrong.  If a new Xen changes
 * one of these, the store has to change with it.
 *
 * One fact is left out on purpose: sharing a frame onto a gfn that already
 * shares another frame brings the whole host down.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <xenctrl.h>
#include <xencall.h>
#include <xenforeignmemory.h>
#include <xen/grant_table.h>
#include <xen/memory.h>

#include "mailbox.h"

#define PAGE            4096
#define FRAMES          64
#define STORE_GFN       0x20000         /* any will do */
#define WORDS           (PAGE / 4)
#define BATCH           16
#define NO_PAGE         0xffffffff      /* what a guest reads from a hole */

/* Xen's own codes, which are negative; they come back as errno. */
#define CLIENT_INVALID  (-XENMEM_SHARING_OP_C_HANDLE_INVALID)
#define SOURCE_INVALID  (-XENMEM_SHARING_OP_S_HANDLE_INVALID)

static xc_interface *xc;
static xenforeignmemory_handle *foreign;
static uint32_t store, guest[2];
static volatile struct mailbox *mailbox[2];
static uint64_t frame[FRAMES];          /* the handles of sealed frames */
static int wrong;

static void fact(bool holds, const char *text)
{
    printf("%s: %s\n", holds ? "ok" : "WRONG", text);
    wrong += !holds;
}

/* An errno, or 0: calls are compared by it. */
static int error(int result)
{
    return result ? errno : 0;
}

static void expect(int got, int want, const char *text)
{
    if (got != want) {
        printf("got %d (%s), expected %d\n", got, strerror(got), want);
    }
    fact(got == want, text);
}

static void must(int result, const char *what)
{
    if (result) {
        printf("WRONG: cannot go on: %s: %s\n", what, strerror(errno));
        exit(1);
    }
}

/* Mappings */

static void *map(uint32_t domid, uint64_t gfn, int count, int prot)
{
    xen_pfn_t gfns[FRAMES];
    int errors[FRAMES] = { 0 };
    void *pages;
    int i;

    for (i = 0; i < count; i++) {
        gfns[i] = gfn + i;
    }
    pages = xenforeignmemory_map(foreign, domid, prot, count, gfns, errors);
    for (i = 0; pages && i < count; i++) {
        if (errors[i]) {
            must(-1, "map");
        }
    }
    must(!pages, "map");
    return pages;
}

static void unmap(void *pages, int count)
{
    must(xenforeignmemory_unmap(foreign, pages, count), "unmap");
}

/* Guests: gfn of guest g, and frame number f of the store */

static uint32_t ask(int g, uint32_t command, uint32_t arg0, uint32_t arg1)
{
    int tries;

    mailbox[g]->arg[0] = arg0;
    mailbox[g]->arg[1] = arg1;
    __sync_synchronize();
    mailbox[g]->command = command;
    for (tries = 0; mailbox[g]->command; tries++) {
        if (tries == 20000) {
            errno = ETIMEDOUT;
            must(-1, "a guest's answer");
        }
        usleep(500);
    }
    return mailbox[g]->result[0];
}

static uint32_t guest_reads(int g, uint64_t gfn)
{
    return ask(g, CMD_READ32, gfn * PAGE, 0);
}

static void guest_writes(int g, uint64_t gfn, uint32_t value)
{
    ask(g, CMD_WRITE32, gfn * PAGE, value);
}

static uint32_t frame_word(int f)
{
    return 0xabc00000 | f;
}

static int nominate(int g, uint64_t gfn, uint64_t *handle)
{
    return error(xc_memshr_nominate_gfn(xc, guest[g], gfn, handle));
}

static int share_handle(int f, int g, uint64_t gfn, uint64_t handle)
{
    return error(xc_memshr_share_gfns(xc, store, STORE_GFN + f, frame[f],
                                      guest[g], gfn, handle));
}

/* A hit: only for a gfn that is not shared. */
static int share(int f, int g, uint64_t gfn)
{
    uint64_t handle;

    must(nominate(g, gfn, &handle), "nominate");
    return share_handle(f, g, gfn, handle);
}

static int punch(int g, uint64_t gfn)
{
    xen_pfn_t extent = gfn;

    return error(xc_domain_decrease_reservation_exact(xc, guest[g], 1, 0,
                                                      &extent));
}

static int plug(int f, int g, uint64_t gfn, uint64_t handle)
{
    return error(xc_memshr_add_to_physmap(xc, store, STORE_GFN + f, handle,
                                          guest[g], gfn));
}

static int references(int f)
{
    return xc_memshr_debug_gfn(xc, store, STORE_GFN + f);
}

static xc_dominfo_t info(uint32_t domid)
{
    xc_dominfo_t found;

    must(xc_domain_getinfo(xc, domid, 1, &found) != 1, "getinfo");
    return found;
}

static uint64_t shared_pages(int g)
{
    return info(guest[g]).nr_shared_pages;
}

/* The facts */

static struct xen_domctl_createdomain store_config(void)
{
    return (struct xen_domctl_createdomain) {
        .flags = XEN_DOMCTL_CDF_hvm | XEN_DOMCTL_CDF_hap,
        .max_vcpus = 1,
        .max_grant_frames = 1,
        .grant_opts = XEN_DOMCTL_GRANT_version(1),
        .arch.emulation_flags = XEN_X86_EMU_LAPIC,
    };
}

static void control(void)
{
    expect(error(xc_memshr_control(xc, 0, 1)), EOPNOTSUPP,
           "a PV domain such as dom0 cannot share");
    expect(error(xc_memshr_control(xc, 999, 1)), ESRCH,
           "memshr_control of an unknown domain");
    expect(error(xc_memshr_audit(xc)), EOPNOTSUPP,
           "a Xen without debugging has no audit");
}

static void create_store(void)
{
    struct xen_domctl_createdomain config = store_config();
    uint32_t none = 0;

    config.arch.emulation_flags = 0;
    expect(error(xc_domain_create(xc, &none, &config)), EOPNOTSUPP,
           "a store domain without LAPIC is refused");
    config = store_config();
    expect(error(xc_domain_create(xc, &store, &config)), 0,
           "a store domain needs no vCPU, kernel or device model");
    must(xc_set_paging_mempool_size(xc, store, 2 << 20), "mempool");
    expect(error(xc_memshr_control(xc, store, 1)), 0, "and can share");
    must(xc_domain_setmaxmem(xc, store, 64 << 10), "setmaxmem");
    must(xc_memshr_control(xc, guest[0], 1), "control of the first guest");
    must(xc_memshr_control(xc, guest[1], 1), "control of the second guest");
}

static void fill_and_seal(void)
{
    xen_pfn_t gfns[FRAMES];
    uint32_t *window;
    bool sealed = true;
    int i, j;

    for (i = 0; i < FRAMES; i++) {
        gfns[i] = STORE_GFN + i;
    }
    expect(error(xc_domain_populate_physmap_exact(xc, store, FRAMES, 0, 0,
                                                  gfns)), 0,
           "frames can be had at any gfn");
    window = map(store, STORE_GFN, FRAMES, PROT_READ | PROT_WRITE);
    for (i = 0; i < FRAMES; i++) {
        for (j = 0; j < WORDS; j++) {
            window[i * WORDS + j] = frame_word(i);
        }
    }
    expect(error(xc_memshr_nominate_gfn(xc, store, STORE_GFN, &frame[0])),
           E2BIG, "a frame mapped read-write cannot be sealed");
    must(mprotect(window, FRAMES * PAGE, PROT_READ), "mprotect");
    expect(error(xc_memshr_nominate_gfn(xc, store, STORE_GFN, &frame[0])),
           E2BIG, "and mprotect does not help");
    unmap(window, FRAMES);
    for (i = 0; i < FRAMES; i++) {
        sealed &= !xc_memshr_nominate_gfn(xc, store, STORE_GFN + i, &frame[i]);
    }
    fact(sealed, "unmapped, 64 frames can");
    fact(references(0) == 1, "an idle frame has one reference");
}

static void peek(void)
{
    uint32_t *page = map(store, STORE_GFN, 1, PROT_READ);

    fact(page[1] == frame_word(0), "a sealed frame can be mapped read-only");
    expect(share(0, 0, 0x800), 0, "and be given meanwhile");
    fact(guest_reads(0, 0x800) == frame_word(0) &&
         guest_reads(0, 0x801) != frame_word(0),
         "the guest sees the frame, whatever it had before");
    unmap(page, 1);
}

static void give(void)
{
    long freed = xc_sharing_freed_pages(xc);
    uint64_t pages = info(guest[1]).nr_pages, handle = 0;

    expect(share(0, 1, 0x800), 0, "a second guest gets the same frame");
    fact(references(0) == 3, "references: one, and one a guest");
    fact(xc_sharing_freed_pages(xc) == freed + 1,
         "sharing_freed_memory rises by one");
    fact(shared_pages(1) == 1, "nr_shared_pages is one");
    fact(info(guest[1]).nr_pages == pages - 1, "and nr_pages one less");
    expect(nominate(1, 0x800, &handle), 0, "nominating it again works");
    fact(handle == frame[0], "and returns the store frame's handle");
}

static void mapped_client(void)
{
    uint64_t handle;
    void *page = map(guest[0], 0x810, 1, PROT_READ);

    expect(nominate(0, 0x810, &handle), E2BIG,
           "a guest's page that is mapped, even read-only, cannot be nominated");
    unmap(page, 1);
    expect(nominate(0, 0x810, &handle), 0, "unmapped, it can");
}

static void guest_write(void)
{
    guest_writes(1, 0x800, 0x11111111);
    fact(guest_reads(1, 0x800) == 0x11111111 &&
         guest_reads(0, 0x800) == frame_word(0),
         "a guest's write is its own");
    fact(references(0) == 2, "and drops one reference");
    fact(shared_pages(1) == 0, "and one of nr_shared_pages");
}

static void stale_handles(void)
{
    uint64_t handle;

    must(nominate(1, 0x801, &handle), "nominate");
    guest_writes(1, 0x801, 1);
    expect(share_handle(1, 1, 0x801, handle), CLIENT_INVALID,
           "share after the guest wrote: client handle invalid");
    must(nominate(1, 0x801, &handle), "nominate");
    expect(error(xc_memshr_share_gfns(xc, store, STORE_GFN + 1,
                                      frame[1] + 100000, guest[1], 0x801,
                                      handle)),
           SOURCE_INVALID, "share of a stale frame: source handle invalid");
    expect(share_handle(1, 1, 0x801, handle), 0, "with both right, it works");
}

static void holes_and_plugs(void)
{
    xen_pfn_t extent = 0x802;

    expect(plug(2, 0, 0x802, frame[2]), CLIENT_INVALID,
           "plug onto a populated gfn");
    expect(punch(0, 0x802), 0, "decrease_reservation of a guest's gfn");
    fact(guest_reads(0, 0x802) == NO_PAGE, "leaves a hole that reads as ~0");
    expect(plug(2, 0, 0x802, frame[2] + 100000), SOURCE_INVALID,
           "plug of a stale frame");
    expect(plug(2, 0, 0x802, frame[2]), 0, "plug into the hole");
    fact(guest_reads(0, 0x802) == frame_word(2), "gives the frame");
    expect(punch(0, 0x802), 0, "punch where a frame is shared");
    expect(plug(3, 0, 0x802, frame[3]), 0, "and plug another one");
    fact(guest_reads(0, 0x802) == frame_word(3) && references(2) == 1,
         "replaces a shared frame safely");
    must(punch(0, 0x802), "punch");
    expect(error(xc_domain_populate_physmap_exact(xc, guest[0], 1, 0, 0,
                                                  &extent)), 0,
           "a hole can be filled again with memory");
}

static void orphan_mapping(void)
{
    volatile uint32_t *page;

    guest_writes(0, 0x803, 0x33333333);
    page = map(guest[0], 0x803, 1, PROT_READ | PROT_WRITE);
    expect(punch(0, 0x803), 0, "punching works under a mapping of dom0");
    must(plug(4, 0, 0x803, frame[4]), "plug");
    fact(*page == 0x33333333, "which goes on showing the orphaned page");
    *page = 0x44444444;
    fact(guest_reads(0, 0x803) == frame_word(4), "and writes into nowhere");
    unmap((void *)page, 1);
}

static void foreign_maps(void)
{
    volatile uint32_t *page;

    must(share(5, 0, 0x804), "share");
    page = map(guest[0], 0x804, 1, PROT_READ);
    fact(references(5) == 2, "a read-only mapping leaves a page shared");
    guest_writes(0, 0x804, 0x55555555);
    fact(*page == frame_word(5), "but is stale once the guest has written");
    unmap((void *)page, 1);
    must(share(5, 0, 0x804), "share");
    page = map(guest[0], 0x804, 1, PROT_READ | PROT_WRITE);
    fact(references(5) == 1, "a read-write mapping unshares, touched or not");
    unmap((void *)page, 1);
}

/* Entries of one multicall, and their operations. */
static multicall_entry_t *entries;
static xen_mem_sharing_op_t *ops;

static bool multicall(xencall_handle *call)
{
    int i;

    memset(entries, 0, BATCH * sizeof(*entries));
    for (i = 0; i < BATCH; i++) {
        entries[i].op = __HYPERVISOR_memory_op;
        entries[i].args[0] = XENMEM_sharing_op;
        entries[i].args[1] = (unsigned long)&ops[i];
    }
    if (xencall2(call, __HYPERVISOR_multicall, (unsigned long)entries, BATCH)) {
        return false;
    }
    for (i = 0; i < BATCH; i++) {
        if (entries[i].result) {
            return false;
        }
    }
    return true;
}

static void nominate_op(int i, uint64_t gfn)
{
    ops[i] = (xen_mem_sharing_op_t) {
        .op = XENMEM_sharing_op_nominate_gfn,
        .domain = guest[1],
        .u.nominate.u.gfn = gfn,
    };
}

static void share_op(int i, uint64_t gfn)
{
    uint64_t handle = ops[i].u.nominate.handle;

    ops[i] = (xen_mem_sharing_op_t) {
        .op = XENMEM_sharing_op_share,
        .domain = store,
        .u.share = {
            .source_gfn = STORE_GFN + 16 + i,
            .source_handle = frame[16 + i],
            .client_gfn = gfn,
            .client_handle = handle,
            .client_domain = guest[1],
        },
    };
}

static void multicalls(void)
{
    xencall_handle *call = xencall_open(NULL, 0);
    bool right = true;
    int i;

    must(!call, "xencall_open");
    entries = xencall_alloc_buffer_pages(call, 1);
    ops = xencall_alloc_buffer_pages(call, 1);
    for (i = 0; i < BATCH; i++) {
        nominate_op(i, 0x900 + i);
    }
    fact(multicall(call), "16 nominations in one system call");
    for (i = 0; i < BATCH; i++) {
        share_op(i, 0x900 + i);
    }
    fact(multicall(call), "16 shares in the next");
    for (i = 0; i < BATCH; i++) {
        right &= guest_reads(1, 0x900 + i) == frame_word(16 + i);
    }
    fact(right, "and each page is the right one");
    xencall_close(call);
}

static void evictions(void)
{
    xen_pfn_t idle = STORE_GFN + 40, busy = STORE_GFN + 16;
    uint64_t handle;

    expect(error(xc_domain_decrease_reservation_exact(xc, store, 1, 0, &idle)),
           0, "an idle frame can be evicted");
    expect(error(xc_domain_decrease_reservation_exact(xc, store, 1, 0, &busy)),
           0, "so can one in use");
    fact(guest_reads(1, 0x900) == frame_word(16), "its guest keeps it");
    fact(xc_memshr_nominate_gfn(xc, store, busy, &handle) != 0,
         "an evicted frame is gone from the store");
}

static uint64_t claimed(void)
{
    xc_physinfo_t physical;

    must(xc_physinfo(xc, &physical), "physinfo");
    return physical.outstanding_pages;
}

static void claims(void)
{
    xc_dominfo_t now = info(guest[1]);

    expect(error(xc_domain_claim_pages(xc, guest[1], now.nr_pages +
                                       now.nr_shared_pages)), 0,
           "memory for all unshares can be claimed");
    fact(claimed() == now.nr_shared_pages, "as many pages as are shared");
    guest_writes(1, 0x901, 1);
    fact(claimed() == now.nr_shared_pages - 1, "an unshare takes one of them");
    must(xc_domain_claim_pages(xc, guest[1], 0), "end of the claim");
}

#define GRANT_GFN 0x1f00
#define GRANT_REF 8

static void grants(void)
{
    xenforeignmemory_resource_handle *resource;
    grant_entry_v1_t *table;
    uint64_t handle;
    void *seen = NULL;

    must(punch(0, GRANT_GFN), "punch");
    must(xc_domain_add_to_physmap(xc, guest[0], XENMAPSPACE_grant_table, 0,
                                  GRANT_GFN), "grant table");
    table = map(guest[0], GRANT_GFN, 1, PROT_READ | PROT_WRITE);
    table[GRANT_REF].frame = 0x820;
    table[GRANT_REF].domid = 0;
    __sync_synchronize();
    table[GRANT_REF].flags = GTF_permit_access;
    expect(error(xc_memshr_nominate_gref(xc, guest[0], GRANT_REF, &handle)),
           E2BIG, "nominate_gref refuses a granted, unmapped page");
    expect(nominate(0, 0x820, &handle), 0, "nominate_gfn takes it");
    resource = xenforeignmemory_map_resource(
        foreign, guest[0], XENMEM_resource_grant_table,
        XENMEM_resource_grant_table_id_shared, 0, 1, &seen, PROT_READ, 0);
    fact(resource && ((grant_entry_v1_t *)seen)[GRANT_REF].frame == 0x820,
         "a grant's gfn can be read from the guest's grant table");
    if (resource) {
        xenforeignmemory_unmap_resource(foreign, resource);
    }
    unmap(table, 1);
}

static void end_of_store(void)
{
    must(share(50, 0, 0x830), "share");
    must(share(50, 1, 0x830), "share");
    must(share(51, 0, 0x831), "share");
    must(share(51, 1, 0x831), "share");
    must(xc_domain_destroy(xc, store), "destroy");
    fact(guest_reads(0, 0x830) == frame_word(50) &&
         guest_reads(1, 0x830) == frame_word(50),
         "guests keep their frames when the store domain is destroyed");
    fact(shared_pages(0) && shared_pages(1), "still shared");
    guest_writes(0, 0x830, 7);
    fact(guest_reads(0, 0x830) == 7 && guest_reads(1, 0x830) == frame_word(50),
         "and still copied on write");
}

/* Of two holders of a page: the last one would not need memory. */
static void no_memory(void)
{
    int tries = 4000;

    must(xc_domain_setmaxmem(xc, guest[1], info(guest[1]).nr_pages * 4),
         "setmaxmem");
    mailbox[1]->arg[0] = 0x831 * PAGE;
    mailbox[1]->arg[1] = 7;
    __sync_synchronize();
    mailbox[1]->command = CMD_WRITE32;
    while (!info(guest[1]).crashed && --tries) {
        usleep(500);
    }
    fact(info(guest[1]).crashed,
         "a guest whose unshare finds no memory crashes, without a ring");
}

int main(int argc, char **argv)
{
    int g;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc != 3) {
        fprintf(stderr, "usage: xen-facts DOMID DOMID\n");
        return 2;
    }
    xc = xc_interface_open(NULL, NULL, 0);
    foreign = xenforeignmemory_open(NULL, 0);
    must(!xc || !foreign, "open");
    for (g = 0; g < 2; g++) {
        guest[g] = atoi(argv[1 + g]);
        mailbox[g] = map(guest[g], MAILBOX_GFN, 1, PROT_READ | PROT_WRITE);
    }
    control();
    create_store();
    fill_and_seal();
    peek();
    give();
    mapped_client();
    guest_write();
    stale_handles();
    holes_and_plugs();
    orphan_mapping();
    foreign_maps();
    multicalls();
    evictions();
    claims();
    grants();
    end_of_store();
    no_memory();
    printf("%d facts wrong\n", wrong);
    return wrong != 0;
}
