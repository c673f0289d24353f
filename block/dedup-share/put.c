/*
 * dedup-share: blocks that are read here and handed to the store daemon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What is in no leased image can be shared by its content.
 *
 * Invariants
 *
 * - What the request gets is what was read for it; a frame only ever takes the
 *   place of equal bytes.  So nothing is remembered of a block, writes need not
 *   be known of, and it does not matter who else writes to the image.
 * - What is handed over was read into memory that no guest can write to.
 * - Nothing of a chain with an encrypted image is put, unless the node's
 *   options say so.
 *
 * A node whose puts match nothing puts less and less: what nobody else has
 * costs a digest and a copy, and gains nothing.  It has to have put as much as
 * a guest reads when it boots, or the first of two guests on equal copies would
 * have nothing in the store for the second one to match.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/units.h"
#include "node.h"
#include "parallel.h"

/* Blocks without a match in a row: 1 GiB, and then 16 MiB for each step. */
#define PATIENCE (1 * GiB / DEDUP_BLOCK_SIZE)
#define STEP (16 * MiB / DEDUP_BLOCK_SIZE)
/* One request in so many is put at least. */
#define MAX_INTERVAL 16
/* One block in so many has to match. */
#define MATCHING 8

typedef struct Puts {
    BlockDriverState *bs;
    const DedupTarget *target;
    DedupBlock *blocks;
    struct {
        uint8_t first, n;       /* of @blocks */
    } runs[DEDUP_BATCH];
} Puts;

/* --- back-off ------------------------------------------------------------- */

static bool is_turn(DedupPutting *p)
{
    unsigned interval = qatomic_read(&p->interval);

    return interval <= 1 || qatomic_fetch_inc(&p->turn) % interval == 0;
}

/* Of @n blocks that were put, so many have matched. */
static void learn(DedupPutting *p, unsigned n, unsigned matched)
{
    unsigned unmatched;

    if (matched * MATCHING >= n) {
        if (qatomic_read(&p->unmatched)) {
            qatomic_set(&p->unmatched, 0);
            qatomic_set(&p->interval, 1);
        }
        return;
    }
    unmatched = qatomic_fetch_add(&p->unmatched, n) + n;
    if (unmatched >= PATIENCE) {
        unsigned interval = MAX(qatomic_read(&p->interval), 1);

        qatomic_set(&p->unmatched, PATIENCE - STEP);
        qatomic_set(&p->interval, MIN(interval * 2, MAX_INTERVAL));
    }
}

/* --- putting -------------------------------------------------------------- */

static void count_put(BDRVDedupShareState *s, const DedupAnswers *a)
{
    unsigned i, made = 0, frames = 0;

    for (i = 0; i < a->n; i++) {
        frames += a->frames[i].answer == DEDUP_ANSWER_FRAME;
        made += a->frames[i].answer == DEDUP_ANSWER_FRAME &&
                a->frames[i].flags & DEDUP_FRAME_NEW;
    }
    stat64_add(&s->counters.misses, a->n);
    stat64_add(&s->counters.matched, frames - made);
    learn(&s->putting, a->n, frames - made);
}

/* The @n blocks at @buf, which are for the whole pages at their dests. */
static void coroutine_fn put_run(BDRVDedupShareState *s, const DedupTarget *t,
                                 DedupBlock *blocks, unsigned n,
                                 const uint8_t *buf)
{
    DEDUP_HOT_ARRAY DedupAnswers answers;
    uint8_t which[DEDUP_PUT_BLOCKS];
    uint32_t flags = s->opts.admission == DEDUP_SHARE_ADMISSION_SECOND_READ
                     ? DEDUP_REQUEST_SECOND_READ : 0;
    unsigned i;

    for (i = 0; i < n; i++) {
        blocks[i].result = DEDUP_GIVEN;
        which[i] = i;
    }
    dedup_client_put_blocks(s->client, buf, n, flags, &answers);
    dedup_place_answers(s, t, &answers, which, blocks);
    count_put(s, &answers);
    dedup_client_done(&answers);
    for (i = 0; i < n; i++) {
        if (!blocks[i].placed && !dedup_in_place(blocks[i].result)) {
            memcpy(blocks[i].dest.host, buf + i * DEDUP_BLOCK_SIZE,
                   DEDUP_BLOCK_SIZE);
            blocks[i].placed = true;
        }
    }
}

static int coroutine_fn GRAPH_RDLOCK read_and_put(void *opaque, unsigned i)
{
    Puts *p = opaque;
    BDRVDedupShareState *s = p->bs->opaque;
    DedupBlock *blocks = p->blocks + p->runs[i].first;
    unsigned n = p->runs[i].n;
    int64_t bytes = (int64_t)n * DEDUP_BLOCK_SIZE;
    uint8_t *buf = dedup_buffer_get(s);

    /* an error is for the ordinary read to find, and to report */
    if (buf && bdrv_co_pread(p->bs->file, blocks[0].number * DEDUP_BLOCK_SIZE,
                             bytes, buf, 0) >= 0) {
        stat64_add(&s->counters.bytes_filled, bytes);
        put_run(s, p->target, blocks, n, buf);
    }
    dedup_buffer_put(s, buf);
    return 0;
}

void coroutine_fn GRAPH_RDLOCK
dedup_put_blocks(BlockDriverState *bs, const DedupTarget *t,
                 DedupBlock *blocks, unsigned n)
{
    BDRVDedupShareState *s = bs->opaque;
    bool turn = false, asked = false;
    DEDUP_HOT_ARRAY Puts puts;
    unsigned i, nruns = 0, run = 0;

    for (i = 0; i < n; i++) {
        if (blocks[i].result != DEDUP_NO_LAYER) {
            run = 0;
            continue;
        }
        if (!asked) {
            turn = is_turn(&s->putting);
            asked = true;
        }
        if (!turn) {
            blocks[i].result = DEDUP_UNMATCHED;
            continue;
        }
        if (!run || run == DEDUP_PUT_BLOCKS) {
            puts.runs[nruns++].first = i;
            run = 0;
        }
        puts.runs[nruns - 1].n = ++run;
    }
    puts.bs = bs;
    puts.target = t;
    puts.blocks = blocks;
    dedup_co_all(nruns, read_and_put, &puts);
}
