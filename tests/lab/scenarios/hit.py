# SPDX-License-Identifier: GPL-2.0-or-later
"""A miss, then hits: the second guest reads with no I/O and no copy."""
from labdom0 import DATA_GFN, pattern

BOOT = {"xen": "sharing", "fast": True, "timeout": 120}

GFNS = range(DATA_GFN, DATA_GFN + 16)


def stats(guest):
    return guest.qmp("query-dedup-stats")[0]


def run(lab):
    one, two = lab.tiny("g1"), lab.tiny("g2")
    lab.start_all(one, two)
    for guest in (one, two):
        lab.equal(stats(guest)["store"], "xen", f"{guest.name}'s store")
    lab.check("dedup-share-default" in lab.strangers().values(),
              "xl list shows the store domain by its name")

    freed = lab.xen.freed()
    one.read_pages(100, GFNS)
    one.expect_blocks(GFNS, 100, "a miss")
    s = stats(one)
    lab.equal((s["blocks-missed"], s["blocks-given"]), (16, 16),
              "16 blocks missed, 16 given")
    lab.equal(one.shared(), 16, "pages that Xen says the first guest shares")
    lab.equal(lab.xen.freed() - freed, 16, "pages freed")

    lab.drop_caches()
    before = lab.image_bytes()
    two.read_pages(100, GFNS)
    two.expect_blocks(GFNS, 100, "a hit")
    lab.equal(lab.image_bytes() - before, 0, "bytes read from the image")
    s = stats(two)
    lab.equal((s["blocks-hit"], s["blocks-missed"], s["blocks-given"]),
              (16, 0, 16), "16 hits, 16 given")
    lab.equal(two.shared(), 16, "pages that Xen says the second guest shares")
    lab.equal(lab.xen.freed() - freed, 32, "pages freed by both")
    lab.equal([one.references(g) for g in GFNS], [3] * 16,
              "store, one and two hold each frame")
    store = s["store-stats"]
    lab.equal((store["given-fresh"], store["fresh-hypercalls"]), (16, 48),
              "three hypercalls a hit")
    lab.equal((store["give-hypercalls"], store["give-system-calls"]), (52, 6),
              "with a look at the memory, a pause, one for the region, two "
              "multicalls for 16 hits, and an end of the pause")

    one.poke(GFNS[3], 8, 0xdeadbeef)
    lab.equal(one.word(GFNS[3], 8), 0xdeadbeef, "the writer sees its write")
    lab.equal(one.references(GFNS[3]), None, "the page is the writer's own")
    two.expect_blocks(GFNS, 100, "the other guest's pages after the write")
    lab.equal(lab.xen.freed() - freed, 31, "pages freed less the one written")

    one.read_pages(100, GFNS)
    one.expect_blocks(GFNS, 100, "read again")
    lab.equal(lab.xen.freed() - freed, 32, "all are shared again")
    check_end(lab, one, two)


def check_end(lab, one, two):
    one.destroy()
    two.expect_blocks(GFNS, 100, "when the first guest is gone")
    two.read_pages(116, range(0x900, 0x910))
    two.expect_blocks(range(0x900, 0x910), 116, "a miss of the survivor")
    two.destroy()
    lab.end_stores()
    lab.eventually(lambda: not lab.strangers(),
                   "guests and store domain are gone")
    lab.eventually(lambda: lab.xen.freed() == 0, "nothing is shared")
