/*
 * Xen store of dedup-share: which gfns of the guest were ever given
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One file a domain in a fixed directory, whatever the group and index-dir:
 * two disks of one guest may be in two groups, and in two processes, and
 * both must know of each other's gives.  See memshr.h for what must hold.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/ctype.h"
#include "qemu/cutils.h"
#include "qemu/uuid.h"
#include "block/dedup-share/index-dir.h"
#include "block/dedup-share/sparse.h"
#include "memshr.h"

#define RECORD_DIR DEDUP_INDEX_DIR_DEFAULT "/.xen"

/* Two bits a gfn; a guest of 1 GiB fills 64 KiB. */
#define MAX_GFNS (1ULL << 28)
#define RECORD_SIZE (MAX_GFNS / 4)

enum { GIVEN = 1, BUSY = 2 };

/*
 * Opened once, in the main loop.  It stays mapped: the map cache asks it, and
 * pages stay shared, also when the last node is gone.
 */
static struct {
    uint32_t domid;
    DedupSparse file;
    uint64_t *words;            /* in it, 32 gfns each; by qatomic_*() only */
} record;

/* Regions that are split, and stay so. */
static unsigned long split[BITS_TO_LONGS(MAX_GFNS / MEMSHR_REGION_GFNS)];

/* Can guests not make large mappings?  Changes before the first give. */
static bool split_is_final;

bool xen_memshr_region_is_split(uint64_t gfn)
{
    return split_is_final && test_bit(gfn / MEMSHR_REGION_GFNS, split);
}

void xen_memshr_region_set_split(uint64_t gfn)
{
    if (split_is_final) {
        set_bit_atomic(gfn / MEMSHR_REGION_GFNS, split);
    }
}

/*
 * Does the command line of Xen keep guests from making mappings of 2 MiB, whose
 * order is 9?  memop-max-order=DOMU,...; what is said last counts.
 */
static bool guests_make_small_pages(xc_interface *xc)
{
    xen_commandline_t line = "";
    g_auto(GStrv) words = NULL;
    unsigned i, order = 9;

    if (xc_version(xc, XENVER_commandline, &line) < 0) {
        return false;
    }
    words = g_strsplit(line, " ", -1);
    for (i = 0; words[i]; i++) {
        const char *value;

        if (strstart(words[i], "memop-max-order=", &value) &&
            qemu_isdigit(value[0])) {
            order = atoi(value);
        }
    }
    return order < 9;
}

/* The word of @gfn, or NULL if the tmpfs has no memory for it. */
static uint64_t *gfn_word(uint64_t gfn, unsigned *shift)
{
    uint64_t *word = &record.words[gfn / 32];

    *shift = gfn % 32 * 2;
    return dedup_sparse_back(&record.file, (gfn / 32) * sizeof(*word)) ? word
                                                                       : NULL;
}

XenMemshrGfn xen_memshr_gfn_begin(uint64_t gfn)
{
    uint64_t *word, old, bits;
    unsigned shift;

    if (gfn >= MAX_GFNS) {
        return XEN_MEMSHR_GFN_BUSY;
    }
    word = gfn_word(gfn, &shift);
    if (!word) {
        return XEN_MEMSHR_GFN_FULL;
    }
    old = qatomic_fetch_or(word, (uint64_t)(GIVEN | BUSY) << shift);
    bits = old >> shift;
    return bits & BUSY ? XEN_MEMSHR_GFN_BUSY :
           bits & GIVEN ? XEN_MEMSHR_GFN_GIVEN : XEN_MEMSHR_GFN_FRESH;
}

void xen_memshr_gfn_end(uint64_t gfn)
{
    unsigned shift;
    uint64_t *word = gfn_word(gfn, &shift);     /* begun, so it is there */

    qatomic_and(word, ~((uint64_t)BUSY << shift));
}

bool xen_memshr_gfn_given(uint64_t gfn)
{
    uint64_t *word;
    unsigned shift;

    if (!qatomic_load_acquire(&record.words) || gfn >= MAX_GFNS) {
        return false;
    }
    word = gfn_word(gfn, &shift);
    return !word || qatomic_read(word) >> shift & GIVEN;
}

int xen_memshr_domain_info(xc_interface *xc, uint32_t domid,
                           xc_domaininfo_t *info)
{
    /* the first domain from domid on */
    int n = xc_domain_getinfolist(xc, domid, 1, info);

    return n == 1 ? info->domain == domid : n;
}

/* A domid is reused in time, and a UUID by the toolstack; not both at once. */
static char *record_name(const xc_domaininfo_t *info)
{
    QemuUUID uuid;
    g_autofree char *text = NULL;

    memcpy(&uuid, info->handle, sizeof(uuid));
    text = qemu_uuid_unparse_strdup(&uuid);
    return g_strdup_printf("%u-%s", info->domain, text);
}

/* Remove the records of domains that are gone.  The directory is locked. */
static void sweep(xc_interface *xc, int dirfd)
{
    g_autoptr(GDir) d = g_dir_open(RECORD_DIR, 0, NULL);
    const char *name;

    while (d && (name = g_dir_read_name(d))) {
        g_autofree char *current = NULL;
        xc_domaininfo_t info;
        int found;

        if (!g_ascii_isdigit(name[0])) {
            continue;
        }
        found = xen_memshr_domain_info(xc, atoi(name), &info);
        if (found == 1) {
            current = record_name(&info);
        }
        if (found >= 0 && g_strcmp0(current, name)) {
            unlinkat(dirfd, name, 0);
        }
    }
}

/* A record under a name of its own, renamed when it is complete. */
static int make_record(int dirfd, const char *name)
{
    int fd = openat(dirfd, "new", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC |
                    O_NOFOLLOW, 0600);

    if (fd >= 0 && (ftruncate(fd, RECORD_SIZE) < 0 ||
                    renameat(dirfd, "new", dirfd, name) < 0)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static bool map_record(int dirfd, const xc_domaininfo_t *info, Error **errp)
{
    g_autofree char *name = record_name(info);
    int fd = openat(dirfd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    struct stat st;

    if (fd < 0 && errno == ENOENT && info->shr_pages) {
        error_setg(errp, "store: domain %u shares %" PRIu64 " pages and "
                   "nobody can say which; restart the domain, and let nothing "
                   "but dedup-share share its memory", info->domain,
                   (uint64_t)info->shr_pages);
        return false;
    }
    if (fd < 0 && errno == ENOENT) {
        fd = make_record(dirfd, name);
    }
    if (fd >= 0 && (fstat(fd, &st) < 0 || st.st_size != RECORD_SIZE)) {
        close(fd);
        fd = -1;
        errno = EINVAL;
    }
    if (fd < 0 || !dedup_sparse_open(&record.file, fd, RECORD_SIZE)) {
        error_setg_errno(errp, errno, "store: could not open '%s/%s'",
                         RECORD_DIR, name);
        return false;
    }
    return true;
}

bool xen_memshr_domain_open(uint32_t domid, xc_interface *xc, Error **errp)
{
    DedupDir dir;
    xc_domaininfo_t info;
    bool ok = false;

    if (record.words) {
        assert(record.domid == domid);
        return true;
    }
    if (!dedup_dir_lock(&dir, DEDUP_INDEX_DIR_DEFAULT, ".xen", errp)) {
        return false;
    }
    sweep(xc, dir.fd);
    if (xen_memshr_domain_info(xc, domid, &info) != 1) {
        error_setg(errp, "store: there is no domain %" PRIu32, domid);
    } else {
        ok = map_record(dir.fd, &info, errp);
    }
    dedup_dir_close(&dir);
    if (ok) {
        split_is_final = guests_make_small_pages(xc);
        record.domid = domid;
        qatomic_store_release(&record.words, record.file.base);
    }
    return ok;
}
