# SPDX-License-Identifier: GPL-2.0-or-later
"""Xen has no free memory: nothing is nominated, and guests read all the same.

Xen would come down at a nomination for which it finds no memory.
"""
import time

from dedup import Change
from labdom0 import DATA_GFN, PAGE, pages_of, pattern

BOOT = {"xen": "sharing", "fast": True, "timeout": 200}

FLOOR = 4096                    # XEN_SPARE_FLOOR
N = 512
STEP = 128
GFNS = range(DATA_GFN, DATA_GFN + N)


def run(lab):
    free = lab.xen.free_pages()
    store = lab.store()
    one, two = lab.tiny("g1"), lab.tiny("g2")
    lab.start_all(one, two)
    read(one, 100)
    check_short(lab, store, one, two, 0)
    check_short(lab, store, one, two, FLOOR - 64)
    check_claimed(lab, two)
    check_unshare(lab, one, two)
    check_again(lab, one, two)
    one.destroy()
    two.destroy()
    lab.end_stores()
    # Xen's own heap may have grown by a page or two
    lab.eventually(lambda: lab.xen.free_pages() >= free - 4,
                   "all memory is free again")


def check_again(lab, one, two):
    change = Change(two)
    read(two, 100)
    two.expect_blocks(GFNS, 100, "with memory again")
    lab.equal(change.of("blocks-given", "no-memory"), (N, 0), "all are given")
    one.expect_blocks(GFNS, 100, "the other guest, after all of it")


def check_unshare(lab, one, two):
    """Ordinary reads into shared pages wait for memory, and no frame is lost."""
    read(two, 100)
    pages = GFNS[:16]
    taker = lab.xen.create(hvm=False)
    lab.xen.take_memory(taker)
    two.start_read(17, pages_of(pages))
    time.sleep(1)
    lab.equal([two.references(g) is not None for g in pages],
              [True] * len(pages), "they cannot be unshared")
    lab.xen.destroy(taker)
    two.finish_read()
    lab.check(b"".join(map(two.peek, pages)) ==
              pattern.base(17 * 512, len(pages) * PAGE),
              "what was read when there was memory")
    one.expect_blocks(GFNS, 100, "the other guest")


def read(guest, block, gfns=GFNS):
    for i in range(0, len(gfns), STEP):
        guest.read_pages(block + i, gfns[i:i + STEP])


def check_short(lab, store, one, two, leave):
    """Hits, and a fill, while another domain has all memory but so much."""
    taker = lab.xen.create(hvm=False)
    lab.xen.take_memory(taker, leave)
    lab.note(f"{lab.xen.free_pages()} pages are free")
    change = Change(two)
    read(two, 100)
    two.expect_blocks(GFNS, 100, "hits without memory")
    lab.equal(change.of("blocks-given", "no-memory"), (0, N), "none is given")
    frames = sum(store.frames())
    read(two, 2000)
    two.expect_blocks(GFNS, 2000, "misses without memory")
    lab.check(sum(store.frames()) <= frames, "no frame is made")
    one.expect_blocks(GFNS, 100, "what was shared before")
    lab.xen.destroy(taker)
    lab.eventually(lambda: lab.xen.free_pages() > 8 * FLOOR, "memory is back")


def check_claimed(lab, two):
    """What a domain that is being built has claimed is not free."""
    taker = lab.xen.create(hvm=False)
    free = lab.xen.free_pages()
    lab.xen.set_max_kib(taker, free * 4)
    lab.xen.claim(taker, free - FLOOR + 64)
    change = Change(two)
    read(two, 100, GFNS[:STEP])
    two.expect_blocks(GFNS[:STEP], 100, "hits while memory is claimed")
    lab.equal(change.of("blocks-given", "no-memory"), (0, STEP),
              "none is given")
    lab.xen.destroy(taker)
    lab.eventually(lambda: not lab.xen.claimed_pages(), "the claim is gone")
