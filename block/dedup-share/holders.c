/*
 * dedup-share: which frames the processes of a group hold
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See holders.h for what must hold.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitops.h"
#include "qemu/coroutine-tls.h"
#include "index.h"
#include "holders.h"

#define HELD_MAGIC 0x444c4548445544ULL      /* "DUDHELD" */

/* The first page of the file. */
typedef struct HeldHeader {
    uint64_t magic;
    uint32_t nframes;
    uint32_t nrows;             /* rows from here on were never used; atomic */
} HeldHeader;

/* A word of a row has a bit for each of so many slots. */
#define SLOTS_PER_WORD 64
QEMU_BUILD_BUG_ON(BITS_PER_LONG != SLOTS_PER_WORD);

static void *row_at(DedupHolders *h, unsigned row)
{
    return h->base + DEDUP_HEADER_SIZE + row * h->row_size;
}

/* Make sure of memory for @size bytes at @p. */
static bool populate(void *p, size_t size)
{
    if (madvise(p, size, MADV_POPULATE_WRITE) < 0) {
        errno = errno == EFAULT ? ENOSPC : errno;
        return false;
    }
    return true;
}

static bool map_file(DedupHolders *h, bool create)
{
    HeldHeader *hdr;
    struct stat st;

    if (create ? ftruncate(h->fd, h->size) < 0
               : fstat(h->fd, &st) < 0 || st.st_size != h->size) {
        errno = create ? errno : EINVAL;
        return false;
    }
    h->base = mmap(NULL, h->size, PROT_READ | PROT_WRITE, MAP_SHARED, h->fd,
                   0);
    if (h->base == MAP_FAILED || !populate(h->base, DEDUP_HEADER_SIZE)) {
        return false;
    }
    hdr = h->base;
    if (create) {
        hdr->nframes = h->nframes;
        hdr->magic = HELD_MAGIC;
    }
    errno = EINVAL;
    return hdr->magic == HELD_MAGIC && hdr->nframes == h->nframes &&
           hdr->nrows <= DEDUP_MAX_MEMBERS;
}

/* Take the first row that nobody has, and clear it. */
static bool take_row(DedupHolders *h)
{
    HeldHeader *hdr = h->base;
    unsigned row = 0;

    while (row < DEDUP_MAX_MEMBERS && qemu_lock_fd(h->fd, row, 1, true) < 0) {
        row++;
    }
    if (row == DEDUP_MAX_MEMBERS) {
        errno = EUSERS;
        return false;
    }
    h->row = row;
    h->bits = row_at(h, row);
    if (!populate(h->bits, h->row_size)) {
        return false;
    }
    memset(h->bits, 0, h->row_size);
    if (row >= qatomic_read(&hdr->nrows)) {
        qatomic_set(&hdr->nrows, row + 1);
    }
    return true;
}

static void unmap(DedupHolders *h)
{
    if (h->base != MAP_FAILED) {
        munmap(h->base, h->size);
    }
    if (h->fd >= 0) {
        close(h->fd);
    }
}

bool dedup_holders_open(DedupHolders *h, int dirfd, uint32_t nframes,
                        bool create, Error **errp)
{
    int i;

    *h = (DedupHolders) { .nframes = nframes, .base = MAP_FAILED };
    h->row_size = ROUND_UP(DIV_ROUND_UP(nframes, 8), DEDUP_HEADER_SIZE);
    h->size = DEDUP_HEADER_SIZE + DEDUP_MAX_MEMBERS * h->row_size;
    h->fd = openat(dirfd, "held", O_RDWR | O_CLOEXEC | O_NOFOLLOW |
                   (create ? O_CREAT | O_EXCL : 0), 0600);
    if (h->fd < 0 || !map_file(h, create) || !take_row(h)) {
        error_setg_errno(errp, errno, "index-dir: could not take part in who "
                         "holds what; name an index-dir on a larger tmpfs");
        unmap(h);
        return false;
    }
    for (i = 0; i < DEDUP_HOLD_STRIPES; i++) {
        qemu_mutex_init(&h->stripes[i].lock);
    }
    return true;
}

void dedup_holders_close(DedupHolders *h)
{
    int i;

    for (i = 0; i < DEDUP_HOLD_STRIPES; i++) {
        assert(!h->stripes[i].in_flight[0] && !h->stripes[i].in_flight[1]);
        qemu_mutex_destroy(&h->stripes[i].lock);
    }
    g_free(h->marks);
    unmap(h);                   /* and the row is that of a dead process */
}

QEMU_DEFINE_STATIC_CO_TLS(unsigned, stripe_number)

static DedupHoldStripe *my_stripe(DedupHolders *h)
{
    static unsigned last;

    if (!get_stripe_number()) {
        set_stripe_number(qatomic_add_fetch(&last, 1));
    }
    return &h->stripes[get_stripe_number() % DEDUP_HOLD_STRIPES];
}

static void set(unsigned long *bits, uint32_t slot)
{
    if (!(qatomic_read(&bits[BIT_WORD(slot)]) & BIT_MASK(slot))) {
        set_bit_atomic(slot, bits);
    }
}

/* One stripe is locked, so no trim begins or ends. */
static void set_all(DedupHolders *h, const uint32_t *slots, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        if (slots[i] < h->nframes) {
            set(h->bits, slots[i]);
            if (h->marks) {
                set(h->marks, slots[i]);
            }
        }
    }
}

void dedup_hold_begin(DedupHolders *h, DedupHold *hold, const uint32_t *slots,
                      unsigned n)
{
    hold->stripe = my_stripe(h);
    qemu_mutex_lock(&hold->stripe->lock);
    hold->parity = h->parity;
    qatomic_inc(&hold->stripe->in_flight[hold->parity]);
    set_all(h, slots, n);
    qemu_mutex_unlock(&hold->stripe->lock);
    smp_mb();                   /* the bits, then the tags */
}

void dedup_hold_more(DedupHolders *h, DedupHold *hold, const uint32_t *slots,
                     unsigned n)
{
    qemu_mutex_lock(&hold->stripe->lock);
    set_all(h, slots, n);
    qemu_mutex_unlock(&hold->stripe->lock);
    smp_mb();                   /* the bits, then the tags */
}

void dedup_hold_end(DedupHold *hold)
{
    /* what was done with the frames is done */
    smp_mb__before_rmw();
    qatomic_dec(&hold->stripe->in_flight[hold->parity]);
}

void dedup_holders_bury(DedupHolders *h)
{
    HeldHeader *hdr = h->base;
    unsigned row, nrows = MIN(qatomic_read(&hdr->nrows), DEDUP_MAX_MEMBERS);

    for (row = 0; row < nrows; row++) {
        if (row != h->row && !qemu_lock_fd(h->fd, row, 1, true)) {
            memset(row_at(h, row), 0, h->row_size);
            qemu_unlock_fd(h->fd, row, 1);
        }
    }
}

uint64_t dedup_holders_word(DedupHolders *h, uint32_t first)
{
    HeldHeader *hdr = h->base;
    unsigned row, nrows = MIN(qatomic_read(&hdr->nrows), DEDUP_MAX_MEMBERS);
    uint64_t word = 0;

    for (row = 0; row < nrows; row++) {
        unsigned long *bits = row_at(h, row);

        word |= qatomic_read(&bits[BIT_WORD(first)]);
    }
    return word;
}

static void lock_all(DedupHolders *h)
{
    int i;

    for (i = 0; i < DEDUP_HOLD_STRIPES; i++) {
        qemu_mutex_lock(&h->stripes[i].lock);
    }
}

static void unlock_all(DedupHolders *h)
{
    int i;

    for (i = DEDUP_HOLD_STRIPES; i--; ) {
        qemu_mutex_unlock(&h->stripes[i].lock);
    }
}

void dedup_trim_begin(DedupHolders *h)
{
    unsigned long *marks = g_malloc0(h->row_size);

    lock_all(h);
    assert(!h->marks);
    h->marks = marks;
    h->parity ^= 1;
    unlock_all(h);
}

bool dedup_trim_alone(DedupHolders *h)
{
    int i;

    for (i = 0; i < DEDUP_HOLD_STRIPES; i++) {
        if (qatomic_read(&h->stripes[i].in_flight[h->parity ^ 1])) {
            return false;
        }
    }
    smp_mb();                   /* and what they did is to be seen */
    return true;
}

void dedup_trim_mark(DedupHolders *h, uint32_t slot)
{
    set(h->marks, slot);
}

void dedup_trim_end(DedupHolders *h)
{
    size_t i;

    lock_all(h);
    for (i = 0; i < h->row_size / sizeof(long); i++) {
        if (h->bits[i] != h->marks[i]) {
            qatomic_set(&h->bits[i], h->marks[i]);
        }
    }
    g_free(h->marks);
    h->marks = NULL;
    unlock_all(h);
}
