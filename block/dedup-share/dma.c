/*
 * dedup-share: the guest pages of emulated disks' DMA reads
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A disk controller's read names guest pages by a scatter list.  Before
 * anything of it is mapped, the whole pages in it that are for whole blocks
 * are offered to the filter.  What was not given is read into a buffer and
 * copied, so no guest page stays mapped while I/O is in flight.
 *
 * If a page occurs twice in a list, what it holds in the end depends on the
 * order of the parts; such a request is left to the ordinary code.
 */

#include "qemu/osdep.h"
#include "block/dedup-share.h"
#include "block/dedup-share-dma.h"
#include "exec/memory.h"
#include "qemu/memalign.h"
#include "qemu/rcu.h"
#include "qemu/units.h"
#include "system/block-backend.h"
#include "trace.h"

#define PAGE_OFFSET_MASK (DEDUP_BLOCK_SIZE - 1)

/* A guest can have many requests in flight: bound what each takes here. */
#define MAX_BUFFER (1 * MiB)

typedef struct DedupDMA {
    BlockAIOCB common;
    BlockBackend *blk;
    QEMUSGList *sg;
    uint64_t offset;
    DedupPage *pages;
    unsigned npages;
    bool returned;              /* to the device model, which has the AIOCB */
    bool done;
    int ret;
} DedupDMA;

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

/* Does a guest page occur in two parts of the list? */
static bool has_repeated_page(const QEMUSGList *sg)
{
    g_autoptr(GArray) seen = g_array_new(false, false, sizeof(uint64_t));
    uint64_t *pages, page;
    unsigned i;

    for (i = 0; i < sg->nsg; i++) {
        uint64_t last = sg->sg[i].base + sg->sg[i].len - 1;

        for (page = sg->sg[i].base >> DEDUP_BLOCK_BITS;
             sg->sg[i].len && page <= last >> DEDUP_BLOCK_BITS; page++) {
            g_array_append_val(seen, page);
        }
    }
    pages = (uint64_t *)seen->data;
    qsort(pages, seen->len, sizeof(uint64_t), compare_u64);
    for (i = 1; i < seen->len; i++) {
        if (pages[i] == pages[i - 1]) {
            return true;
        }
    }
    return false;
}

/* The guest page at DMA address @addr, if it can be given. */
static bool resolve(DedupDMA *req, dma_addr_t addr, DedupDest *dest)
{
    hwaddr xlat, len = DEDUP_BLOCK_SIZE;
    MemoryRegion *mr;

    RCU_READ_LOCK_GUARD();
    mr = address_space_translate(req->sg->as, addr, &xlat, &len, true,
                                 MEMTXATTRS_UNSPECIFIED);
    return len == DEDUP_BLOCK_SIZE && !(xlat & PAGE_OFFSET_MASK) &&
           dedup_share_resolve(req->blk, mr, xlat, dest);
}

/* Collect the whole pages of one part of the list, which is for @pos on. */
static void collect_part(DedupDMA *req, const ScatterGatherEntry *e,
                         uint64_t pos)
{
    uint64_t skip = -pos & PAGE_OFFSET_MASK;

    for (; skip + DEDUP_BLOCK_SIZE <= e->len; skip += DEDUP_BLOCK_SIZE) {
        DedupPage *p = &req->pages[req->npages];

        if ((e->base + skip) & PAGE_OFFSET_MASK) {
            return;
        }
        *p = (DedupPage) { .offset = pos + skip };
        if (!resolve(req, e->base + skip, &p->dest)) {
            p->result = DEDUP_NOT_RAM;
        }
        req->npages++;
    }
}

/* How many blocks the request touches, whole or in part. */
static unsigned count_blocks(const QEMUSGList *sg, uint64_t offset)
{
    return DIV_ROUND_UP(offset + sg->size, DEDUP_BLOCK_SIZE) -
           offset / DEDUP_BLOCK_SIZE;
}

static void collect(DedupDMA *req)
{
    uint64_t pos = req->offset;
    unsigned i;

    req->pages = g_new(DedupPage, req->sg->size / DEDUP_BLOCK_SIZE);
    for (i = 0; i < req->sg->nsg; i++) {
        collect_part(req, &req->sg->sg[i], pos);
        pos += req->sg->sg[i].len;
    }
}

/* Copy @bytes for @offset on from @buf to where the list wants them. */
static MemTxResult copy_out(DedupDMA *req, uint64_t offset, uint64_t bytes,
                            uint8_t *buf)
{
    uint64_t pos = req->offset;
    MemTxResult res = MEMTX_OK;
    unsigned i;

    for (i = 0; i < req->sg->nsg && bytes; i++) {
        const ScatterGatherEntry *e = &req->sg->sg[i];

        if (offset < pos + e->len) {
            uint64_t n = MIN(bytes, pos + e->len - offset);

            res |= dma_memory_rw(req->sg->as, e->base + (offset - pos), buf,
                                 n, DMA_DIRECTION_FROM_DEVICE,
                                 MEMTXATTRS_UNSPECIFIED);
            offset += n;
            buf += n;
            bytes -= n;
        }
        pos += e->len;
    }
    return res;
}

static int coroutine_fn read_rest(DedupDMA *req, uint64_t offset,
                                  uint64_t bytes)
{
    size_t size = MIN(bytes, MAX_BUFFER);
    void *buf;
    int ret = 0;

    if (!bytes) {
        return 0;
    }
    trace_dedup_dma_rest(req, offset, bytes);
    buf = blk_try_blockalign(req->blk, size);
    if (!buf) {
        return -ENOMEM;
    }
    while (bytes && ret >= 0) {
        size = MIN(bytes, MAX_BUFFER);
        ret = dedup_share_co_read_rest(req->blk, offset, size, buf);
        if (ret >= 0) {
            /* as with a page that is no RAM: what cannot be stored is lost */
            copy_out(req, offset, size, buf);
        }
        offset += size;
        bytes -= size;
    }
    qemu_vfree(buf);
    return MIN(ret, 0);
}

static void complete(DedupDMA *req)
{
    req->common.cb(req->common.opaque, req->ret);
    blk_dec_in_flight(req->blk);
    g_free(req->pages);
    qemu_aio_unref(req);
}

static void complete_bh(void *opaque)
{
    complete(opaque);
}

static void coroutine_fn dma_co_entry(void *opaque)
{
    DedupDMA *req = opaque;
    uint64_t pos = req->offset;
    unsigned i;

    dedup_share_co_read(req->blk, req->pages, req->npages);
    for (i = 0; i < req->npages && req->ret == 0; i++) {
        if (req->pages[i].result == DEDUP_GIVEN) {
            req->ret = read_rest(req, pos, req->pages[i].offset - pos);
            pos = req->pages[i].offset + DEDUP_BLOCK_SIZE;
        }
    }
    if (req->ret == 0) {
        req->ret = read_rest(req, pos, req->offset + req->sg->size - pos);
    }
    req->done = true;
    if (req->returned) {
        complete(req);
    }
}

static const AIOCBInfo dedup_dma_aiocb_info = {
    .aiocb_size = sizeof(DedupDMA),
};

/* Is the request for what the disk has?  Else the ordinary code fails it. */
static bool in_range(BlockBackend *blk, const QEMUSGList *sg, uint64_t offset)
{
    uint64_t sectors, size;

    if (!blk_is_available(blk)) {
        return false;
    }
    blk_get_geometry(blk, &sectors);
    size = sectors * BDRV_SECTOR_SIZE;
    return offset <= size && sg->size <= size - offset;
}

BlockAIOCB *dedup_share_dma_read(BlockBackend *blk, QEMUSGList *sg,
                                 uint64_t offset, BlockCompletionFunc *cb,
                                 void *opaque)
{
    AioContext *ctx = qemu_get_current_aio_context();
    DedupDMA *req;

    blk_inc_in_flight(blk);
    if (!dedup_share_wants(blk, blk_get_public(blk)) ||
        !in_range(blk, sg, offset)) {
        blk_dec_in_flight(blk);
        return NULL;
    }
    if (has_repeated_page(sg)) {
        dedup_share_skip(blk, count_blocks(sg, offset), DEDUP_REPEATED);
        blk_dec_in_flight(blk);
        return NULL;
    }
    req = qemu_aio_get(&dedup_dma_aiocb_info, NULL, cb, opaque);
    req->blk = blk;
    req->sg = sg;
    req->offset = offset;
    req->npages = req->ret = 0;
    req->returned = req->done = false;
    collect(req);
    trace_dedup_dma_read(req, offset, sg->size, req->npages);
    dedup_share_skip(blk, count_blocks(sg, offset) - req->npages,
                     DEDUP_UNALIGNED);
    if (!req->npages) {
        blk_dec_in_flight(blk);
        g_free(req->pages);
        qemu_aio_unref(req);
        return NULL;
    }
    aio_co_enter(ctx, qemu_coroutine_create(dma_co_entry, req));
    req->returned = true;
    if (req->done) {
        aio_bh_schedule_oneshot(ctx, complete_bh, req);
    }
    return &req->common;
}
