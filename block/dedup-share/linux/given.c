/*
 * dedup-share: guest pages that map frames of Linux stores
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See given.h for what must hold.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/lockable.h"
#include "block/dedup-share.h"
#include "given.h"
#include "trace/trace-block_dedup_share.h"

/*
 * A page of a table: 0, or the owner's id << 32 | slot.  If it is known to be a
 * copy, which the guest or QEMU has written to, it does not use the frame any
 * more; but it is still part of the frames' mapping.
 */
#define COPY (1ULL << 63)

/* The memory of one DedupRam. */
typedef struct Table {
    DedupRam ram;
    uint64_t *pages;
    QLIST_ENTRY(Table) next;
} Table;

static const DedupRamOps *ram_ops;
static unsigned last_owner;

/* Protects the rest, and is held while guest memory is mapped. */
static QemuMutex lock;
static QLIST_HEAD(, Table) tables = QLIST_HEAD_INITIALIZER(tables);
static uint64_t mappings;       /* boundaries between pages, see edge() */
static uint64_t budget;

static void __attribute__((constructor)) given_init(void)
{
    qemu_mutex_init(&lock);
}

static uint64_t find_budget(void)
{
    g_autofree char *text = NULL;

    if (!g_file_get_contents("/proc/sys/vm/max_map_count", &text, NULL,
                             NULL)) {
        return 65530 / 2;       /* the kernel's default */
    }
    return g_ascii_strtoull(text, NULL, 10) / 2;
}

void dedup_given_set_ram(const DedupRamOps *ops)
{
    ram_ops = ops;
    budget = find_budget();
}

void dedup_given_set_budget(uint64_t most)
{
    QEMU_LOCK_GUARD(&lock);
    budget = most;
}

void dedup_given_owner_init(DedupGivenOwner *owner, int fd)
{
    QEMU_LOCK_GUARD(&lock);
    *owner = (DedupGivenOwner) { .id = ++last_owner, .fd = fd };
}

/* The table for @host, if there is one. */
static Table *table_at(const void *host)
{
    const uint8_t *p = host;
    Table *t;

    QLIST_FOREACH(t, &tables, next) {
        if (p >= t->ram.host && p - t->ram.host < t->ram.size) {
            return t;
        }
    }
    return NULL;
}

/* The same; made if all of @n pages at @host may be mapped over. */
static Table *table_for(void *host, unsigned n)
{
    size_t size = n * DEDUP_BLOCK_SIZE;
    DedupRam ram;
    Table *t;

    if (!ram_ops || !QEMU_PTR_IS_ALIGNED(host, DEDUP_BLOCK_SIZE) ||
        !ram_ops->find(host, &ram) ||
        size > ram.size - ((uint8_t *)host - ram.host)) {
        return NULL;
    }
    t = table_at(host);
    if (!t) {
        t = g_new0(Table, 1);
        t->ram = ram;
        t->pages = g_new0(uint64_t, ram.size / DEDUP_BLOCK_SIZE);
        QLIST_INSERT_HEAD(&tables, t, next);
    }
    return t;
}

static size_t page_of(const Table *t, const void *host)
{
    return ((uint8_t *)host - t->ram.host) / DEDUP_BLOCK_SIZE;
}

/*
 * Is there a boundary of two mappings in front of @page?  The kernel merges
 * neighbours that map what follows each other in one file.
 */
static bool edge(const Table *t, size_t page)
{
    size_t n = t->ram.size / DEDUP_BLOCK_SIZE;
    uint64_t before = page ? t->pages[page - 1] & ~COPY : 0;
    uint64_t after = page < n ? t->pages[page] & ~COPY : 0;

    return before ? after != before + 1 : after;
}

static unsigned edges(const Table *t, size_t page, size_t n)
{
    unsigned count = 0;
    size_t i;

    for (i = page; i <= page + n; i++) {
        count += edge(t, i);
    }
    return count;
}

/* Pages from @page on map the frames from @entry on, or, if that is 0, none. */
static void set_pages(Table *t, size_t page, size_t n, uint64_t entry)
{
    size_t i;

    mappings -= edges(t, page, n);
    for (i = 0; i < n; i++) {
        t->pages[page + i] = entry ? entry + i : 0;
    }
    mappings += edges(t, page, n);
}

/* May a run of @n pages get a mapping of its own? */
static bool worth_it(unsigned n)
{
    uint64_t left = budget - MIN(budget, mappings);

    return n >= 64 ? left >= 4 : n >= 16 ? left > budget / 16 :
           n >= 4 ? left > budget / 8 : n >= 2 ? left > budget / 4 :
           left > budget / 2;
}

/* Where an attempt to map something failed: see that something is mapped. */
static void mend(void *host, size_t size)
{
    size_t i;
    unsigned char there;

    for (i = 0; i < size; i += DEDUP_BLOCK_SIZE) {
        if (!mincore(host + i, DEDUP_BLOCK_SIZE, &there) || errno != ENOMEM) {
            continue;
        }
        if (mmap(host + i, DEDUP_BLOCK_SIZE, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
            MAP_FAILED) {
            abort();            /* the kernel has lost a page of the guest */
        }
        ram_ops->advise(host + i, DEDUP_BLOCK_SIZE, true);
    }
}

bool dedup_given_map(DedupGivenOwner *owner, void *host, uint32_t slot,
                     unsigned n)
{
    size_t size = n * DEDUP_BLOCK_SIZE;
    Table *t;

    QEMU_LOCK_GUARD(&lock);
    t = table_for(host, n);
    if (!t || !worth_it(n) || !ram_ops->may_give()) {
        return false;
    }
    if (mmap(host, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
             owner->fd, (off_t)slot * DEDUP_BLOCK_SIZE) == MAP_FAILED) {
        trace_dedup_given_map_failed(host, n, errno);
        mend(host, size);
        return false;
    }
    ram_ops->advise(host, size, false);
    set_pages(t, page_of(t, host), n, (uint64_t)owner->id << 32 | slot);
    return true;
}

static int drop_run(Table *t, size_t page, size_t n)
{
    uint8_t *host = t->ram.host + page * DEDUP_BLOCK_SIZE;
    size_t size = n * DEDUP_BLOCK_SIZE;
    int err;

    if (mmap(host, size, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) {
        err = errno;
        mend(host, size);
        memset(host, 0, size);
        return -err;
    }
    ram_ops->advise(host, size, true);
    set_pages(t, page, n, 0);
    return 0;
}

int dedup_given_drop(void *host, size_t size)
{
    size_t page, end, run;
    int ret = 0;
    Table *t;

    QEMU_LOCK_GUARD(&lock);
    t = table_at(host);
    if (!t) {
        return 0;
    }
    page = page_of(t, host);
    end = MIN(page + size / DEDUP_BLOCK_SIZE, t->ram.size / DEDUP_BLOCK_SIZE);
    for (; page < end; page += run) {
        run = 0;
        while (page + run < end && t->pages[page + run]) {
            run++;
        }
        if (run) {
            ret = drop_run(t, page, run) ?: ret;
        } else {
            run = 1;
        }
    }
    return ret;
}

void dedup_given_forget(void *host)
{
    Table *t;

    QEMU_LOCK_GUARD(&lock);
    t = table_at(host);
    if (t) {
        set_pages(t, 0, t->ram.size / DEDUP_BLOCK_SIZE, 0);
        QLIST_REMOVE(t, next);
        g_free(t->pages);
        g_free(t);
    }
}

void dedup_given_wait(void)
{
    QEMU_LOCK_GUARD(&lock);
}

/* /proc/PID/pagemap, see the kernel's admin-guide/mm/pagemap.rst */
#define PM_UFFD_WP  (1ULL << 57)
#define PM_FILE     (1ULL << 61)
#define PM_SWAP     (1ULL << 62)
#define PM_PRESENT  (1ULL << 63)

/*
 * Is it certain that a page of a private mapping is a copy of its own?  The
 * entry of one that was never touched is 0; that of one with a userfault
 * marker may look as if it was swapped out.
 */
static bool is_copy(uint64_t entry)
{
    return entry & (PM_PRESENT | PM_SWAP) && !(entry & (PM_FILE | PM_UFFD_WP));
}

/* Look at so many pages at a time: others wait for the lock. */
#define EACH 512

static bool uses(uint64_t entry, DedupGivenOwner *owner)
{
    return entry >> 32 == owner->id;        /* and is no copy */
}

/* What the kernel says of @n pages from @page on; in doubt, nothing. */
static void ask_kernel(Table *t, size_t page, size_t n, int pagemap,
                       uint64_t *entries)
{
    size_t size = n * sizeof(uint64_t);
    off_t at = (uintptr_t)(t->ram.host + page * DEDUP_BLOCK_SIZE) /
               DEDUP_BLOCK_SIZE * sizeof(uint64_t);

    if (pread(pagemap, entries, size, at) != size) {
        memset(entries, 0, size);
    }
}

static void each_page(DedupGivenOwner *owner, Table *t, size_t page, size_t n,
                      int pagemap, void (*used)(void *opaque, uint32_t slot),
                      void *opaque)
{
    uint64_t entries[EACH];
    bool asked = false;
    size_t i;

    for (i = 0; i < n; i++) {
        if (!uses(t->pages[page + i], owner)) {
            continue;
        }
        if (!asked) {
            ask_kernel(t, page, n, pagemap, entries);
            asked = true;
        }
        if (is_copy(entries[i])) {
            t->pages[page + i] |= COPY;
        } else {
            used(opaque, t->pages[page + i]);
        }
    }
}

/* The next EACH pages of a table: *host says where, and where to go on. */
static bool each_step(DedupGivenOwner *owner, uint8_t **host, int pagemap,
                      void (*used)(void *opaque, uint32_t slot), void *opaque)
{
    Table *t, *next = NULL;
    size_t page, n;

    QEMU_LOCK_GUARD(&lock);
    /* tables come and go: in the order of their addresses none is left out */
    QLIST_FOREACH(t, &tables, next) {
        if (t->ram.host + t->ram.size > *host &&
            (!next || t->ram.host < next->ram.host)) {
            next = t;
        }
    }
    if (!next) {
        return false;
    }
    page = *host > next->ram.host ? page_of(next, *host) : 0;
    n = MIN(EACH, next->ram.size / DEDUP_BLOCK_SIZE - page);
    each_page(owner, next, page, n, pagemap, used, opaque);
    *host = next->ram.host + (page + n) * DEDUP_BLOCK_SIZE;
    return true;
}

void dedup_given_each(DedupGivenOwner *owner,
                      void (*used)(void *opaque, uint32_t slot), void *opaque)
{
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint8_t *host = NULL;
    bool more;

    do {
        more = each_step(owner, &host, pagemap, used, opaque);
    } while (more);
    if (pagemap >= 0) {
        close(pagemap);
    }
}

bool dedup_given_any(DedupGivenOwner *owner)
{
    size_t i;
    Table *t;

    QEMU_LOCK_GUARD(&lock);
    QLIST_FOREACH(t, &tables, next) {
        for (i = 0; i < t->ram.size / DEDUP_BLOCK_SIZE; i++) {
            if (uses(t->pages[i], owner)) {
                return true;
            }
        }
    }
    return false;
}

void dedup_given_mappings(uint64_t *used, uint64_t *most)
{
    QEMU_LOCK_GUARD(&lock);
    *used = mappings;
    *most = budget;
}
