# SPDX-License-Identifier: GPL-2.0-or-later
"""Two groups share nothing, in two guests and in two disks of one guest."""
from dedup import Change
from labdom0 import DATA_GFN, Disk

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

A = DATA_GFN
GFNS = range(A, A + 16)


def run(lab):
    one = lab.tiny("g1", [Disk(group="red")])
    two = lab.tiny("g2", [Disk(group="blue"), Disk(group="red")])
    lab.start_all(one, two)
    lab.check({"dedup-share-red", "dedup-share-blue"} <=
              set(lab.strangers().values()), "a store for each group")

    one.read_pages(100, GFNS)
    change = Change(two, "dedup1")
    two.read_pages(100, GFNS)
    two.expect_blocks(GFNS, 100, "the other group's read")
    lab.equal(change.of("blocks-hit", "blocks-missed"), (0, 16),
              "nothing of the first group is found")
    for guest in (one, two):
        lab.equal([guest.references(g) for g in GFNS], [2] * 16,
                  f"{guest.name} shares with its own store alone")

    # one gfn given by both groups in turn: each knows of the other's gives
    red = two.disks[1]
    for round in range(4):
        disk = red if round % 2 == 0 else two.disks[0]
        two.read_pages(100 + round, GFNS, disk)
        two.expect_blocks(GFNS, 100 + round, f"groups in turn, {round}")
    two.read_pages(100, GFNS, red)
    two.expect_blocks(GFNS, 100, "its own disk of the first's group")
    lab.equal([one.references(g) for g in GFNS], [3] * 16,
              "there it shares with the first guest")
    one.destroy()
    two.destroy()
    lab.end_stores()
    lab.eventually(lambda: not lab.strangers(), "all is gone")
