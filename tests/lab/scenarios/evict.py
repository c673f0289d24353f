# SPDX-License-Identifier: GPL-2.0-or-later
"""A full store evicts frames that no guest uses, and no others."""
from dedup import Change
from labdom0 import DATA_GFN

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

FRAMES = 72                     # of which a client may hold three quarters
HELD = 48
A = DATA_GFN
GFNS = range(A, A + HELD)


def run(lab):
    store = lab.store(frames=FRAMES)
    one, two, three = lab.tiny("g1"), lab.tiny("g2"), lab.tiny("g3")
    lab.start_all(one, two, three)
    one.read_pages(100, GFNS)
    two.read_pages(100, range(A, A + 16))

    change = Change(three)
    three.read_pages(500, GFNS)
    three.expect_blocks(GFNS, 500, "while all frames are in use")
    given, full = change.of("blocks-given", "store-full")
    # what the firmware has read of the disks takes some frames, too
    lab.check(FRAMES - HELD - 3 <= given <= FRAMES - HELD and
              given + full == HELD, f"what there is room for: {given}, {full}")
    # that can go: no guest has it any more
    evicted = store.status()["frames-evicted"]
    lab.check(evicted <= 3, f"nothing is evicted that a guest uses: {evicted}")
    one.expect_blocks(GFNS, 100, "the first guest's pages, under pressure")
    lab.equal(one.shared(), HELD, "pages of the first guest still shared")

    one.destroy()
    lab.eventually(lambda: store.frames()[0] == 16 + given, "its holds end")
    change = Change(three)
    three.read_pages(500, GFNS)
    three.expect_blocks(GFNS, 500, "in place of what nobody uses")
    lab.equal(change.of("blocks-given"), HELD, "all are given")
    lab.check(store.status()["frames-evicted"] - evicted >= HELD - given - 3,
              "idle frames made room")
    lab.equal(three.shared(), HELD, "pages that share them")
    two.expect_blocks(range(A, A + 16), 100, "the second guest's pages")
    lab.equal(two.shared(), 16, "and they are still shared")
    two.read_pages(100, GFNS)
    two.expect_blocks(GFNS, 100, "what was evicted is read again")
    check_written(lab, store, two)
    check_killed(lab, store, two, three)


def check_written(lab, store, two):
    """Frames that a guest has overwritten are let go, and no others."""
    used = store.frames()[0]
    for gfn in range(A, A + 4):
        two.poke(gfn, 0, 7)
    store.run("reclaim")
    lab.eventually(lambda: store.frames()[0] <= used - 4, "four are let go")
    lab.check(store.frames()[0] >= two.shared(), "what it has is held")
    lab.equal([two.references(g) for g in range(A + 4, A + 16)], [2] * 12,
              "and is still shared")


def check_killed(lab, store, two, three):
    """A device model is killed: only Xen knows what its guest uses."""
    three.kill_dm()
    two.destroy()
    lab.eventually(lambda: store.frames()[0] == 0, "nobody holds any")
    four = lab.tiny("g4")
    four.start()
    change = Change(four)
    # a request tries as many idle frames as it has blocks; what Xen says is in
    # use is the youngest again
    for block in range(1000, 1000 + 4 * HELD, HELD):
        four.read_pages(block, range(0x1000, 0x1000 + HELD))
        four.expect_blocks(range(0x1000, 0x1000 + HELD), block, "a new guest")
    # but for what the firmware has read
    given = change.of("blocks-given")
    lab.check(given >= FRAMES - HELD - 3, f"what no guest uses is given: {given}")
    store.run("reclaim")
    three.expect_blocks(GFNS, 500, "the guest without a device model")
    lab.equal(three.shared(), HELD, "its pages, still shared")
    three.destroy()
    four.destroy()
    store.run("reclaim")
    lab.equal(store.status()["memory"], 0, "all memory is back")
