# SPDX-License-Identifier: GPL-2.0-or-later
"""Operations that Xen refuses the device model, or the daemon, each in turn.

Bytes stay right, and it goes on.
"""
import errno
import time

import faults as f
from dedup import Change
from faults import Faults
from labdom0 import DATA_GFN, PAGE, pattern

BOOT = {"xen": "sharing", "fast": True, "timeout": 240}

N = 16
FRESH = 0x1000                  # gfns that were never given a frame
GFNS = range(DATA_GFN, DATA_GFN + N)

# what fails, for how many of the pages, and the counter that says so
ONTO_FRESH = (
    ("nominate: no memory", [(f.NOMINATE, {"result": -errno.ENOMEM})],
     "failed", N),
    ("nominate: one is mapped", [(f.NOMINATE, {"result": -errno.E2BIG,
                                               "skip": 5, "count": 1})],
     "mapped", 1),
    ("share: the guest wrote", [(f.SHARE, {"result": -9, "count": 3})],
     "changed", 3),
    ("share: the frame is gone", [(f.SHARE, {"result": -10, "skip": N - 1})],
     "evicted", 1),
    ("count: somebody else has given it one",
     [(f.COUNT, {"result": 3, "skip": 2, "count": 4})], "busy", 4),
    ("count: private again", [(f.COUNT, {"result": -errno.EINVAL,
                                         "count": 2})], "changed", 2),
    ("pause", [(f.PAUSE, {"result": errno.ESRCH})], "failed", N),
    ("share: something else", [(f.SHARE, {"result": -errno.EIO})],
     "failed", N),
    ("all multicalls", [(f.MULTICALL, {"result": errno.EFAULT})],
     "failed", N),
    ("the second multicall", [(f.MULTICALL, {"result": errno.EFAULT,
                                             "skip": 1})],
     "failed", N),
)
ONTO_SHARED = (
    ("unshare: no memory", [(f.PRIVATE, {"result": errno.EAGAIN,
                                         "count": 1})],
     "failed", N),
    ("count", [(f.COUNT, {"result": -errno.EIO, "count": 4})], "failed", 4),
    ("nominate: no memory", [(f.NOMINATE, {"result": -errno.ENOMEM})],
     "failed", N),
    ("share of one", [(f.SHARE, {"result": -10, "skip": 7, "count": 1})],
     "evicted", 1),
    ("share, and it cannot be undone",
     [(f.SHARE, {"result": -errno.EIO}),
      (f.PRIVATE, {"result": errno.EAGAIN, "skip": 1, "count": 1})],
     "failed", N),
    ("all multicalls", [(f.MULTICALL, {"result": errno.EFAULT})],
     "failed", N),
)
FILLS = (
    ("populate", [(f.STORE_POPULATE, {"result": errno.ENOMEM})],
     "store-full", N),
    ("map", [(f.STORE_MAP, {"result": errno.EFAULT, "count": 1})],
     "failed", N),
    ("seal", [(f.NOMINATE, {"result": -errno.ENOMEM, "skip": 3, "count": 1})],
     "store-full", N),
)


def run(lab):
    broken, store = Faults("g2"), Faults("store")
    lab.store(faults=store)
    one, two = lab.tiny("g1"), lab.tiny("g2", faults=broken)
    lab.start_all(one, two)
    one.read_pages(100, GFNS)
    for i, case in enumerate(ONTO_FRESH):
        check_case(lab, two, broken, case, 100,
                   range(FRESH + i * N, FRESH + (i + 1) * N))
    check_split(lab, two, broken)
    for i, case in enumerate(ONTO_SHARED):
        change = Change(two)
        two.read_pages(100 if i % 2 else 200, GFNS)
        lab.equal(two.references(GFNS[0]) is not None, True,
                  f"it shares: {change.all()}")
        check_case(lab, two, broken, case, 200 if i % 2 else 100, GFNS)
    for i, case in enumerate(FILLS):
        check_case(lab, two, store, case, 1000 + i * N, GFNS)
    check_peek(lab, two, broken)
    check_map(lab, two, broken)
    check_late(lab, one, two, broken)
    one.expect_blocks(GFNS, 100, "the other guest, after all of it")


def check_case(lab, guest, broken, case, block, gfns):
    """Read while it fails, and once more when it does not."""
    what, rules, counter, failing = case
    change = Change(guest)
    broken.set(*rules)
    guest.read_pages(block, gfns)
    done = broken.done()
    broken.set()
    lab.check(all(done[:len(rules)]), f"{what}: it failed {done} times")
    guest.expect_blocks(gfns, block, f"{what}: while it fails")
    lab.equal(change.of(counter, "blocks-given"), (failing, N - failing),
              f"{what}: {counter}, given")
    guest.poke(gfns[0], 4, 0x1234)
    lab.equal(guest.word(gfns[0], 4), 0x1234, f"{what}: the page is RAM")
    change = Change(guest)
    guest.read_pages(block, gfns)
    guest.expect_blocks(gfns, block, f"{what}: later")
    lab.equal(change.of("blocks-given"), N, f"{what}: all are given later")


def check_split(lab, guest, broken):
    """Splitting a large mapping fails."""
    gfns = range(0x1e00, 0x1e00 + N)
    check_case(lab, guest, broken,
               ("split", [(f.PRIVATE, {"result": errno.EAGAIN,
                                       "count": 1})], "failed", N), 100, gfns)
    broken.set((f.PRIVATE, {}))
    for first in (0x1e40, 0x1e60, 0x1bf8):
        guest.read_pages(100, range(first, first + N))
    lab.equal(broken.done()[0], 4, "splits: each request, each of its regions")
    broken.set()


def check_peek(lab, guest, broken):
    """Copying from the store fails."""
    change = Change(guest)
    broken.set((f.STORE_MAP, {"result": errno.EFAULT}))
    guest.read_pio(100 * 8, 8, GFNS[0])
    broken.set()
    guest.expect_blocks([GFNS[0]], 100, "what could not be copied")
    lab.equal(change.of("blocks-copied"), 0, "nothing was copied")
    lab.check(change.of("bytes-passed") > 0, "it was read")


def check_map(lab, guest, broken):
    """A shared page is not mapped for an ordinary read before it is private."""
    guest.read_pages(100, GFNS)
    broken.set((f.PRIVATE, {"result": errno.EAGAIN, "count": 5}))
    guest.read(17, [(GFNS[3], 0, PAGE)])
    lab.equal(broken.done()[0], 5, "tries")
    broken.set()
    lab.check(guest.peek(GFNS[3]) == pattern.base(17 * 512, PAGE),
              "what is read when there is memory")
    lab.equal([guest.references(g) is None for g in GFNS[2:5]],
              [False, True, False], "not shared are")


def check_late(lab, one, two, broken):
    """A slow give: the guest sees its read complete after it, not before."""
    gfns = range(FRESH + 0x200, FRESH + 0x200 + N)
    for kind, pages, block in ((f.NOMINATE, gfns, 100),
                               (f.SHARE, range(0x1400, 0x1410), 100),
                               (f.PRIVATE, gfns, 200)):
        skip = 0 if kind == f.PRIVATE else 3
        broken.set((kind, {"delay_ms": 400, "skip": skip, "count": 1}))
        begin = time.monotonic()
        two.read_pages(block, pages)
        took = time.monotonic() - begin
        held = [two.references(g) is not None for g in pages]
        lab.check(took >= 0.4, f"the read took {took:.2f} s")
        lab.equal(held, [True] * N, "and then all its pages are frames")
        two.expect_blocks(pages, block, "its bytes")
        broken.set()
