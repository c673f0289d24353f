/*
 * dedup-share: a read of blocks that the store daemon may have
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One message asks for all blocks of a part of a request that are in leased
 * images.  What comes back is mapped over guest memory, or copied to where the
 * request wants it; the caller reads what is not in place then.
 */

#include "qemu/osdep.h"
#include "node.h"
#include "trace.h"

/* What is asked for. */
typedef struct Question {
    DedupMsgExtent extents[DEDUP_BATCH];
    unsigned nextents;
    uint8_t blocks[DEDUP_BATCH];        /* answer i is for this block */
    unsigned n;
    uint64_t connection;
    uint32_t flags;
} Question;

/* Where a block's bytes go: a part of the request. */
typedef struct Target {
    int64_t offset, bytes;      /* on the disk */
    QEMUIOVector *qiov;
    size_t qiov_offset;         /* for @offset */
} Target;

static void add_block(Question *q, unsigned i, uint32_t layer, uint64_t block)
{
    DedupMsgExtent *e = q->nextents ? &q->extents[q->nextents - 1] : NULL;

    if (e && e->layer == layer && e->first + e->n == block) {
        e->n++;
    } else {
        q->extents[q->nextents++] = (DedupMsgExtent) {
            .layer = layer, .first = block, .n = 1,
        };
    }
    q->blocks[q->n++] = i;
}

static void make_question(BDRVDedupShareState *s, Question *q,
                          const DedupPlace *places, DedupBlock *blocks,
                          unsigned n)
{
    DedupFile *last = NULL;
    uint64_t connection = 0;
    uint32_t number = 0;
    bool leased = false, name;
    unsigned i;

    q->n = q->nextents = 0;
    q->connection = 0;
    q->flags = s->opts.admission == DEDUP_SHARE_ADMISSION_SECOND_READ
               ? DEDUP_REQUEST_SECOND_READ : 0;
    for (i = 0; i < n; i++) {
        DedupFile *file = places[i].file;

        if (file && file != last) {
            last = file;
            leased = dedup_client_layer_is_leased(s->client, &file->layer,
                                                  &number, &connection, &name);
        }
        if (!file || !leased ||
            (q->connection && q->connection != connection)) {
            blocks[i].result = blocks[i].result ?:
                places[i].unallocated ? DEDUP_UNALLOCATED : DEDUP_NO_LAYER;
            continue;
        }
        q->connection = connection;
        q->flags |= file->throttled ? DEDUP_REQUEST_NO_FILL : 0;
        add_block(q, i, number, places[i].block);
    }
}

/* --- what has come -------------------------------------------------------- */

/* The part of a block that is wanted. */
static void cut_block(const Target *t, const DedupBlock *b, size_t *skip,
                      size_t *bytes, size_t *to)
{
    int64_t start = b->number * DEDUP_BLOCK_SIZE;
    int64_t from = MAX(start, t->offset);
    int64_t end = MIN(start + DEDUP_BLOCK_SIZE, t->offset + t->bytes);

    *skip = from - start;
    *bytes = end - from;
    *to = t->qiov_offset + (from - t->offset);
}

/* A block that is not for one whole page. */
static void copy_part(BDRVDedupShareState *s, const Target *t, DedupBlock *b,
                      DedupHeld *held, uint32_t slot)
{
    uint8_t buf[DEDUP_BLOCK_SIZE];
    size_t skip, bytes, to;

    cut_block(t, b, &skip, &bytes, &to);
    if (!dedup_held_copy(held, slot, skip, buf, bytes)) {
        qemu_iovec_from_buf(t->qiov, to, buf, bytes);
        b->placed = true;
        stat64_add(&s->counters.copied, 1);
    }
}

static void place_zeroes(const Target *t, DedupBlock *b)
{
    size_t skip, bytes, to;

    cut_block(t, b, &skip, &bytes, &to);
    qemu_iovec_memset(t->qiov, to, 0, bytes);
    b->placed = true;
    b->result = b->result ?: DEDUP_ZEROES;
}

static DedupResult why_not(DedupAnswer answer)
{
    switch (answer) {
    case DEDUP_ANSWER_ABSENT:
    case DEDUP_ANSWER_NO_LEASE:
        return DEDUP_NO_LAYER;
    case DEDUP_ANSWER_SEEN_ONCE:
        return DEDUP_SEEN_ONCE;
    case DEDUP_ANSWER_FULL:
    case DEDUP_ANSWER_BUSY:
        return DEDUP_STORE_FULL;
    default:
        return DEDUP_FAILED;
    }
}

/* How many answers, from @i on, are one run of frames, for pages in a row? */
static unsigned count_run(const Question *q, const DedupAnswers *a,
                          const DedupBlock *blocks, unsigned i)
{
    const DedupBlock *first = &blocks[q->blocks[i]];
    unsigned run = 1;

    while (i + run < a->n) {
        const DedupBlock *b = &blocks[q->blocks[i + run]];
        const DedupMsgFrame *f = &a->frames[i + run];

        if (f->answer != DEDUP_ANSWER_FRAME || b->result != DEDUP_GIVEN ||
            f->slot != a->frames[i].slot + run ||
            b->dest.host != first->dest.host + run * DEDUP_BLOCK_SIZE) {
            break;
        }
        run++;
    }
    return run;
}

static unsigned give_run(const Question *q, const DedupAnswers *a,
                         DedupBlock *blocks, unsigned i)
{
    unsigned run = count_run(q, a, blocks, i), j;
    uint8_t *host = blocks[q->blocks[i]].dest.host;
    uint32_t slot = a->frames[i].slot;
    DedupResult result = DEDUP_GIVEN;

    if (!dedup_held_give(a->held, slot, host, run)) {
        result = dedup_held_copy(a->held, slot, 0, host,
                                 run * DEDUP_BLOCK_SIZE) ? DEDUP_FAILED
                                                         : DEDUP_COPIED;
    }
    for (j = 0; j < run; j++) {
        blocks[q->blocks[i + j]].result = result;
    }
    return run;
}

static void place_answers(BDRVDedupShareState *s, const Target *t,
                          const Question *q, const DedupAnswers *a,
                          DedupBlock *blocks)
{
    unsigned i, run;

    for (i = 0; i < a->n; i += run) {
        DedupBlock *b = &blocks[q->blocks[i]];
        const DedupMsgFrame *f = &a->frames[i];

        run = 1;
        if (f->answer == DEDUP_ANSWER_ZEROES) {
            place_zeroes(t, b);
        } else if (f->answer != DEDUP_ANSWER_FRAME) {
            b->result = b->result ?: why_not(f->answer);
        } else if (b->result == DEDUP_GIVEN) {
            run = give_run(q, a, blocks, i);
        } else {
            copy_part(s, t, b, a->held, f->slot);
        }
    }
}

static void count_answers(BDRVDedupShareState *s, const DedupAnswers *a)
{
    unsigned i, hits = 0;

    for (i = 0; i < a->n; i++) {
        hits += (a->frames[i].answer == DEDUP_ANSWER_FRAME ||
                 a->frames[i].answer == DEDUP_ANSWER_ZEROES) &&
                !(a->frames[i].flags & DEDUP_FRAME_FILLED);
    }
    stat64_add(&s->counters.hits, hits);
    stat64_add(&s->counters.misses, a->n - hits);
    stat64_add(&s->counters.bytes_filled,
               (uint64_t)a->nfilled * DEDUP_BLOCK_SIZE);
}

void coroutine_fn dedup_ask_blocks(BlockDriverState *bs, DedupBlock *blocks,
                                   unsigned n, int64_t offset, int64_t bytes,
                                   QEMUIOVector *qiov, size_t qiov_offset)
{
    BDRVDedupShareState *s = bs->opaque;
    Target t = {
        .offset = offset, .bytes = bytes, .qiov = qiov,
        .qiov_offset = qiov_offset,
    };
    DEDUP_HOT_ARRAY DedupPlace places[DEDUP_BATCH];
    DEDUP_HOT_ARRAY DedupAnswers answers;
    DEDUP_HOT_ARRAY Question q;

    dedup_files_locate(&s->files, s->client, bs, blocks[0].number, n, places);
    make_question(s, &q, places, blocks, n);
    if (q.n) {
        dedup_client_read(s->client, q.connection, q.extents, q.nextents,
                          q.flags, &answers);
        place_answers(s, &t, &q, &answers, blocks);
        count_answers(s, &answers);
        dedup_client_done(&answers);
    }
    dedup_count_results(&s->counters, blocks, n);
}
