# SPDX-License-Identifier: GPL-2.0-or-later
"""A store that is full, and one that a guest says another size of."""
from dedup import Change, stats
from labdom0 import DATA_GFN, Disk
from storedaemon import FRAME_SIZE

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

FRAMES = 32
MOST = 24                       # that one client may hold
A = DATA_GFN


def run(lab):
    size = FRAMES * FRAME_SIZE
    store = lab.store(frames=FRAMES)
    one, two = lab.tiny("g1"), lab.tiny("g2")
    lab.start_all(one, two)
    for guest in (one, two):
        lab.equal(stats(guest)["store-stats"]["size"], size, "store size")

    change = Change(one)
    gfns = range(A, A + 40)
    one.read_pages(100, gfns)
    one.expect_blocks(gfns, 100, "more than fits")
    # the firmware's reads may be held, too
    given, full = change.of("blocks-given", "store-full")
    lab.check(MOST - 2 <= given <= MOST and given + full == 40,
              f"what it may hold is given, the rest read: {given}, {full}")
    lab.check(stats(one)["store-stats"]["frames"] <= MOST, "frames")
    lab.check(store.status()["memory"] <= FRAMES * 4096, "memory")

    change = Change(two)
    two.read_pages(100, gfns)
    two.expect_blocks(gfns, 100, "the same in the other guest")
    given, full = change.of("blocks-given", "store-full")
    lab.check(MOST - 2 <= given <= MOST and given + full == 40,
              f"hits go on in a full store: {given}, {full}")

    three = lab.tiny("g3", [Disk(store_size=4096 * 100)])
    code, text = three.create()
    lab.check(code and "store-size" in text and str(size) in text,
              "a second opinion on the size is refused, with the true one")
    two.read_pages(100, gfns)
    two.expect_blocks(gfns, 100, "after the refusal")
