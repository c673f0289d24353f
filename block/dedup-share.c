/*
 * dedup-share block filter driver
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Sits above an image.  Requests pass through, byte for byte; but a device
 * model may offer it the guest pages that a read is for (see
 * include/block/dedup-share.h), and then the guest gets shared frames instead
 * of copies, and no I/O where another guest has read the block before.
 *
 * This file: options, permissions, which image of the chain owns a block, and
 * the announcing of writes.  What is done with the blocks is the engine's.
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
#include "block/block_int.h"
#include "block/dedup-share.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/memalign.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "system/block-backend.h"
#include "block/throttle-groups.h"
#include "coroutines.h"
#include "dedup-share/engine.h"
#include "dedup-share/gather.h"
#include "dedup-share/layer.h"
#include "dedup-share/stats.h"
#include "dedup-share/trace.h"

/* Longest backing chain whose layers take part. */
#define MAX_LAYERS 64

typedef struct DedupShareOptions {
    char *group;
    char *index_dir;
    DedupShareStore store;
    bool has_size;
    uint64_t size;
} DedupShareOptions;

typedef struct DedupLayer {
    DedupMap *map;              /* NULL: takes no part */
} DedupLayer;

/* What a reopen will change; then, until it ends, what it has changed. */
typedef struct DedupShareReopen {
    DedupShareOptions opts;
    DedupGroup *group;
    char *reason;
} DedupShareReopen;

typedef struct BDRVDedupShareState {
    /* Change only in the main loop while the node is drained. */
    DedupShareReopen *reopen;   /* from its preparation to its end */
    DedupShareOptions opts;
    DedupGroup *group;          /* NULL: requests pass through */
    char *reason;               /* then, why; NULL if it was asked for */
    DedupLayer layers[MAX_LAYERS];
    int nlayers;

    /* Have their own locks. */
    DedupTracker tracker;
    DedupGather gather;
    DedupCounters counters;
} BDRVDedupShareState;

static BlockDriver bdrv_dedup_share;

static QemuOptsList dedup_share_opts = {
    .name = "dedup-share",
    .head = QTAILQ_HEAD_INITIALIZER(dedup_share_opts.head),
    .desc = {
        { .name = "group", .type = QEMU_OPT_STRING,
          .help = "trust domain whose guests share (default: default)" },
        { .name = "store", .type = QEMU_OPT_STRING,
          .help = "auto, xen or off (default: auto)" },
        { .name = "store-size", .type = QEMU_OPT_SIZE,
          .help = "most bytes that the store may hold" },
        { .name = "index-dir", .type = QEMU_OPT_STRING,
          .help = "tmpfs directory of the groups" },
        { /* end of list */ }
    },
};

static void options_free(DedupShareOptions *o)
{
    g_free(o->group);
    g_free(o->index_dir);
    memset(o, 0, sizeof(*o));
}

static bool options_parse(QDict *options, DedupShareOptions *o, Error **errp)
{
    QemuOpts *opts = qemu_opts_create(&dedup_share_opts, NULL, 0,
                                      &error_abort);
    bool ok = qemu_opts_absorb_qdict(opts, options, errp);
    const char *store;
    int kind = DEDUP_SHARE_STORE_AUTO;

    if (ok) {
        store = qemu_opt_get(opts, "store");
        if (store) {
            kind = qapi_enum_parse(&DedupShareStore_lookup, store, -1, NULL);
        }
        if (kind < 0) {
            error_setg(errp, "store: '%s' is not a store; use auto, xen or "
                       "off", store);
            ok = false;
        }
    }
    if (ok) {
        *o = (DedupShareOptions) {
            .group = g_strdup(qemu_opt_get(opts, "group") ?: "default"),
            .index_dir = g_strdup(qemu_opt_get(opts, "index-dir")
                                  ?: DEDUP_INDEX_DIR_DEFAULT),
            .store = kind,
            .has_size = qemu_opt_get(opts, "store-size"),
            .size = qemu_opt_get_size(opts, "store-size", 0),
        };
    }
    qemu_opts_del(opts);
    return ok;
}

/* Join the group that @o names.  NULL with *errp set if that cannot be. */
static DedupGroup *join_group(const DedupShareOptions *o, Error **errp)
{
    DedupGroupConfig config = {
        .name = o->group, .root = o->index_dir, .store = o->store,
        .has_size = o->has_size, .size = o->size,
    };
    const DedupStoreOps *ops;

    if (config.store == DEDUP_SHARE_STORE_AUTO) {
        config.store = DEDUP_SHARE_STORE_XEN;
    }
    ops = dedup_store_find(config.store);
    if (!ops) {
        error_setg(errp, "store: this program has no Xen store; it needs a "
                   "QEMU system emulator built with Xen support, running as "
                   "a Xen guest's device model; use store=off elsewhere");
        return NULL;
    }
    if (!ops->probe(errp) || !dedup_group_check(&config, errp)) {
        return NULL;
    }
    return dedup_group_get(&config, errp);
}

/* Warn of @reason, unless that was the last thing said. */
static void warn_once(const char *reason)
{
    static char *last;

    if (g_strcmp0(last, reason)) {
        g_free(last);
        last = g_strdup(reason);
        warn_report("dedup-share: nothing will be shared: %s", reason);
    }
}

/*
 * What @o asks for: *group, or NULL with *reason if it may be done without.
 * False with *errp set if it may not.
 */
static bool start(const DedupShareOptions *o, DedupGroup **group,
                  char **reason, Error **errp)
{
    Error *err = NULL;

    *group = NULL;
    *reason = NULL;
    if (o->store == DEDUP_SHARE_STORE_OFF) {
        return true;
    }
    *group = join_group(o, &err);
    if (*group) {
        return true;
    }
    if (o->store != DEDUP_SHARE_STORE_AUTO) {
        error_propagate(errp, err);
        return false;
    }
    *reason = g_strdup(error_get_pretty(err));
    warn_once(*reason);
    error_free(err);
    return true;
}

/* Layers */

static void layers_drop(BDRVDedupShareState *s)
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

static void GRAPH_RDLOCK layers_find(BlockDriverState *bs)
{
    BDRVDedupShareState *s = bs->opaque;
    BlockDriverState *p = bs->file ? bs->file->bs : NULL;

    layers_drop(s);
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

static void dedup_share_drain_end(BlockDriverState *bs)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    layers_find(bs);
}

/* Writes: all that changes what is read */

static void write_begin(BlockDriverState *bs, DedupRange *w, int64_t offset,
                        int64_t bytes)
{
    BDRVDedupShareState *s = bs->opaque;

    trace_dedup_share_write(bs, offset, bytes);
    dedup_write_begin(&s->tracker, w, offset, bytes);
}

static void write_end(BlockDriverState *bs, DedupRange *w)
{
    BDRVDedupShareState *s = bs->opaque;

    dedup_write_end(&s->tracker, w);
}

/* Find the layer that owns each of @n blocks that follow each other. */
static void coroutine_fn GRAPH_RDLOCK
find_owners(BlockDriverState *bs, DedupBlock *blocks, unsigned n)
{
    BDRVDedupShareState *s = bs->opaque;
    int64_t offset = blocks[0].number * DEDUP_BLOCK_SIZE;
    int64_t end = offset + (int64_t)n * DEDUP_BLOCK_SIZE;
    int64_t pnum;
    unsigned i = 0;

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

/*
 * Read from the store, by copying, if it holds all the blocks: parts of blocks,
 * and what no page is offered for, then cost no I/O either.
 */
static bool coroutine_fn GRAPH_RDLOCK
copy_from_store(BlockDriverState *bs, int64_t offset, int64_t bytes,
                QEMUIOVector *qiov)
{
    BDRVDedupShareState *s = bs->opaque;
    uint64_t first = offset / DEDUP_BLOCK_SIZE;
    uint64_t n = DIV_ROUND_UP(offset + bytes, DEDUP_BLOCK_SIZE) - first;
    g_autofree DedupBlock *blocks = NULL;
    g_autofree uint8_t *buf = NULL;
    unsigned i;

    if (!s->group || !bytes || n > DEDUP_BATCH) {
        return false;
    }
    blocks = g_new0(DedupBlock, n);
    for (i = 0; i < n; i++) {
        blocks[i].number = first + i;
    }
    find_owners(bs, blocks, n);
    buf = g_malloc(n * DEDUP_BLOCK_SIZE);
    if (!dedup_engine_copy(s->group, blocks, n, buf)) {
        return false;
    }
    qemu_iovec_from_buf(qiov, 0, buf + offset % DEDUP_BLOCK_SIZE, bytes);
    stat64_add(&s->counters.copied, n);
    return true;
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_preadv(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    BDRVDedupShareState *s = bs->opaque;

    if (!(flags & ~BDRV_REQ_REGISTERED_BUF) &&
        copy_from_store(bs, offset, bytes, qiov)) {
        return 0;
    }
    stat64_add(&s->counters.bytes_passed, bytes);
    return bdrv_co_preadv(bs->file, offset, bytes, qiov, flags);
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_pwritev(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    DedupRange w;
    int ret;

    write_begin(bs, &w, offset, bytes);
    ret = bdrv_co_pwritev(bs->file, offset, bytes, qiov, flags);
    write_end(bs, &w);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_pwritev_compressed(BlockDriverState *bs, int64_t offset,
                                  int64_t bytes, QEMUIOVector *qiov)
{
    return dedup_share_co_pwritev(bs, offset, bytes, qiov,
                                  BDRV_REQ_WRITE_COMPRESSED);
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset,
                             int64_t bytes, BdrvRequestFlags flags)
{
    DedupRange w;
    int ret;

    write_begin(bs, &w, offset, bytes);
    ret = bdrv_co_pwrite_zeroes(bs->file, offset, bytes, flags);
    write_end(bs, &w);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    DedupRange w;
    int ret;

    write_begin(bs, &w, offset, bytes);
    ret = bdrv_co_pdiscard(bs->file, offset, bytes);
    write_end(bs, &w);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                        PreallocMode prealloc, BdrvRequestFlags flags,
                        Error **errp)
{
    int64_t old = bs->total_sectors * BDRV_SECTOR_SIZE;
    int64_t from = ROUND_DOWN(MIN(old, offset), DEDUP_BLOCK_SIZE);
    DedupRange w;
    int ret;

    write_begin(bs, &w, from, INT64_MAX - from);
    ret = bdrv_co_truncate(bs->file, offset, exact, prealloc, flags, errp);
    write_end(bs, &w);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_copy_range_from(BlockDriverState *bs, BdrvChild *src,
                               int64_t src_offset, BdrvChild *dst,
                               int64_t dst_offset, int64_t bytes,
                               BdrvRequestFlags read_flags,
                               BdrvRequestFlags write_flags)
{
    return bdrv_co_copy_range_from(bs->file, src_offset, dst, dst_offset,
                                   bytes, read_flags, write_flags);
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_copy_range_to(BlockDriverState *bs, BdrvChild *src,
                             int64_t src_offset, BdrvChild *dst,
                             int64_t dst_offset, int64_t bytes,
                             BdrvRequestFlags read_flags,
                             BdrvRequestFlags write_flags)
{
    DedupRange w;
    int ret;

    write_begin(bs, &w, dst_offset, bytes);
    ret = bdrv_co_copy_range_to(src, src_offset, bs->file, dst_offset, bytes,
                                read_flags, write_flags);
    write_end(bs, &w);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_ioctl(BlockDriverState *bs, unsigned long int req, void *buf)
{
    DedupRange w;
    int ret;

    /* a SCSI command may write anywhere */
    write_begin(bs, &w, 0, INT64_MAX);
    ret = bdrv_co_ioctl(bs->file->bs, req, buf);
    write_end(bs, &w);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK dedup_share_co_flush(BlockDriverState *bs)
{
    return bdrv_co_flush(bs->file->bs);
}

static int64_t coroutine_fn GRAPH_RDLOCK
dedup_share_co_getlength(BlockDriverState *bs)
{
    return bdrv_co_getlength(bs->file->bs);
}

static void coroutine_fn GRAPH_RDLOCK
dedup_share_co_eject(BlockDriverState *bs, bool eject_flag)
{
    bdrv_co_eject(bs->file->bs, eject_flag);
}

static void coroutine_fn GRAPH_RDLOCK
dedup_share_co_lock_medium(BlockDriverState *bs, bool locked)
{
    bdrv_co_lock_medium(bs->file->bs, locked);
}

/* Reads that were offered */

bool dedup_share_wants(BlockBackend *blk, const BlockBackendPublic *public)
{
    BlockDriverState *bs = blk_bs(blk);
    BDRVDedupShareState *s;

    if (!bs || bs->drv != &bdrv_dedup_share ||
        qatomic_read(&bs->quiesce_counter) ||
        qatomic_read(&public->throttle_group_member.throttle_state)) {
        return false;
    }
    s = bs->opaque;
    return s->group;
}

bool dedup_share_resolve(BlockBackend *blk, MemoryRegion *mr, uint64_t offset,
                         DedupDest *dest)
{
    BDRVDedupShareState *s = blk_bs(blk)->opaque;
    DedupGroup *g = s->group;

    return g->ops->resolve(g->store, mr, offset, dest);
}

bool dedup_share_resolve_grant(BlockBackend *blk, uint32_t ref, uint16_t peer,
                               DedupDest *dest)
{
    BDRVDedupShareState *s = blk_bs(blk)->opaque;
    DedupGroup *g = s->group;

    return g->ops->resolve_grant &&
           g->ops->resolve_grant(g->store, ref, peer, dest);
}

void dedup_share_grants_changed(BlockBackend *blk)
{
    BlockDriverState *bs = blk_bs(blk);
    BDRVDedupShareState *s;

    if (bs && bs->drv == &bdrv_dedup_share) {
        s = bs->opaque;
        if (s->group && s->group->ops->grants_changed) {
            s->group->ops->grants_changed(s->group->store);
        }
    }
}

static void *read_alloc(void *opaque, size_t size)
{
    BlockDriverState *bs = opaque;

    return qemu_try_blockalign(bs, size);
}

static int coroutine_fn GRAPH_RDLOCK
read_blocks(void *opaque, uint64_t first, unsigned n, void *buf)
{
    BlockDriverState *bs = opaque;
    int64_t bytes = (int64_t)n * DEDUP_BLOCK_SIZE;
    int ret = bdrv_co_pread(bs->file, first * DEDUP_BLOCK_SIZE, bytes, buf, 0);

    return ret < 0 ? ret : 0;
}

static void coroutine_fn give(void *opaque, DedupGive *gives, unsigned n)
{
    BlockDriverState *bs = opaque;
    BDRVDedupShareState *s = bs->opaque;

    dedup_gather_give(&s->gather, s->group, gives, n);
}

static void coroutine_fn GRAPH_RDLOCK
read_batch(BlockDriverState *bs, DedupPage *pages, unsigned n)
{
    BDRVDedupShareState *s = bs->opaque;
    g_autofree DedupBlock *blocks = g_new0(DedupBlock, n);
    int64_t first = pages[0].offset;
    DedupRange fill;
    DedupRead r = {
        .group = s->group, .tracker = &s->tracker, .fill = &fill,
        .counters = &s->counters, .read = read_blocks, .alloc = read_alloc,
        .give = give, .opaque = bs,
    };
    unsigned i, run;

    dedup_fill_begin(&s->tracker, &fill, first,
                     pages[n - 1].offset + DEDUP_BLOCK_SIZE - first);
    for (i = 0; i < n; i++) {
        blocks[i].number = pages[i].offset / DEDUP_BLOCK_SIZE;
        blocks[i].dest = pages[i].dest;
        blocks[i].result = pages[i].result;
    }
    for (i = 0; i < n; i += run) {
        run = 1;
        while (i + run < n &&
               blocks[i + run].number == blocks[i].number + run) {
            run++;
        }
        find_owners(bs, blocks + i, run);
    }
    dedup_engine_read(&r, blocks, n);
    dedup_fill_end(&s->tracker, &fill);
    for (i = 0; i < n; i++) {
        pages[i].result = blocks[i].result;
        stat64_add(&s->counters.results[blocks[i].result], 1);
    }
}

void dedup_share_skip(BlockBackend *blk, unsigned n, DedupResult why)
{
    BDRVDedupShareState *s = blk_bs(blk)->opaque;

    stat64_add(&s->counters.blocks_read, n);
    stat64_add(&s->counters.results[why], n);
}

/* Does QEMU map one of @pages, so that the main loop has to let it go? */
static bool any_held(DedupGroup *g, const DedupPage *pages, unsigned n)
{
    unsigned i;

    for (i = 0; g->ops->held && i < n; i++) {
        if (pages[i].result == DEDUP_GIVEN &&
            g->ops->held(g->store, &pages[i].dest)) {
            return true;
        }
    }
    return false;
}

/* From an iothread: have the main loop let go of what QEMU maps of @pages. */
static void coroutine_fn let_go(DedupGroup *g, const DedupPage *pages,
                                unsigned n)
{
    AioContext *ctx = qemu_get_current_aio_context();
    unsigned i;

    if (qemu_in_main_thread() || !any_held(g, pages, n)) {
        return;
    }
    aio_co_reschedule_self(qemu_get_aio_context());
    for (i = 0; i < n; i++) {
        if (pages[i].result == DEDUP_GIVEN) {
            g->ops->let_go(g->store, &pages[i].dest);
        }
    }
    aio_co_reschedule_self(ctx);
}

static void coroutine_fn read_pages(BlockDriverState *bs, DedupPage *pages,
                                    unsigned n)
{
    BDRVDedupShareState *s = bs->opaque;
    unsigned i, batch;

    GRAPH_RDLOCK_GUARD();
    stat64_add(&s->counters.blocks_read, n);
    for (i = 0; i < n; i += batch) {
        batch = MIN(n - i, DEDUP_BATCH);
        read_batch(bs, pages + i, batch);
    }
}

/* Are all of @pages, which ascend, on the disk? */
static bool in_range(BlockDriverState *bs, const DedupPage *pages, unsigned n)
{
    return n && pages[0].offset >= 0 &&
           pages[n - 1].offset / BDRV_SECTOR_SIZE < bs->total_sectors;
}

void coroutine_fn dedup_share_co_read(BlockBackend *blk, DedupPage *pages,
                                      unsigned n)
{
    /* the request is in flight: neither node nor group change until its end */
    BlockDriverState *bs = blk_bs(blk);
    BDRVDedupShareState *s = bs->opaque;
    unsigned i;

    if (in_range(bs, pages, n)) {
        let_go(s->group, pages, n);
        read_pages(bs, pages, n);
    } else {
        for (i = 0; i < n; i++) {
            pages[i].result = DEDUP_FAILED;
        }
        dedup_share_skip(blk, n, DEDUP_FAILED);
    }
}

int coroutine_fn dedup_share_co_read_rest(BlockBackend *blk, int64_t offset,
                                          int64_t bytes, void *buf)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, bytes);
    BlockDriverState *bs;

    GRAPH_RDLOCK_GUARD();
    bs = blk_bs(blk);
    return dedup_share_co_preadv(bs, offset, bytes, &qiov, 0);
}

/* The node */

static int dedup_share_open(BlockDriverState *bs, QDict *options, int flags,
                            Error **errp)
{
    BDRVDedupShareState *s = bs->opaque;
    int ret;

    if (!options_parse(options, &s->opts, errp)) {
        return -EINVAL;
    }
    ret = bdrv_open_file_child(NULL, options, "file", bs, errp);
    if (ret < 0) {
        options_free(&s->opts);
        return ret;
    }
    if (!start(&s->opts, &s->group, &s->reason, errp)) {
        options_free(&s->opts);
        return -EINVAL;
    }
    dedup_tracker_init(&s->tracker);
    dedup_gather_init(&s->gather);

    GRAPH_RDLOCK_GUARD_MAINLOOP();
    bs->sg = bdrv_is_sg(bs->file->bs);
    bs->supported_read_flags = bs->file->bs->supported_read_flags;
    bs->supported_write_flags = BDRV_REQ_WRITE_UNCHANGED |
        (BDRV_REQ_FUA & bs->file->bs->supported_write_flags);
    bs->supported_zero_flags = BDRV_REQ_WRITE_UNCHANGED |
        ((BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK) &
         bs->file->bs->supported_zero_flags);
    bs->supported_truncate_flags = bs->file->bs->supported_truncate_flags &
                                   BDRV_REQ_ZERO_WRITE;
    layers_find(bs);
    return 0;
}

static void dedup_share_close(BlockDriverState *bs)
{
    BDRVDedupShareState *s = bs->opaque;

    layers_drop(s);
    if (s->group) {
        dedup_group_put(s->group);
    }
    dedup_tracker_destroy(&s->tracker);
    dedup_gather_destroy(&s->gather);
    g_free(s->reason);
    options_free(&s->opts);
}

static void GRAPH_RDLOCK
dedup_share_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                       BlockReopenQueue *reopen_queue, uint64_t perm,
                       uint64_t shared, uint64_t *nperm, uint64_t *nshared)
{
    BDRVDedupShareState *s = bs->opaque;

    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm,
                       nshared);
    /* permissions are computed before a reopen is committed */
    if (s->reopen ? s->reopen->group : s->group) {
        /* what others write we would not see */
        *nshared &= ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
    }
}

static bool reopen_check(const DedupShareOptions *old,
                         const DedupShareOptions *new, Error **errp)
{
    const char *option = NULL;

    if (strcmp(old->group, new->group)) {
        option = "group";
    } else if (strcmp(old->index_dir, new->index_dir)) {
        option = "index-dir";
    } else if (old->has_size != new->has_size || old->size != new->size) {
        option = "store-size";
    }
    if (option) {
        error_setg(errp, "%s cannot be changed; only store can, open the "
                   "node anew for another %s", option, option);
    }
    return !option;
}

static int dedup_share_reopen_prepare(BDRVReopenState *state,
                                      BlockReopenQueue *queue, Error **errp)
{
    BDRVDedupShareState *s = state->bs->opaque;
    g_autofree DedupShareReopen *r = g_new0(DedupShareReopen, 1);

    if (!options_parse(state->options, &r->opts, errp)) {
        return -EINVAL;
    }
    if (!reopen_check(&s->opts, &r->opts, errp) ||
        !start(&r->opts, &r->group, &r->reason, errp)) {
        options_free(&r->opts);
        return -EINVAL;
    }
    state->opaque = s->reopen = g_steal_pointer(&r);
    return 0;
}

static void reopen_end(BDRVReopenState *state)
{
    BDRVDedupShareState *s = state->bs->opaque;
    DedupShareReopen *r = state->opaque;

    if (r->group) {
        dedup_group_put(r->group);
    }
    g_free(r->reason);
    options_free(&r->opts);
    g_free(r);
    s->reopen = state->opaque = NULL;
}

static void dedup_share_reopen_commit(BDRVReopenState *state)
{
    BDRVDedupShareState *s = state->bs->opaque;
    DedupShareReopen *r = state->opaque;
    DedupShareReopen old = {
        .opts = s->opts, .group = s->group, .reason = s->reason,
    };

    /* the file may be another: all layers are found again when undrained */
    layers_drop(s);
    s->opts = r->opts;
    s->group = r->group;
    s->reason = r->reason;
    *r = old;
    reopen_end(state);
}

static void dedup_share_reopen_abort(BDRVReopenState *state)
{
    reopen_end(state);
}

void dedup_share_leave(BlockDriverState *bs)
{
    BDRVDedupShareState *s = bs->opaque;

    GLOBAL_STATE_CODE();
    bdrv_drained_begin(bs);
    layers_drop(s);
    if (s->group) {
        dedup_group_put(s->group);
        s->group = NULL;
    }
    bdrv_drained_end(bs);
}

/* What the node has done, for QMP; see stats.h. */
DedupShareStats *dedup_share_stats(BlockDriverState *bs)
{
    BDRVDedupShareState *s = bs->opaque;

    if (bs->drv != &bdrv_dedup_share) {
        return NULL;
    }
    return dedup_stats_new(bdrv_get_node_name(bs), s->opts.group, s->reason,
                           s->group, &s->counters);
}

/*
 * An overlay over this node names it as its backing file, with these: without
 * group and store its guest would share with others when it is opened again.
 */
static const char *const dedup_share_strong_runtime_opts[] = {
    "group", "store", "store-size", "index-dir", NULL
};

static BlockDriver bdrv_dedup_share = {
    .format_name                = "dedup-share",
    .instance_size              = sizeof(BDRVDedupShareState),

    .bdrv_open                  = dedup_share_open,
    .bdrv_close                 = dedup_share_close,
    .bdrv_child_perm            = dedup_share_child_perm,
    .strong_runtime_opts        = dedup_share_strong_runtime_opts,
    .bdrv_reopen_prepare        = dedup_share_reopen_prepare,
    .bdrv_reopen_commit         = dedup_share_reopen_commit,
    .bdrv_reopen_abort          = dedup_share_reopen_abort,
    .bdrv_drain_end             = dedup_share_drain_end,

    .bdrv_co_getlength          = dedup_share_co_getlength,
    .bdrv_co_preadv             = dedup_share_co_preadv,
    .bdrv_co_pwritev            = dedup_share_co_pwritev,
    .bdrv_co_pwritev_compressed = dedup_share_co_pwritev_compressed,
    .bdrv_co_pwrite_zeroes      = dedup_share_co_pwrite_zeroes,
    .bdrv_co_pdiscard           = dedup_share_co_pdiscard,
    .bdrv_co_truncate           = dedup_share_co_truncate,
    .bdrv_co_copy_range_from    = dedup_share_co_copy_range_from,
    .bdrv_co_copy_range_to      = dedup_share_co_copy_range_to,
    .bdrv_co_flush              = dedup_share_co_flush,
    .bdrv_co_ioctl              = dedup_share_co_ioctl,
    .bdrv_co_eject              = dedup_share_co_eject,
    .bdrv_co_lock_medium        = dedup_share_co_lock_medium,

    .is_filter                  = true,
};

static void bdrv_dedup_share_init(void)
{
    bdrv_register(&bdrv_dedup_share);
}

block_init(bdrv_dedup_share_init);
