# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames given to pages that share already.

Sharing onto such a page is what Xen panics on; it is made private first.
"""
from dedup import Change
from labdom0 import DATA_GFN

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

GFNS = range(DATA_GFN, DATA_GFN + 16)


def run(lab):
    one, two = lab.tiny("g1"), lab.tiny("g2")
    lab.start_all(one, two)
    for guest in (one, two):
        guest.read_pages(100, GFNS)

    change = Change(two)
    two.read_pages(200, GFNS)
    two.expect_blocks(GFNS, 200, "a miss onto shared pages")
    one.expect_blocks(GFNS, 100, "the other sharer's pages")
    lab.equal(change.of("given-again", "given-fresh"), (16, 0),
              "pages made private before they are shared onto")
    lab.equal([one.references(g) for g in GFNS], [2] * 16,
              "the frames that were there have one sharer less")

    one.read_pages(200, GFNS)
    one.expect_blocks(GFNS, 200, "a hit onto shared pages")
    lab.equal([two.references(g) for g in GFNS], [3] * 16,
              "all three hold the new frames")
    check_mixture(lab, one, two)
    check_same_again(lab, one)
    check_many(lab, one, two)


def check_mixture(lab, one, two):
    """Shared, written since, never given, and asked for, in one request."""
    pages = [GFNS[0], GFNS[1], 0xa00, 0xa01]
    two.poke(GFNS[1], 0, 1)
    change = Change(two)
    two.read_pages(300, pages)
    two.expect_blocks(pages, 300, "a mixture of pages")
    lab.equal(change.of("given-again", "given-fresh"), (2, 2),
              "those given before, and the others")
    lab.equal(change.of("fresh-hypercalls"), 6, "three for each fresh page")
    one.expect_blocks(GFNS, 200, "the other guest's pages")


def check_same_again(lab, one):
    """The frame that is there already."""
    change = Change(one)
    one.read_pages(200, GFNS)
    one.expect_blocks(GFNS, 200, "the same blocks into the same pages")
    lab.equal(change.of("blocks-given"), 16, "given")
    lab.equal([one.references(g) for g in GFNS][5], 3, "references")


def check_many(lab, one, two):
    """A boot loader reads everything into the same few pages."""
    for block in range(400, 800, 16):
        for guest in (one, two):
            guest.read_pages(block, GFNS)
            guest.expect_blocks(GFNS, block, f"block {block} on")
    lab.equal(lab.xen.domain(one.domid).crashed, 0, "the guest is well")
