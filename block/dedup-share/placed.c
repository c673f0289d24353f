/*
 * dedup-share: putting the store daemon's answers into place
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A frame is mapped or shared over guest memory, or copied to where the request
 * wants it.  What is not in place then is the caller's to read.
 */

#include "qemu/osdep.h"
#include "node.h"

/* The part of a block that is wanted. */
static void cut_block(const DedupTarget *t, const DedupBlock *b, size_t *skip,
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
static void copy_part(BDRVDedupShareState *s, const DedupTarget *t,
                      DedupBlock *b, DedupHeld *held, uint32_t slot)
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

static void place_zeroes(const DedupTarget *t, DedupBlock *b)
{
    size_t skip, bytes, to;

    b->result = b->result ?: DEDUP_ZEROES;
    if (t->qiov) {
        cut_block(t, b, &skip, &bytes, &to);
        qemu_iovec_memset(t->qiov, to, 0, bytes);
        b->placed = true;
    }
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
static unsigned count_run(const DedupAnswers *a, const uint8_t *which,
                          const DedupBlock *blocks, unsigned i)
{
    const DedupBlock *first = &blocks[which[i]];
    unsigned run = 1;

    while (i + run < a->n) {
        const DedupBlock *b = &blocks[which[i + run]];
        const DedupMsgFrame *f = &a->frames[i + run];

        if (f->answer != DEDUP_ANSWER_FRAME || b->result != DEDUP_UNDECIDED ||
            f->slot != a->frames[i].slot + run ||
            b->dest.host != first->dest.host + run * DEDUP_BLOCK_SIZE) {
            break;
        }
        run++;
    }
    return run;
}

static unsigned give_run(const DedupAnswers *a, const uint8_t *which,
                         DedupBlock *blocks, unsigned i)
{
    unsigned run = count_run(a, which, blocks, i), j;
    uint8_t *host = blocks[which[i]].dest.host;
    uint32_t slot = a->frames[i].slot;
    DedupResult result = DEDUP_GIVEN;

    if (!dedup_held_give(a->held, slot, host, run)) {
        result = dedup_held_copy(a->held, slot, 0, host,
                                 run * DEDUP_BLOCK_SIZE) ? DEDUP_FAILED
                                                         : DEDUP_COPIED;
    }
    for (j = 0; j < run; j++) {
        blocks[which[i + j]].result = result;
    }
    return run;
}

/* Pages of the guest that only its store knows. */
static void coroutine_fn give_pages(BDRVDedupShareState *s,
                                    const DedupAnswers *a, const uint8_t *which,
                                    DedupBlock *blocks)
{
    DEDUP_HOT_ARRAY DedupGive gives[DEDUP_BATCH];
    uint8_t given[DEDUP_BATCH];
    unsigned i, n = 0;

    for (i = 0; i < a->n; i++) {
        const DedupBlock *b = &blocks[which[i]];
        const DedupMsgFrame *f = &a->frames[i];

        if (f->answer == DEDUP_ANSWER_FRAME && b->result == DEDUP_UNDECIDED) {
            gives[n] = (DedupGive) {
                .dest = b->dest, .slot = f->slot, .handle = f->handle,
            };
            given[n++] = which[i];
        }
    }
    if (n) {
        dedup_gather_give(&s->gather, a->held, gives, n);
    }
    for (i = 0; i < n; i++) {
        blocks[given[i]].result = gives[i].result;
    }
}

void coroutine_fn dedup_place_answers(BDRVDedupShareState *s,
                                      const DedupTarget *t,
                                      const DedupAnswers *a,
                                      const uint8_t *which, DedupBlock *blocks)
{
    unsigned i, run;

    if (!t->qiov) {
        give_pages(s, a, which, blocks);
    }
    for (i = 0; i < a->n; i += run) {
        DedupBlock *b = &blocks[which[i]];
        const DedupMsgFrame *f = &a->frames[i];

        run = 1;
        if (f->answer == DEDUP_ANSWER_ZEROES) {
            place_zeroes(t, b);
        } else if (f->answer != DEDUP_ANSWER_FRAME) {
            b->result = b->result ?: why_not(f->answer);
        } else if (!t->qiov) {
            continue;           /* it was given, or is the caller's to read */
        } else if (b->result == DEDUP_UNDECIDED) {
            run = give_run(a, which, blocks, i);
        } else {
            copy_part(s, t, b, a->held, f->slot);
        }
    }
}
