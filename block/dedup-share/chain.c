/*
 * dedup-share: which image of a backing chain owns a block
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Which layers take part
 *
 * - Only one that is not written to.  A layer below the first is only read:
 *   this node does not share the permission to write with others, and so nor
 *   does any node of the backing chain.  Block jobs insert filter nodes that
 *   lift this; so a layer below such a node (or any filter) takes no part.
 * - The first layer takes part if this node is read-only.  What one guest
 *   alone can write is read by no other, and its frames would only wait to be
 *   overwritten; matching it with other guests' by content is to come.
 * - The graph below this node changes only while this node is drained, as a
 *   node is drained with its children.  So the layers are found again at the
 *   end of every drained section, and are constant in between.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qemu/error-report.h"
#include "../coroutines.h"
#include "layer.h"
#include "node.h"
#include "trace.h"

void dedup_layers_drop(BDRVDedupShareState *s)
{
    while (s->nlayers) {
        DedupLayer *l = &s->layers[--s->nlayers];

        if (l->map) {
            dedup_map_close(l->map);
        }
        *l = (DedupLayer) { 0 };
    }
}

/* The node whose regular file holds the data of @bs, or NULL. */
static BlockDriverState *GRAPH_RDLOCK layer_file(BlockDriverState *bs)
{
    bool raw = !strcmp(bs->drv->format_name, "raw");
    BdrvChild *child;

    bdrv_refresh_filename(bs);  /* it sets full_open_options */
    if (raw && (qdict_haskey(bs->full_open_options, "offset") ||
                qdict_haskey(bs->full_open_options, "size"))) {
        return NULL;            /* a part of the file has no key */
    }
    if (raw || !strcmp(bs->drv->format_name, "qcow2")) {
        QLIST_FOREACH(child, &bs->children, next) {
            if (!strcmp(child->name, "data-file")) {
                return NULL;
            }
        }
        bs = bs->file ? bs->file->bs : NULL;
    }
    while (bs && bs->drv && !strcmp(bs->drv->format_name, "throttle")) {
        bs = bs->file->bs;
    }
    return bs && bs->drv && !strcmp(bs->drv->format_name, "file") &&
           !bs->force_share ? bs : NULL;
}

/* Find the key of the layer @bs; *why says why it takes no part. */
static bool GRAPH_RDLOCK layer_key(BlockDriverState *bs, bool writable,
                                   char key[DEDUP_LAYER_KEY_SIZE],
                                   const char **why)
{
    BlockDriverState *file = layer_file(bs);
    const char *format = bs->drv->format_name;

    if (writable) {
        *why = "it may be written to";
        return false;
    }
    if (!file) {
        *why = "its data is not all of a local file, read as raw or qcow2";
        return false;
    }
    if (!strcmp(format, "file")) {
        format = "raw";
    }
    return dedup_layer_key(file->filename, format, key, why);
}

static void GRAPH_RDLOCK layer_add(BlockDriverState *bs, BlockDriverState *p,
                                   int dirfd)
{
    BDRVDedupShareState *s = bs->opaque;
    DedupLayer *l = &s->layers[s->nlayers];
    char key[DEDUP_LAYER_KEY_SIZE];
    const char *why = "takes part";
    int64_t blocks = DIV_ROUND_UP(p->total_sectors * BDRV_SECTOR_SIZE,
                                  DEDUP_BLOCK_SIZE);
    Error *err = NULL;

    *l = (DedupLayer) { 0 };
    /* all of a raw image is data, if nobody asks for zeroes */
    l->whole = !bdrv_backing_chain_next(p) &&
               (!strcmp(p->drv->format_name, "raw") ||
                !strcmp(p->drv->format_name, "file"));
    if (layer_key(p, s->nlayers == 0 && !bdrv_is_read_only(bs), key, &why)) {
        l->map = dedup_map_open(dirfd, key, blocks, &err);
        if (!l->map) {
            warn_reportf_err(err, "dedup-share: layer '%s' takes no part: ",
                             p->filename);
            why = "no block map";
        }
    }
    trace_dedup_share_layer(bs, s->nlayers, bdrv_get_node_name(p), why);
    s->nlayers++;
}

void GRAPH_RDLOCK dedup_layers_find(BlockDriverState *bs)
{
    BDRVDedupShareState *s = bs->opaque;
    BlockDriverState *p = bs->file ? bs->file->bs : NULL;

    dedup_layers_drop(s);
    if (!s->group) {
        return;
    }
    /* a node without a driver is one that was closed by an error */
    for (; p && p->drv && !p->drv->is_filter && s->nlayers < MAX_LAYERS;
         p = bdrv_filter_or_cow_bs(p)) {
        layer_add(bs, p, s->group->dir.fd);
    }
    trace_dedup_share_layers(bs, bdrv_get_node_name(bs), s->nlayers);
}

/* Are the blocks in the first layer, without a look? */
static bool GRAPH_RDLOCK
first_owns(BlockDriverState *bs, const DedupBlock *blocks, unsigned n)
{
    BDRVDedupShareState *s = bs->opaque;
    int64_t end = (blocks[0].number + n) * DEDUP_BLOCK_SIZE;

    return s->nlayers && s->layers[0].map && s->layers[0].whole &&
           end / BDRV_SECTOR_SIZE <= bs->total_sectors;
}

void coroutine_fn GRAPH_RDLOCK
dedup_find_owners(BlockDriverState *bs, DedupBlock *blocks, unsigned n)
{
    BDRVDedupShareState *s = bs->opaque;
    int64_t offset = blocks[0].number * DEDUP_BLOCK_SIZE;
    int64_t end = offset + (int64_t)n * DEDUP_BLOCK_SIZE;
    int64_t pnum;
    unsigned i = 0;

    if (first_owns(bs, blocks, n)) {
        for (i = 0; i < n; i++) {
            blocks[i].map = s->layers[0].map;
        }
    }
    while (i < n) {
        int depth = 0;
        int ret = bdrv_co_common_block_status_above(bs->file->bs, NULL, false,
                                                    false, offset,
                                                    end - offset, &pnum, NULL,
                                                    NULL, &depth);
        unsigned whole = ret < 0 ? 0 : pnum / DEDUP_BLOCK_SIZE;
        bool data = ret >= 0 && ret & BDRV_BLOCK_ALLOCATED &&
                    !(ret & BDRV_BLOCK_ZERO);
        /* a block that is in two layers is in none */
        DedupLayer *l = data && whole && depth <= s->nlayers ?
                        &s->layers[depth - 1] : NULL;
        DedupResult why = ret < 0 ? DEDUP_FAILED :
                          data || !whole ? DEDUP_NO_LAYER : DEDUP_UNALLOCATED;

        for (whole = MAX(whole, 1); whole && i < n; whole--, i++) {
            blocks[i].map = l ? l->map : NULL;
            if (!blocks[i].map && blocks[i].result == DEDUP_GIVEN) {
                blocks[i].result = why;
            }
        }
        offset = (blocks[0].number + i) * DEDUP_BLOCK_SIZE;
    }
}
