/*
 * Xen store of dedup-share: what the map cache and the store ask each other
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Also included by QEMUs that are built without dedup-share.
 */

#ifndef HW_XEN_MEMSHR_MAPCACHE_H
#define HW_XEN_MEMSHR_MAPCACHE_H

/* --- gfn.c and store.c, for the map cache --------------------------------- */

/* Has this process ever given a frame to @gfn?  A hint. */
#ifdef CONFIG_DEDUP_SHARE
bool xen_memshr_gfn_given(uint64_t gfn);

/*
 * Ask Xen whether it destroys the guest.  It then refuses to share, but not to
 * make a page private, and that of a page that is nominated brings the host
 * down.  Nothing is to be done about these: Xen takes them apart itself.  Any
 * thread.
 */
bool xen_memshr_guest_is_ending(void);
#else
static inline bool xen_memshr_gfn_given(uint64_t gfn)
{
    return false;
}

static inline bool xen_memshr_guest_is_ending(void)
{
    return false;
}
#endif

/* --- mapcache.c.inc, inside xen-mapcache.c, for the store ----------------- */

/*
 * All of these do nothing where there is no map cache.  The lock is taken
 * inside of the store's.  While it is held nothing gets mapped.
 */
void xen_memshr_mapcache_lock(void);
void xen_memshr_mapcache_unlock(void);

/* Does the map cache hold @gfn; @unused: in a mapping that is not in use? */
bool xen_memshr_mapcache_has(uint64_t gfn, bool unused);

/*
 * Drop what the map cache holds of @gfn and does not use.  Not only its lock,
 * but the BQL has to be held: who accesses guest memory under the BQL uses
 * mappings that are not marked as used.  Returns how many system calls it took.
 */
unsigned xen_memshr_mapcache_forget(uint64_t gfn);

#endif /* HW_XEN_MEMSHR_MAPCACHE_H */
