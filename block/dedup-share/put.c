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
 * - What is handed over to be given was read into memory that no guest can
 *   write to.  A probe may have what the guest has written meanwhile: it gives
 *   nothing, and what it leaves in the store is found only by equal bytes.
 * - Nothing of a chain with an encrypted image is put, unless the node's
 *   options say so.
 *
 * What nobody else has costs a digest and two copies, and gains nothing.  So a
 * node whose puts match nothing stops, and only probes: now and then it hands
 * over one block that was read in the ordinary way, to see whether it is known.
 * It has to have put as much as a guest reads when it boots, or the first of
 * two guests on equal copies would have nothing in the store for the second one
 * to match.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/units.h"
#include "node.h"
#include "parallel.h"

/* Blocks without a match until it stops: 1 GiB; after a probe has matched. */
#define PATIENCE (1 * GiB / DEDUP_BLOCK_SIZE)
#define PATIENCE_AGAIN (64 * MiB / DEDUP_BLOCK_SIZE)
/* One request in so many probes. */
#define PROBE_INTERVAL 64
/* One block in so many has to match. */
#define MATCHING 8

typedef struct Puts {
    BlockDriverState *bs;
    const DedupTarget *target;
    DedupBlock *blocks;
    struct {
        uint8_t first, n;       /* of @blocks */
    } runs[DEDUP_READ_BLOCKS];
} Puts;

/* --- back-off ------------------------------------------------------------- */

/* Of @n blocks whose put could have been of use, so many have matched. */
static void learn(DedupPutting *p, unsigned n, unsigned matched)
{
    if (!n) {
        return;
    }
    if (matched * MATCHING >= n) {
        if (qatomic_read(&p->unmatched)) {
            qatomic_set(&p->unmatched, 0);
            qatomic_set(&p->stopped, false);
        }
    } else if (qatomic_fetch_add(&p->unmatched, n) + n >= PATIENCE) {
        qatomic_set(&p->stopped, true);
    }
}

/* Is it this request's turn? */
static bool take_turn(DedupPutting *p)
{
    return qatomic_fetch_inc(&p->turn) % PROBE_INTERVAL == 0;
}

bool dedup_put_is_stopped(BDRVDedupShareState *s)
{
    return qatomic_read(&s->putting.stopped);
}

bool dedup_put_skips(BDRVDedupShareState *s)
{
    return dedup_put_is_stopped(s) && !dedup_share_asks(s) &&
           !take_turn(&s->putting);
}

/* A block that was read in place, or NULL. */
static const DedupBlock *find_unmatched(const DedupBlock *blocks, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        if (blocks[i].result == DEDUP_UNMATCHED) {
            return &blocks[i];
        }
    }
    return NULL;
}

void coroutine_fn dedup_put_probe(BDRVDedupShareState *s,
                                  const DedupBlock *blocks, unsigned n)
{
    DEDUP_HOT_ARRAY DedupAnswers answers;
    uint8_t buf[DEDUP_BLOCK_SIZE];
    const DedupBlock *b;

    if (!dedup_put_is_stopped(s)) {
        return;
    }
    b = find_unmatched(blocks, n);
    /* if nothing is asked for, dedup_put_skips() has taken the turn */
    if (!b || (dedup_share_asks(s) && !take_turn(&s->putting))) {
        return;
    }
    /* the guest may be writing to it: then it will match nothing */
    memcpy(buf, b->dest.host, sizeof(buf));
    /* what is seen for the second time gets a frame, and has matched */
    dedup_client_put_blocks(s->client, buf, 1, DEDUP_REQUEST_SECOND_READ,
                            &answers);
    if (answers.frames[0].answer == DEDUP_ANSWER_FRAME) {
        qatomic_set(&s->putting.unmatched, PATIENCE - PATIENCE_AGAIN);
        qatomic_set(&s->putting.stopped, false);
    }
    dedup_client_done(&answers);
}

/* --- putting -------------------------------------------------------------- */

static void count_put(BDRVDedupShareState *s, const DedupAnswers *a)
{
    unsigned i, matched = 0, unmatched = 0;

    for (i = 0; i < a->n; i++) {
        switch (a->frames[i].answer) {
        case DEDUP_ANSWER_FRAME:
            if (!(a->frames[i].flags & DEDUP_FRAME_NEW)) {
                matched++;
                break;
            }
            /* fall through */
        case DEDUP_ANSWER_SEEN_ONCE:
        case DEDUP_ANSWER_FULL:
        case DEDUP_ANSWER_BUSY:
            unmatched++;        /* or it was for nothing all the same */
            break;
        default:
            break;              /* that says nothing of its content */
        }
    }
    stat64_add(&s->counters.misses, a->n);
    stat64_add(&s->counters.matched, matched);
    learn(&s->putting, matched + unmatched, matched);
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
        blocks[i].result = DEDUP_UNDECIDED;
        which[i] = i;
    }
    dedup_client_put_blocks(s->client, buf, n, flags, &answers);
    dedup_place_answers(s, t, &answers, which, blocks);
    count_put(s, &answers);
    dedup_client_done(&answers);
    for (i = 0; t->qiov && i < n; i++) {
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
    bool stopped = dedup_put_is_stopped(s);
    DEDUP_HOT_ARRAY Puts puts;
    unsigned i, nruns = 0, run = 0;

    for (i = 0; i < n; i++) {
        if (blocks[i].result != DEDUP_NO_LAYER) {
            run = 0;
            continue;
        }
        if (stopped) {
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
