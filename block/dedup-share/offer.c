/*
 * dedup-share: reads that device models offer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See include/block/dedup-share.h for who calls what.
 */

#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "system/block-backend.h"
#include "block/throttle-groups.h"
#include "node.h"
#include "parallel.h"
#include "trace.h"

bool dedup_share_wants(BlockBackend *blk, const BlockBackendPublic *public)
{
    BlockDriverState *bs = blk_bs(blk);
    BDRVDedupShareState *s;

    if (!bs || !dedup_share_is(bs) ||
        qatomic_read(&bs->quiesce_counter) ||
        qatomic_read(&public->throttle_group_member.throttle_state)) {
        return false;
    }
    s = bs->opaque;
    return s->offers && dedup_layers_take_part(s) &&
           dedup_client_is_up(s->client) &&
           /* then requests are passed through, but for those that probe */
           (dedup_share_asks(s) || !dedup_put_is_stopped(s));
}

bool dedup_share_resolve(BlockBackend *blk, MemoryRegion *mr, uint64_t offset,
                         DedupDest *dest)
{
    BDRVDedupShareState *s = blk_bs(blk)->opaque;

    return s->offers->resolve(mr, offset, dest);
}

bool dedup_share_resolve_grant(BlockBackend *blk, uint32_t ref, uint16_t peer,
                               DedupDest *dest)
{
    BDRVDedupShareState *s = blk_bs(blk)->opaque;

    return s->offers->resolve_grant(ref, peer, dest);
}

void dedup_share_grants_changed(BlockBackend *blk)
{
    BlockDriverState *bs = blk_bs(blk);
    BDRVDedupShareState *s;

    if (bs && dedup_share_is(bs)) {
        s = bs->opaque;
        if (s->offers) {
            s->offers->grants_changed();
        }
    }
}

/* Ask for a run of blocks that follow each other. */
static void coroutine_fn GRAPH_RDLOCK
ask_run(BlockDriverState *bs, DedupBlock *blocks, unsigned n)
{
    DedupTarget t = {
        .offset = blocks[0].number * DEDUP_BLOCK_SIZE,
        .bytes = (int64_t)n * DEDUP_BLOCK_SIZE,
    };

    dedup_ask_blocks(bs, blocks, n, &t);
}

static void coroutine_fn GRAPH_RDLOCK
read_batch(BlockDriverState *bs, DedupPage *pages, unsigned n)
{
    g_autofree DedupBlock *blocks = g_new0(DedupBlock, n);
    unsigned i, run;

    for (i = 0; i < n; i++) {
        blocks[i].number = pages[i].offset / DEDUP_BLOCK_SIZE;
        blocks[i].dest = pages[i].dest;
        blocks[i].result = pages[i].result;
    }
    for (i = 0; i < n; i += run) {
        run = 1;
        while (i + run < n &&
               blocks[i + run].number == blocks[i].number + run) {
            run++;
        }
        ask_run(bs, blocks + i, run);
    }
    for (i = 0; i < n; i++) {
        pages[i].result = blocks[i].result;
    }
}

void dedup_share_skip(BlockBackend *blk, unsigned n, DedupResult why)
{
    dedup_count_skipped(blk_bs(blk)->opaque, n, why);
}

/* Does QEMU map one of @pages, so that the main loop has to let it go? */
static bool any_held(const DedupStoreOps *ops, const DedupPage *pages,
                     unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        if (pages[i].result == DEDUP_UNDECIDED && ops->held(&pages[i].dest)) {
            return true;
        }
    }
    return false;
}

/* From an iothread: have the main loop let go of what QEMU maps of @pages. */
static void coroutine_fn let_go(const DedupStoreOps *ops,
                                const DedupPage *pages, unsigned n)
{
    AioContext *ctx = qemu_get_current_aio_context();
    unsigned i;

    if (qemu_in_main_thread() || !any_held(ops, pages, n)) {
        return;
    }
    aio_co_reschedule_self(qemu_get_aio_context());
    for (i = 0; i < n; i++) {
        if (pages[i].result == DEDUP_UNDECIDED) {
            ops->let_go(&pages[i].dest);
        }
    }
    aio_co_reschedule_self(ctx);
}

/* The pages of a request. */
typedef struct Pages {
    BlockDriverState *bs;
    DedupPage *pages;
    unsigned n;
} Pages;

static int coroutine_fn GRAPH_RDLOCK read_one_batch(void *opaque, unsigned i)
{
    Pages *p = opaque;
    unsigned first = i * DEDUP_BATCH;

    read_batch(p->bs, p->pages + first, MIN(p->n - first, DEDUP_BATCH));
    return 0;                   /* what failed is in the pages' results */
}

static void coroutine_fn read_pages(BlockDriverState *bs, DedupPage *pages,
                                    unsigned n)
{
    Pages p = { .bs = bs, .pages = pages, .n = n };

    GRAPH_RDLOCK_GUARD();
    dedup_co_all(DIV_ROUND_UP(n, DEDUP_BATCH), read_one_batch, &p);
}

/* Are all of @pages, which ascend, on the disk? */
static bool in_range(BlockDriverState *bs, const DedupPage *pages, unsigned n)
{
    return n && pages[0].offset >= 0 &&
           pages[n - 1].offset / BDRV_SECTOR_SIZE < bs->total_sectors;
}

void coroutine_fn dedup_share_co_read(BlockBackend *blk, DedupPage *pages,
                                      unsigned n)
{
    /* the request is in flight: neither node nor store change until its end */
    BlockDriverState *bs = blk_bs(blk);
    BDRVDedupShareState *s = bs->opaque;
    unsigned i;

    if (in_range(bs, pages, n)) {
        let_go(s->offers, pages, n);
        read_pages(bs, pages, n);
    } else {
        for (i = 0; i < n; i++) {
            pages[i].result = DEDUP_FAILED;
        }
        dedup_share_skip(blk, n, DEDUP_FAILED);
    }
}

/* What is left of a request. */
typedef struct Rests {
    BlockDriverState *bs;
    const DedupRest *rests;
} Rests;

static int coroutine_fn GRAPH_RDLOCK read_one_rest(void *opaque, unsigned i)
{
    Rests *all = opaque;
    const DedupRest *r = &all->rests[i];
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, r->buf, r->bytes);

    return dedup_share_co_preadv(all->bs, r->offset, r->bytes, &qiov, 0);
}

int coroutine_fn dedup_share_co_read_rests(BlockBackend *blk,
                                           const DedupRest *rests, unsigned n)
{
    Rests all = { .rests = rests };

    GRAPH_RDLOCK_GUARD();
    all.bs = blk_bs(blk);
    return dedup_co_all(n, read_one_rest, &all);
}
