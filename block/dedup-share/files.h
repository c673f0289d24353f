/*
 * dedup-share: files on a tmpfs that are made whole or not at all
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_SHARE_FILES_H
#define DEDUP_SHARE_FILES_H

/*
 * A new file of @size zeroes with @header in front.  Returns it, open; < 0
 * with errno set, and no file.
 */
int dedup_make_file(int dirfd, const char *name, size_t size,
                    const void *header, size_t header_size);

/*
 * Open a file that is there already, and has a header page and exactly *size
 * bytes, if not 0; *size is set.  < 0 with errno set, EINVAL if it is another.
 */
int dedup_open_file(int dirfd, const char *name, size_t *size);

/*
 * Make sure of memory for @size bytes at @p, a mapping of a file.  False with
 * errno set, ENOSPC if the tmpfs is full.
 */
bool dedup_populate(void *p, size_t size);

/* A number that nobody can guess, from the kernel. */
uint64_t dedup_random(void);

#endif /* DEDUP_SHARE_FILES_H */
