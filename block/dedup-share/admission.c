/*
 * dedup-share: what was seen once
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "admission.h"
#include "files.h"

#define PLACES 4

bool dedup_seen_open(DedupSeen *seen, int dirfd, uint32_t nframes,
                     Error **errp)
{
    int fd;

    if (seen->marks) {
        return true;
    }
    /* as many places as there are frames */
    seen->nsets = DIV_ROUND_UP(nframes, PLACES);
    seen->size = seen->nsets * PLACES * sizeof(uint32_t);
    fd = openat(dirfd, "seen", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW,
                0600);
    if (fd >= 0 && !ftruncate(fd, seen->size)) {
        seen->marks = mmap(NULL, seen->size, PROT_READ | PROT_WRITE,
                           MAP_SHARED, fd, 0);
    }
    if (!seen->marks || seen->marks == MAP_FAILED ||
        !dedup_populate(seen->marks, seen->size)) {
        error_setg_errno(errp, errno, "admission: could not make a table of "
                         "%zu bytes in the index-dir; use first-read, or an "
                         "index-dir on a larger tmpfs", seen->size);
        dedup_seen_close(seen);
    }
    if (fd >= 0) {
        close(fd);
    }
    return seen->marks;
}

void dedup_seen_close(DedupSeen *seen)
{
    if (seen->marks && seen->marks != MAP_FAILED) {
        munmap(seen->marks, seen->size);
    }
    seen->marks = NULL;
}

bool dedup_seen(DedupSeen *seen, const DedupDigest *digest)
{
    uint32_t set = (digest->low & UINT32_MAX) * seen->nsets >> 32;
    uint32_t *marks = seen->marks + set * PLACES;
    uint32_t mark = digest->high | 1;           /* 0: an empty place */
    int i, victim = digest->high >> 32 & (PLACES - 1);

    for (i = 0; i < PLACES; i++) {
        uint32_t was = qatomic_read(&marks[i]);

        if (was == mark) {
            return true;
        }
        if (!was) {
            victim = i;
            break;
        }
    }
    qatomic_set(&marks[victim], mark);
    return false;
}
