/*
 * dedup-share: what was seen once
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For nodes that keep only what is read a second time: the digests of what was
 * read and not kept, in the file "seen", for all processes of the group.  It is
 * a table that forgets: each digest has a set of four places, and takes that of
 * another.  Whatever it says, the worst is that a block is kept too early or
 * too late.
 */

#ifndef DEDUP_SHARE_ADMISSION_H
#define DEDUP_SHARE_ADMISSION_H

#include "index.h"

typedef struct DedupSeen {
    uint32_t *marks;            /* NULL: not open; in the file */
    uint32_t nsets;
    size_t size;
} DedupSeen;

/* Make or open the table.  Main loop.  False with *errp set. */
bool dedup_seen_open(DedupSeen *seen, int dirfd, uint32_t nframes,
                     Error **errp);
void dedup_seen_close(DedupSeen *seen);

/* Was @digest seen before?  It is now.  Any thread. */
bool dedup_seen(DedupSeen *seen, const DedupDigest *digest);

#endif /* DEDUP_SHARE_ADMISSION_H */
