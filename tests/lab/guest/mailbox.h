/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What dom0 and the tiny guest say to each other, and where.
 *
 * dom0 maps the mailbox pages read-write and keeps them mapped, and the
 * device model maps the 1 MiB around each DMA table; so both live in a MiB of
 * their own, far from the pages whose sharing is under test.
 */
#ifndef LAB_MAILBOX_H
#define LAB_MAILBOX_H

#include <stdint.h>

#define MAILBOX_GFN     0x400   /* one page, then two pages of lists */
#define LIST_GFN        0x401   /* list i is at LIST_GFN + i */
#define PRD_GFN         0x500   /* the DMA tables of both channels */
#define HYPERCALL_GFN   0x600
#define DATA_GFN        0x800   /* the pages that are free to be tested */
#define END_GFN         0x2000  /* 32 MiB */

#define MAILBOX_MAGIC   0x4c414247
#define LIST_MAX        512
#define LISTS           2

/* An IDE bus master's table entry, and what commands on lists work on. */
struct piece {
    uint32_t addr;
    uint32_t len;
};

enum command {
    CMD_NONE,
    CMD_WRITE32,    /* *arg0 = arg1 */
    CMD_READ32,     /* result0 = *arg0 */
    CMD_SUMS,       /* list 0: each of arg0 pieces' addr -> its page's hash */
    CMD_FILL,       /* page of arg0 (an address) from seed arg1 */
    CMD_DMA,        /* arg0 drive, arg1 LBA, arg2 sectors, arg3 flags, list 0 */
    CMD_DMA_BOTH,   /* arg0-3 with list 0 and arg4-7 with list 1, at once */
    CMD_DMA_HAMMER, /* as CMD_DMA; meanwhile ++*arg4; result1 = how often */
    CMD_PIO_READ,   /* arg0 drive, arg1 LBA, arg2 sectors, to address arg3 */
    CMD_DECREASE,   /* XENMEM_decrease_reservation of gfn arg0 */
    CMD_POPULATE,   /* XENMEM_populate_physmap of gfn arg0 */
    CMD_COPY,       /* arg2 bytes from address arg1 to address arg0 */
    CMD_NOTIFY,     /* send an event on port arg0 */
    CMD_GRANTS,     /* set the version of the grant table to arg0 */
};

/* flags of CMD_DMA; bits 16-31 are the number of the list's pieces */
#define DMA_WRITE       1       /* from memory to the disk */

/* A drive is channel * 2 + unit: 0 primary master … 3 secondary slave. */

/*
 * result0 of a DMA command: what the bus master and the drive say at its end
 * (one byte each, in this order from bit 8), or this.
 */
#define DMA_TIMEOUT     0xffffffff
#define DMA_OK          0x0450  /* interrupt, no error; drive ready, no error */

struct mailbox {
    uint32_t magic;     /* set once the guest is up */
    uint32_t command;   /* written by dom0 last, zeroed by the guest */
    uint32_t done;      /* commands that the guest has finished */
    uint32_t ticks;     /* goes on while the guest is idle */
    uint32_t arg[8];
    uint32_t result[2];
};

/*
 * A page's hash: FNV-1a over 64-bit words.  Each step is a bijection of the
 * hash so far, so no change of a single word goes unnoticed.
 */
static inline uint64_t page_hash(const volatile void *page)
{
    const volatile uint64_t *word = page;
    uint64_t hash = 0xcbf29ce484222325ULL;
    int i;

    for (i = 0; i < 512; i++) {
        hash = (hash ^ word[i]) * 0x100000001b3ULL;
    }
    return hash;
}

/* What CMD_FILL writes as word i. */
static inline uint32_t fill_word(uint32_t seed, uint32_t i)
{
    return seed * 2654435761u + i * 40503u + 1;
}

#endif
