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
 * - The first layer, even if it is written to, as all writes to it pass this
 *   node or one that shares its object (own.h); but not if the device says that
 *   others may write to the image, too, and not if it is a block device that a
 *   Xen guest may also reach by a backend in the kernel.
 * - Nor while the image is inactive, as another QEMU has it then, during a
 *   migration, or after it, until the layers are found anew.
 * - The graph below this node changes only while this node is drained, as a
 *   node is drained with its children.  So the layers are found again at the
 *   end of every drained section, and are constant in between.  A read that
 *   begins in a drained section (exports and jobs can do that) is passed
 *   through: the layers may not be those of the graph.  What is known
 *   of a raw image that may be written to survives that, if the nodes are the
 *   same: nothing could write to it meanwhile, as this node does not share that
 *   permission.  A qcow2 image may have been reverted to a snapshot of its own.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qobject/qdict.h"
#include "qemu/error-report.h"
#include "../coroutines.h"
#include "layer.h"
#include "node.h"
#include "trace.h"

static void layer_drop(DedupLayer *l)
{
    dedup_alias_free(l->alias);
    if (l->own) {
        dedup_own_put(l->own);
    } else if (l->map) {
        dedup_map_close(l->map);
    }
    *l = (DedupLayer) { 0 };
}

void dedup_layers_drop(BDRVDedupShareState *s)
{
    if (s->client) {
        dedup_files_drop(&s->files, s->client);
    }
    while (s->nlayers) {
        layer_drop(&s->layers[--s->nlayers]);
    }
    s->map_takes_part = s->puts = false;
    s->tail = NULL;
    s->tracker = &s->node_tracker;
}

static bool is_device(const BlockDriverState *bs)
{
    return !strcmp(bs->drv->format_name, "host_device");
}

/* The node whose file or device holds the data of @bs, or NULL. */
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
    return bs && bs->drv && !bs->force_share &&
           (!strcmp(bs->drv->format_name, "file") || is_device(bs)) ? bs : NULL;
}

/* The format that the layer @bs is read as. */
static const char *layer_format(BlockDriverState *bs)
{
    return !strcmp(bs->drv->format_name, "qcow2") ? "qcow2" : "raw";
}

static uint64_t layer_blocks(BlockDriverState *bs)
{
    return DIV_ROUND_UP(bs->total_sectors * BDRV_SECTOR_SIZE,
                        DEDUP_BLOCK_SIZE);
}

/* What is known of a layer's file. */
typedef struct LayerFile {
    char *path;                 /* NULL: it has none, and no part in anything */
    struct stat st;
    DedupLayerKey has_key;
    char key[DEDUP_LAYER_KEY_SIZE];
    const char *why;            /* it has no key, or takes no part */
} LayerFile;

/* Nodes whose name leads to the file @st. */
static unsigned GRAPH_RDLOCK count_nodes(const struct stat *st)
{
    BlockDriverState *bs = NULL;
    struct stat other;
    unsigned n = 0;

    while ((bs = bdrv_next_all_states(bs))) {
        n += bs->drv && (!strcmp(bs->drv->format_name, "file") ||
                         is_device(bs)) &&
             !stat(bs->filename, &other) && other.st_dev == st->st_dev &&
             other.st_ino == st->st_ino;
    }
    return n;
}

static void GRAPH_RDLOCK layer_stat(BlockDriverState *p, LayerFile *f)
{
    BlockDriverState *file = layer_file(p);
    g_autofree char *path = file ? realpath(file->filename, NULL) : NULL;
    unsigned nodes;

    *f = (LayerFile) { 0 };
    if (!path || stat(path, &f->st) < 0) {
        f->why = "its data is not all of a local file, read as raw or qcow2";
        return;
    }
    nodes = MAX(count_nodes(&f->st), 1);
    f->has_key = dedup_layer_key(path, layer_format(p), nodes, f->key,
                                 &f->why);
    /* one with a key is open, as it was looked at for that */
    if (f->has_key != DEDUP_KEY_NONE || dedup_layer_is_open(&f->st, nodes)) {
        f->path = g_steal_pointer(&path);
    }
}

/* The layer is not written to: it has a map by its key, or none. */
static void layer_add_keyed(BDRVDedupShareState *s, DedupLayer *l,
                            BlockDriverState *p, LayerFile *f, DedupLayer *old)
{
    DedupGroup *g = s->group;
    DedupMapLayer layer = {
        .key = f->key, .nblocks = layer_blocks(p), .dev = f->st.st_dev,
        .ino = f->st.st_ino, .path = f->path,
    };
    Error *err = NULL;

    if (old->node == p && !old->own && old->map &&
        dedup_map_is_of(old->map, f->key)) {
        /* to look for others with its blocks takes long */
        *l = *old;
        *old = (DedupLayer) { 0 };
        f->why = "takes part as before";
        return;
    }
    l->node = p;
    l->map = dedup_map_open(&g->index, g->dir.fd, &layer, &err);
    if (!l->map) {
        warn_reportf_err(err, "dedup-share: layer '%s' takes no part: ",
                         p->filename);
        f->why = "no block map";
        return;
    }
    l->alias = dedup_alias_find(l->map, g->dir.fd, g->dir.path, &layer,
                                layer_format(p));
    f->why = l->alias ? "takes part, with blocks of others" : "takes part";
}

/*
 * The layer may be written to.  What it holds now is of use to others only if
 * they have the same physical blocks.
 */
static void GRAPH_RDLOCK layer_add_own(BDRVDedupShareState *s, DedupLayer *l,
                                       BlockDriverState *p, LayerFile *f)
{
    DedupGroup *g = s->group;
    DedupMapLayer layer = {
        .key = f->key, .nblocks = layer_blocks(p), .dev = f->st.st_dev,
        .ino = f->st.st_ino, .path = f->path, .writer = true,
    };
    DedupOwnId id = {
        .dev = S_ISBLK(f->st.st_mode) ? f->st.st_rdev : f->st.st_dev,
        .ino = S_ISBLK(f->st.st_mode) ? UINT64_MAX : f->st.st_ino,
        .nblocks = layer.nblocks,
    };
    /* a qcow2 image's write may make it own the rest of a cluster */
    uint64_t unit = MAX(DEDUP_BLOCK_SIZE, p->bl.pdiscard_alignment);
    DedupMap *keyed = NULL;

    pstrcpy(id.format, sizeof(id.format), layer_format(p));
    /* what a qcow2 image has written may not be in its file yet */
    if (f->has_key == DEDUP_KEY_SHARED && !strcmp(id.format, "raw") &&
        dedup_alias_possible(&layer)) {
        keyed = dedup_map_open(&g->index, g->dir.fd, &layer, NULL);
    }
    if (keyed) {
        l->alias = dedup_alias_find(keyed, g->dir.fd, g->dir.path, &layer,
                                    id.format);
    }
    l->own = dedup_own_get(&g->index, &id, unit, keyed);
    l->map = l->own->keyed;
    l->node = p;
    l->file = layer_file(p);
    s->tracker = &l->own->tracker;
    f->why = l->own->closed ? "it is open in two ways that do not go together" :
             l->alias ? "takes part and may be written to, "
                        "with blocks of others" :
             "takes part and may be written to";
}

/* Is @old, from before a drained section, what layer_add_own() would find? */
static bool GRAPH_RDLOCK is_kept(BDRVDedupShareState *s, const DedupLayer *old,
                                 BlockDriverState *p, const LayerFile *f)
{
    return old->own && !old->own->closed && old->node == p &&
           old->file == layer_file(p) && !strcmp(layer_format(p), "raw") &&
           old->own->index == &s->group->index &&
           old->own->id.nblocks == layer_blocks(p) &&
           S_ISREG(f->st.st_mode) && old->own->id.dev == f->st.st_dev &&
           old->own->id.ino == f->st.st_ino;
}

static void GRAPH_RDLOCK layer_add(BlockDriverState *bs, BlockDriverState *p,
                                   DedupLayer *old)
{
    BDRVDedupShareState *s = bs->opaque;
    DedupLayer *l = &s->layers[s->nlayers];
    bool writable = s->nlayers == 0 && !bdrv_is_read_only(bs);
    LayerFile f;

    layer_stat(p, &f);
    *l = (DedupLayer) { 0 };
    /* all of a raw image is data, if nobody asks for zeroes */
    l->whole = !bdrv_backing_chain_next(p) && !strcmp(layer_format(p), "raw");
    if (f.path && !writable && f.has_key == DEDUP_KEY_SHARED) {
        layer_add_keyed(s, l, p, &f, old);
    } else if (f.path && !writable && f.has_key == DEDUP_KEY_PRIVATE) {
        /* others do not know it, but can have blocks of the same content */
        l->map = dedup_map_new(&s->group->index, layer_blocks(p));
    } else if (f.path && writable) {
        if (qatomic_read(&s->others_write)) {
            f.why = "others may write to it";
        } else if (s->inactive) {
            f.why = "another QEMU may write to it";
        } else if (S_ISBLK(f.st.st_mode) && !s->group->ops->by_host) {
            f.why = "the guest may write to it in other ways";
        } else if (is_kept(s, old, p, &f)) {
            *l = *old;
            *old = (DedupLayer) { 0 };
            s->tracker = &l->own->tracker;
            f.why = "takes part as before";
        } else {
            layer_drop(old);    /* it has locks that the new one wants */
            layer_add_own(s, l, p, &f);
        }
    }
    trace_dedup_share_layer(bs, s->nlayers, bdrv_get_node_name(p), f.why);
    s->nlayers++;
    free(f.path);
}

/*
 * Layers behind the last one that takes part need not be asked for blocks,
 * which may take a message to a server.  @end is behind all layers.
 */
static void GRAPH_RDLOCK find_tail(BlockDriverState *bs, BlockDriverState *end)
{
    BDRVDedupShareState *s = bs->opaque;
    BlockDriverState *p = bs->file ? bs->file->bs : NULL;
    int i;

    s->tail = NULL;
    s->map_takes_part = false;
    for (i = 0; i < s->nlayers; i++, p = bdrv_filter_or_cow_bs(p)) {
        s->map_takes_part |= s->layers[i].map && !s->layers[i].own;
        if (s->layers[i].map || s->layers[i].own) {
            s->tail = NULL;
        } else if (!s->tail) {
            s->tail = p;
        }
    }
    s->tail = s->tail ?: end;
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
    BlockDriverState *p = bs->file ? bs->file->bs : NULL;
    DedupLayer old[MAX_LAYERS] = { 0 };
    int i, nold = s->nlayers;

    memcpy(old, s->layers, nold * sizeof(*old));
    memset(s->layers, 0, nold * sizeof(*old));
    dedup_layers_drop(s);
    if (s->inactive && old[0].own) {
        layer_drop(&old[0]);
    }
    s->inactive = bs->open_flags & BDRV_O_INACTIVE;
    if (s->client) {
        dedup_files_find(&s->files, bs);
        s->puts = s->opts.share == DEDUP_SHARE_SCOPE_ALL &&
                  (s->opts.share_encrypted || !is_encrypted(bs));
    }
    if (!s->group) {
        p = NULL;
    }
    /* a node without a driver is one that was closed by an error */
    for (; p && p->drv && !p->drv->is_filter && s->nlayers < MAX_LAYERS;
         p = bdrv_filter_or_cow_bs(p)) {
        layer_add(bs, p, &old[s->nlayers]);
    }
    find_tail(bs, p && p->drv ? p : NULL);
    for (i = 0; i < nold; i++) {
        layer_drop(&old[i]);
    }
    trace_dedup_share_layers(bs, bdrv_get_node_name(bs), s->nlayers);
}

/*
 * Set where @b is looked up.  @l is the layer that owns it, or NULL; then, or
 * if the layer takes no part, the result says @why.
 */
static void place(BDRVDedupShareState *s, const DedupLayer *l, DedupBlock *b,
                  DedupResult why)
{
    b->in_map = b->number;
    b->map = l ? l->map : NULL;
    if (l && l->own) {
        b->map = qatomic_read(&s->others_write) || qatomic_read(&s->inactive)
                 ? NULL : dedup_own_map(l->own, b->number);
    }
    if (!b->map) {
        b->result = b->result ?: why;
    } else if (l->alias && b->map == l->map) {
        dedup_alias_lookup(l->alias, &b->map, &b->in_map);
    }
}

/* Does the first layer take part, if it may be written to? */
static bool own_takes_part(BDRVDedupShareState *s)
{
    return s->nlayers && s->layers[0].own &&
           !qatomic_read(&s->layers[0].own->closed) &&
           !qatomic_read(&s->others_write) && !qatomic_read(&s->inactive);
}

bool dedup_layers_take_part(BDRVDedupShareState *s)
{
    return !qatomic_load_acquire(&s->drained) &&
           (s->files.n || s->puts || s->map_takes_part || own_takes_part(s));
}

/* Are the blocks in the first layer, without a look? */
static bool GRAPH_RDLOCK
first_owns(BlockDriverState *bs, const DedupBlock *blocks, unsigned n)
{
    BDRVDedupShareState *s = bs->opaque;
    int64_t end = (blocks[0].number + n) * DEDUP_BLOCK_SIZE;

    return s->nlayers && (s->layers[0].map || s->layers[0].own) &&
           s->layers[0].whole && end / BDRV_SECTOR_SIZE <= bs->total_sectors;
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
            place(s, &s->layers[0], &blocks[i], DEDUP_NO_LAYER);
        }
    }
    while (i < n) {
        int depth = 0;
        int ret = bdrv_co_common_block_status_above(bs->file->bs, s->tail,
                                                    false, false, offset,
                                                    end - offset, &pnum, NULL,
                                                    NULL, &depth);
        unsigned whole = ret < 0 ? 0 : pnum / DEDUP_BLOCK_SIZE;
        bool allocated = ret >= 0 && ret & BDRV_BLOCK_ALLOCATED;
        bool data = allocated && !(ret & BDRV_BLOCK_ZERO);
        /* a block that is in two layers is in none */
        DedupLayer *l = data && whole && depth <= s->nlayers ?
                        &s->layers[depth - 1] : NULL;
        DedupResult why = ret < 0 ? DEDUP_FAILED :
                          data || !whole || (s->tail && !allocated) ?
                          DEDUP_NO_LAYER : DEDUP_UNALLOCATED;

        for (whole = MAX(whole, 1); whole && i < n; whole--, i++) {
            place(s, l, &blocks[i], why);
        }
        offset = (blocks[0].number + i) * DEDUP_BLOCK_SIZE;
    }
}
