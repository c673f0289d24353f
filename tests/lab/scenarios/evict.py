# SPDX-License-Identifier: GPL-2.0-or-later
"""A full store evicts frames that no guest uses, and no others."""
import time

from dedup import Change
from labdom0 import DATA_GFN, Disk

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

FRAMES = 48
A = DATA_GFN
GFNS = range(A, A + FRAMES)


def run(lab):
    one = lab.tiny("g1", [Disk(store_size=FRAMES * 4096)])
    two, three = lab.tiny("g2"), lab.tiny("g3")
    lab.start_all(one, two, three)
    one.read_pages(100, GFNS)
    two.read_pages(100, range(A, A + 16))

    change = Change(three)
    three.read_pages(500, GFNS)
    three.expect_blocks(GFNS, 500, "while all frames are in use")
    lab.equal(change.of("blocks-given", "frames-evicted"), (0, 0),
              "nothing is evicted that a guest uses")
    one.expect_blocks(GFNS, 100, "the first guest's pages, under pressure")
    lab.equal(one.shared(), FRAMES, "pages of the first guest still shared")

    one.destroy()
    time.sleep(1.5)             # a full store is tried again after a second
    change = Change(three)
    three.read_pages(500, GFNS)
    three.expect_blocks(GFNS, 500, "in place of what nobody uses")
    lab.equal(change.of("blocks-given", "frames-evicted"),
              (FRAMES - 16, FRAMES - 16), "idle frames make room")
    lab.equal(three.shared(), FRAMES - 16, "pages that share them")
    two.expect_blocks(range(A, A + 16), 100, "the second guest's pages")
    lab.equal(two.shared(), 16, "and they are still shared")
    two.read_pages(100, GFNS)
    two.expect_blocks(GFNS, 100, "what was evicted is read again")
