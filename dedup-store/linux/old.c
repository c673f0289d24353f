/*
 * qemu-dedup-store: frames of earlier daemons, which guests still map
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See old.h for what must hold.
 */

#include "qemu/osdep.h"
#include <linux/falloc.h>
#include <linux/magic.h>
#include <sys/vfs.h>
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/lockable.h"
#include "qemu/queue.h"
#include "qemu/thread.h"
#include "../checks.h"
#include "../trace.h"
#include "old.h"

#define BLOCK DEDUP_PROTOCOL_BLOCK

/* Files that are minded; what else is claimed stays while it is mapped. */
#define MAX_FILES 16

/*
 * Locks of a process on a file for which it can claim: a client reconnects to
 * a daemon that lives, if ever, and never often.  And bitmaps of a file, of all
 * claims: each takes the 32768th part of its size.
 */
#define MAX_CLAIMS_OF_PROCESS 16
#define MAX_BITMAPS 1024

/* Those that have ended are looked for so often. */
#define SWEEP_MS 1000

typedef struct Claim {
    unsigned long *slots;       /* NULL: not complete yet */
    unsigned long *next;        /* what is being said, or NULL */
    uint64_t connection;        /* ... on it, or was said last */
} Claim;

typedef struct OldFile {
    int fd;
    dev_t dev;
    ino_t ino;
    uint32_t nslots;
    GHashTable *claims;         /* uint64_t, a lock -> Claim */
    unsigned nbitmaps;          /* of these */
    bool punched;               /* all, as of the claims that there are */
    QTAILQ_ENTRY(OldFile) next;
} OldFile;

struct OldFiles {
    int own_fd;
    uint64_t memory;            /* atomic */
    bool stop;                  /* atomic */
    QemuSemaphore wake;
    QemuThread thread;
    QemuMutex lock;             /* protects the rest; held while it punches */
    unsigned nfiles;
    bool has_thread;
    QTAILQ_HEAD(, OldFile) files;
};

/* --- locks ---------------------------------------------------------------- */

bool frames_file_lock(int fd, uint64_t lock)
{
    struct flock l = {
        .l_type = lock == FRAMES_LOCK_DAEMON ? F_WRLCK : F_RDLCK,
        .l_whence = SEEK_SET, .l_start = lock, .l_len = 1,
    };

    return fcntl(fd, F_OFD_SETLK, &l) == 0;
}

/* Is there no lock among @n from @first on?  0: all of them. */
static bool is_unlocked(const OldFile *o, uint64_t first, uint64_t n)
{
    struct flock lock = {
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = first, .l_len = n,
    };

    return fcntl(o->fd, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

/* Does the daemon live whose file it is?  Only that can have such a lock. */
static bool is_in_use(const OldFile *o)
{
    struct flock lock = {
        .l_type = F_RDLCK, .l_whence = SEEK_SET,
        .l_start = FRAMES_LOCK_DAEMON, .l_len = 1,
    };

    return DO("claim-live") && (fcntl(o->fd, F_OFD_GETLK, &lock) < 0 ||
                                lock.l_type != F_UNLCK);
}

static gint compare_locks(gconstpointer a, gconstpointer b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

/* Is there a claim for each lock, and complete? */
static bool all_have_claimed(const OldFile *o)
{
    g_autoptr(GList) locks = g_list_sort(g_hash_table_get_keys(o->claims),
                                         compare_locks);
    uint64_t from = 0;
    GList *l;

    for (l = locks; l; l = l->next) {
        const Claim *c = g_hash_table_lookup(o->claims, l->data);
        uint64_t lock = *(uint64_t *)l->data;

        if (!c->slots || (lock > from && !is_unlocked(o, from, lock - from))) {
            return false;
        }
        from = lock + 1;
    }
    return is_unlocked(o, from, 0);
}

/* --- punching, with the lock held ----------------------------------------- */

static gboolean has_ended(gpointer lock, gpointer opaque, gpointer file)
{
    Claim *c = opaque;
    OldFile *o = file;

    if (!is_unlocked(o, *(uint64_t *)lock, 1)) {
        return false;
    }
    o->nbitmaps -= !!c->slots + !!c->next;
    o->punched = false;
    return true;
}

/* The slots that nobody has claimed; the caller's. */
static unsigned long *find_unclaimed(OldFile *o)
{
    unsigned long *slots = bitmap_new(o->nslots);
    GHashTableIter iter;
    gpointer claim;

    g_hash_table_iter_init(&iter, o->claims);
    while (g_hash_table_iter_next(&iter, NULL, &claim)) {
        bitmap_or(slots, slots, ((Claim *)claim)->slots, o->nslots);
    }
    bitmap_complement(slots, slots, o->nslots);
    return slots;
}

/* Punch those of @slots that have memory, from @slot to @end. */
static void punch_run(OldFile *o, const unsigned long *slots,
                      unsigned long slot, unsigned long end)
{
    while ((slot = find_next_bit(slots, end, slot)) < end) {
        unsigned long stop = find_next_zero_bit(slots, end, slot);

        if (fallocate(o->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      (off_t)slot * BLOCK, (off_t)(stop - slot) * BLOCK) < 0) {
            return;
        }
        slot = stop;
    }
}

static void punch_unclaimed(OldFile *o)
{
    g_autofree unsigned long *slots = find_unclaimed(o);
    off_t from = 0, end;

    while ((from = lseek(o->fd, from, SEEK_DATA)) >= 0) {
        end = lseek(o->fd, from, SEEK_HOLE);
        if (end < 0) {
            return;
        }
        punch_run(o, slots, from / BLOCK, DIV_ROUND_UP(end, BLOCK));
        from = end;
    }
}

/* What is left of it; its own daemon counts that, as long as it lives. */
static uint64_t find_memory(const OldFile *o)
{
    struct stat st;

    return is_in_use(o) || fstat(o->fd, &st) < 0 ? 0 : st.st_blocks * 512ULL;
}

static void old_file_free(OldFile *o)
{
    close(o->fd);
    g_hash_table_destroy(o->claims);
    g_free(o);
}

/* Nobody uses it any more: what it has goes with it. */
static void remove_file(OldFiles *old, OldFile *o)
{
    QTAILQ_REMOVE(&old->files, o, next);
    old->nfiles--;
    old_file_free(o);
}

static void sweep(OldFiles *old)
{
    OldFile *o, *next;
    uint64_t sum = 0;

    QEMU_LOCK_GUARD(&old->lock);
    QTAILQ_FOREACH_SAFE(o, &old->files, next, next) {
        g_hash_table_foreach_remove(o->claims, has_ended, o);
        if (!o->punched && CHECK("claim-all", all_have_claimed(o))) {
            punch_unclaimed(o);
            o->punched = true;
        }
        if (is_unlocked(o, 0, 0)) {
            remove_file(old, o);
        } else {
            sum += find_memory(o);
        }
    }
    trace_dedup_store_old_files(old->nfiles, sum);
    qatomic_set(&old->memory, sum);
}

static void *sweep_thread(void *opaque)
{
    OldFiles *old = opaque;

    while (!qatomic_read(&old->stop)) {
        sweep(old);
        qemu_sem_timedwait(&old->wake, SWEEP_MS);
    }
    return NULL;
}

/* --- claims --------------------------------------------------------------- */

/* A file that has become known. */
static void add_file(OldFiles *old, OldFile *o)
{
    QTAILQ_INSERT_TAIL(&old->files, o, next);
    old->nfiles++;
    qatomic_set(&old->memory, old->memory + find_memory(o));
    if (!old->has_thread) {
        old->has_thread = true;
        qemu_thread_create(&old->thread, "old", sweep_thread, old,
                           QEMU_THREAD_JOINABLE);
    }
}

static OldFile *find_file(OldFiles *old, const OldFile *same)
{
    OldFile *o;

    QTAILQ_FOREACH(o, &old->files, next) {
        if (o->dev == same->dev && o->ino == same->ino) {
            break;
        }
    }
    return o;
}

/* Is it the file of a store daemon of this user?  Anything may be passed. */
static bool is_frames_file(int fd, const struct stat *st)
{
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", fd);
    g_autofree char *name = g_file_read_link(path, NULL);
    struct statfs fs;

    return fstatfs(fd, &fs) == 0 && fs.f_type == TMPFS_MAGIC &&
           S_ISREG(st->st_mode) && (st->st_mode & 07777) == 0600 &&
           st->st_uid == geteuid() && !st->st_nlink && st->st_size > 0 &&
           st->st_size / BLOCK < UINT32_MAX &&
           !g_strcmp0(name, "/memfd:" FRAMES_FILE_NAME " (deleted)");
}

static void claim_free(gpointer opaque)
{
    Claim *c = opaque;

    g_free(c->slots);
    g_free(c->next);
    g_free(c);
}

/* What @fd is of, opened anew to be punched; NULL if that must not be. */
static OldFile *open_file(const OldFiles *old, int fd)
{
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", fd);
    struct stat st, own;
    OldFile *o;

    if (fstat(fd, &st) < 0 || fstat(old->own_fd, &own) < 0 ||
        !CHECK("claim-file", is_frames_file(fd, &st)) ||
        (st.st_dev == own.st_dev && st.st_ino == own.st_ino)) {
        return NULL;
    }
    fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        return NULL;
    }
    o = g_new0(OldFile, 1);
    o->fd = fd;
    o->dev = st.st_dev;
    o->ino = st.st_ino;
    o->nslots = st.st_size / BLOCK;
    o->claims = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                      claim_free);
    return o;
}

/* Are there as many claims of the process of @lock as there may be? */
static bool has_many_claims(const OldFile *o, uint64_t lock)
{
    unsigned n = 0;
    GHashTableIter iter;
    gpointer other;

    g_hash_table_iter_init(&iter, o->claims);
    while (g_hash_table_iter_next(&iter, &other, NULL)) {
        n += *(uint64_t *)other >> 40 == lock >> 40;
    }
    return n >= MAX_CLAIMS_OF_PROCESS;
}

/* NULL: there may be no more.  What was not claimed for is not punched. */
static Claim *get_claim(OldFile *o, uint64_t lock)
{
    Claim *c = g_hash_table_lookup(o->claims, &lock);

    if (!c && CHECK("claim-many", !has_many_claims(o, lock))) {
        c = g_new0(Claim, 1);
        g_hash_table_insert(o->claims, g_memdup2(&lock, sizeof(lock)), c);
    }
    return c;
}

/*
 * Begin @c anew, for @connection; false if a later one has said something, as
 * what two connections say may be handled in any order.
 */
static bool begin_claim(OldFile *o, Claim *c, uint64_t connection)
{
    if (!CHECK("claim-order", connection >= c->connection)) {
        return false;
    }
    c->connection = connection;
    if (c->next) {
        bitmap_clear(c->next, 0, o->nslots);
    } else if (o->nbitmaps < MAX_BITMAPS) {
        c->next = bitmap_new(o->nslots);
        o->nbitmaps++;
    }
    return c->next;
}

/* With the lock held. */
static void note_claim(OldFile *o, Claim *c, uint64_t connection,
                       const uint32_t *slots, unsigned n, uint32_t flags)
{
    unsigned i;

    if (flags & DEDUP_CLAIM_FIRST ? !begin_claim(o, c, connection)
        : !c->next || !CHECK("claim-order", c->connection == connection)) {
        return;
    }
    for (i = 0; i < n; i++) {
        if (slots[i] < o->nslots) {
            set_bit(slots[i], c->next);
        }
    }
    if (flags & DEDUP_CLAIM_LAST) {
        o->nbitmaps -= !!c->slots;
        g_free(c->slots);
        c->slots = g_steal_pointer(&c->next);
        o->punched = false;
    }
}

/* Is @lock, which there is, of process @pid? */
static bool is_lock_of(const OldFile *o, pid_t pid, uint64_t lock)
{
    return CHECK("claim-pid", pid > 0 && lock >> 40 == pid) &&
           !is_unlocked(o, lock, 1);
}

void old_files_claim(OldFiles *old, pid_t pid, uint64_t connection, int fd,
                     const DedupMsgClaim *m, const uint32_t *slots, unsigned n)
{
    OldFile *opened = open_file(old, fd), *o;
    Claim *c;

    if (!opened) {
        return;
    }
    QEMU_LOCK_GUARD(&old->lock);
    o = find_file(old, opened);
    if (!o && old->nfiles < MAX_FILES) {
        o = g_steal_pointer(&opened);
        add_file(old, o);
    }
    c = o && is_lock_of(o, pid, m->lock) ? get_claim(o, m->lock) : NULL;
    if (c) {
        note_claim(o, c, connection, slots, n, m->flags);
    }
    if (m->flags & DEDUP_CLAIM_LAST) {
        qemu_sem_post(&old->wake);
    }
    if (opened) {
        old_file_free(opened);
    }
}

/* -------------------------------------------------------------------------- */

OldFiles *old_files_new(int own_fd)
{
    OldFiles *old = g_new0(OldFiles, 1);

    old->own_fd = own_fd;
    qemu_mutex_init(&old->lock);
    qemu_sem_init(&old->wake, 0);
    QTAILQ_INIT(&old->files);
    return old;
}

void old_files_free(OldFiles *old)
{
    OldFile *o;

    if (old->has_thread) {
        qatomic_set(&old->stop, true);
        qemu_sem_post(&old->wake);
        qemu_thread_join(&old->thread);
    }
    while ((o = QTAILQ_FIRST(&old->files))) {
        remove_file(old, o);
    }
    qemu_sem_destroy(&old->wake);
    qemu_mutex_destroy(&old->lock);
    g_free(old);
}

uint64_t old_files_memory(OldFiles *old)
{
    return qatomic_read(&old->memory);
}
