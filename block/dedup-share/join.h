/*
 * dedup-share: which store a node's options mean
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_SHARE_JOIN_H
#define DEDUP_SHARE_JOIN_H

#include "node.h"

/*
 * Where the store daemon of @o listens: an absolute path, as the working
 * directory may be another one later.  The caller's.
 */
char *dedup_find_socket(const DedupShareOptions *o);

/*
 * Become *client of the store daemon that @o asks for, which may be started for
 * that on Linux; or not, with *reason unless @o says so.  What is got is the
 * caller's.  False with *errp set if it cannot be, and must.
 *
 * Main loop.
 */
bool dedup_join(const DedupShareOptions *o, DedupClient **client, char **reason,
                Error **errp);

#endif /* DEDUP_SHARE_JOIN_H */
