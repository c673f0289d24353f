/*
 * dedup-share: files on a tmpfs that are made whole or not at all
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/random.h>
#include "files.h"
#include "index.h"

int dedup_make_file(int dirfd, const char *name, size_t size,
                    const void *header, size_t header_size)
{
    int fd = openat(dirfd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    int err;

    if (fd < 0) {
        return -1;
    }
    errno = ENOSPC;             /* if less is written than was to be */
    if (ftruncate(fd, size) < 0 ||
        pwrite(fd, header, header_size, 0) != header_size) {
        err = errno;
        unlinkat(dirfd, name, 0);
        close(fd);
        errno = err;
        return -1;
    }
    return fd;
}

int dedup_open_file(int dirfd, const char *name, size_t *size)
{
    int fd = openat(dirfd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    struct stat st;

    if (fd < 0) {
        return -1;
    }
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) ||
        st.st_size < DEDUP_HEADER_SIZE || (*size && *size != st.st_size)) {
        close(fd);
        errno = EINVAL;
        return -1;
    }
    *size = st.st_size;
    return fd;
}

bool dedup_populate(void *p, size_t size)
{
    int ret;

    /*
     * Not fallocate(): if a signal interrupts that, it takes away again what
     * was allocated and not yet touched, also by other processes.
     */
    do {
        ret = madvise(p, size, MADV_POPULATE_WRITE);
    } while (ret < 0 && errno == EINTR);
    if (ret < 0) {
        errno = errno == EFAULT ? ENOSPC : errno;
    }
    return ret == 0;
}

uint64_t dedup_random(void)
{
    uint64_t number;

    /* not QEMU's, which a user can make repeatable */
    if (getentropy(&number, sizeof(number)) < 0) {
        abort();                /* Linux has had it since 3.17 */
    }
    return number;
}
