/*
 * Xen store of dedup-share: can this guest's memory be shared?
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "hw/xen/xen_native.h"
#include "qapi/error.h"
#include "system/xen.h"
#include <xenguest.h>
#include "memshr.h"

/* CPUID: the bits that announce VMX and SVM. */
#define LEAF_1_ECX_VMX          (1U << 5)
#define LEAF_80000001_ECX_SVM   (1U << 2)

static void explain_control(int err, Error **errp)
{
    switch (err) {
    case ENOSYS:
        error_setg(errp, "store: this Xen was built without memory sharing; "
                   "it needs CONFIG_MEM_SHARING, or use store=off");
        break;
    case EOPNOTSUPP:
        error_setg(errp, "store: this Xen shares memory only on Intel "
                   "processors with VMX and EPT; use store=off on this host");
        break;
    case EXDEV:
        error_setg(errp, "store: domain %u has a device passed through, and "
                   "its memory cannot be shared; remove the device or use "
                   "store=off", xen_domid);
        break;
    default:
        error_setg_errno(errp, err, "store: Xen refused to share memory of "
                         "domain %u; use store=off", xen_domid);
    }
}

/*
 * Has the domain nested virtualisation?  Xen hides it from all others.
 * 1: yes, 0: no, -1: cannot be known, see errno.
 */
static int has_nested_virt(xc_interface *xc)
{
    xc_cpu_policy_t *policy = xc_cpu_policy_init();
    g_autofree xen_cpuid_leaf_t *leaves = NULL;
    g_autofree xen_msr_entry_t *msrs = NULL;
    uint32_t i, nleaves = 0, nmsrs = 0;
    int ret = -1;

    if (policy && !xc_cpu_policy_get_size(xc, &nleaves, &nmsrs)) {
        leaves = g_new(xen_cpuid_leaf_t, nleaves);
        msrs = g_new(xen_msr_entry_t, nmsrs);
        ret = xc_cpu_policy_get_domain(xc, xen_domid, policy) ||
              xc_cpu_policy_serialise(xc, policy, leaves, &nleaves, msrs,
                                      &nmsrs) ? -1 : 0;
    }
    for (i = 0; ret == 0 && i < nleaves; i++) {
        ret = (leaves[i].leaf == 1 && leaves[i].c & LEAF_1_ECX_VMX) ||
              (leaves[i].leaf == 0x80000001 &&
               leaves[i].c & LEAF_80000001_ECX_SVM);
    }
    xc_cpu_policy_destroy(policy);
    return ret;
}

/* With nested page tables about, Xen 4.17 panics when a page is shared. */
static bool probe_nested(xc_interface *xc, Error **errp)
{
    int nested = has_nested_virt(xc);

    if (nested < 0) {
        error_setg_errno(errp, errno, "store: cannot tell if domain %u has "
                         "nested virtualisation; use store=off", xen_domid);
    } else if (nested) {
        error_setg(errp, "store: domain %u has nested virtualisation, and its "
                   "memory cannot be shared; set nestedhvm=0 or use "
                   "store=off", xen_domid);
    }
    return !nested;
}

/*
 * Xen takes pages of a guest that is populated on demand for itself, and clears
 * them, without a look whether they are shared.
 */
static bool probe_pod(xc_interface *xc, Error **errp)
{
    uint64_t pages, cache, entries;

    if (xc_domain_get_pod_target(xc, xen_domid, &pages, &cache, &entries)) {
        error_setg_errno(errp, errno, "store: cannot tell if domain %u is "
                         "populated on demand; use store=off", xen_domid);
    } else if (entries) {
        error_setg(errp, "store: domain %u is populated on demand, and its "
                   "memory cannot be shared; set maxmem to the value of "
                   "memory, or use store=off", xen_domid);
    } else {
        return true;
    }
    return false;
}

static bool probe_domain(xc_interface *xc, Error **errp)
{
    xc_domaininfo_t info;

    if (xen_get_domain_info(xc, xen_domid, &info) != 1) {
        error_setg(errp, "store: there is no domain %u", xen_domid);
    } else if (!(info.flags & XEN_DOMINF_hvm_guest)) {
        error_setg(errp, "store: domain %u is a PV guest; only the memory of "
                   "HVM and PVH guests can be shared, use store=off",
                   xen_domid);
    } else if (probe_nested(xc, errp) && probe_pod(xc, errp)) {
        if (!xc_memshr_control(xc, xen_domid, 1)) {
            return true;
        }
        explain_control(errno, errp);
    }
    return false;
}

bool xen_memshr_applies(void)
{
    /* -blockdev comes before the accelerator: xen_enabled() is yet to be */
    return xen_domid && xen_mode != XEN_EMULATE;
}

bool xen_memshr_probe(Error **errp)
{
    xc_interface *xc;
    bool ok;

    if (!xen_memshr_applies()) {
        error_setg(errp, "store: this QEMU is not the device model of a Xen "
                   "guest; use store=off");
        return false;
    }
    if (xen_domid_restrict) {
        error_setg(errp, "store: dm_restrict confines this QEMU to its own "
                   "guest, but the store is another domain; set dm_restrict=0 "
                   "or use store=off");
        return false;
    }
    xc = xc_interface_open(NULL, NULL, 0);
    if (!xc) {
        error_setg_errno(errp, errno, "store: cannot talk to Xen");
        return false;
    }
    ok = probe_domain(xc, errp);
    xc_interface_close(xc);
    return ok && xen_memshr_guest_open(errp);
}
