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

/*
 * A guest can have many requests in flight: bound what each takes here.  Linux
 * asks a disk for at most 1.25 MiB at a time, by default.
 */
#define MAX_BUFFER (4 * MiB)

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

/* Add what is not given from *pos on, up to @end, or as much as has room. */
static uint64_t add_rest(GArray *rests, uint64_t *pos, uint64_t end,
                         uint64_t room)
{
    DedupRest r = { .offset = *pos, .bytes = MIN(end - *pos, room) };

    if (r.bytes) {
        g_array_append_val(rests, r);
    }
    *pos += r.bytes;
    return r.bytes;
}

/*
 * Collect what is not given from *pos on, at most MAX_BUFFER; step on behind
 * it.  Returns how many bytes these are.
 */
static uint64_t collect_rests(DedupDMA *req, GArray *rests, uint64_t *pos,
                              unsigned *page)
{
    uint64_t end = req->offset + req->sg->size, bytes = 0;

    for (; *page < req->npages; (*page)++) {
        const DedupPage *p = &req->pages[*page];

        if (p->result != DEDUP_GIVEN) {
            continue;
        }
        bytes += add_rest(rests, pos, p->offset, MAX_BUFFER - bytes);
        if (*pos < p->offset) {
            return bytes;
        }
        *pos = p->offset + DEDUP_BLOCK_SIZE;
    }
    return bytes + add_rest(rests, pos, end, MAX_BUFFER - bytes);
}

/* Read @rests, of @bytes in all, and copy them to where the list wants them. */
static int coroutine_fn read_rests(DedupDMA *req, GArray *rests, uint64_t bytes)
{
    DedupRest *r = (DedupRest *)rests->data;
    unsigned i, n = rests->len;
    /* each is aligned, for O_DIRECT */
    uint8_t *buf = blk_try_blockalign(req->blk, bytes + n * DEDUP_BLOCK_SIZE);
    uint8_t *at = buf;
    int ret;

    trace_dedup_dma_rest(req, r->offset, bytes, n);
    if (!buf) {
        return -ENOMEM;
    }
    for (i = 0; i < n; i++) {
        r[i].buf = at;
        at += ROUND_UP(r[i].bytes, DEDUP_BLOCK_SIZE);
    }
    ret = dedup_share_co_read_rests(req->blk, r, n);
    for (i = 0; ret >= 0 && i < n; i++) {
        /* as with a page that is no RAM: what cannot be stored is lost */
        copy_out(req, r[i].offset, r[i].bytes, r[i].buf);
    }
    qemu_vfree(buf);
    return ret;
}

/* Read all that was not given. */
static int coroutine_fn read_rest(DedupDMA *req)
{
    g_autoptr(GArray) rests = g_array_new(false, false, sizeof(DedupRest));
    uint64_t pos = req->offset, bytes;
    unsigned page = 0;
    int ret = 0;

    while (ret == 0 && (bytes = collect_rests(req, rests, &pos, &page))) {
        ret = read_rests(req, rests, bytes);
        g_array_set_size(rests, 0);
    }
    return ret;
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

    dedup_share_co_read(req->blk, req->pages, req->npages);
    req->ret = read_rest(req);
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
