/*
 * dedup-share: a read of blocks that the store daemon may have
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One message asks for all blocks of a part of a request that are in leased
 * images, or still those of the leased image that theirs is a copy of.  Of the
 * others, those that are for whole pages are read and put, if the node's
 * share=all.  The caller reads what is not in place then.
 */

#include "qemu/osdep.h"
#include "node.h"
#include "trace.h"

/* What is asked for. */
typedef struct Question {
    DedupMsgExtent extents[DEDUP_READ_BLOCKS];
    unsigned nextents;
    uint8_t blocks[DEDUP_READ_BLOCKS];  /* answer i is for this block */
    unsigned n;
    unsigned norigin;                   /* of these, of a copy's origin */
    uint64_t connection;
    uint32_t flags;
} Question;

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

    q->n = q->nextents = q->norigin = 0;
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
            (q->connection && q->connection != connection) ||
            (places[i].connection && places[i].connection != connection)) {
            blocks[i].result = blocks[i].result ?:
                places[i].unallocated ? DEDUP_UNALLOCATED : DEDUP_NO_LAYER;
            continue;
        }
        q->connection = connection;
        q->flags |= file->throttled ? DEDUP_REQUEST_NO_FILL : 0;
        q->norigin += places[i].connection != 0;
        add_block(q, i, number, places[i].block);
    }
}

/* Hits and misses are counted once, if what was offered is then read. */
static void count_answers(BDRVDedupShareState *s, const DedupAnswers *a,
                          bool counts)
{
    unsigned i, hits = 0, misses = 0;

    for (i = 0; i < a->n; i++) {
        const DedupMsgFrame *f = &a->frames[i];
        bool filled = f->flags & DEDUP_FRAME_FILLED;

        /* a lease that broke meanwhile: it was read for nothing, and is put */
        misses += filled && f->answer != DEDUP_ANSWER_NO_LEASE &&
                  f->answer != DEDUP_ANSWER_FAILED;
        hits += !filled && (f->answer == DEDUP_ANSWER_FRAME ||
                            f->answer == DEDUP_ANSWER_ZEROES);
    }
    if (counts) {
        stat64_add(&s->counters.hits, hits);
        stat64_add(&s->counters.misses, misses);
    }
    stat64_add(&s->counters.bytes_filled,
               (uint64_t)a->nfilled * DEDUP_BLOCK_SIZE);
}

void coroutine_fn dedup_ask_blocks(BlockDriverState *bs, DedupBlock *blocks,
                                   unsigned n, const DedupTarget *t)
{
    BDRVDedupShareState *s = bs->opaque;
    bool counts = !s->offers || !t->qiov;
    DEDUP_HOT_ARRAY DedupPlace places[DEDUP_READ_BLOCKS];
    DEDUP_HOT_ARRAY DedupAnswers answers;
    DEDUP_HOT_ARRAY Question q;

    if (s->files.n) {
        dedup_files_locate(&s->files, s->client, bs, blocks[0].number, n,
                           places);
    } else {
        memset(places, 0, n * sizeof(*places));
    }
    dedup_origin_locate(&s->origin, s->client, bs, blocks[0].number, n, places);
    make_question(s, &q, places, blocks, n);
    if (q.n) {
        dedup_client_read(s->client, q.connection, q.extents, q.nextents,
                          q.flags, &answers);
        dedup_place_answers(s, t, &answers, q.blocks, blocks);
        count_answers(s, &answers, counts);
        stat64_add(&s->counters.of_origin, counts ? q.norigin : 0);
        dedup_client_done(&answers);
    }
    /* what was offered was put then */
    if (s->puts && (counts || dedup_put_is_stopped(s))) {
        dedup_put_blocks(bs, t, blocks, n);
    }
    if (counts) {
        dedup_count_results(&s->counters, blocks, n);
    }
}
