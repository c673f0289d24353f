/*
 * dedup-share: what reads that are offered and others have in common
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "node.h"

/*
 * Buffers are kept: the kernel would clear the pages of a new one for each
 * request, which takes longer than to fill the frames from it.
 */
void *dedup_buffer_get(BDRVDedupShareState *s)
{
    WITH_QEMU_LOCK_GUARD(&s->buffers_lock) {
        if (s->nbuffers) {
            return s->buffers[--s->nbuffers];
        }
    }
    return qemu_try_memalign(DEDUP_BLOCK_SIZE, DEDUP_BATCH * DEDUP_BLOCK_SIZE);
}

void dedup_buffer_put(BDRVDedupShareState *s, void *buf)
{
    WITH_QEMU_LOCK_GUARD(&s->buffers_lock) {
        if (buf && s->nbuffers < ARRAY_SIZE(s->buffers)) {
            s->buffers[s->nbuffers++] = buf;
            return;
        }
    }
    qemu_vfree(buf);
}

void dedup_buffers_init(BDRVDedupShareState *s)
{
    qemu_mutex_init(&s->buffers_lock);
}

void dedup_buffers_destroy(BDRVDedupShareState *s)
{
    while (s->nbuffers) {
        qemu_vfree(s->buffers[--s->nbuffers]);
    }
    qemu_mutex_destroy(&s->buffers_lock);
}

void dedup_count_results(DedupCounters *c, const DedupBlock *blocks, unsigned n)
{
    unsigned i, run;

    stat64_add(&c->blocks_read, n);
    for (i = 0; i < n; i += run) {
        run = 1;
        while (i + run < n && blocks[i + run].result == blocks[i].result) {
            run++;
        }
        stat64_add(&c->results[blocks[i].result], run);
    }
}
