/*
 * Xen store of dedup-share: what this process knows of its guest's gfns
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Hints, which may be wrong either way: another process may give frames to
 * the same guest, and the guest writes when it likes.
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/ctype.h"
#include "qemu/cutils.h"
#include "qemu/lockable.h"
#include "memshr.h"

/* 2 MiB of the guest. */
typedef struct Region {
    bool split;
    DECLARE_BITMAP(given, MEMSHR_REGION_GFNS);
} Region;

static QemuMutex lock;          /* a leaf; protects the table */
static GHashTable *regions;     /* gfn / MEMSHR_REGION_GFNS -> Region */

/* Can guests not make large mappings?  Changes before the first give. */
static bool split_is_final;

static Region *find_region(uint64_t gfn)
{
    gpointer key = GSIZE_TO_POINTER(gfn / MEMSHR_REGION_GFNS);

    return regions ? g_hash_table_lookup(regions, key) : NULL;
}

static Region *get_region(uint64_t gfn)
{
    Region *r = find_region(gfn);

    if (!r) {
        r = g_new0(Region, 1);
        g_hash_table_insert(regions, GSIZE_TO_POINTER(gfn /
                                                      MEMSHR_REGION_GFNS), r);
    }
    return r;
}

bool xen_memshr_gfn_given(uint64_t gfn)
{
    Region *r;

    QEMU_LOCK_GUARD(&lock);
    r = find_region(gfn);
    return r && test_bit(gfn % MEMSHR_REGION_GFNS, r->given);
}

void xen_memshr_gfn_set_given(uint64_t gfn)
{
    QEMU_LOCK_GUARD(&lock);
    set_bit(gfn % MEMSHR_REGION_GFNS, get_region(gfn)->given);
}

bool xen_memshr_region_is_split(uint64_t gfn)
{
    Region *r;

    QEMU_LOCK_GUARD(&lock);
    r = find_region(gfn);
    return split_is_final && r && r->split;
}

void xen_memshr_region_set_split(uint64_t gfn)
{
    QEMU_LOCK_GUARD(&lock);
    get_region(gfn)->split = true;
}

bool xen_memshr_regions_stay_split(void)
{
    return split_is_final;
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

void xen_memshr_gfns_open(xc_interface *xc)
{
    if (!regions) {
        split_is_final = guests_make_small_pages(xc);
        regions = g_hash_table_new(NULL, NULL);
    }
}

/* The map cache asks before there is a store. */
static void __attribute__((constructor)) init_lock(void)
{
    qemu_mutex_init(&lock);
}
