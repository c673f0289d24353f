/*
 * dedup-share: sparse files on a tmpfs, mapped
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Block maps and records are as large as what they describe, and mostly empty,
 * so their files are sparse.  But to touch a page of a mapped file for which
 * the tmpfs has no memory is a SIGBUS.  So: before a place is touched,
 * dedup_sparse_back() makes sure of its memory, or says that there is none.
 * (MADV_POPULATE_WRITE, since Linux 5.14.)
 */

#ifndef DEDUP_SHARE_SPARSE_H
#define DEDUP_SHARE_SPARSE_H

/* Memory is taken in chunks of so many bytes. */
#define DEDUP_SPARSE_CHUNK (64 * 1024)

typedef struct DedupSparse {
    void *base;
    size_t size;
    bool anonymous;
    unsigned long *backed;      /* a bit a chunk; by qatomic_*() */
} DedupSparse;

/* Map @size bytes of the file @fd, and close it.  False with errno set. */
bool dedup_sparse_open(DedupSparse *s, int fd, size_t size);

/* The same with memory of this process alone, which is always there. */
bool dedup_sparse_new(DedupSparse *s, size_t size);
void dedup_sparse_close(DedupSparse *s);

/*
 * May the bytes around @offset be touched?  Any thread.  False if the tmpfs is
 * full; it may be true the next time.
 */
bool dedup_sparse_back(DedupSparse *s, size_t offset);

/* Has dedup_sparse_back() been true for it, in this process? */
bool dedup_sparse_is_backed(DedupSparse *s, size_t offset);

#endif /* DEDUP_SHARE_SPARSE_H */
