/*
 * dedup-share: guest memory for tests and benchmarks, which have no guest
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * It stands in for block/dedup-share/linux/ram.c: one piece of anonymous
 * memory, or none, in which case whatever is read is copied.
 */

#ifndef DEDUP_GUEST_RAM_H
#define DEDUP_GUEST_RAM_H

/*
 * Make @size bytes of memory that frames may be mapped over.  There is at most
 * one at a time.  Returns the memory, which is the caller's to use until
 * dedup_guest_ram_free(); NULL if @size is 0.
 */
uint8_t *dedup_guest_ram_new(size_t size);

/* Forget the frames in the memory, and unmap it. */
void dedup_guest_ram_free(void);

/* May frames be mapped over it?  They may when it is new. */
void dedup_guest_ram_permit(bool may_give);

/* How often the store has given a mapping the properties of guest memory. */
unsigned dedup_guest_ram_advised(void);

#endif /* DEDUP_GUEST_RAM_H */
