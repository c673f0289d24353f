/*
 * qemu-dedup-store: the checks at the trust boundary, by name
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * 'make hostile' makes each attack against the daemon, which must fail, and
 * against one that was built with DEDUP_STORE_UNCHECKED and leaves out the
 * check that $DEDUP_STORE_WITHOUT names, where it must succeed: so each check
 * is seen to be what keeps the attack off.  Checks without a name have no such
 * test.
 */

#ifndef DEDUP_STORE_CHECKS_H
#define DEDUP_STORE_CHECKS_H

#ifdef DEDUP_STORE_UNCHECKED
static inline bool dedup_store_does(const char *name)
{
    const char *without = getenv("DEDUP_STORE_WITHOUT");

    return !without || strcmp(without, name);
}
#define DO(name) dedup_store_does(name)
#else
#define DO(name) true
#endif

/* @ok; but true if the check @name is left out. */
#define CHECK(name, ok) (!DO(name) || (ok))

#endif /* DEDUP_STORE_CHECKS_H */
