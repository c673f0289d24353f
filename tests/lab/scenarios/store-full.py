# SPDX-License-Identifier: GPL-2.0-or-later
"""A store that is full, and one that another guest says a size of."""
from dedup import Change, stats
from labdom0 import DATA_GFN, Disk

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

FRAMES = 24
A = DATA_GFN


def run(lab):
    size = FRAMES * 4096
    one = lab.tiny("g1", [Disk(store_size=size)])
    two = lab.tiny("g2", [Disk()])
    lab.start_all(one, two)
    for guest in (one, two):
        lab.equal(stats(guest)["store-stats"]["size"], size, "store size")

    change = Change(one)
    gfns = range(A, A + 32)
    one.read_pages(100, gfns)
    one.expect_blocks(gfns, 100, "more than fits")
    lab.equal(change.of("blocks-given", "store-full"), (FRAMES, 32 - FRAMES),
              "what fits is given, the rest read")
    lab.equal(stats(one)["store-stats"]["frames"], FRAMES, "frames")

    change = Change(two)
    two.read_pages(100, gfns)
    two.expect_blocks(gfns, 100, "the same in the other guest")
    lab.equal(change.of("blocks-hit", "blocks-given", "store-full"),
              (FRAMES, FRAMES, 32 - FRAMES), "hits go on in a full store")

    three = lab.tiny("g3", [Disk(store_size=size * 2)])
    code, text = three.create()
    lab.check(code and "store-size" in text and str(size) in text,
              "a second opinion on the size is refused, with the true one")
    two.read_pages(100, gfns)
    two.expect_blocks(gfns, 100, "after the refusal")
