/*
 * dedup-share: what makes two opened image files the same layer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_SHARE_LAYER_H
#define DEDUP_SHARE_LAYER_H

/* A SHA-256 in hexadecimal. */
#define DEDUP_LAYER_KEY_SIZE 65

typedef enum DedupLayerKey {
    DEDUP_KEY_NONE,             /* it may be changing: it takes no part */
    DEDUP_KEY_SHARED,           /* it has a key */
    DEDUP_KEY_PRIVATE,          /* none that others would know it by */
} DedupLayerKey;

/*
 * The key of an image that nobody may write to: two images have the same
 * key only if they are the same file, with the same content, read in the
 * same @format.  @path is what this process has opened it by, by @nodes nodes:
 * so many have to have it open, as one that was opened before the file was
 * replaced under its name has another.
 *
 * In doubt there is no key, and *why says what was doubtful (a static string).
 *
 * Content is told by the inode's change time, which nobody but the kernel
 * sets.
 *
 * - It is as coarse as the kernel's tick, so a file that was changed in the
 *   last second has no key yet: it might change again within the tick.
 * - A change time of whole seconds was not set by a kernel that keeps
 *   fractions, but by a tool that makes file systems, or is too coarse.
 * - File systems of other hosts or of user programs set it as they like.
 *
 * The last two are no reason why the file should change while it is open.
 */
DedupLayerKey dedup_layer_key(const char *path, const char *format,
                              unsigned nodes, char key[DEDUP_LAYER_KEY_SIZE],
                              const char **why);

/* Has this process the file @st open so many times? */
bool dedup_layer_is_open(const struct stat *st, unsigned nodes);

/* The same for a file that this process need not have open. */
DedupLayerKey dedup_layer_key_of_path(const char *path, const char *format,
                                      char key[DEDUP_LAYER_KEY_SIZE],
                                      const char **why);

#endif /* DEDUP_SHARE_LAYER_H */
