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
 * This file: options, and requests.  Which images of the chain take part is
 * found out in chain.c; what is offered comes in by offer.c, all else by
 * direct.c.  Which frames hold the blocks is asked of the group's store daemon
 * (asked.c), or found by handing over what was read (put.c); placed.c puts them
 * where they are wanted.
 */

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "block/dedup-share.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "dedup-share/join.h"
#include "dedup-share/node.h"
#include "dedup-share/stats.h"
#include "dedup-share/trace.h"

/* Seconds that the store daemon may be silent. */
#define DEFAULT_TIMEOUT 2
#define MAX_TIMEOUT 600

static BlockDriver bdrv_dedup_share;

bool dedup_share_is(const BlockDriverState *bs)
{
    return bs->drv == &bdrv_dedup_share;
}

static QemuOptsList dedup_share_opts = {
    .name = "dedup-share",
    .head = QTAILQ_HEAD_INITIALIZER(dedup_share_opts.head),
    .desc = {
        { .name = "group", .type = QEMU_OPT_STRING,
          .help = "trust domain whose guests share (default: default)" },
        { .name = "store", .type = QEMU_OPT_STRING,
          .help = "auto, xen, linux or off (default: auto)" },
        { .name = "store-size", .type = QEMU_OPT_SIZE,
          .help = "most bytes that the store may hold" },
        { .name = "share", .type = QEMU_OPT_STRING,
          .help = "base or all (default: base)" },
        { .name = "share-encrypted", .type = QEMU_OPT_BOOL,
          .help = "with share=all, also what is encrypted (default: off)" },
        { .name = "timeout", .type = QEMU_OPT_NUMBER,
          .help = "seconds that the store daemon may be silent (default: 2)" },
        { .name = "admission", .type = QEMU_OPT_STRING,
          .help = "first-read or second-read (default: first-read)" },
        { .name = "socket", .type = QEMU_OPT_STRING,
          .help = "where the group's store daemon listens" },
        { .name = "x-copy", .type = QEMU_OPT_BOOL,
          .help = "for tests: share by copies, in programs without a guest" },
        { /* end of list */ }
    },
};

static void options_free(DedupShareOptions *o)
{
    g_free(o->group);
    g_free(o->socket);
    g_free(o->path);
    memset(o, 0, sizeof(*o));
}

/* The option's value, 0 if it is not there; < 0 with *errp set. */
static int parse_enum(QemuOpts *opts, const char *name,
                      const QEnumLookup *lookup, const char *values,
                      Error **errp)
{
    const char *text = qemu_opt_get(opts, name);
    int value = text ? qapi_enum_parse(lookup, text, -1, NULL) : 0;

    if (value < 0) {
        error_setg(errp, "%s: '%s' is not known; use %s", name, text, values);
    }
    return value;
}

static bool options_parse(QDict *options, DedupShareOptions *o, Error **errp)
{
    QemuOpts *opts = qemu_opts_create(&dedup_share_opts, NULL, 0,
                                      &error_abort);
    bool ok = qemu_opts_absorb_qdict(opts, options, errp);
    uint64_t timeout = 0;
    int kind, admission, share;

    if (ok) {
        kind = parse_enum(opts, "store", &DedupShareStore_lookup,
                          "auto, xen, linux or off", errp);
        ok = kind >= 0;
    }
    if (ok) {
        admission = parse_enum(opts, "admission", &DedupShareAdmission_lookup,
                               "first-read or second-read", errp);
        ok = admission >= 0;
    }
    if (ok) {
        share = parse_enum(opts, "share", &DedupShareScope_lookup,
                           "base or all", errp);
        ok = share >= 0;
    }
    if (ok) {
        timeout = qemu_opt_get_number(opts, "timeout", DEFAULT_TIMEOUT);
        if (timeout < 1 || timeout > MAX_TIMEOUT) {
            error_setg(errp, "timeout: %" PRIu64 " is no number of seconds "
                       "from 1 to %d", timeout, MAX_TIMEOUT);
            ok = false;
        }
    }
    if (ok) {
        *o = (DedupShareOptions) {
            .group = g_strdup(qemu_opt_get(opts, "group") ?: "default"),
            .socket = g_strdup(qemu_opt_get(opts, "socket")),
            .store = kind,
            .admission = admission,
            .share = share,
            .share_encrypted = qemu_opt_get_bool(opts, "share-encrypted",
                                                 false),
            .timeout = timeout,
            .x_copy = qemu_opt_get_bool(opts, "x-copy", false),
            .has_size = qemu_opt_get(opts, "store-size"),
            .size = qemu_opt_get_size(opts, "store-size", 0),
        };
    }
    qemu_opts_del(opts);
    return ok;
}

static void dedup_share_drain_begin(BlockDriverState *bs)
{
    BDRVDedupShareState *s = bs->opaque;

    qatomic_set(&s->drained, true);
}

static void dedup_share_drain_end(BlockDriverState *bs)
{
    BDRVDedupShareState *s = bs->opaque;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    dedup_layers_find(bs);
    qatomic_store_release(&s->drained, false);
}

int coroutine_fn GRAPH_RDLOCK
dedup_share_co_preadv(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    BDRVDedupShareState *s = bs->opaque;

    if (s->client && !dedup_layers_take_part(s)) {
        dedup_count_skipped(s, dedup_count_blocks(offset, bytes),
                            DEDUP_NO_LAYER);
    } else if (s->client && !dedup_client_is_up(s->client)) {
        dedup_count_skipped(s, dedup_count_blocks(offset, bytes),
                            DEDUP_NO_DAEMON);
    } else if (s->puts && dedup_put_skips(s)) {
        dedup_count_skipped(s, dedup_count_blocks(offset, bytes),
                            DEDUP_UNMATCHED);
    } else if (s->client && !(flags & ~BDRV_REQ_REGISTERED_BUF)) {
        return dedup_read_direct(bs, offset, bytes, qiov, flags);
    }
    stat64_add(&s->counters.bytes_passed, bytes);
    return bdrv_co_preadv(bs->file, offset, bytes, qiov, flags);
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_pwritev(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    BDRVDedupShareState *s = bs->opaque;
    DedupWrite w;
    int ret;

    dedup_origin_begin_write(&s->origin, &w, offset, bytes);
    ret = bdrv_co_pwritev(bs->file, offset, bytes, qiov, flags);
    dedup_origin_end_write(&s->origin, &w);
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
    BDRVDedupShareState *s = bs->opaque;
    DedupWrite w;
    int ret;

    dedup_origin_begin_write(&s->origin, &w, offset, bytes);
    ret = bdrv_co_pwrite_zeroes(bs->file, offset, bytes, flags);
    dedup_origin_end_write(&s->origin, &w);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    BDRVDedupShareState *s = bs->opaque;
    DedupWrite w;
    int ret;

    dedup_origin_begin_write(&s->origin, &w, offset, bytes);
    ret = bdrv_co_pdiscard(bs->file, offset, bytes);
    dedup_origin_end_write(&s->origin, &w);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                        PreallocMode prealloc, BdrvRequestFlags flags,
                        Error **errp)
{
    BDRVDedupShareState *s = bs->opaque;
    int ret;

    dedup_origin_begin_resize(&s->origin);
    ret = bdrv_co_truncate(bs->file, offset, exact, prealloc, flags, errp);
    dedup_origin_end_resize(&s->origin);
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
    BDRVDedupShareState *s = bs->opaque;
    DedupWrite w;
    int ret;

    dedup_origin_begin_write(&s->origin, &w, dst_offset, bytes);
    ret = bdrv_co_copy_range_to(src, src_offset, bs->file, dst_offset, bytes,
                                 read_flags, write_flags);
    dedup_origin_end_write(&s->origin, &w);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
dedup_share_co_ioctl(BlockDriverState *bs, unsigned long int req, void *buf)
{
    return bdrv_co_ioctl(bs->file->bs, req, buf);
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

/* The node */

static void GRAPH_RDLOCK
dedup_share_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                       BlockReopenQueue *queue, uint64_t perm, uint64_t shared,
                       uint64_t *nperm, uint64_t *nshared)
{
    BDRVDedupShareState *s = bs->opaque;

    if (role & BDRV_CHILD_FILTERED) {
        bdrv_default_perms(bs, c, role, queue, perm, shared, nperm, nshared);
        dedup_origin_cut_shared(&s->origin, bs, nshared);
    } else {
        dedup_origin_perms(nperm, nshared);
    }
}

/* Who offers reads, if they must be: where guest memory is not QEMU's. */
static void set_client(BDRVDedupShareState *s, DedupClient *client)
{
    s->client = client;
    s->offers = client && dedup_client_kind(client) == DEDUP_STORE_KIND_XEN
                ? dedup_store_find(DEDUP_SHARE_STORE_XEN) : NULL;
}

static int dedup_share_open(BlockDriverState *bs, QDict *options, int flags,
                            Error **errp)
{
    BDRVDedupShareState *s = bs->opaque;
    int ret;

    if (!options_parse(options, &s->opts, errp)) {
        return -EINVAL;
    }
    s->opts.path = dedup_find_socket(&s->opts);
    dedup_origin_init(&s->origin);
    ret = bdrv_open_file_child(NULL, options, "file", bs, errp);
    if (ret < 0 || !dedup_origin_open(&s->origin, bs, options, errp) ||
        !dedup_join(&s->opts, &s->client, &s->reason, errp)) {
        dedup_origin_destroy(&s->origin);
        options_free(&s->opts);
        return ret < 0 ? ret : -EINVAL;
    }
    set_client(s, s->client);
    dedup_gather_init(&s->gather);
    dedup_buffers_init(s);
    s->drained = bs->quiesce_counter;

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
    dedup_layers_find(bs);
    return 0;
}

static void leave(DedupClient *client)
{
    if (client) {
        dedup_client_put(client);
    }
}

static void dedup_share_close(BlockDriverState *bs)
{
    BDRVDedupShareState *s = bs->opaque;

    dedup_layers_drop(s);
    leave(s->client);
    dedup_gather_destroy(&s->gather);
    dedup_buffers_destroy(s);
    dedup_origin_destroy(&s->origin);
    g_free(s->reason);
    options_free(&s->opts);
}

static bool reopen_check(const DedupShareOptions *old,
                         const DedupShareOptions *new, Error **errp)
{
    const char *option = NULL;

    if (strcmp(old->group, new->group)) {
        option = "group";
    } else if (old->has_size != new->has_size || old->size != new->size) {
        option = "store-size";
    } else if (g_strcmp0(old->socket, new->socket)) {
        option = "socket";
    } else if (old->timeout != new->timeout) {
        option = "timeout";
    }
    if (option) {
        error_setg(errp, "%s cannot be changed; store, share, share-encrypted "
                   "and admission can, open the node anew for another %s",
                   option, option);
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
    r->opts.path = g_strdup(s->opts.path);
    if (!reopen_check(&s->opts, &r->opts, errp) ||
        !dedup_join(&r->opts, &r->client, &r->reason, errp)) {
        options_free(&r->opts);
        return -EINVAL;
    }
    state->opaque = g_steal_pointer(&r);
    return 0;
}

static void reopen_end(BDRVReopenState *state)
{
    DedupShareReopen *r = state->opaque;

    leave(r->client);
    g_free(r->reason);
    options_free(&r->opts);
    g_free(r);
    state->opaque = NULL;
}

static void dedup_share_reopen_commit(BDRVReopenState *state)
{
    BDRVDedupShareState *s = state->bs->opaque;
    DedupShareReopen *r = state->opaque;
    DedupShareReopen old = {
        .opts = s->opts, .client = s->client, .reason = s->reason,
    };

    /* the file may be another: all layers are found again when undrained */
    dedup_layers_drop(s);
    s->opts = r->opts;
    set_client(s, r->client);
    s->reason = r->reason;
    s->putting = (DedupPutting) { 0 };
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
    dedup_layers_drop(s);
    leave(s->client);
    set_client(s, NULL);
    bdrv_drained_end(bs);
}

DedupClient *dedup_share_client(const char *group)
{
    BlockDriverState *bs = NULL;

    while ((bs = bdrv_next_all_states(bs))) {
        BDRVDedupShareState *s = bs->opaque;

        if (dedup_share_is(bs) && s->client && !strcmp(s->opts.group, group)) {
            return s->client;
        }
    }
    return NULL;
}

/* What the node has done, for QMP; see stats.h. */
DedupShareStats *dedup_share_stats(BlockDriverState *bs)
{
    BDRVDedupShareState *s = bs->opaque;

    if (!dedup_share_is(bs)) {
        return NULL;
    }
    return dedup_stats_new(bdrv_get_node_name(bs), s->opts.group, s->reason,
                           s->client, &s->counters, &s->origin);
}

/*
 * An overlay over this node names it as its backing file, with these: without
 * group and store its guest would share with others when it is opened again.
 */
static const char *const dedup_share_strong_runtime_opts[] = {
    "group", "store", "store-size", "admission", "socket", "share",
    "share-encrypted", "timeout", "x-copy", NULL
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
    .bdrv_drain_begin           = dedup_share_drain_begin,
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
