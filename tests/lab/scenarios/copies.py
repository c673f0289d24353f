# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests on full copies of an image share; also after one has rewritten some."""
import random

import pattern
from dedup import Change
from disks import CopyDisk
from labdom0 import DATA_GFN, PAGE

BOOT = {"xen": "sharing", "fast": True, "timeout": 200}

FIRST, COUNT = 256, 512
BLOCKS = FIRST + COUNT          # that are copied
SOURCE = DATA_GFN               # a page that is written from
A = DATA_GFN + 16
B = A + COUNT                   # where all is read a second time
STEP = 128


def read_all(guest, gfn):
    for i in range(0, COUNT, STEP):
        guest.read_pages(FIRST + i, range(gfn + i, gfn + i + STEP))


def run(lab):
    one, two = (lab.tiny(name, [CopyDisk(BLOCKS, options={"share": "all"})])
                for name in ("g1", "g2"))
    lab.start_all(one, two)
    check_copies(lab, one, two)
    check_zeroes(lab, one, two)
    check_rewritten(lab, one, two)


def check_copies(lab, one, two):
    read_all(one, A)
    change = Change(two)
    read_all(two, A)
    for guest in (one, two):
        guest.expect_blocks(range(A, A + COUNT), FIRST, "of a copy")
    shared = sum((two.references(A + i) or 0) >= 3 for i in range(COUNT))
    lab.show(f"full copies: {shared} of {COUNT} pages shared, "
             f"{shared / COUNT:.4f}")
    lab.check(shared >= 0.97 * COUNT, "both guests hold one frame a block")
    lab.equal(change.of("blocks-matched"), COUNT, "found by their content")
    lab.equal(sum(lab.stores["default"].frames()), COUNT, "frames")


def check_zeroes(lab, one, two):
    """They are found to be zeroes, and read again for the guest."""
    gfns = range(B, B + 8)
    for guest in (one, one, two):
        for gfn in gfns:
            guest.fill(gfn, gfn)
        change = Change(guest)
        guest.read_pages(BLOCKS, gfns)
        guest.expect(gfns, [bytes(PAGE)] * 8, "zeroes")
        lab.equal(change.of("zeroes", "blocks-given", "frames"), (8, 0, 0),
                  "zeroes are counted, and not shared")


def check_rewritten(lab, one, two):
    """A tenth of the blocks; with them whole clusters come to the overlay."""
    rewritten = sorted(random.Random(5).sample(range(COUNT), COUNT // 10))
    for i in rewritten:
        two.fill(SOURCE, 1000 + i)
        two.write_pages(FIRST + i, [SOURCE])
    change = Change(two)
    read_all(two, B)
    read_all(one, B)
    one.expect_blocks(range(B, B + COUNT), FIRST, "who has written nothing")
    two.expect(range(B, B + COUNT),
               [lab.xen.filled(1000 + i) if i in rewritten
                else pattern.block(FIRST + i) for i in range(COUNT)],
               "who has rewritten a tenth")
    left = [i for i in range(COUNT) if i not in rewritten]
    # the store's, one's two pages, and two's two
    shared = sum((two.references(B + i) or 0) >= 5 for i in left)
    lab.show(f"after a tenth was rewritten: {shared} of {len(left)} pages "
             f"shared, {shared / len(left):.4f}; blocks found by content: "
             f"{change.of('blocks-matched')}")
    lab.check(shared >= 0.94 * len(left), "what is equal is still shared")
