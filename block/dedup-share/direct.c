/*
 * dedup-share: reads whose destinations are addresses in QEMU
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For a store that maps or copies frames to where a request's vector points
 * (DedupStoreOps.by_host).  No device model has to offer anything: guest memory
 * that a device has mapped for its DMA is in the vector.  Every whole block
 * that is for 4096 bytes that follow each other is handed to the engine.  The
 * rest is copied from the store if it is there, and else read.
 *
 * What a guest page holds that the vector names twice is for the request to
 * undefine: the order of the parts is not kept.
 */

#include "qemu/osdep.h"
#include "node.h"

/* A place in a vector. */
typedef struct Cursor {
    const struct iovec *iov;
    size_t skip;                /* bytes of it */
} Cursor;

/* A part of a request, of at most DEDUP_BATCH blocks. */
typedef struct Part {
    int64_t offset;
    int64_t bytes;
    QEMUIOVector *qiov;
    size_t qiov_offset;
    BdrvRequestFlags flags;
} Part;

/* Where the next @n bytes go, if they go to one place, else NULL; step on. */
static uint8_t *next_place(Cursor *c, size_t n)
{
    uint8_t *place = NULL;

    while (c->skip == c->iov->iov_len) {
        c->iov++;
        c->skip = 0;
    }
    if (c->iov->iov_len - c->skip >= n) {
        place = c->iov->iov_base + c->skip;
    }
    while (n) {
        size_t step = MIN(n, c->iov->iov_len - c->skip);

        c->skip += step;
        n -= step;
        if (n) {
            c->iov++;
            c->skip = 0;
        }
    }
    return place;
}

static unsigned find_places(const Part *p, DedupBlock *blocks, Cursor *c)
{
    int64_t offset = p->offset, end = p->offset + p->bytes;
    unsigned n = 0;

    while (offset < end) {
        uint64_t number = offset / DEDUP_BLOCK_SIZE;
        int64_t next = MIN(end, (int64_t)(number + 1) * DEDUP_BLOCK_SIZE);
        uint8_t *place = next_place(c, next - offset);
        bool whole = next - offset == DEDUP_BLOCK_SIZE;

        blocks[n++] = (DedupBlock) {
            .number = number,
            .dest.host = place,
            .result = whole && place ? DEDUP_GIVEN : DEDUP_UNALIGNED,
        };
        offset = next;
    }
    return n;
}

static void coroutine_fn give(void *opaque, DedupGive *gives, unsigned n)
{
    BlockDriverState *bs = opaque;
    DedupGroup *g = ((BDRVDedupShareState *)bs->opaque)->group;

    g->ops->give(g->store, gives, n);
}

/*
 * Read a run of blocks that are not in place yet: from the store if it has all
 * of them, else from the image.
 */
static int coroutine_fn GRAPH_RDLOCK
read_run(BlockDriverState *bs, const Part *p, int64_t from, int64_t end)
{
    BDRVDedupShareState *s = bs->opaque;
    int64_t offset = MAX(from, p->offset);
    int64_t bytes = MIN(end, p->offset + p->bytes) - offset;
    size_t qiov_offset = p->qiov_offset + offset - p->offset;

    if (dedup_copy_from_store(bs, offset, bytes, p->qiov, qiov_offset)) {
        return 0;
    }
    stat64_add(&s->counters.bytes_passed, bytes);
    return bdrv_co_preadv_part(bs->file, offset, bytes, p->qiov, qiov_offset,
                               p->flags);
}

static bool is_there(const DedupBlock *b)
{
    return b->placed || dedup_in_place(b->result);
}

static int coroutine_fn GRAPH_RDLOCK
read_part(BlockDriverState *bs, const Part *p, Cursor *c)
{
    DEDUP_HOT_ARRAY DedupBlock blocks[DEDUP_BATCH];
    unsigned i, run, n = find_places(p, blocks, c);
    int ret = 0;

    dedup_read_blocks(bs, blocks, n, give);
    for (i = 0; i < n && ret >= 0; i += run) {
        bool in_place = is_there(&blocks[i]);

        run = 1;
        while (i + run < n && is_there(&blocks[i + run]) == in_place) {
            run++;
        }
        if (!in_place) {
            ret = read_run(bs, p, blocks[i].number * DEDUP_BLOCK_SIZE,
                           (blocks[i].number + run) * DEDUP_BLOCK_SIZE);
        }
    }
    return MIN(ret, 0);
}

int coroutine_fn dedup_read_direct(BlockDriverState *bs, int64_t offset,
                                   int64_t bytes, QEMUIOVector *qiov,
                                   BdrvRequestFlags flags)
{
    Cursor c = { .iov = qiov->iov };
    int64_t end = offset + bytes;
    Part p = { .offset = offset, .qiov = qiov, .flags = flags };
    int ret = 0;

    while (p.offset < end && ret == 0) {
        int64_t stop = ROUND_DOWN(p.offset, DEDUP_BLOCK_SIZE) +
                       DEDUP_BATCH * DEDUP_BLOCK_SIZE;

        p.bytes = MIN(stop, end) - p.offset;
        ret = read_part(bs, &p, &c);
        p.offset += p.bytes;
        p.qiov_offset += p.bytes;
    }
    return ret;
}
