/*
 * dedup-share: reads whose destinations are addresses in QEMU
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Frames are mapped or copied to where a request's vector points.  No device
 * model has to offer anything: guest memory that a device has mapped for its
 * DMA is in the vector.  On Xen, where such memory is not QEMU's, they are
 * copied.  What is not in place then is read.
 *
 * What a guest page holds that the vector names twice is for the request to
 * undefine: the order of the parts is not kept.
 */

#include "qemu/osdep.h"
#include "node.h"
#include "parallel.h"

/* A place in a vector. */
typedef struct Cursor {
    const struct iovec *iov;
    size_t skip;                /* bytes of it */
} Cursor;

/* A part of a request, of at most DEDUP_READ_BLOCKS blocks. */
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
            .result = whole && place ? DEDUP_UNDECIDED : DEDUP_UNALIGNED,
        };
        offset = next;
    }
    return n;
}

static bool is_there(const DedupBlock *b)
{
    return b->placed || dedup_in_place(b->result);
}

/* What of a part is not in place. */
typedef struct Rest {
    BlockDriverState *bs;
    const Part *part;
    uint64_t first;             /* block of the part */
    struct {
        uint16_t from, to;      /* blocks of the part; a run */
    } runs[DEDUP_READ_BLOCKS];
} Rest;

static int coroutine_fn GRAPH_RDLOCK read_rest_run(void *opaque, unsigned i)
{
    Rest *rest = opaque;
    BDRVDedupShareState *s = rest->bs->opaque;
    const Part *p = rest->part;
    int64_t from = (rest->first + rest->runs[i].from) * DEDUP_BLOCK_SIZE;
    int64_t end = (rest->first + rest->runs[i].to) * DEDUP_BLOCK_SIZE;
    int64_t offset = MAX(from, p->offset);
    int64_t bytes = MIN(end, p->offset + p->bytes) - offset;

    stat64_add(&s->counters.bytes_passed, bytes);
    return bdrv_co_preadv_part(rest->bs->file, offset, bytes, p->qiov,
                               p->qiov_offset + offset - p->offset, p->flags);
}

static int coroutine_fn GRAPH_RDLOCK
read_part(BlockDriverState *bs, const Part *p, Cursor *c)
{
    BDRVDedupShareState *s = bs->opaque;
    DEDUP_HOT_ARRAY DedupBlock blocks[DEDUP_READ_BLOCKS];
    DEDUP_HOT_ARRAY Rest rest;
    unsigned i, n = find_places(p, blocks, c), nruns = 0;
    int ret;

    dedup_ask_blocks(bs, blocks, n, &(DedupTarget) {
        .offset = p->offset, .bytes = p->bytes, .qiov = p->qiov,
        .qiov_offset = p->qiov_offset,
    });
    for (i = 0; i < n; i++) {
        if (is_there(&blocks[i])) {
            continue;
        }
        if (i == 0 || is_there(&blocks[i - 1])) {
            rest.runs[nruns++].from = i;
        }
        rest.runs[nruns - 1].to = i + 1;
    }
    rest.bs = bs;
    rest.part = p;
    rest.first = blocks[0].number;
    ret = dedup_co_all(nruns, read_rest_run, &rest);
    if (s->puts && ret == 0) {
        dedup_put_probe(s, blocks, n);
    }
    return ret;
}

/* A request of several parts, and where each part's first byte goes. */
typedef struct Parts {
    BlockDriverState *bs;
    Part *parts;
    Cursor *cursors;
} Parts;

static int coroutine_fn GRAPH_RDLOCK read_one_part(void *opaque, unsigned i)
{
    Parts *all = opaque;

    return read_part(all->bs, &all->parts[i], &all->cursors[i]);
}

/* The part of @p from @skip bytes on, up to a bound of so many blocks. */
static Part cut_part(const Part *p, int64_t skip)
{
    Part part = *p;
    int64_t stop;

    part.offset += skip;
    part.qiov_offset += skip;
    stop = ROUND_DOWN(part.offset, DEDUP_BLOCK_SIZE) +
           DEDUP_READ_BLOCKS * DEDUP_BLOCK_SIZE;
    part.bytes = MIN(stop - part.offset, p->bytes - skip);
    return part;
}

static int coroutine_fn GRAPH_RDLOCK
read_parts(BlockDriverState *bs, const Part *whole)
{
    size_t most = whole->bytes / (DEDUP_READ_BLOCKS * DEDUP_BLOCK_SIZE) + 2;
    g_autofree Part *parts = g_new(Part, most);
    g_autofree Cursor *cursors = g_new(Cursor, most);
    Parts all = { .bs = bs, .parts = parts, .cursors = cursors };
    Cursor c = { .iov = whole->qiov->iov };
    int64_t done = 0;
    unsigned n = 0;

    while (done < whole->bytes) {
        parts[n] = cut_part(whole, done);
        cursors[n] = c;
        next_place(&c, parts[n].bytes);
        done += parts[n++].bytes;
    }
    return dedup_co_all(n, read_one_part, &all);
}

int coroutine_fn dedup_read_direct(BlockDriverState *bs, int64_t offset,
                                   int64_t bytes, QEMUIOVector *qiov,
                                   BdrvRequestFlags flags)
{
    Part p = {
        .offset = offset, .bytes = bytes, .qiov = qiov, .flags = flags,
    };
    Cursor c = { .iov = qiov->iov };

    if (!bytes) {
        return 0;
    }
    return cut_part(&p, 0).bytes == bytes ? read_part(bs, &p, &c)
                                          : read_parts(bs, &p);
}
