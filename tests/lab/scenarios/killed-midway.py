# SPDX-License-Identifier: GPL-2.0-or-later
"""A device model, the daemon, or a guest ends at each step of a read."""
import signal
import time

import faults as f
from dedup import Change
from faults import Faults
from labdom0 import DATA_GFN, pages_of

BOOT = {"xen": "sharing", "fast": True, "timeout": 300}

N = 16
GFNS = range(DATA_GFN, DATA_GFN + N)
MISS = 5000
# a step, which one of the read, and the read: a miss, a hit, onto shared pages
STEPS = (
    ("when it has asked", f.NOMINATE, 0, "miss"),
    ("before pages are nominated", f.NOMINATE, 0, "hit"),
    ("before frames are shared onto them", f.SHARE, 0, "hit"),
    ("before pages are made private", f.PRIVATE, 0, "again"),
    ("before frames are shared onto those", f.SHARE, 0, "again"),
)
# of the daemon, at a miss
STORE_STEPS = (
    ("before frames are made", f.STORE_POPULATE),
    ("before they are mapped to be filled", f.STORE_MAP),
    ("before they are sealed", f.NOMINATE),
)


def run(lab):
    one = lab.tiny("g1")
    one.start()
    one.read_pages(100, GFNS)
    one.read_pages(200, GFNS)
    for i, (what, kind, skip, read) in enumerate(STEPS):
        block = MISS + i * N if read == "miss" else 100
        kill(lab, f"victim{i}", kind, skip, block, read == "again")
        lab.note(f"killed {what}")
        change = Change(one)
        for _ in range(2):
            one.read_pages(block, GFNS)
            one.expect_blocks(GFNS, block, f"killed {what}")
        lab.equal(change.of("blocks-given"), 2 * N, "sharing goes on")
    two = lab.tiny("g2")
    two.start()
    for i in range(len(STEPS)):
        two.read_pages(MISS + i * N, GFNS)
        two.expect_blocks(GFNS, MISS + i * N, "a guest that came later")
        lab.equal(two.shared(), N, "it shares")
    two.destroy()               # its frames would keep the old store domain
    destroy(lab)
    lab.end_stores()
    for i, step in enumerate(STORE_STEPS):
        kill_store(lab, one, MISS + 1000 + i * N, *step)


def destroy(lab):
    """The guest is destroyed between nominating and sharing.

    To make its pages private then brings Xen down, until it has taken all of
    them from the guest.
    """
    broken = Faults("ending")
    victim = lab.tiny("ending", faults=broken)
    victim.start()
    broken.set((f.SHARE, {"delay_ms": 3000, "count": 1}), (f.PRIVATE, {}))
    victim.start_read(100 * 8, pages_of(GFNS))
    lab.eventually(lambda: broken.done()[0], "it is there")
    before = broken.done()[1]
    lab.check(before, "a large mapping was split")
    lab.xen.destroy(victim.domid)
    time.sleep(5)
    lab.equal(broken.done()[1], before, "no page is made private any more")
    victim.destroy()


def kill_store(lab, one, block, what, kind):
    """The daemon dies within a fill; the guest's read goes on without it."""
    broken = Faults("store")
    store = lab.store(faults=broken)
    change = Change(one)

    def shares():
        one.read_pages(200, GFNS)
        return change.of("blocks-given") > 0
    lab.eventually(shares, "the daemon is found")
    broken.set((kind, {"delay_ms": 60000, "count": 1}))
    one.start_read(block * 8, pages_of(GFNS))
    lab.eventually(lambda: broken.done()[0], "it is there")
    store.end(signal.SIGKILL)
    one.finish_read()
    one.expect_blocks(GFNS, block, f"the daemon was killed {what}")
    lab.store()
    lab.eventually(lambda: not [n for n in lab.strangers().values()
                                if n.endswith("-draining")],
                   "the old store domain is gone")
    lab.end_stores()


def kill(lab, name, kind, skip, block, again):
    """A guest whose device model dies within a read; it is then destroyed."""
    broken = Faults(name)
    victim = lab.tiny(name, faults=broken)
    victim.start()
    if again:
        victim.read_pages(200, GFNS)
    broken.set((kind, {"delay_ms": 60000, "skip": skip, "count": 1}))
    victim.start_read(block * 8, pages_of(GFNS))
    lab.eventually(lambda: broken.done()[0], "it is there")
    victim.kill_dm()
    victim.destroy()
