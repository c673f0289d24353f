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
#include <xendevicemodel.h>
#include <xenforeignmemory.h>
#include <xen/grant_table.h>
#include <xen/memory.h>

#include "mailbox.h"

#define PAGE            4096
#define FRAMES          64
#define STORE_GFN       0x20000         /* any will do */
#define WORDS           (PAGE / 4)
#define BATCH           32
#define SHARES          16

/* Xen's own codes, which are negative; they come back as errno. */
#define CLIENT_INVALID  (-XENMEM_SHARING_OP_C_HANDLE_INVALID)
#define SOURCE_INVALID  (-XENMEM_SHARING_OP_S_HANDLE_INVALID)

static xc_interface *xc;
static xenforeignmemory_handle *foreign;
static xendevicemodel_handle *model;
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

static bool multicall(xencall_handle *call, int n)
{
    int i;

    memset(entries, 0, n * sizeof(*entries));
    for (i = 0; i < n; i++) {
        entries[i].op = __HYPERVISOR_memory_op;
        entries[i].args[0] = XENMEM_sharing_op;
        entries[i].args[1] = (unsigned long)&ops[i];
    }
    return !xencall2(call, __HYPERVISOR_multicall, (unsigned long)entries, n);
}

/* Have the first @n entries the result @want? */
static bool results(int n, long want)
{
    int i = 0;

    while (i < n && (long)entries[i].result == want) {
        i++;
    }
    return i == n;
}

static void nominate_op(int i, uint64_t gfn)
{
    ops[i] = (xen_mem_sharing_op_t) {
        .op = XENMEM_sharing_op_nominate_gfn,
        .domain = guest[1],
        .u.nominate.u.gfn = gfn,
    };
}

static void count_op(int i, uint64_t gfn)
{
    ops[i] = (xen_mem_sharing_op_t) {
        .op = XENMEM_sharing_op_debug_gfn,
        .domain = guest[1],
        .u.debug.u.gfn = gfn,
    };
}

static void share_op(int i, int f, uint64_t gfn, uint64_t handle)
{
    ops[i] = (xen_mem_sharing_op_t) {
        .op = XENMEM_sharing_op_share,
        .domain = store,
        .u.share = {
            .source_gfn = STORE_GFN + f,
            .source_handle = frame[f],
            .client_gfn = gfn,
            .client_handle = handle,
            .client_domain = guest[1],
        },
    };
}

static void multicalls(xencall_handle *call)
{
    bool right = true;
    int i;

    for (i = 0; i < SHARES; i++) {
        nominate_op(i, 0x900 + i);
    }
    fact(multicall(call, SHARES) && results(SHARES, 0),
         "16 nominations in one system call");
    for (i = 0; i < SHARES; i++) {
        share_op(i, 16 + i, 0x900 + i, ops[i].u.nominate.handle);
    }
    fact(multicall(call, SHARES) && results(SHARES, 0),
         "16 shares in the next");
    for (i = 0; i < SHARES; i++) {
        right &= guest_reads(1, 0x900 + i) == frame_word(16 + i);
    }
    fact(right, "and each page is the right one");
}

/* Making private: what it does, and that it loses nothing. */

static int make_private(int g, uint64_t gfn, unsigned n)
{
    return error(xendevicemodel_set_mem_type(model, guest[g], HVMMEM_ram_rw,
                                             gfn, n));
}

static void private_pages(void)
{
    uint64_t handle = 0, pages;
    bool right = true;
    int i;

    must(share(6, 0, 0x840), "share");
    must(share(6, 1, 0x840), "share");
    pages = info(guest[0]).nr_pages;
    expect(make_private(0, 0x840, 1), 0, "set_mem_type of a shared page");
    fact(references(6) == 2 && info(guest[0]).nr_pages == pages + 1,
         "unshares it");
    fact(guest_reads(0, 0x840) == frame_word(6) &&
         guest_reads(1, 0x840) == frame_word(6), "and keeps its content");
    for (i = 0; i < 16; i += 2) {
        must(share(32 + i, 1, 0x850 + i), "share");
    }
    guest_writes(1, 0x851, 0x51515151);
    must(nominate(1, 0x853, &handle), "nominate");
    expect(make_private(1, 0x850, 16), 0,
           "a run of shared, private and nominated pages in one call");
    for (i = 0; i < 16; i += 2) {
        right &= references(32 + i) == 1 &&
                 guest_reads(1, 0x850 + i) == frame_word(32 + i);
    }
    fact(right && guest_reads(1, 0x851) == 0x51515151,
         "makes all private, with their content");
    expect(share_handle(7, 1, 0x853, handle), CLIENT_INVALID,
           "a nomination from before is no longer good for a share");
}

static void private_without_memory(void)
{
    xc_dominfo_t before = info(guest[1]);

    must(share(8, 0, 0x841), "share");
    must(share(8, 1, 0x841), "share");
    must(xc_domain_setmaxmem(xc, guest[1], info(guest[1]).nr_pages * 4),
         "setmaxmem");
    expect(make_private(1, 0x841, 1), EAGAIN, "set_mem_type without memory");
    fact(references(8) == 3 && guest_reads(1, 0x841) == frame_word(8),
         "leaves the page as it is");
    must(xc_domain_setmaxmem(xc, guest[1], before.max_memkb), "setmaxmem");
    expect(make_private(1, 0x841, 1), 0, "and works later");
    fact(!info(guest[1]).crashed, "the guest is well");
}

/* References of a page that was nominated, by one multicall. */

static long count_after_nominate(xencall_handle *call, uint64_t gfn,
                                 uint64_t *handle)
{
    nominate_op(0, gfn);
    count_op(1, gfn);
    must(!multicall(call, 2), "multicall");
    if (entries[0].result) {
        return (long)entries[0].result;
    }
    *handle = ops[0].u.nominate.handle;
    return (long)entries[1].result;
}

static void counts(xencall_handle *call)
{
    xen_pfn_t gone = STORE_GFN + 9;
    uint64_t handle;

    fact(count_after_nominate(call, 0x860, &handle) == 1,
         "a fresh page has one reference when it was nominated");
    fact(count_after_nominate(call, 0x860, &handle) == 1, "and later");
    must(share(10, 1, 0x861), "share");
    fact(count_after_nominate(call, 0x861, &handle) == 2 &&
         handle == frame[10], "one that has a frame has more, and its handle");
    must(share(9, 1, 0x862), "share");
    must(xc_domain_decrease_reservation_exact(xc, store, 1, 0, &gone),
         "evict");
    fact(count_after_nominate(call, 0x862, &handle) == 1,
         "one whose frame was evicted has one");
    expect(share_handle(11, 1, 0x862, handle), 0, "and can be shared onto");
    fact(guest_reads(1, 0x862) == frame_word(11), "it has the new frame");
}

/*
 * Two that give to one gfn, each of which has nominated it and counted one
 * reference before the other goes on.
 */
static void two_at_once(xencall_handle *call)
{
    uint64_t first = 0, second = 0;

    fact(count_after_nominate(call, 0x870, &first) == 1 &&
         count_after_nominate(call, 0x870, &second) == 1 && first == second,
         "two requests for one page count one reference each");
    expect(share_handle(12, 1, 0x870, second), 0, "the one shares");
    expect(share_handle(13, 1, 0x870, first), CLIENT_INVALID,
           "and then the other cannot");
    fact(guest_reads(1, 0x870) == frame_word(12) && references(12) == 2 &&
         references(13) == 1, "the page has the frame of the first");
    must(make_private(1, 0x870, 1), "make private");
    expect(share_handle(13, 1, 0x870, first), CLIENT_INVALID,
           "nor when the page is private again");
    fact(count_after_nominate(call, 0x870, &second) == 1 && second != first,
         "a page that is nominated anew has another handle");
    expect(share_handle(13, 1, 0x870, second), 0, "which is good");
    must(make_private(1, 0x870, 1), "make private");
}

/* --- what giving costs ---------------------------------------------------- */

#define ROUNDS 200

static double now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

/* Give SHARES frames to private pages; with a count or without.  In us. */
static double give_all(xencall_handle *call, bool count)
{
    int step = count ? 2 : 1, i;
    uint64_t handles[SHARES];
    double start = now_us();

    for (i = 0; i < SHARES; i++) {
        nominate_op(step * i, 0x880 + i);
        if (count) {
            count_op(step * i + 1, 0x880 + i);
        }
    }
    must(!multicall(call, step * SHARES), "multicall");
    for (i = 0; i < SHARES; i++) {
        handles[i] = ops[step * i].u.nominate.handle;
    }
    for (i = 0; i < SHARES; i++) {
        share_op(i, 16 + i, 0x880 + i, handles[i]);
    }
    must(!multicall(call, SHARES) || !results(SHARES, 0), "share");
    return now_us() - start;
}

static void costs(xencall_handle *call)
{
    double us[2] = { 0, 0 }, private = 0, start;
    int i;

    must(make_private(1, 0x880, SHARES), "make private");
    for (i = 0; i < 2 * ROUNDS; i++) {
        us[i % 2] += give_all(call, i % 2);
        start = now_us();
        must(make_private(1, 0x880, SHARES), "make private");
        private += now_us() - start;
    }
    printf("cost: a page, %d rounds of %d: %.1f us to nominate and share, "
           "%.1f with a count, %.1f to make private before\n", ROUNDS, SHARES,
           us[0] / ROUNDS / SHARES, us[1] / ROUNDS / SHARES,
           private / 2 / ROUNDS / SHARES);
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
    xencall_handle *call;
    int g;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc != 3) {
        fprintf(stderr, "usage: xen-facts DOMID DOMID\n");
        return 2;
    }
    xc = xc_interface_open(NULL, NULL, 0);
    foreign = xenforeignmemory_open(NULL, 0);
    model = xendevicemodel_open(NULL, 0);
    must(!xc || !foreign || !model, "open");
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
    foreign_maps();
    call = xencall_open(NULL, 0);
    must(!call, "xencall_open");
    entries = xencall_alloc_buffer_pages(call, 1);
    ops = xencall_alloc_buffer_pages(call, 2);
    multicalls(call);
    private_pages();
    private_without_memory();
    counts(call);
    two_at_once(call);
    costs(call);
    xencall_close(call);
    evictions();
    claims();
    grants();
    end_of_store();
    no_memory();
    printf("%d facts wrong\n", wrong);
    return wrong != 0;
}
