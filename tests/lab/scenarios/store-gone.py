# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon ends, is killed, or its domain destroyed: guests go on."""
import signal
import time

from dedup import Change
from faults import PRIVATE, SHARE, STORE_MAP, Faults
from labdom0 import DATA_GFN, pages_of, pattern

BOOT = {"xen": "sharing", "fast": True, "timeout": 240}

N = 16
GFNS = range(DATA_GFN, DATA_GFN + N)
OTHERS = range(0x900, 0x900 + N)
LATE = range(0xa00, 0xa00 + N)


def run(lab):
    store, late = lab.store(), Faults("g1")
    one, two = lab.tiny("g1", faults=late), lab.tiny("g2")
    lab.start_all(one, two)
    for how in (signal.SIGTERM, signal.SIGKILL):
        check_daemon(lab, store, one, two, how)
        store = lab.store()
        check_next(lab, one, two)
    store = check_late_give(lab, store, one, late)
    check_next(lab, one, two)
    store = check_late_copy(lab, store, one, late)
    check_next(lab, one, two)
    check_destroyed(lab, store, one, two)


def check_without(lab, one, two):
    """Nothing is shared any more; what was shared is as it was."""
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


def check_daemon(lab, store, one, two, how):
    for guest in (one, two):
        guest.read_pages(100, GFNS)
    domid = store.domid()
    lab.equal([one.references(g) for g in GFNS], [3] * N, "references")
    store.end(how)
    lab.check(lab.xen.domain(domid) is not None,
              "the store domain stays while guests use its frames")
    check_without(lab, one, two)


def check_next(lab, one, two):
    """Clients find the next daemon; what the last one left goes."""
    change = Change(two)

    def shares():
        two.read_pages(300, GFNS)
        return change.of("blocks-given") > 0
    lab.eventually(shares, "the next daemon is found")
    one.read_pages(300, GFNS)
    for guest in (one, two):
        guest.expect_blocks(GFNS, 300, "its frames")
    lab.eventually(lambda: not [n for n in lab.strangers().values()
                                if n.endswith("-draining")],
                   "the old store domain is gone", 20)


def check_late_give(lab, store, one, late):
    """A frame is given when the next daemon has found that nobody uses it.

    No guest may be the only one that has a frame: if it dies while a page of it
    is mapped, Xen comes down.
    """
    lab.check(sum(store.frames()) + N < 64, "all are looked at at once")
    late.set((SHARE, {"delay_ms": 9000, "count": 1}))
    one.start_read(800 * 8, pages_of(LATE))
    lab.eventually(lambda: late.done()[0], "it is about to be given")
    store.end(signal.SIGKILL)
    slow = Faults("store")
    slow.set((PRIVATE, {"delay_ms": 7000, "count": 1}))
    store = lab.store(faults=slow)
    lab.eventually(lambda: slow.done()[0], "the next daemon has counted")
    lab.equal([one.references(g) for g in LATE], [1] * N,
              "pages that are not given yet")
    one.finish_read(60)
    late.set()
    time.sleep(6)
    lab.equal([one.references(g) for g in LATE], [None] * N,
              "references, when the next daemon has freed the frames")
    one.expect_blocks(LATE, 800, "what was read")
    store.end(signal.SIGKILL)
    return lab.store()


def check_late_copy(lab, store, one, late):
    """A frame is freed by the next daemon when it is about to be copied."""
    part = [(OTHERS[0], 512, 1024)]
    for _ in range(2):                  # a miss, a hit; no page shares it
        one.read(700 * 8, part)
    old, frames = store.domid(), sum(store.frames())
    late.set((STORE_MAP, {"delay_ms": 12000, "count": 1}))
    one.start_read(700 * 8, part)
    lab.eventually(lambda: late.done()[0], "it is about to be copied")
    store.end(signal.SIGKILL)
    store = lab.store()

    def is_drained():
        info = lab.xen.domain(old)
        return info is None or info.pages + info.shared - 1 < frames
    lab.eventually(is_drained, "frames are freed", 11)
    time.sleep(0.2)
    one.finish_read()
    late.set()
    lab.check(one.peek(OTHERS[0])[512:1536] == pattern.block(700)[:1024],
              "what was read then")
    return store


def check_destroyed(lab, store, one, two):
    """Somebody destroys the store domain: its domid is not used again."""
    for guest in (one, two):
        guest.read_pages(100, GFNS)
    domid = store.domid()
    lab.xen.destroy(domid)
    lab.equal(store.process.wait(30), 1, "the daemon ends")
    check_without(lab, one, two)
    info = lab.xen.domain(domid)
    lab.check(info is not None and info.dying,
              "the domid is taken as long as a device model has it open")
    lab.store()
    check_next(lab, one, two)
    lab.eventually(lambda: lab.xen.domain(domid) is None, "it is gone")
