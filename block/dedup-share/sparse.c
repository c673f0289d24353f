/*
 * dedup-share: sparse files on a tmpfs, mapped
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "files.h"
#include "sparse.h"

static bool sparse_init(DedupSparse *s, void *base, size_t size,
                        bool anonymous)
{
    if (base == MAP_FAILED) {
        return false;
    }
    *s = (DedupSparse) {
        .base = base, .size = size, .anonymous = anonymous,
        .backed = bitmap_new(DIV_ROUND_UP(size, DEDUP_SPARSE_CHUNK)),
    };
    return true;
}

bool dedup_sparse_open(DedupSparse *s, int fd, size_t size)
{
    void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int err = errno;

    close(fd);
    errno = err;
    return sparse_init(s, base, size, false);
}

bool dedup_sparse_new(DedupSparse *s, size_t size)
{
    void *base = mmap(NULL, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return sparse_init(s, base, size, true);
}

void dedup_sparse_close(DedupSparse *s)
{
    munmap(s->base, s->size);
    g_free(s->backed);
    memset(s, 0, sizeof(*s));
}

bool dedup_sparse_is_backed(DedupSparse *s, size_t offset)
{
    size_t chunk = offset / DEDUP_SPARSE_CHUNK;

    return qatomic_read(&s->backed[BIT_WORD(chunk)]) & BIT_MASK(chunk);
}

bool dedup_sparse_back(DedupSparse *s, size_t offset)
{
    size_t start = ROUND_DOWN(offset, DEDUP_SPARSE_CHUNK);

    if (dedup_sparse_is_backed(s, offset)) {
        return true;
    }
    if (!s->anonymous &&
        !dedup_populate(s->base + start, MIN(DEDUP_SPARSE_CHUNK,
                                             s->size - start))) {
        return false;
    }
    set_bit_atomic(offset / DEDUP_SPARSE_CHUNK, s->backed);
    return true;
}
