/*
 * qemu-dedup-store: image files that nobody writes to, by the kernel's word
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/magic.h>
#include <sys/vfs.h>
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/units.h"
#include "checks.h"
#include "layer.h"
#include "trace.h"

#define LEAST_SIZE MiB
#define TICK_MS 100

#ifndef XFS_SUPER_MAGIC
#define XFS_SUPER_MAGIC 0x58465342
#endif

struct Layers {
    Store *store;
    int64_t idle_us;
    void (*changed)(void);
    QemuThread thread;
    QemuCond decided;           /* a NEW layer is not any more */
    bool stop;                  /* all by the store's lock, and: */
    QTAILQ_HEAD(, Layer) all;
};

/* --- the map, with the lock held ------------------------------------------ */

const Entry *layer_entry(const Layer *layer, uint64_t block)
{
    const Chunk *chunk = layer->chunks[block / CHUNK_BLOCKS];

    return chunk ? &chunk->entries[block % CHUNK_BLOCKS] : NULL;
}

void layer_record(Layer *layer, uint64_t block, Entry entry)
{
    Chunk **chunk = &layer->chunks[block / CHUNK_BLOCKS];
    Entry *e;

    if (!*chunk) {
        *chunk = g_new0(Chunk, 1);
    }
    e = &(*chunk)->entries[block % CHUNK_BLOCKS];
    if (!e->generation) {
        (*chunk)->known++;
        layer->known++;
    }
    *e = entry;
}

bool layer_is_whole(const Layer *layer, uint64_t block)
{
    const Chunk *chunk = layer->chunks[block / CHUNK_BLOCKS];
    uint64_t first = QEMU_ALIGN_DOWN(block, CHUNK_BLOCKS);

    return chunk && chunk->known == MIN(CHUNK_BLOCKS, layer->nblocks - first);
}

static void drop_map(Layer *layer)
{
    uint64_t i;

    for (i = 0; i < DIV_ROUND_UP(layer->nblocks, CHUNK_BLOCKS); i++) {
        g_clear_pointer(&layer->chunks[i], g_free);
    }
    layer->known = 0;
}

void layer_ref(Layer *layer)
{
    layer->refs++;
}

void layer_unref(Layer *layer)
{
    if (--layer->refs) {
        return;
    }
    drop_map(layer);
    close(layer->fd);           /* a local file's, which does not hang */
    g_hash_table_destroy(layer->fills);
    g_free(layer->chunks);
    g_free(layer);
}

void layer_close(Layers *l, Layer *layer)
{
    if (!--layer->clients) {
        layer->unused_since = g_get_monotonic_time();
    }
    layer_unref(layer);
}

void layers_each(Layers *l, void (*each)(void *opaque, Layer *layer),
                 void *opaque)
{
    Layer *layer;

    QTAILQ_FOREACH(layer, &l->all, next) {
        each(opaque, layer);
    }
}

/* --- the lease thread ----------------------------------------------------- */

static int take_lease(int fd)
{
    /* the owner first: a break at once would be for nobody */
    return fcntl(fd, F_SETOWN, getpid()) < 0 ||
           fcntl(fd, F_SETLEASE, F_RDLCK) < 0 ? errno : 0;
}

/* Is the lease as it was?  A file that is being opened for writing: no. */
static bool has_lease(int fd)
{
    return fcntl(fd, F_GETLEASE) == F_RDLCK;
}

bool layer_has_lease(const Layer *layer)
{
    return layer_is_leased(layer) && has_lease(layer->fd);
}

/* It is in no list any more, so that nobody else finds it. */
static void remove_layer(Layers *l, Layer *layer)
{
    QTAILQ_REMOVE(&l->all, layer, next);
    layer_unref(layer);
}

static bool is_unused(const Layers *l, const Layer *layer)
{
    struct stat st;

    if (layer->clients) {
        return false;
    }
    return g_get_monotonic_time() - layer->unused_since >= l->idle_us ||
           (fstat(layer->fd, &st) == 0 && st.st_nlink == 0);
}

/* Give the lease back: nobody uses the map from now on. */
static void break_lease(Layer *layer, const char *why)
{
    layer->state = LAYER_BROKEN;
    drop_map(layer);
    fcntl(layer->fd, F_SETLEASE, F_UNLCK);
    trace_dedup_store_unlease(layer->dev, layer->ino, why);
}

/* The file cannot change any more: what it is now it stays. */
static bool measure(Layer *layer)
{
    struct stat st;

    if (fstat(layer->fd, &st) < 0 || st.st_size < BLOCK) {
        return false;
    }
    layer->nblocks = st.st_size / BLOCK;
    layer->chunks = g_new0(Chunk *, DIV_ROUND_UP(layer->nblocks,
                                                 CHUNK_BLOCKS));
    return true;
}

static void decide(Layers *l, Layer *layer)
{
    layer->error = take_lease(layer->fd);
    layer->state = layer->error || !measure(layer) ? LAYER_REFUSED
                                                   : LAYER_LEASED;
    trace_dedup_store_lease(layer->dev, layer->ino, layer->error);
    qemu_cond_broadcast(&l->decided);
}

/*
 * Look at all layers.  Who is told that others have broken a lease is noted
 * before anybody finds the layer without one.
 */
static void look_at_all(Layers *l)
{
    Layer *layer, *next;
    bool broken = false;

    QEMU_LOCK_GUARD(&l->store->lock);
    QTAILQ_FOREACH_SAFE(layer, &l->all, next, next) {
        if (layer->state == LAYER_NEW) {
            decide(l, layer);
        } else if (layer->state == LAYER_LEASED && !has_lease(layer->fd)) {
            break_lease(layer, "somebody writes");
            broken = true;
            remove_layer(l, layer);
        } else if (layer->state == LAYER_LEASED && is_unused(l, layer)) {
            break_lease(layer, "unused");
            remove_layer(l, layer);
        } else if (layer->state == LAYER_REFUSED) {
            remove_layer(l, layer);
        }
    }
    if (broken) {
        l->changed();
    }
}

static void *lease_thread(void *opaque)
{
    const struct timespec tick = { .tv_nsec = TICK_MS * 1000 * 1000 };
    Layers *l = opaque;
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGIO);     /* it is blocked everywhere */
    while (!qatomic_read(&l->stop)) {
        look_at_all(l);
        sigtimedwait(&set, NULL, &tick);
    }
    return NULL;
}

static void wake(Layers *l)
{
    pthread_kill(l->thread.thread, SIGIO);
}

Layers *layers_new(Store *s, unsigned idle_seconds, void (*changed)(void))
{
    Layers *l = g_new0(Layers, 1);

    l->store = s;
    l->idle_us = idle_seconds * G_USEC_PER_SEC;
    l->changed = changed;
    qemu_cond_init(&l->decided);
    QTAILQ_INIT(&l->all);
    qemu_thread_create(&l->thread, "leases", lease_thread, l,
                       QEMU_THREAD_JOINABLE);
    return l;
}

void layers_end(Layers *l)
{
    Layer *layer, *next;

    qatomic_set(&l->stop, true);
    wake(l);
    qemu_thread_join(&l->thread);
    QEMU_LOCK_GUARD(&l->store->lock);
    QTAILQ_FOREACH_SAFE(layer, &l->all, next, next) {
        /* a thread whose read hangs would keep the file, and so the lease */
        if (layer->state == LAYER_LEASED) {
            break_lease(layer, "the store daemon ends");
        } else if (layer->state == LAYER_NEW) {
            layer->state = LAYER_REFUSED;
            layer->error = ECANCELED;
        }
        remove_layer(l, layer);
    }
    qemu_cond_broadcast(&l->decided);
}

void layers_free(Layers *l)
{
    qemu_cond_destroy(&l->decided);
    g_free(l);
}

/* --- opening -------------------------------------------------------------- */

static bool refuse(DedupLayerState *why, char *text, DedupLayerState state,
                   const char *because)
{
    *why = state;
    pstrcpy(text, DEDUP_TEXT_MAX, because);
    return false;
}

/* Can a file system's leases be relied on? */
static bool is_lease_file_system(const struct statfs *fs)
{
    return fs->f_type == EXT4_SUPER_MAGIC || fs->f_type == XFS_SUPER_MAGIC ||
           fs->f_type == BTRFS_SUPER_MAGIC;
}

/* Is it a file that can have a layer?  May hang. */
static bool check_file(int fd, struct stat *st, DedupLayerState *why,
                       char *text)
{
    struct statfs fs;
    int flags = fcntl(fd, F_GETFL);

    if (flags < 0 || !CHECK("layer-path-only", !(flags & O_PATH)) ||
        (flags & O_ACCMODE) == O_WRONLY) {
        return refuse(why, text, DEDUP_LAYER_UNSUITABLE,
                      "the descriptor is not open for reading");
    }
    if (fstat(fd, st) < 0 || !S_ISREG(st->st_mode)) {
        return refuse(why, text, DEDUP_LAYER_UNSUITABLE,
                      "it is no regular file");
    }
    if (fstatfs(fd, &fs) < 0 ||
        !CHECK("layer-file-system", is_lease_file_system(&fs))) {
        return refuse(why, text, DEDUP_LAYER_UNSUITABLE,
                      "its file system is not ext4, XFS or btrfs, whose "
                      "leases tell that nobody writes");
    }
    if (!CHECK("layer-size", st->st_size >= LEAST_SIZE)) {
        return refuse(why, text, DEDUP_LAYER_SMALL, "it is below 1 MiB");
    }
    return true;
}

/*
 * Open the file anew: of a description that somebody else has, too, that one
 * could change the lease's owner, or give the lease back.
 */
static int open_anew(int fd, const struct stat *st)
{
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", fd);
    int flags = fcntl(fd, F_GETFL), own;
    struct stat now;

    if (!DO("layer-reopen")) {
        return fcntl(fd, F_DUPFD_CLOEXEC, 0);
    }
    own = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY |
               (flags & O_DIRECT));
    if (own >= 0 && (fstat(own, &now) < 0 || now.st_dev != st->st_dev ||
                     now.st_ino != st->st_ino)) {
        close(own);
        own = -1;
        errno = ESTALE;
    }
    return own;
}

/* The layer of that file, if there is one; perhaps NEW yet. */
static Layer *find_layer(Layers *l, const struct stat *st)
{
    Layer *layer;

    QTAILQ_FOREACH(layer, &l->all, next) {
        if (layer->dev == st->st_dev && layer->ino == st->st_ino &&
            (layer->state == LAYER_LEASED || layer->state == LAYER_NEW)) {
            layer->clients++;
            layer_ref(layer);
            return layer;
        }
    }
    return NULL;
}

static Layer *new_layer(Layers *l, int fd, const struct stat *st)
{
    Layer *layer = g_new0(Layer, 1);

    layer->fd = fd;
    layer->direct = fcntl(fd, F_GETFL) & O_DIRECT;
    layer->dev = st->st_dev;
    layer->ino = st->st_ino;
    layer->refs = 2;            /* the caller's, and the list's */
    layer->clients = 1;
    layer->fills = g_hash_table_new(NULL, NULL);
    QTAILQ_INSERT_TAIL(&l->all, layer, next);
    wake(l);
    return layer;
}

static Layer *lease_file(Layers *l, int fd, const struct stat *st,
                         DedupLayerState *why, char *text)
{
    Layer *layer;

    QEMU_LOCK_GUARD(&l->store->lock);
    layer = find_layer(l, st);
    if (layer) {
        close(fd);
    } else {
        layer = new_layer(l, fd, st);
    }
    while (layer->state == LAYER_NEW) {
        qemu_cond_wait(&l->decided, &l->store->lock);
    }
    if (layer->state == LAYER_LEASED) {
        return layer;
    }
    if (layer->error == EAGAIN || layer->state == LAYER_BROKEN) {
        refuse(why, text, DEDUP_LAYER_BUSY, "somebody writes to it");
    } else {
        refuse(why, text, DEDUP_LAYER_FORBIDDEN, "the store daemon may not "
               "have a lease: it needs CAP_LEASE, or to own the file");
    }
    layer_close(l, layer);
    return NULL;
}

Layer *layers_open(Layers *l, int client_fd, DedupLayerState *why,
                   char text[DEDUP_TEXT_MAX])
{
    struct stat st;
    int fd;

    if (!check_file(client_fd, &st, why, text)) {
        return NULL;
    }
    fd = open_anew(client_fd, &st);
    if (fd < 0) {
        refuse(why, text, DEDUP_LAYER_FORBIDDEN,
               "the store daemon may not read it");
        return NULL;
    }
    return lease_file(l, fd, &st, why, text);
}
