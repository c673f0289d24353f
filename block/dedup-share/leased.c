/*
 * dedup-share: reads of images that the store daemon has leases on
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See leased.h for what must hold.
 */

#include "qemu/osdep.h"
#include "../coroutines.h"
#include "block/dedup-share.h"
#include "block/thread-pool.h"
#include "qobject/qdict.h"
#include "qemu/atomic.h"
#include "leased.h"
#include "trace.h"

static bool is_driver(const BlockDriverState *bs, const char *name)
{
    return bs->drv && !strcmp(bs->drv->format_name, name);
}

/* --- finding -------------------------------------------------------------- */

/* The 'file' node that @bs leads to, through nodes that leave bytes be. */
static BlockDriverState *GRAPH_RDLOCK find_file(BlockDriverState *bs,
                                                bool *throttled)
{
    while (bs && is_driver(bs, "throttle")) {
        *throttled = true;
        bs = bs->file ? bs->file->bs : NULL;
    }
    return bs && is_driver(bs, "file") ? bs : NULL;
}

/*
 * Without offset and size, 'raw' is little more than a filter.  Its child's
 * role is that of the open; a reopen can have changed the options.
 */
static bool GRAPH_RDLOCK is_whole_raw(BlockDriverState *bs)
{
    return is_driver(bs, "raw") && bs->file &&
           bs->file->role & BDRV_CHILD_FILTERED &&
           !qdict_haskey(bs->options, "offset") &&
           !qdict_haskey(bs->options, "size");
}

BlockDriverState *GRAPH_RDLOCK dedup_file_node(BlockDriverState *bs,
                                               bool *throttled)
{
    while (bs && (is_whole_raw(bs) || is_driver(bs, "throttle"))) {
        *throttled |= is_driver(bs, "throttle");
        bs = bs->file ? bs->file->bs : NULL;
    }
    return bs && is_driver(bs, "file") ? bs : NULL;
}

static void GRAPH_RDLOCK add_files(DedupFiles *f, BlockDriverState *layer,
                                   int depth, bool throttled)
{
    BdrvChild *child;

    QLIST_FOREACH(child, &layer->children, next) {
        bool slow = throttled;
        BlockDriverState *file;

        if (strcmp(child->name, "file") && strcmp(child->name, "data-file")) {
            continue;
        }
        file = find_file(child->bs, &slow);
        if (file && f->n < DEDUP_MAX_FILES) {
            f->files[f->n] = (DedupFile) {
                .node = file, .depth = depth, .throttled = slow,
            };
            qemu_co_mutex_init(&f->files[f->n++].opening);
        }
    }
}

void GRAPH_RDLOCK dedup_files_find(DedupFiles *f, BlockDriverState *bs)
{
    BlockDriverState *p = bs->file ? bs->file->bs : NULL;
    bool throttled = false;
    int depth = 1;

    assert(!f->n);
    f->files = f->files ?: g_new0(DedupFile, DEDUP_MAX_FILES);
    f->tail = NULL;
    for (; p && p->drv; p = bdrv_filter_or_cow_bs(p), depth++) {
        unsigned before = f->n;

        if (is_driver(p, "throttle")) {
            throttled = true;
        } else if (p->drv->is_filter) {
            break;
        } else if (depth > 1 || bdrv_is_read_only(p)) {
            /* nobody leases what this process has open for writing */
            add_files(f, p, depth, throttled);
        }
        if (f->n > before) {
            f->tail = bdrv_filter_or_cow_bs(p);
        }
    }
    trace_dedup_leased_find(bs, f->n);
}

void dedup_files_drop(DedupFiles *f, DedupClient *c)
{
    while (f->n) {
        dedup_client_close_layer(c, &f->files[--f->n].layer);
    }
    g_clear_pointer(&f->files, g_free);
}

/* --- opening -------------------------------------------------------------- */

typedef struct Opening {
    int fd;                     /* a duplicate of QEMU's */
    int flags;
    int opened;
} Opening;

/* In a worker: all of this can hang. */
static int open_anew(void *opaque)
{
    Opening *o = opaque;
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", o->fd);

    o->opened = open(path, o->flags | O_RDONLY | O_CLOEXEC | O_NOCTTY);
    close(o->fd);
    return 0;
}

static int size_blocks(void *opaque)
{
    Opening *o = opaque;
    struct stat st;
    int ret = fstat(o->opened, &st);

    close(o->opened);
    return ret < 0 ? 0 : MIN(st.st_size / DEDUP_BLOCK_SIZE, INT_MAX);
}

/* Have the daemon open @file, if it was not asked yet. */
static void coroutine_fn open_file(DedupClient *c, DedupFile *file)
{
    Opening o = {
        .flags = file->node->open_flags & BDRV_O_NOCACHE ? O_DIRECT : 0,
    };

    o.fd = fcntl(dedup_share_file_fd(file->node), F_DUPFD_CLOEXEC, 0);
    if (o.fd < 0) {
        qatomic_set(&file->failed, true);
        return;
    }
    thread_pool_submit_co(open_anew, &o);
    qatomic_set(&file->failed, o.opened < 0);
    if (o.opened >= 0) {
        dedup_client_open_layer(c, &file->layer, o.opened);
        /* its size does not change while it is leased */
        file->nblocks = thread_pool_submit_co(size_blocks, &o);
    }
}

static uint64_t look_up(DedupClient *c, DedupFile *file, bool *name)
{
    uint64_t connection;
    uint32_t number;

    return dedup_client_layer_is_leased(c, &file->layer, &number, &connection,
                                        name) ? connection : 0;
}

uint64_t coroutine_fn dedup_file_lease(DedupClient *c, DedupFile *file)
{
    uint64_t connection;
    bool name;

    connection = look_up(c, file, &name);
    if (!name || qatomic_read(&file->failed)) {
        return connection;
    }
    qemu_co_mutex_lock(&file->opening);
    connection = look_up(c, file, &name);
    if (name && !file->failed) {
        open_file(c, file);
        connection = look_up(c, file, &name);
    }
    qemu_co_mutex_unlock(&file->opening);
    return connection;
}

/* --- locating ------------------------------------------------------------- */

static DedupFile *GRAPH_RDLOCK match_file(DedupFiles *f, int depth,
                                          BlockDriverState *node)
{
    bool throttled = false;
    unsigned i;

    node = find_file(node, &throttled);
    for (i = 0; node && i < f->n; i++) {
        if (f->files[i].depth == depth && f->files[i].node == node) {
            return &f->files[i];
        }
    }
    return NULL;
}

/* @n whole blocks are at @map of @file. */
static void coroutine_fn place_run(DedupClient *c, DedupFile *file,
                                   int64_t map, unsigned n, DedupPlace *places)
{
    unsigned i;

    if (map % DEDUP_BLOCK_SIZE || !dedup_file_lease(c, file)) {
        return;
    }
    map /= DEDUP_BLOCK_SIZE;
    for (i = 0; i < n && map + i < file->nblocks; i++) {
        places[i] = (DedupPlace) { .file = file, .block = map + i };
    }
}

void coroutine_fn GRAPH_RDLOCK
dedup_files_locate(DedupFiles *f, DedupClient *c, BlockDriverState *bs,
                   uint64_t first, unsigned n, DedupPlace *places)
{
    int64_t offset = first * DEDUP_BLOCK_SIZE, map = 0, pnum;
    unsigned i = 0, whole;

    memset(places, 0, n * sizeof(*places));
    while (i < n) {
        BlockDriverState *node = NULL;
        DedupFile *file;
        int depth = 0;
        int ret = bdrv_co_common_block_status_above(
            bs->file->bs, f->tail, false, false, offset,
            (int64_t)(n - i) * DEDUP_BLOCK_SIZE, &pnum, &map, &node, &depth);

        whole = ret < 0 ? 0 : MIN(pnum / DEDUP_BLOCK_SIZE, n - i);
        if (whole && (ret & (BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO |
                             BDRV_BLOCK_OFFSET_VALID)) ==
                     (BDRV_BLOCK_DATA | BDRV_BLOCK_OFFSET_VALID)) {
            file = match_file(f, depth, node);
            if (file) {
                place_run(c, file, map, whole, places + i);
            }
        } else if (whole && !f->tail && (ret & BDRV_BLOCK_ZERO ||
                                         !(ret & BDRV_BLOCK_ALLOCATED))) {
            unsigned j;

            for (j = 0; j < whole; j++) {
                places[i + j].unallocated = true;
            }
        }
        whole = MAX(whole, 1);
        i += whole;
        offset += (int64_t)whole * DEDUP_BLOCK_SIZE;
    }
}
