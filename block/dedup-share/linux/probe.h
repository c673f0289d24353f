/*
 * dedup-share: the Linux store
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_SHARE_LINUX_PROBE_H
#define DEDUP_SHARE_LINUX_PROBE_H

#include "block/dedup-share.h"

/* To be registered by programs that have guests.  Linux 5.14 is needed. */
extern const DedupStoreOps dedup_linux_store_ops;

#endif /* DEDUP_SHARE_LINUX_PROBE_H */
