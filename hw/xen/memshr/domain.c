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
#include "qemu/bitops.h"
#include "qemu/uuid.h"
#include "block/dedup-share/index-dir.h"
#include "memshr.h"

#define RECORD_DIR DEDUP_INDEX_DIR_DEFAULT "/.xen"

/* Two bits a gfn.  The file is sparse; a guest of 1 GiB fills 64 KiB. */
#define MAX_GFNS (1ULL << 28)
#define RECORD_SIZE (MAX_GFNS / 4)

enum { GIVEN = 1, BUSY = 2 };

/*
 * Opened once, in the main loop.  It stays mapped: the map cache asks it, and
 * pages stay shared, also when the last node is gone.
 */
static struct {
    uint32_t domid;
    uint64_t *words;            /* 32 gfns each; by qatomic_*() only */
} record;

static uint64_t *gfn_word(uint64_t gfn, unsigned *shift)
{
    *shift = gfn % 32 * 2;
    return &record.words[gfn / 32];
}

XenMemshrGfn xen_memshr_gfn_begin(uint64_t gfn)
{
    uint64_t *word, old, bits;
    unsigned shift;

    if (gfn >= MAX_GFNS) {
        return XEN_MEMSHR_GFN_BUSY;
    }
    word = gfn_word(gfn, &shift);
    old = qatomic_fetch_or(word, (uint64_t)(GIVEN | BUSY) << shift);
    bits = old >> shift;
    return bits & BUSY ? XEN_MEMSHR_GFN_BUSY :
           bits & GIVEN ? XEN_MEMSHR_GFN_GIVEN : XEN_MEMSHR_GFN_FRESH;
}

void xen_memshr_gfn_end(uint64_t gfn)
{
    unsigned shift;
    uint64_t *word = gfn_word(gfn, &shift);

    qatomic_and(word, ~((uint64_t)BUSY << shift));
}

bool xen_memshr_gfn_given(uint64_t gfn)
{
    uint64_t *words = qatomic_read(&record.words);

    if (!words || gfn >= MAX_GFNS) {
        return false;
    }
    return qatomic_read(&words[gfn / 32]) >> (gfn % 32 * 2) & GIVEN;
}

/* 1: *info is set; 0: there is no such domain; -1: Xen did not say. */
static int get_info(xc_interface *xc, uint32_t domid, xc_dominfo_t *info)
{
    int n = xc_domain_getinfo(xc, domid, 1, info);

    return n == 1 ? info->domid == domid : n;
}

/* A domid is reused in time, and a UUID by the toolstack; not both at once. */
static char *record_name(const xc_dominfo_t *info)
{
    QemuUUID uuid;
    g_autofree char *text = NULL;

    memcpy(&uuid, info->handle, sizeof(uuid));
    text = qemu_uuid_unparse_strdup(&uuid);
    return g_strdup_printf("%" PRIu32 "-%s", info->domid, text);
}

/* Remove the records of domains that are gone.  The directory is locked. */
static void sweep(xc_interface *xc, int dirfd)
{
    g_autoptr(GDir) d = g_dir_open(RECORD_DIR, 0, NULL);
    const char *name;

    while (d && (name = g_dir_read_name(d))) {
        g_autofree char *current = NULL;
        xc_dominfo_t info;
        int found;

        if (!g_ascii_isdigit(name[0])) {
            continue;
        }
        found = get_info(xc, atoi(name), &info);
        if (found == 1) {
            current = record_name(&info);
        }
        if (found >= 0 && g_strcmp0(current, name)) {
            unlinkat(dirfd, name, 0);
        }
    }
}

static uint64_t *map_record(int dirfd, const xc_dominfo_t *info,
                            Error **errp)
{
    g_autofree char *name = record_name(info);
    int fd = openat(dirfd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    void *words = MAP_FAILED;
    struct stat st;

    if (fd < 0 && errno == ENOENT && info->nr_shared_pages) {
        error_setg(errp, "store: domain %" PRIu32 " shares %lu pages and "
                   "nobody can say which; restart the domain, and let nothing "
                   "but dedup-share share its memory", info->domid,
                   info->nr_shared_pages);
        return NULL;
    }
    if (fd < 0 && errno == ENOENT) {
        /* it gets its name when it is complete */
        fd = openat(dirfd, "new", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC |
                    O_NOFOLLOW, 0600);
        if (fd >= 0 && (ftruncate(fd, RECORD_SIZE) < 0 ||
                        renameat(dirfd, "new", dirfd, name) < 0)) {
            close(fd);
            fd = -1;
        }
    }
    if (fd >= 0 && !fstat(fd, &st)) {
        errno = EINVAL;
        if (st.st_size == RECORD_SIZE) {
            words = mmap(NULL, RECORD_SIZE, PROT_READ | PROT_WRITE,
                         MAP_SHARED, fd, 0);
        }
    }
    if (words == MAP_FAILED) {
        error_setg_errno(errp, errno, "store: could not open '%s/%s'",
                         RECORD_DIR, name);
        words = NULL;
    }
    if (fd >= 0) {
        close(fd);
    }
    return words;
}

bool xen_memshr_domain_open(uint32_t domid, xc_interface *xc, Error **errp)
{
    DedupDir dir;
    xc_dominfo_t info;
    uint64_t *words = NULL;

    if (record.words) {
        assert(record.domid == domid);
        return true;
    }
    if (!dedup_dir_lock(&dir, DEDUP_INDEX_DIR_DEFAULT, ".xen", errp)) {
        return false;
    }
    sweep(xc, dir.fd);
    if (get_info(xc, domid, &info) != 1) {
        error_setg(errp, "store: there is no domain %" PRIu32, domid);
    } else {
        words = map_record(dir.fd, &info, errp);
    }
    dedup_dir_close(&dir);
    if (!words) {
        return false;
    }
    record.domid = domid;
    qatomic_set(&record.words, words);
    return true;
}
