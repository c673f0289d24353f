/*
 * qemu-dedup-store: how much memory it may take
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_STORE_MEMORY_LIMIT_H
#define DEDUP_STORE_MEMORY_LIMIT_H

/*
 * The tightest limit of memory, in bytes: of the host, and of the cgroups that
 * this process is in, of either version.  @root: "", or what is before /proc
 * and /sys, for tests.
 */
uint64_t memory_limit_find(const char *root);

/* Is the host short of memory now? */
bool memory_is_short(void);

#endif /* DEDUP_STORE_MEMORY_LIMIT_H */
