/*
 * dedup-share: blocks of a reflink copy that are still its origin's
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See origin.h for what must hold.
 */

#include "qemu/osdep.h"
#include "block/dedup-share.h"
#include "block/qdict.h"
#include "block/thread-pool.h"
#include "qapi/error.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/lockable.h"
#include "qobject/qdict.h"
#include "extents.h"
#include "origin.h"
#include "trace.h"

/* Blocks that are looked at together: 16 MiB. */
#define WINDOW 4096

/* A read waits so long for what was written to be put on the disk. */
#define WAIT_MS 100

/* Blocks of the copy; 4096 of them make 512 bytes. */
typedef struct Window {
    bool looked;                /* at the extents: all that is not own is not */
    DECLARE_BITMAP(own, WINDOW);
} Window;

/* --- putting the files on the disk ---------------------------------------- */

/*
 * A thread of its own does it, which may hang with the disk, and which nobody
 * waits for for long.
 */
typedef struct DedupSync {
    int refs;                   /* atomic */
    int copy, origin;           /* QEMU's, duplicated; then opened anew */
    bool done;                  /* atomic */
    bool slow;                  /* atomic: no read waits for it any more */
    bool failed;                /* so that it is not to be tried again */
    const char *why;            /* nothing can come of it; once it is done */
    QemuSemaphore over;         /* posted as long as it is done */
} DedupSync;

static void sync_unref(DedupSync *sync)
{
    if (qatomic_fetch_dec(&sync->refs) == 1) {
        if (sync->copy >= 0) {
            close(sync->copy);
        }
        if (sync->origin >= 0) {
            close(sync->origin);
        }
        qemu_sem_destroy(&sync->over);
        g_free(sync);
    }
}

/*
 * A duplicate would keep QEMU's image locks when the node has let go of them,
 * and who syncs by it would hear of write errors in place of the node.
 */
static bool open_anew(int *fd)
{
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", *fd);
    int own = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);

    close(*fd);
    *fd = own;
    return own >= 0;
}

static void *sync_thread(void *opaque)
{
    DedupSync *sync = opaque;
    bool opened = open_anew(&sync->copy);

    if (!open_anew(&sync->origin) || !opened) {
        sync->why = "the files cannot be opened anew";
    } else if (dedup_extents_comparable(sync->copy, sync->origin,
                                        &sync->why) &&
               (dedup_extents_sync(sync->copy) < 0 ||
                dedup_extents_sync(sync->origin) < 0)) {
        sync->why = "the file system does not tell where the files are";
        sync->failed = true;
    }
    qatomic_store_release(&sync->done, true);
    qemu_sem_post(&sync->over);
    sync_unref(sync);
    return NULL;
}

/* Is it done, after a while?  In a worker. */
static bool sync_wait(DedupSync *sync)
{
    if (!qatomic_load_acquire(&sync->done)) {
        if (qemu_sem_timedwait(&sync->over, WAIT_MS) < 0) {
            qatomic_set(&sync->slow, true);
            return false;
        }
        qemu_sem_post(&sync->over);     /* for the next one */
    }
    return true;
}

/* Begin to sync.  NULL: there are no descriptors left. */
static DedupSync *sync_start(BlockDriverState *copy, BlockDriverState *origin)
{
    DedupSync *sync = g_new0(DedupSync, 1);
    QemuThread thread;

    sync->refs = 2;             /* the thread's, and the caller's */
    sync->copy = fcntl(dedup_share_file_fd(copy), F_DUPFD_CLOEXEC, 0);
    sync->origin = fcntl(dedup_share_file_fd(origin), F_DUPFD_CLOEXEC, 0);
    qemu_sem_init(&sync->over, 0);
    if (sync->copy < 0 || sync->origin < 0) {
        sync_unref(sync);
        sync_unref(sync);
        return NULL;
    }
    qemu_thread_create(&thread, "dedup-sync", sync_thread, sync,
                       QEMU_THREAD_DETACHED);
    return sync;
}

void dedup_origin_init(DedupOrigin *o)
{
    qemu_co_mutex_init(&o->looking);
    qemu_mutex_init(&o->lock);
    QLIST_INIT(&o->writes);
    o->windows = g_hash_table_new_full(NULL, NULL, NULL, g_free);
}

void dedup_origin_destroy(DedupOrigin *o)
{
    unsigned i;

    assert(QLIST_EMPTY(&o->writes));
    g_clear_pointer(&o->sync, sync_unref);
    for (i = 0; i < ARRAY_SIZE(o->begun); i++) {
        g_clear_pointer(&o->begun[i], sync_unref);
    }
    g_hash_table_destroy(o->windows);
    qemu_mutex_destroy(&o->lock);
}

/* --- what is known, with the lock held ------------------------------------ */

static void forget_all(DedupOrigin *o)
{
    o->connection = 0;
    g_clear_pointer(&o->sync, sync_unref);
    g_hash_table_remove_all(o->windows);
}

static void forget(DedupOrigin *o)
{
    QEMU_LOCK_GUARD(&o->lock);
    forget_all(o);
}

static gpointer key_of(uint64_t window)
{
    return (gpointer)(uintptr_t)window;
}

static Window *get_window(DedupOrigin *o, uint64_t number)
{
    Window *w = g_hash_table_lookup(o->windows, key_of(number));

    if (!w) {
        w = g_new0(Window, 1);
        g_hash_table_insert(o->windows, key_of(number), w);
    }
    return w;
}

/* What @write touches is the copy's own. */
static void own_blocks(DedupOrigin *o, const DedupWrite *write)
{
    uint64_t block = write->offset / DEDUP_BLOCK_SIZE;
    uint64_t end = DIV_ROUND_UP(write->offset + write->bytes, DEDUP_BLOCK_SIZE);

    while (block < end) {
        unsigned from = block % WINDOW;
        unsigned n = MIN(WINDOW - from, end - block);

        bitmap_set(get_window(o, block / WINDOW)->own, from, n);
        block += n;
    }
}

/* Where one more sync is noted, that may hang; NULL: so many may not. */
static DedupSync **find_place(DedupOrigin *o)
{
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(o->begun); i++) {
        if (!o->begun[i] || qatomic_load_acquire(&o->begun[i]->done)) {
            g_clear_pointer(&o->begun[i], sync_unref);
            return &o->begun[i];
        }
    }
    return NULL;
}

/*
 * Begin anew, with what is leased on @connection.  What is written from now on
 * is the copy's own; what was written before is synced.
 */
static void begin_looks(DedupOrigin *o, uint64_t connection)
{
    DedupSync **begun = find_place(o);
    DedupWrite *w;

    forget_all(o);
    if (!begun) {
        return;
    }
    o->connection = connection;
    QLIST_FOREACH(w, &o->writes, next) {
        own_blocks(o, w);
    }
    o->sync = sync_start(o->copy, o->file.node);
    if (!o->sync) {
        forget_all(o);
        return;
    }
    qatomic_inc(&o->sync->refs);
    *begun = o->sync;
}

/* --- writes --------------------------------------------------------------- */

void dedup_origin_begin_write(DedupOrigin *o, DedupWrite *w, int64_t offset,
                              int64_t bytes)
{
    if (!o->child) {
        return;
    }
    *w = (DedupWrite) { .offset = offset, .bytes = bytes };
    QEMU_LOCK_GUARD(&o->lock);
    QLIST_INSERT_HEAD(&o->writes, w, next);
    if (o->connection) {
        own_blocks(o, w);
    }
}

void dedup_origin_end_write(DedupOrigin *o, DedupWrite *w)
{
    if (!o->child) {
        return;
    }
    QEMU_LOCK_GUARD(&o->lock);
    QLIST_REMOVE(w, next);
}

void dedup_origin_begin_resize(DedupOrigin *o)
{
    QEMU_LOCK_GUARD(&o->lock);
    o->resizes++;
    forget_all(o);
}

void dedup_origin_end_resize(DedupOrigin *o)
{
    QEMU_LOCK_GUARD(&o->lock);
    o->resizes--;
    forget_all(o);
}

/* --- looking at extents --------------------------------------------------- */

/* The files that are synced, and what is looked at of them. */
typedef struct Look {
    DedupSync *sync;
    uint64_t block;             /* where the window begins */
    bool done;                  /* else it is to be tried again */
    DECLARE_BITMAP(same, WINDOW);
} Look;

/*
 * Look at what is at @start, up to @end at most.  Returns up to where that was
 * done, or 0 if it cannot be.
 */
static uint64_t look_at_some(Look *l, DedupExtents *before,
                             DedupExtents *origin, DedupExtents *after,
                             uint64_t start, uint64_t end)
{
    DECLARE_BITMAP(same, WINDOW) = { 0 };
    DECLARE_BITMAP(still, WINDOW) = { 0 };

    if (dedup_extents_read(l->sync->copy, start, end, before) < 0 ||
        dedup_extents_read(l->sync->origin, start, before->end, origin) < 0 ||
        dedup_extents_read(l->sync->copy, start, origin->end, after) < 0) {
        return 0;
    }
    dedup_extents_mark_same(before, origin, l->block, WINDOW, same);
    dedup_extents_mark_same(after, origin, l->block, WINDOW, still);
    bitmap_and(same, same, still, WINDOW);
    bitmap_or(l->same, l->same, same, WINDOW);
    return MAX(QEMU_ALIGN_DOWN(after->end, DEDUP_BLOCK_SIZE),
               start + DEDUP_BLOCK_SIZE);
}

/* In a worker: all of this can hang. */
static int look_at_window(void *opaque)
{
    Look *l = opaque;
    g_autofree DedupExtents *x = NULL;
    uint64_t at = l->block * DEDUP_BLOCK_SIZE, end, next;
    struct stat st;

    if (!sync_wait(l->sync) || l->sync->why ||
        fstat(l->sync->copy, &st) < 0) {
        return 0;
    }
    l->done = true;
    x = g_new(DedupExtents, 3);
    end = MIN(at + WINDOW * DEDUP_BLOCK_SIZE,
              QEMU_ALIGN_DOWN((uint64_t)st.st_size, DEDUP_BLOCK_SIZE));
    for (; at < end; at = next) {
        next = look_at_some(l, &x[0], &x[1], &x[2], at, end);
        if (!next) {
            break;
        }
    }
    return 0;
}

/* What the look @l has found, with the lock held. */
static void record(DedupOrigin *o, const Look *l)
{
    Window *w = get_window(o, l->block / WINDOW);
    DECLARE_BITMAP(differs, WINDOW);

    bitmap_complement(differs, l->same, WINDOW);
    bitmap_or(w->own, w->own, differs, WINDOW);
    w->looked = true;
}

/*
 * The files to look at, for the window @number, while the origin is leased on
 * @connection; NULL if nothing is to be looked at now.  The lock is held.
 */
static DedupSync *get_files(DedupOrigin *o, uint64_t connection,
                            uint64_t number)
{
    Window *w;

    if (o->connection != connection && !o->resizes) {
        begin_looks(o, connection);
    }
    w = g_hash_table_lookup(o->windows, key_of(number));
    if (!o->sync || (w && w->looked) ||
        (qatomic_read(&o->sync->slow) && !qatomic_read(&o->sync->done))) {
        return NULL;
    }
    qatomic_inc(&o->sync->refs);
    return o->sync;
}

/* Look at the window @number, while the origin is leased on @connection. */
static void coroutine_fn look(DedupOrigin *o, uint64_t connection,
                              uint64_t number)
{
    Look l = { .block = number * WINDOW };

    qemu_co_mutex_lock(&o->looking);
    WITH_QEMU_LOCK_GUARD(&o->lock) {
        l.sync = get_files(o, connection, number);
    }
    if (l.sync) {
        thread_pool_submit_co(look_at_window, &l);
        trace_dedup_origin_look(o, l.block, bitmap_count_one(l.same, WINDOW),
                                l.done);
        WITH_QEMU_LOCK_GUARD(&o->lock) {
            if (o->sync != l.sync) {
                /* all was forgotten meanwhile */
            } else if (l.done) {
                record(o, &l);
            } else if (qatomic_load_acquire(&l.sync->done)) {
                qatomic_set(&o->why, l.sync->why);
                o->failed |= l.sync->failed;
            }
        }
        sync_unref(l.sync);
    }
    qemu_co_mutex_unlock(&o->looking);
}

/* --- locating ------------------------------------------------------------- */

/* False: @n blocks from @first on are in a window that is to be looked at. */
static bool take_places(DedupOrigin *o, uint64_t connection, uint64_t first,
                        unsigned n, DedupPlace *places)
{
    unsigned i, from = first % WINDOW;
    Window *w;

    QEMU_LOCK_GUARD(&o->lock);
    w = o->connection == connection
        ? g_hash_table_lookup(o->windows, key_of(first / WINDOW)) : NULL;
    if (!w || !w->looked) {
        return false;
    }
    for (i = 0; i < n; i++) {
        if (!test_bit(from + i, w->own) && first + i < o->file.nblocks) {
            places[i] = (DedupPlace) {
                .file = &o->file, .block = first + i,
                .connection = connection,
            };
        }
    }
    return true;
}

void coroutine_fn GRAPH_RDLOCK
dedup_origin_locate(DedupOrigin *o, DedupClient *c, BlockDriverState *bs,
                    uint64_t first, unsigned n, DedupPlace *places)
{
    uint64_t connection;
    unsigned i, run;

    if (!dedup_origin_is_used(o) || bs->open_flags & BDRV_O_INACTIVE) {
        return;
    }
    connection = dedup_file_lease(c, &o->file);
    for (i = 0; connection && i < n; i += run) {
        run = MIN(n - i, WINDOW - (first + i) % WINDOW);
        if (!take_places(o, connection, first + i, run, places + i)) {
            look(o, connection, (first + i) / WINDOW);
            take_places(o, connection, first + i, run, places + i);
        }
    }
}

/* --- the graph ------------------------------------------------------------ */

/* The node that keeps @bs from leading to a file as it is. */
static BlockDriverState *GRAPH_RDLOCK find_obstacle(BlockDriverState *bs)
{
    while (bs->drv && (!strcmp(bs->drv->format_name, "throttle") ||
                       (!strcmp(bs->drv->format_name, "raw") &&
                        bs->file->role & BDRV_CHILD_FILTERED))) {
        bs = bs->file->bs;
    }
    return bs;
}

/*
 * A guest's write to an image of another format can go to any place of its
 * file, so only of raw images is it known which block is written.
 */
static bool GRAPH_RDLOCK check_copy(BlockDriverState *bs, Error **errp)
{
    bool throttled;

    if (dedup_file_node(bs->file->bs, &throttled)) {
        return true;
    }
    bs = find_obstacle(bs->file->bs);
    error_setg(errp, "origin: node '%s' is of driver '%s', and only a whole "
               "raw image in a file can be a copy; use an overlay over the "
               "common image instead, or share=all", bdrv_get_node_name(bs),
               bs->drv ? bs->drv->format_name : "none");
    return false;
}

static bool GRAPH_RDLOCK check_origin(BlockDriverState *bs, Error **errp)
{
    bool throttled;
    BlockDriverState *file = dedup_file_node(bs, &throttled);

    if (!file) {
        bs = find_obstacle(bs);
        error_setg(errp, "origin: node '%s' is of driver '%s'; name the file "
                   "that the image was copied from, or a whole raw image in it",
                   bdrv_get_node_name(bs),
                   bs->drv ? bs->drv->format_name : "none");
    } else if (!bdrv_is_read_only(file)) {
        error_setg(errp, "origin: node '%s' is writable; open it with "
                   "read-only=on, as the image must not change",
                   bdrv_get_node_name(file));
        file = NULL;
    }
    return file;
}

/* An origin that is described here is only read, as a backing file is. */
static void set_read_only(QDict *options)
{
    const QDictEntry *e;

    for (e = qdict_first(options); e; e = qdict_next(options, e)) {
        if (strstart(qdict_entry_key(e), "origin.", NULL)) {
            qdict_set_default_str(options, "origin." BDRV_OPT_READ_ONLY, "on");
            return;
        }
    }
}

bool dedup_origin_open(DedupOrigin *o, BlockDriverState *bs, QDict *options,
                       Error **errp)
{
    ERRP_GUARD();

    set_read_only(options);
    o->child = bdrv_open_child(NULL, options, "origin", bs, &child_of_bds,
                               BDRV_CHILD_DATA, true, errp);
    if (!o->child) {
        return !*errp;
    }
    GRAPH_RDLOCK_GUARD_MAINLOOP();
    return check_copy(bs, errp) && check_origin(o->child->bs, errp);
}

void dedup_origin_perms(uint64_t *perm, uint64_t *shared)
{
    *perm = BLK_PERM_CONSISTENT_READ;
    *shared = BLK_PERM_ALL & ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
}

void GRAPH_RDLOCK dedup_origin_cut_shared(DedupOrigin *o, BlockDriverState *bs,
                                          uint64_t *shared)
{
    if (!o->child) {
        return;
    }
    /* who inserts the filter into a graph has others that write, until then */
    if (!QLIST_EMPTY(&bs->parents) && !(bs->open_flags & BDRV_O_INACTIVE)) {
        *shared &= ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
    }
    forget(o);
}

/* Does a node from @bs to @copy let others write, whatever its parents say? */
static bool GRAPH_RDLOCK is_shared_by_force(BlockDriverState *bs,
                                            BlockDriverState *copy)
{
    while (bs != copy && !bs->force_share) {
        bs = bs->file->bs;
    }
    return bs->force_share;
}

void GRAPH_RDLOCK dedup_origin_find(DedupOrigin *o, BlockDriverState *bs)
{
    BlockDriverState *copy, *origin;
    const char *why = NULL;
    bool throttled = false;

    if (!o->child) {
        return;
    }
    assert(!o->copy);
    copy = dedup_file_node(bs->file->bs, &throttled);
    origin = dedup_file_node(o->child->bs, &throttled);
    if (!copy || !origin) {
        why = "the image, or the origin, is no raw image in a file now";
    } else if (o->failed) {
        why = "the files could not be synced";
    } else if (is_shared_by_force(bs->file->bs, copy)) {
        why = "force-share lets others write to the image";
    } else {
        o->copy = copy;
        o->file = (DedupFile) { .node = origin, .throttled = throttled };
        qemu_co_mutex_init(&o->file.opening);
    }
    qatomic_set(&o->why, why);
    forget(o);
}

void dedup_origin_drop(DedupOrigin *o, DedupClient *c)
{
    if (o->copy) {
        dedup_client_close_layer(c, &o->file.layer);
        o->copy = NULL;
    }
    forget(o);
}

char *dedup_origin_reason(DedupOrigin *o, DedupClient *c)
{
    g_autofree char *why = NULL;

    if (qatomic_read(&o->why)) {
        return g_strdup(qatomic_read(&o->why));
    }
    if (o->copy) {
        why = dedup_client_layer_why(c, &o->file.layer);
    }
    return why ? g_strdup_printf("the store daemon has no lease on it: %s", why)
               : NULL;
}
