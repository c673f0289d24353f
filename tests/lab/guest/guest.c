/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The tiny HVM guest: does what the mailbox says, one page at a time, and
 * nothing else.  No paging, no interrupts, no memory of its own beyond the
 * first MiB and what mailbox.h lists: what dom0 sees change, dom0 asked for.
 */
#include "mailbox.h"

#define PAGE            4096
#define ADDRESS(gfn)    ((void *)((gfn) * PAGE))

static volatile struct mailbox *const mailbox = ADDRESS(MAILBOX_GFN);

/* x86 I/O ports */

static inline void outb(uint16_t port, uint8_t value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;

    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint16_t inw(uint16_t port)
{
    uint16_t value;

    asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void outl(uint16_t port, uint32_t value)
{
    asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint32_t inl(uint16_t port)
{
    uint32_t value;

    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void say(const char *text)
{
    for (; *text; text++) {
        while (!(inb(0x3f8 + 5) & 0x20)) {
        }
        outb(0x3f8, *text);
    }
}

/* Xen hypercalls, through the page that Xen fills with their entry points */

#define HYPERCALL_MEMORY_OP     12
#define HYPERCALL_SCHED_OP      29
#define HYPERCALL_EVENT_OP      32
#define HYPERCALL_GRANT_OP      20
#define GRANT_SET_VERSION       8
#define SCHEDOP_YIELD           0
#define EVENT_SEND              4
#define XENMEM_DECREASE         1
#define XENMEM_POPULATE         6
#define DOMID_SELF              0x7ff0

struct reservation {
    uint32_t extents;
    uint32_t count;
    uint32_t order;
    uint32_t flags;
    uint16_t domain;
};

static int hypercall3(int number, uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t entry = HYPERCALL_GFN * PAGE + number * 32;
    int result;

    asm volatile("call *%%eax"
                 : "=a"(result), "+b"(a), "+c"(b), "+d"(c)
                 : "0"(entry)
                 : "memory", "esi", "edi");
    return result;
}

static int hypercall(int number, uint32_t a, uint32_t b)
{
    return hypercall3(number, a, b, 0);
}

static void cpuid(uint32_t leaf, uint32_t *a, uint32_t *b)
{
    uint32_t c, d;

    asm volatile("cpuid" : "=a"(*a), "=b"(*b), "=c"(c), "=d"(d)
                 : "a"(leaf), "c"(0));
}

static void init_hypercalls(void)
{
    uint32_t base, a, b;

    for (base = 0x40000000; base < 0x40010000; base += 0x100) {
        cpuid(base, &a, &b);
        if (b == 0x566e6558) {          /* "XenV", of "XenVMMXenVMM" */
            break;
        }
    }
    cpuid(base + 2, &a, &b);            /* b: the MSR that takes the page */
    asm volatile("wrmsr" : : "c"(b), "a"(HYPERCALL_GFN * PAGE), "d"(0));
}

static uint32_t reserve(uint32_t op, uint32_t gfn)
{
    static uint32_t extent;
    static struct reservation r;

    extent = gfn;
    r.extents = (uint32_t)&extent;
    r.count = 1;
    r.domain = DOMID_SELF;
    return hypercall(HYPERCALL_MEMORY_OP, op, (uint32_t)&r);
}

/* The IDE controller, PIIX: two channels with a bus master each */

#define ATA_BUSY        0x80
#define ATA_DRQ         0x08
#define ATA_READ_PIO    0x24            /* all of these are the LBA48 ones */
#define ATA_READ_DMA    0x25
#define ATA_WRITE_DMA   0x35
#define BM_START        0x01
#define BM_TO_MEMORY    0x08
#define BM_ERROR        0x02
#define BM_INTERRUPT    0x04
#define BM_TRIES        20000000

static uint16_t bus_master;

static uint16_t ata_port(int channel)
{
    return channel ? 0x170 : 0x1f0;
}

static uint16_t bm_port(int channel)
{
    return bus_master + channel * 8;
}

static uint32_t pci_address(uint32_t reg)
{
    return 0x80000000 | 1 << 11 | 1 << 8 | reg;     /* 00:01.1, the IDE */
}

static void init_ide(void)
{
    outl(0xcf8, pci_address(4));
    outl(0xcfc, inl(0xcfc) | 5);        /* I/O ports and bus mastering on */
    outl(0xcf8, pci_address(0x20));
    bus_master = inl(0xcfc) & ~3;
    outb(0x3f6, 0);             /* interrupts on: the bus master notes them, */
    outb(0x376, 0);             /* and the processor has them off */
}

static void ata_command(uint32_t drive, uint32_t lba, uint32_t count,
                        uint8_t command)
{
    uint16_t port = ata_port(drive >> 1);

    while (inb(port + 7) & ATA_BUSY) {
    }
    outb(port + 6, 0xe0 | (drive & 1) << 4);
    outb(port + 2, count >> 8);         /* LBA48: the high bytes first */
    outb(port + 3, lba >> 24);
    outb(port + 4, 0);
    outb(port + 5, 0);
    outb(port + 2, count);
    outb(port + 3, lba);
    outb(port + 4, lba >> 8);
    outb(port + 5, lba >> 16);
    outb(port + 7, command);
}

/* Copy list `list` to a channel's DMA table. */
static uint32_t load_table(int channel, int list, uint32_t count)
{
    const volatile struct piece *from = ADDRESS(LIST_GFN + list);
    volatile struct piece *to = ADDRESS(PRD_GFN + channel);
    uint32_t i;

    for (i = 0; i < count; i++) {
        to[i].addr = from[i].addr;
        to[i].len = (from[i].len & 0xffff) |
                    (i + 1 == count ? 0x80000000 : 0);
    }
    return (uint32_t)to;
}

/* arg: drive, LBA, sectors, flags */
static void dma_start(const volatile uint32_t *arg, int list)
{
    int channel = arg[0] >> 1;
    uint16_t bm = bm_port(channel);
    int write = arg[3] & DMA_WRITE;
    uint8_t direction = write ? 0 : BM_TO_MEMORY;

    outl(bm + 4, load_table(channel, list, arg[3] >> 16));
    outb(bm + 2, BM_INTERRUPT | BM_ERROR);          /* writing 1 clears */
    outb(bm, direction);
    ata_command(arg[0], arg[1], arg[2], write ? ATA_WRITE_DMA : ATA_READ_DMA);
    outb(bm, direction | BM_START);
}

static int dma_busy(int channel)
{
    return !(inb(bm_port(channel) + 2) & BM_INTERRUPT);
}

static uint32_t dma_finish(int channel)
{
    uint16_t bm = bm_port(channel);
    uint32_t result;

    while (inb(ata_port(channel) + 7) & ATA_BUSY) {
    }
    result = (inb(bm + 2) & 7) << 8;
    outb(bm, 0);
    result |= inb(ata_port(channel) + 7);
    outb(bm + 2, BM_INTERRUPT | BM_ERROR);
    return result;
}

static uint32_t dma_wait(int channel)
{
    uint32_t tries;

    for (tries = 0; dma_busy(channel); tries++) {
        if (tries == BM_TRIES) {
            return DMA_TIMEOUT;
        }
    }
    return dma_finish(channel);
}

static void dma_hammer(void)
{
    int channel = mailbox->arg[0] >> 1;
    volatile uint32_t *target = (volatile uint32_t *)mailbox->arg[4];
    uint32_t writes = 0;

    dma_start(mailbox->arg, 0);
    while (dma_busy(channel) && writes < BM_TRIES) {
        ++*target;
        writes++;
    }
    mailbox->result[0] = dma_wait(channel);
    mailbox->result[1] = writes;
}

static uint32_t pio_read(uint32_t drive, uint32_t lba, uint32_t count,
                         volatile uint16_t *to)
{
    uint16_t port = ata_port(drive >> 1);
    uint8_t status;
    int i;

    ata_command(drive, lba, count, ATA_READ_PIO);
    for (; count; count--) {
        do {
            status = inb(port + 7);
        } while ((status & ATA_BUSY) || !(status & (ATA_DRQ | 1)));
        if (!(status & ATA_DRQ)) {
            return status;
        }
        for (i = 0; i < 256; i++) {
            *to++ = inw(port);
        }
    }
    return inb(port + 7);
}

/* Memory */

static void sums(uint32_t count)
{
    volatile struct piece *list = ADDRESS(LIST_GFN);
    uint64_t hash;
    uint32_t i;

    for (i = 0; i < count; i++) {
        hash = page_hash((volatile void *)list[i].addr);
        list[i].addr = hash;
        list[i].len = hash >> 32;
    }
}

static void fill(volatile uint32_t *page, uint32_t seed)
{
    uint32_t i;

    for (i = 0; i < PAGE / 4; i++) {
        page[i] = fill_word(seed, i);
    }
}

static void copy(volatile uint8_t *to, const volatile uint8_t *from,
                 uint32_t count)
{
    while (count--) {
        *to++ = *from++;
    }
}

static void execute(uint32_t command, volatile uint32_t *arg,
                    volatile uint32_t *result)
{
    switch (command) {
    case CMD_WRITE32:
        *(volatile uint32_t *)arg[0] = arg[1];
        break;
    case CMD_READ32:
        result[0] = *(volatile uint32_t *)arg[0];
        break;
    case CMD_SUMS:
        sums(arg[0]);
        break;
    case CMD_FILL:
        fill((volatile uint32_t *)arg[0], arg[1]);
        break;
    case CMD_DMA:
        dma_start(arg, 0);
        result[0] = dma_wait(arg[0] >> 1);
        break;
    case CMD_DMA_BOTH:
        dma_start(arg, 0);
        dma_start(arg + 4, 1);
        result[0] = dma_wait(arg[0] >> 1);
        result[1] = dma_wait(arg[4] >> 1);
        break;
    case CMD_DMA_HAMMER:
        dma_hammer();
        break;
    case CMD_PIO_READ:
        result[0] = pio_read(arg[0], arg[1], arg[2],
                             (volatile uint16_t *)arg[3]);
        break;
    case CMD_DECREASE:
        result[0] = reserve(XENMEM_DECREASE, arg[0]);
        break;
    case CMD_POPULATE:
        result[0] = reserve(XENMEM_POPULATE, arg[0]);
        break;
    case CMD_COPY:
        copy((void *)arg[0], (void *)arg[1], arg[2]);
        break;
    case CMD_GRANTS:
        result[0] = hypercall3(HYPERCALL_GRANT_OP, GRANT_SET_VERSION,
                               (uint32_t)arg, 1);
        break;
    case CMD_NOTIFY:
        result[0] = hypercall(HYPERCALL_EVENT_OP, EVENT_SEND, (uint32_t)arg);
        break;
    }
}

void guest_main(void)
{
    uint32_t command;

    mailbox->command = CMD_NONE;
    mailbox->done = 0;
    init_ide();
    init_hypercalls();
    mailbox->magic = MAILBOX_MAGIC;
    say("LAB GUEST UP\r\n");
    for (;;) {
        mailbox->ticks++;
        command = mailbox->command;
        if (command == CMD_NONE) {
            hypercall(HYPERCALL_SCHED_OP, SCHEDOP_YIELD, 0);
            continue;
        }
        execute(command, mailbox->arg, mailbox->result);
        mailbox->command = CMD_NONE;
        mailbox->done++;
    }
}
