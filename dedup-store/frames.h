/*
 * qemu-dedup-store: what frames are made of on Linux
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef DEDUP_STORE_FRAMES_H
#define DEDUP_STORE_FRAMES_H

/*
 * Pages of one memfd; slot n is at n * 4096.  Nobody but the daemon can open it
 * for writing: its mode is 0600 before anyone gets a descriptor of it, and what
 * clients get is opened for reading.
 */
typedef struct Frames {
    int fd;
    int client_fd;              /* the same file, read-only */
    uint32_t nslots;
} Frames;

/* Make the file, for @nslots frames, none of which has memory. */
bool frames_open(Frames *f, uint32_t nslots, Error **errp);
void frames_close(Frames *f);

/* Of @n slots from @slot on; 0 or -errno.  Any thread. */
int frames_write(Frames *f, uint32_t slot, unsigned n, const void *buf);
int frames_read(Frames *f, uint32_t slot, unsigned n, void *buf);

/* Give their memory back to the host. */
int frames_drop(Frames *f, uint32_t slot, unsigned n);

/* Bytes of memory that the file has. */
uint64_t frames_memory(Frames *f);

#endif /* DEDUP_STORE_FRAMES_H */
