# SPDX-License-Identifier: GPL-2.0-or-later
"""The first guest's device model is killed, then its domain destroyed."""
from dedup import Change
from labdom0 import DATA_GFN

BOOT = {"xen": "sharing", "fast": True, "timeout": 180}

GFNS = range(DATA_GFN, DATA_GFN + 16)


def run(lab):
    one, two = lab.tiny("g1"), lab.tiny("g2")
    lab.start_all(one, two)
    one.read_pages(100, GFNS)
    two.read_pages(100, GFNS)
    one.kill_dm()

    two.expect_blocks(GFNS, 100, "when the first's device model is killed")
    change = Change(two)
    two.read_pages(100, range(0x900, 0x910))
    two.expect_blocks(range(0x900, 0x910), 100, "hits of its frames")
    two.read_pages(200, range(0xa00, 0xa10))
    two.expect_blocks(range(0xa00, 0xa10), 200, "new misses")
    lab.equal(change.of("blocks-hit", "blocks-missed", "blocks-given"),
              (16, 16, 32), "sharing goes on")

    one.destroy()
    two.expect_blocks(GFNS, 100, "when its domain is destroyed")
    three = lab.tiny("g3")
    three.start()
    three.read_pages(200, GFNS)
    three.expect_blocks(GFNS, 200, "a guest that came later")
    lab.equal([two.references(g) for g in range(0xa00, 0xa10)], [3] * 16,
              "it shares with the survivor")

    # the last device model killed: the store has what its guests do not use
    two.kill_dm()
    three.kill_dm()
    store = lab.stores["default"]
    lab.eventually(lambda: store.frames()[0] == 0, "nobody holds a frame")
    store.run("reclaim")
    two.expect_blocks(GFNS, 100, "pages of a guest without device model")
    three.expect_blocks(GFNS, 200, "and of another one")
    two.destroy()
    three.destroy()
    four = lab.tiny("g4")
    four.start()
    four.read_pages(100, GFNS)
    four.expect_blocks(GFNS, 100, "a fresh start")
    four.destroy()
    lab.end_stores()
    lab.eventually(lambda: not lab.strangers(), "no domain is left")
