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
    struct {
        DedupStore *store;      /* NULL: none, as far as is known */
        uint32_t slot;
    } *frames;                  /* of MEMSHR_REGION_GFNS, or NULL */
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

void xen_memshr_gfn_set_frame(uint64_t gfn, DedupStore *store, uint32_t slot)
{
    Region *r;

    QEMU_LOCK_GUARD(&lock);
    r = get_region(gfn);
    if (!r->frames) {
        r->frames = g_malloc0_n(MEMSHR_REGION_GFNS, sizeof(*r->frames));
    }
    r->frames[gfn % MEMSHR_REGION_GFNS].store = store;
    r->frames[gfn % MEMSHR_REGION_GFNS].slot = slot;
}

/* Up to @most gfns with frames of @store, from *next of the region on. */
static unsigned collect(uint64_t region, DedupStore *store, unsigned *next,
                        unsigned most, uint64_t *gfns, uint32_t *slots)
{
    unsigned n = 0;
    Region *r;

    QEMU_LOCK_GUARD(&lock);
    r = find_region(region * MEMSHR_REGION_GFNS);
    if (!r->frames) {
        *next = MEMSHR_REGION_GFNS;
    }
    for (; *next < MEMSHR_REGION_GFNS && n < most; (*next)++) {
        if (r->frames[*next].store == store) {
            gfns[n] = region * MEMSHR_REGION_GFNS + *next;
            slots[n++] = r->frames[*next].slot;
        }
    }
    return n;
}

/* They have no frame, unless they were given another one meanwhile. */
static void forget(DedupStore *store, const uint64_t *gfns,
                   const uint32_t *slots, const bool *gone, unsigned n)
{
    unsigned i;

    QEMU_LOCK_GUARD(&lock);
    for (i = 0; i < n; i++) {
        Region *r = find_region(gfns[i]);
        unsigned at = gfns[i] % MEMSHR_REGION_GFNS;

        if (gone[i] && r->frames[at].store == store &&
            r->frames[at].slot == slots[i]) {
            r->frames[at].store = NULL;
        }
    }
}

/* The numbers of all regions, which stay. */
static GArray *list_regions(void)
{
    GArray *list = g_array_new(false, false, sizeof(uint64_t));
    GHashTableIter iter;
    gpointer key;

    QEMU_LOCK_GUARD(&lock);
    g_hash_table_iter_init(&iter, regions);
    while (g_hash_table_iter_next(&iter, &key, NULL)) {
        uint64_t region = GPOINTER_TO_SIZE(key);

        g_array_append_val(list, region);
    }
    return list;
}

void xen_memshr_gfns_each(DedupStore *store, unsigned most, XenGfnsFn *each,
                          void *opaque)
{
    g_autoptr(GArray) list = list_regions();
    g_autofree uint64_t *gfns = g_new(uint64_t, most);
    g_autofree uint32_t *slots = g_new(uint32_t, most);
    g_autofree bool *gone = g_new(bool, most);
    unsigned i, n, next;

    for (i = 0; i < list->len; i++) {
        for (next = 0; next < MEMSHR_REGION_GFNS; ) {
            n = collect(g_array_index(list, uint64_t, i), store, &next, most,
                        gfns, slots);
            if (n) {
                memset(gone, false, n);
                each(opaque, gfns, slots, n, gone);
                forget(store, gfns, slots, gone, n);
            }
        }
    }
}

static void forget_all(void *opaque, const uint64_t *gfns,
                       const uint32_t *slots, unsigned n, bool *gone)
{
    memset(gone, true, n);
}

void xen_memshr_gfns_forget(DedupStore *store)
{
    xen_memshr_gfns_each(store, MEMSHR_REGION_GFNS, forget_all, NULL);
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
