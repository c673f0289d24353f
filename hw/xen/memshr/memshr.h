/*
 * Xen store of dedup-share: internal interfaces
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Facts about Xen that are used here were measured on Xen 4.17.5 and are
 * asserted by tests/lab/dom0/xen-facts.c.
 */

#ifndef HW_XEN_MEMSHR_H
#define HW_XEN_MEMSHR_H

#include <xenctrl.h>
#include <xenforeignmemory.h>

#include "block/dedup-share.h"
#include "dedup-store/xen-calls.h"
#include "exec/memory.h"
#include "mapcache.h"
#include "qemu/thread.h"

/* --- grant.c: what the guest has granted --------------------------------- */

/* Begins as zeroes.  Protected by the store's lock. */
typedef struct XenMemshrGrants {
    xenforeignmemory_resource_handle *resource;
    const void *table;          /* mapped read-only */
    uint32_t nrefs;             /* references whose entries are mapped */
    unsigned version;
} XenMemshrGrants;

/* --- store.c: the guest, and stores of daemons ---------------------------- */

/* The guest of this process, and how it is reached.  One object. */
typedef struct XenGuest {
    xc_interface *xc;
    xenforeignmemory_handle *fmem;

    QemuMutex lock;             /* protects all below; held for a batch */
    XenCalls calls;
    DedupStoreCounters counters;
    uint64_t other_hypercalls;
    uint64_t other_system_calls;
    XenMemshrGrants grants;
    uint64_t max_gfn;           /* of a guest whose memory QEMU does not know */

    MemoryListener listener;    /* main loop */

    bool is_ending;             /* atomic: Xen was seen to destroy it */
} XenGuest;

/* There is one once a store has been found to work.  Any thread. */
XenGuest *xen_memshr_guest(void);

/* Begin.  Main loop; false with *errp set if Xen cannot be talked to. */
bool xen_memshr_guest_open(Error **errp);

/* A daemon's store. */
struct DedupStore {
    uint32_t domid;
    void *pin;                  /* see XEN_STORE_GFN_PIN */
};

/* Account for @n calls made through libxenctrl or libxenforeignmemory. */
static inline void xen_memshr_count_calls(XenGuest *s, unsigned n,
                                          unsigned system_calls)
{
    s->other_hypercalls += n;
    s->other_system_calls += system_calls;
}

/*
 * The gfn that the guest has granted as @ref to domain @peer, whole and
 * writable.  False if it has not, or its table cannot be read.
 */
bool xen_memshr_grant_gfn(XenGuest *s, uint32_t ref, uint16_t peer,
                          uint64_t *gfn);

/* Forget the table: the guest may set up another one. */
void xen_memshr_grants_close(XenGuest *s);

/* --- probe.c, give.c: DedupStoreOps --------------------------------------- */

bool xen_memshr_probe(Error **errp);

/* Is this the device model of a Xen guest? */
bool xen_memshr_applies(void);
void xen_memshr_give(DedupStore *store, DedupGive *gives, unsigned n);
void xen_memshr_take_back(DedupStore *store, DedupGive *gives, unsigned n);
bool xen_memshr_held(const DedupDest *dest);
void xen_memshr_let_go(const DedupDest *dest);

/* --- gfn.c: what this process knows of its guest's gfns ------------------ */

/*
 * Hints.  A gfn that was given a frame may still share it; the map cache
 * leaves it out of what it maps (mapcache.h).  Nothing is unsafe if they are
 * wrong: another process may have given to the gfn, or the guest have written
 * to it.  Any thread.
 */

/* Begin; Xen's command line is looked at.  Main loop, before the first give. */
void xen_memshr_gfns_open(xc_interface *xc);

void xen_memshr_gfn_set_given(uint64_t gfn);

/*
 * @gfn was given the frame @slot of @store.  What it has had before is no
 * matter, and that it has it still is for Xen to say.
 */
void xen_memshr_gfn_set_frame(uint64_t gfn, DedupStore *store, uint32_t slot);

/*
 * Call @each for all gfns that were given frames of @store, in runs of at most
 * @most.  It returns those that have none any more as gone[i], and these are
 * forgotten.  One caller for each store.
 */
typedef void XenGfnsFn(void *opaque, const uint64_t *gfns,
                       const uint32_t *slots, unsigned n, bool *gone);
void xen_memshr_gfns_each(DedupStore *store, unsigned most, XenGfnsFn *each,
                          void *opaque);

/* No gfn has frames of @store, as far as is remembered. */
void xen_memshr_gfns_forget(DedupStore *store);

/*
 * No gfn from here on is given to, so that what is remembered has a bound: a
 * guest can have pages at any gfn, one after the other.  1 TiB.
 */
#define MEMSHR_MAX_GFNS (1ULL << 28)

/*
 * Is the 2 MiB region around @gfn mapped by single pages for sure?  Only if it
 * was split once, and stays so.
 */
#define MEMSHR_REGION_GFNS 512
bool xen_memshr_region_is_split(uint64_t gfn);
void xen_memshr_region_set_split(uint64_t gfn);

/* Does what is split stay so: can guests not make large mappings? */
bool xen_memshr_regions_stay_split(void);

#endif /* HW_XEN_MEMSHR_H */
