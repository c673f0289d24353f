# SPDX-License-Identifier: GPL-2.0-or-later
"""Somebody destroys the store domain: guests go on, its domid is not reused."""
from dedup import Change
from labdom0 import DATA_GFN

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

N = 16
GFNS = range(DATA_GFN, DATA_GFN + N)
OTHERS = range(0x900, 0x900 + N)


def run(lab):
    one, two = lab.tiny("g1"), lab.tiny("g2")
    lab.start_all(one, two)
    for guest in (one, two):
        guest.read_pages(100, GFNS)
    store = lab.xen.domid("dedup-share-default")
    lab.xen.destroy(store)

    change = Change(one)
    for guest in (one, two):
        guest.expect_blocks(GFNS, 100, "pages that were shared")
        for gfns in (GFNS, OTHERS):
            for block in (100, 200):    # once in the store, and never
                guest.read_pages(block, gfns)
                guest.expect_blocks(gfns, block, "ordinary reads")
        guest.poke(GFNS[2], 0, 7)
        lab.equal(guest.word(GFNS[2]), 7, "RAM")
    lab.equal(change.of("blocks-given"), 0, "nothing is given any more")

    info = lab.xen.domain(store)
    lab.check(info is not None and info.dying,
              "the domid is taken as long as a device model has it open")
    late = lab.tiny("g3")
    code, text = late.create()
    lab.check(code and "store:" in text and "destroyed" in text,
              "a guest that comes later is refused, and told why")
    one.destroy()
    two.destroy()
    lab.eventually(lambda: lab.xen.domain(store) is None, "it is gone")
    three = lab.tiny("g4")
    three.start()
    three.read_pages(100, GFNS)
    three.expect_blocks(GFNS, 100, "a new store")
    lab.equal(three.shared(), N, "it shares")
