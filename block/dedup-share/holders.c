/*
 * dedup-share: the processes of a group, and which frames they hold
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
#include "files.h"
#include "index.h"
#include "holders.h"

#define HELD_MAGIC 0x444c4548445544ULL      /* "DUDHELD" */

/* The first page of the file. */
typedef struct HeldHeader {
    uint64_t magic;
    uint32_t nframes;
    uint32_t reserved;
    uint64_t nrows;             /* rows from here on were never used; atomic */
    uint8_t lived[DEDUP_MAX_MEMBERS];   /* a process had or has the row */
} HeldHeader;
QEMU_BUILD_BUG_ON(sizeof(HeldHeader) > DEDUP_HEADER_SIZE);

/* A row has two words for so many slots. */
#define SLOTS_PER_WORD 64

/* The count, and it inverted: so that it is noticed if it was not us. */
static uint64_t nrows_make(unsigned n)
{
    return (uint64_t)~n << 32 | n;
}

/* False if it cannot be told. */
static bool nrows_get(DedupHolders *h, unsigned *n)
{
    uint64_t word = qatomic_read(&((HeldHeader *)h->base)->nrows);

    *n = word;
    return nrows_make(*n) == word && *n <= DEDUP_MAX_MEMBERS;
}

static uint64_t *row_at(DedupHolders *h, unsigned row)
{
    return h->base + DEDUP_HEADER_SIZE + row * h->row_size;
}

static size_t row_words(DedupHolders *h)
{
    return h->row_size / (2 * sizeof(uint64_t));
}

/* Only who has the row. */
static void row_set(uint64_t *bits, size_t word, uint64_t value)
{
    if (bits[2 * word] != value || bits[2 * word + 1] != ~value) {
        qatomic_set(&bits[2 * word], value);
        qatomic_set(&bits[2 * word + 1], ~value);
    }
}

static void row_clear(DedupHolders *h, uint64_t *bits)
{
    size_t i;

    for (i = 0; i < row_words(h); i++) {
        row_set(bits, i, 0);
    }
}

static bool map_file(DedupHolders *h, bool create)
{
    HeldHeader *hdr;
    struct stat st;
    unsigned nrows;

    if (create ? ftruncate(h->fd, h->size) < 0
               : fstat(h->fd, &st) < 0 || st.st_size != h->size) {
        errno = create ? errno : EINVAL;
        return false;
    }
    h->base = mmap(NULL, h->size, PROT_READ | PROT_WRITE, MAP_SHARED, h->fd,
                   0);
    if (h->base == MAP_FAILED ||
        !dedup_populate(h->base, DEDUP_HEADER_SIZE)) {
        return false;
    }
    hdr = h->base;
    if (create) {
        hdr->nframes = h->nframes;
        hdr->nrows = nrows_make(0);
        hdr->magic = HELD_MAGIC;
    }
    errno = EINVAL;
    return hdr->magic == HELD_MAGIC && hdr->nframes == h->nframes &&
           nrows_get(h, &nrows);
}

/* @row's lock is ours: bury who had it, if anybody. */
static void bury(DedupHolders *h, unsigned row)
{
    HeldHeader *hdr = h->base;

    if (qatomic_read(&hdr->lived[row])) {
        h->bury(h->opaque, row);
        if (h->counts) {
            row_clear(h, row_at(h, row));
        }
        qatomic_set(&hdr->lived[row], 0);
    }
}

/* Rows are taken with the group's directory locked. */
static bool init_row(DedupHolders *h, unsigned row)
{
    HeldHeader *hdr = h->base;
    unsigned nrows;

    if (!nrows_get(h, &nrows)) {
        errno = EINVAL;
        return false;
    }
    if (h->counts && !dedup_populate(row_at(h, row), h->row_size)) {
        return false;
    }
    if (row < nrows) {
        bury(h, row);
    }
    if (h->counts) {
        row_clear(h, row_at(h, row));
    }
    if (row >= nrows) {
        qatomic_set(&hdr->nrows, nrows_make(row + 1));
    }
    qatomic_set(&hdr->lived[row], 1);
    return true;
}

bool dedup_holders_take_row(DedupHolders *h, DedupBuryFn *bury_fn,
                            void *opaque, Error **errp)
{
    unsigned row = 0;

    h->bury = bury_fn;
    h->opaque = opaque;
    while (row < DEDUP_MAX_MEMBERS && qemu_lock_fd(h->fd, row, 1, true) < 0) {
        row++;
    }
    h->row = row;
    if (row == DEDUP_MAX_MEMBERS) {
        error_setg(errp, "group: there are %d processes in the group; choose "
                   "another group", DEDUP_MAX_MEMBERS);
        return false;
    }
    if (!init_row(h, row)) {
        error_setg_errno(errp, errno, "index-dir: could not take part in who "
                         "holds what; name an index-dir on a larger tmpfs");
        return false;
    }
    h->bits = row_at(h, row);
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
                        bool counts, bool create, Error **errp)
{
    int i;

    *h = (DedupHolders) {
        .nframes = nframes, .base = MAP_FAILED, .counts = counts,
    };
    h->row_size = counts ? ROUND_UP(DIV_ROUND_UP(nframes, SLOTS_PER_WORD) *
                                    2 * sizeof(uint64_t), DEDUP_HEADER_SIZE)
                         : 0;
    h->size = DEDUP_HEADER_SIZE + DEDUP_MAX_MEMBERS * h->row_size;
    h->fd = openat(dirfd, "held", O_RDWR | O_CLOEXEC | O_NOFOLLOW |
                   (create ? O_CREAT | O_EXCL : 0), 0600);
    if (h->fd < 0 || !map_file(h, create)) {
        error_setg_errno(errp, errno, "index-dir: could not open the table of "
                         "who holds what; end the QEMUs of that group, or name "
                         "an index-dir on a larger tmpfs");
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

static void set(uint64_t *bits, uint32_t slot)
{
    uint64_t *word = &bits[2 * (slot / SLOTS_PER_WORD)];
    uint64_t bit = BIT_ULL(slot % SLOTS_PER_WORD);

    if (!(qatomic_read(word) & bit)) {
        qatomic_or(word, bit);
        qatomic_and(word + 1, ~bit);
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
    hold->stripe = NULL;
    if (!h->counts) {
        return;
    }
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
    if (!h->counts) {
        return;
    }
    if (!hold->stripe) {
        dedup_hold_begin(h, hold, slots, n);
        return;
    }
    qemu_mutex_lock(&hold->stripe->lock);
    set_all(h, slots, n);
    qemu_mutex_unlock(&hold->stripe->lock);
    smp_mb();                   /* the bits, then the tags */
}

void dedup_hold_end(DedupHold *hold)
{
    if (!hold->stripe) {
        return;
    }
    /* what was done with the frames is done */
    smp_mb__before_rmw();
    qatomic_dec(&hold->stripe->in_flight[hold->parity]);
}

void dedup_holders_bury(DedupHolders *h)
{
    HeldHeader *hdr = h->base;
    unsigned row, nrows;

    if (!nrows_get(h, &nrows)) {
        return;
    }
    for (row = 0; row < nrows; row++) {
        if (row != h->row && qatomic_read(&hdr->lived[row]) &&
            !qemu_lock_fd(h->fd, row, 1, true)) {
            bury(h, row);
            qemu_unlock_fd(h->fd, row, 1);
        }
    }
}

uint64_t dedup_holders_word(DedupHolders *h, uint32_t first)
{
    size_t word = first / SLOTS_PER_WORD;
    uint64_t held = 0;
    unsigned row, nrows;

    if (!h->counts || !nrows_get(h, &nrows)) {
        return UINT64_MAX;
    }
    for (row = 0; row < nrows; row++) {
        uint64_t *bits = row_at(h, row);
        uint64_t set = qatomic_read(&bits[2 * word]);

        held |= set;
        if (set != ~qatomic_read(&bits[2 * word + 1])) {
            return UINT64_MAX;  /* it is being changed, or was scribbled on */
        }
    }
    return held;
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
    uint64_t *marks = g_malloc0(h->row_size);

    row_clear(h, marks);

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
    for (i = 0; i < row_words(h); i++) {
        row_set(h->bits, i, h->marks[2 * i]);
    }
    g_free(h->marks);
    h->marks = NULL;
    unlock_all(h);
}
