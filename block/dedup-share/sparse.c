/*
 * dedup-share: sparse files on a tmpfs, mapped
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "sparse.h"

bool dedup_sparse_open(DedupSparse *s, int fd, size_t size)
{
    void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    int err = errno;

    close(fd);
    errno = err;
    if (base == MAP_FAILED) {
        return false;
    }
    *s = (DedupSparse) {
        .base = base, .size = size,
        .backed = bitmap_new(DIV_ROUND_UP(size, DEDUP_SPARSE_CHUNK)),
    };
    return true;
}

void dedup_sparse_close(DedupSparse *s)
{
    munmap(s->base, s->size);
    g_free(s->backed);
    memset(s, 0, sizeof(*s));
}

bool dedup_sparse_back(DedupSparse *s, size_t offset)
{
    size_t chunk = offset / DEDUP_SPARSE_CHUNK;
    size_t start = chunk * DEDUP_SPARSE_CHUNK;
    int ret;

    if (qatomic_read(&s->backed[BIT_WORD(chunk)]) & BIT_MASK(chunk)) {
        return true;
    }
    /*
     * Not fallocate(): if a signal interrupts that, it takes away again what
     * was allocated and not yet touched, also by other processes.
     */
    do {
        ret = madvise(s->base + start, MIN(DEDUP_SPARSE_CHUNK,
                                           s->size - start),
                      MADV_POPULATE_WRITE);
    } while (ret < 0 && errno == EINTR);
    if (ret < 0) {
        return false;
    }
    set_bit_atomic(chunk, s->backed);
    return true;
}
