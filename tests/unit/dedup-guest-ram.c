/*
 * dedup-share: guest memory for tests and benchmarks, which have no guest
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/dedup-share/linux/given.h"
#include "dedup-guest-ram.h"

static uint8_t *guest;
static size_t guest_size;
static bool permitted;
static unsigned advised;

static bool guest_ram_find(void *host, DedupRam *ram)
{
    *ram = (DedupRam) { .host = guest, .size = guest_size };
    return (uint8_t *)host >= guest && (uint8_t *)host < guest + guest_size;
}

static bool guest_ram_may_give(void)
{
    return permitted;
}

static void guest_ram_advise(void *host, size_t size, bool anonymous)
{
    madvise(host, size, MADV_DONTFORK);         /* as QEMU does */
    advised++;
}

static const DedupRamOps guest_ram_ops = {
    .find = guest_ram_find, .may_give = guest_ram_may_give,
    .advise = guest_ram_advise,
};

uint8_t *dedup_guest_ram_new(size_t size)
{
    g_assert_null(guest);
    dedup_given_set_ram(&guest_ram_ops);
    permitted = size;
    if (size) {
        guest = mmap(NULL, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        g_assert(guest != MAP_FAILED);
        madvise(guest, size, MADV_DONTFORK);
    }
    guest_size = size;
    return guest;
}

void dedup_guest_ram_free(void)
{
    if (guest) {
        dedup_given_forget(guest);
        munmap(guest, guest_size);
    }
    guest = NULL;
    guest_size = 0;
}

void dedup_guest_ram_permit(bool may_give)
{
    permitted = may_give;
}

unsigned dedup_guest_ram_advised(void)
{
    return advised;
}
