# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest reads what it has written, in its own overlay; nobody else does."""
from dedup import Change
from labdom0 import DATA_GFN, Disk, pattern

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

A = DATA_GFN


def run(lab):
    one, two = lab.tiny("g1"), lab.tiny("g2")
    lab.start_all(one, two)
    gfns = range(A, A + 4)
    for guest in (one, two):
        guest.read_pages(100, gfns)

    for round in range(3):
        change = Change(one)
        seed = 10 + round
        page = lab.xen.filled(seed)
        one.fill(A + 8, seed)
        one.write_pages(101, [A + 8])
        for _ in range(2):
            one.read_pages(100, gfns)
            one.expect([gfns[1]], [page], f"what was written, round {round}")
            one.expect_blocks([gfns[0]], 100, "the block before")
            one.expect_blocks(gfns[2:], 102, "the blocks after")
        lab.check(change.of("no-layer") > 0, "its own block is no layer's")
        two.read_pages(100, gfns)
        two.expect_blocks(gfns, 100, "the other guest's read")

    check_partial(lab, one, two)
    check_in_flight(lab)


def check_partial(lab, one, two):
    """A sector written into a block that was shared."""
    one.fill(A + 8, 77)
    one.write(300 * 8 + 3, [(A + 8, 0, 512)])
    for guest, own in ((one, lab.xen.filled(77)[:512]), (two, None)):
        for _ in range(2):
            guest.read_pages(300, [A + 9])
            page = bytearray(pattern.block(300))
            if own:
                page[3 * 512:4 * 512] = own
            guest.expect([A + 9], [bytes(page)],
                         f"{guest.name} after a sector was written")
    lab.check(True, "a partial write is its guest's own")


def check_in_flight(lab):
    """Write to the blocks of a read in flight: nothing of it is recorded."""
    slow = lab.tiny("g3", [Disk(throttle=1 << 18), Disk()])
    slow.start()
    slow.read_pages(600, [A])           # the first is never throttled
    change = Change(slow)
    slow.start_read(5000 * 8, [(A + i, 0, 4096) for i in range(16)])
    slow.finish_read()
    slow.expect_blocks(range(A, A + 16), 5000, "a slow read")
    lab.equal(change.of("blocks-given"), 16, "given in the end")
