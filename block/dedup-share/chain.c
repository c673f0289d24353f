/*
 * dedup-share: what of a backing chain takes part
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * - Images that are only read and that the store daemon can have a lease on
 *   (leased.h).
 * - A copy of such an image, where it is still that (origin.h).
 * - If the node's options say so, all the others, by their content (put.c).
 *
 * The graph below this node changes only while this node is drained, as a node
 * is drained with its children.  So the images are found again at the end of
 * every drained section, and are constant in between.  A read that begins in a
 * drained section (exports and jobs can do that) is passed through: the images
 * may not be those of the graph.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/cutils.h"
#include "qobject/qdict.h"
#include "node.h"

void dedup_layers_drop(BDRVDedupShareState *s)
{
    if (s->client) {
        dedup_files_drop(&s->files, s->client);
        dedup_origin_drop(&s->origin, s->client);
    }
    s->puts = false;
}

/* Is anything that @bs gets its bytes from? */
static bool GRAPH_RDLOCK is_encrypted(BlockDriverState *bs)
{
    const QDictEntry *e;
    BdrvChild *child;

    if (bs->encrypted) {
        return true;
    }
    /* rbd does it itself */
    for (e = qdict_first(bs->options); e; e = qdict_next(bs->options, e)) {
        if (strstart(qdict_entry_key(e), "encrypt.", NULL)) {
            return true;
        }
    }
    QLIST_FOREACH(child, &bs->children, next) {
        if (is_encrypted(child->bs)) {
            return true;
        }
    }
    return false;
}

void GRAPH_RDLOCK dedup_layers_find(BlockDriverState *bs)
{
    BDRVDedupShareState *s = bs->opaque;

    dedup_layers_drop(s);
    if (s->client) {
        dedup_files_find(&s->files, bs);
        dedup_origin_find(&s->origin, bs);
        s->puts = s->opts.share == DEDUP_SHARE_SCOPE_ALL &&
                  (s->opts.share_encrypted || !is_encrypted(bs));
    }
}

bool dedup_layers_take_part(BDRVDedupShareState *s)
{
    return !qatomic_load_acquire(&s->drained) &&
           (dedup_share_asks(s) || s->puts);
}
