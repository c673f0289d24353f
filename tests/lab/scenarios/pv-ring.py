# SPDX-License-Identifier: GPL-2.0-or-later
"""PV reads of all shapes, and guests that lie: page by page through the ring."""
from types import SimpleNamespace

import pvring
from dedup import Change
from faults import SHARE, STORE_MAP, Faults
from labdom0 import DATA_GFN, PAGE, PvDisk, pattern
from pvring import PERMIT, READONLY, PvRing, Segment

BOOT = {"xen": "sharing", "fast": True, "timeout": 200}

A = DATA_GFN
B = 0x900
N = 8
GLOBAL = ["-global",
          "xen-disk.dedup-share=group=default,store=xen,timeout=60"]


class Driven:
    """A tiny guest with a PV disk, its ring, and what is said of the disk."""

    def __init__(self, lab, name):
        self.lab, self.faults = lab, Faults(name)
        self.disk = PvDisk("base")
        self.guest = lab.tiny(name, [self.disk], dm_args=GLOBAL,
                              faults=self.faults)

    def up(self):
        self.guest.wait_up()
        self.ring = PvRing(self.lab, self.guest, self.disk)

    def change(self):
        return Change(self.guest, self.disk.node)

    def read_pages(self, block, gfns, first=pvring.FIRST_REF):
        status = self.ring.read(block * 8, self.ring.grant_pages(gfns, first))
        self.lab.equal(status, 0, f"a read of {len(gfns)} pages")

    def check_pages(self, block, gfns, what):
        self.guest.expect_blocks(gfns, block, what)


def run(lab):
    store = Faults("store")
    lab.store(faults=store)
    one, two = Driven(lab, "t1"), Driven(lab, "t2")
    for driven in (one, two):
        driven.guest.start(wait=False)
    for driven in (one, two):
        driven.up()
    check_whole(lab, one, two)
    check_partial(lab, two)
    check_repeated(lab, two)
    check_bad_grants(lab, two)
    check_growth(lab, two)
    check_revoked(lab, two, store)
    check_guest_writes(lab, two)
    check_write_in_flight(lab, two)
    check_burst(lab, two)
    check_held(lab, two)
    check_out_of_range(lab, one, two)
    check_drains(lab, two)
    check_reconnect(lab, two)
    one.check_pages(100, range(A, A + N), "the other guest, after all of it")
    lab.check(one.guest.dm_alive() and two.guest.dm_alive(), "QEMUs are alive")


def check_whole(lab, one, two):
    """A miss, then a hit with no I/O and no copy."""
    gfns = range(A, A + N)
    one.read_pages(100, gfns)
    one.check_pages(100, gfns, "a miss")
    lab.drop_caches()
    change, before = two.change(), lab.image_bytes()
    two.read_pages(100, gfns)
    two.check_pages(100, gfns, "a hit")
    lab.equal(lab.image_bytes() - before, 0, "bytes read from the image")
    lab.equal(change.of("blocks-read", "blocks-hit", "blocks-given",
                        "bytes-passed"), (N, N, N, 0), "counters")
    lab.equal([two.guest.references(g) for g in gfns], [3] * N,
              "store, one and two hold each frame")
    two.guest.poke(A, 0, 5)
    one.check_pages(100, gfns, "the other guest after a write")


def check_partial(lab, two):
    """Parts of pages, alone and beside whole ones."""
    change, ring = two.change(), two.ring
    whole = ring.grant_pages([B, B + 1, B + 2])
    status = ring.read(100 * 8, [whole[0], whole[1],
                                 Segment(whole[2].ref, 0, 3)])
    lab.equal(status, 0, "two pages and a half")
    two.check_pages(100, [B, B + 1], "the whole ones")
    lab.check(two.guest.peek(B + 2)[:2048] == pattern.block(102)[:2048],
              "the half")
    for sector, first, last in ((803, 0, 7), (805, 2, 5), (800, 0, 0)):
        segment = Segment(whole[0].ref, first, last)
        lab.equal(ring.read(sector, [segment]), 0, "an unaligned read")
        want = pattern.base(sector * 512, (last - first + 1) * 512)
        got = two.guest.peek(B)[first * 512:(last + 1) * 512]
        lab.check(got == want, f"sector {sector} to {first}-{last}")
    lab.equal(change.of("blocks-read", "blocks-given", "unaligned"), (6, 2, 4),
              "counters")


def check_repeated(lab, two):
    """One page in two segments: what was asked for last is there."""
    change, ring = two.change(), two.ring
    ref = ring.grant_pages([B])[0]
    lab.equal(ring.read(100 * 8, [ref, ref]), 0, "the same reference twice")
    two.check_pages(101, [B], "the last one")
    ring.grant(40, B)
    lab.equal(ring.read(102 * 8, [ref, Segment(40)]), 0, "two for one page")
    two.check_pages(103, [B], "the last one")
    # the same, but the first is a part of a page
    half = Segment(40, 0, 3)
    lab.equal(ring.read(104 * 8 + 4, [half, ref]), 0, "half and whole")
    two.check_pages(105, [B], "the last one")
    lab.equal(change.of("repeated", "blocks-given"), (6, 0), "counters")


def check_bad_grants(lab, two):
    """What is not granted is not written to, and QEMU lives."""
    ring, guest = two.ring, two.guest
    guest.fill(B, 77)
    want = lab.xen.filled(77)
    bad = {"read-only": (B, PERMIT | READONLY, 0), "not there": (0, 0, 0),
           "another's": (B, PERMIT, 5), "no RAM": (0xf0000, PERMIT, 0),
           "no address": (0xffffffff, PERMIT, 0)}
    for what, (gfn, flags, peer) in bad.items():
        change = two.change()
        ring.grant(41, gfn, flags, peer)
        good = ring.grant_pages([B + 1])[0]
        status = ring.read(100 * 8, [Segment(41), good])
        lab.check(status != 0, f"a grant that is {what}: an error")
        lab.equal(change.of("grant"), 1, "the counter says so")
        guest.expect([B], [want], "the page is as it was")
    lab.check(ring.read(100 * 8, [Segment(0xfffffff0)]) != 0, "no such grant")
    ring.grant(41, B)
    guest.command(9, B)                 # decrease: a page that is not there
    lab.check(ring.read(100 * 8, [Segment(41)]) != 0, "ballooned out: an error")
    guest.command(10, B)
    two.read_pages(100, [B])
    two.check_pages(100, [B], "back again")


def check_growth(lab, two):
    """References beyond the first page of the grant table."""
    for first in (510, 1020, 1500):
        change = two.change()
        two.read_pages(100, range(B, B + 4), first)
        two.check_pages(100, range(B, B + 4), f"references from {first} on")
        lab.equal(change.of("blocks-given"), 4, "given")


def late(two, kind, block, gfns, faults=None):
    """Send a read that waits at an operation; returns when it is there."""
    faults = faults or two.faults
    faults.set((kind, {"delay_ms": 1500, "count": 1}))
    two.ring.send(pvring.READ, block * 8, two.ring.grant_pages(gfns))
    two.lab.eventually(lambda: faults.done()[0], "it is in flight")
    faults.set()


def check_revoked(lab, two, store):
    """A grant that ends while the read is in flight."""
    change, gfns = two.change(), range(B, B + 4)
    for gfn in gfns:
        two.guest.fill(gfn, 78)
    late(two, STORE_MAP, 3000, gfns, store)
    two.ring.revoke(pvring.FIRST_REF + 1)
    status = two.ring.responses(1)
    lab.check(list(status.values()) != [0], "an error")
    lab.equal(change.of("grant"), 1, "the counter says why")
    two.guest.expect([B + 1], [lab.xen.filled(78)], "the page is untouched")
    two.check_pages(3000, [B], "one that was still granted")


def check_guest_writes(lab, two):
    """The guest writes to pages of a read that is in flight."""
    gfns = range(0xa00, 0xa04)
    change = two.change()
    late(two, SHARE, 100, gfns)         # after the nomination
    two.guest.poke(0xa01, 0, 9)
    lab.equal(list(two.ring.responses(1).values()), [0], "done")
    two.check_pages(100, gfns, "what was read, as it was read after that")
    lab.equal(change.of("changed", "blocks-given"), (1, 3), "counters")


def check_write_in_flight(lab, two):
    """A write to the sectors of a read that is in flight."""
    gfns = range(B, B + 4)
    two.guest.fill(0xb00, 79)
    two.ring.grant(60, 0xb00)
    two.ring.put(pvring.READ, 4000 * 8, two.ring.grant_pages(gfns))
    two.ring.put(pvring.WRITE, 4001 * 8, [Segment(60)])
    two.ring.kick()
    lab.equal(sorted(two.ring.responses(2).values()), [0, 0], "both done")
    lab.check(two.guest.peek(B + 1) in (pattern.block(4001),
                                        lab.xen.filled(79)),
              "the block that was written meanwhile")
    two.check_pages(4000, [B], "a block that was not written")
    two.check_pages(4002, [B + 2, B + 3], "and those behind")
    two.read_pages(4000, gfns)
    two.guest.expect([B + 1], [lab.xen.filled(79)], "what was written")
    two.check_pages(4002, [B + 2, B + 3], "the rest")


def check_burst(lab, two):
    """Requests that are sent at once; given together if answered together."""
    gfns = range(0xc00, 0xc00 + 30)
    for block in (5000, 5000):          # a miss, a hit
        change = two.change()
        refs = two.ring.grant_pages(gfns, 100)
        for i in range(0, 30, 10):
            two.ring.put(pvring.READ, (block + i) * 8, refs[i:i + 10])
        two.ring.kick()
        lab.equal(sorted(two.ring.responses(3).values()), [0] * 3, "a burst")
        two.check_pages(block, gfns, "a burst")
    lab.equal(change.of("blocks-hit", "blocks-given"), (30, 30), "hits")
    calls = change.of("give-system-calls")
    # a look at the memory, a pause, a region that is split, two multicalls, the
    # end of the pause
    lab.check(calls <= 3 * 6, f"{calls} system calls for three requests")


def check_held(lab, two):
    """Pages that QEMU has mapped, for emulated DMA that went there before."""
    gfns = range(0xe00, 0xe08)
    two.guest.read_pages(0, gfns, SimpleNamespace(drive=0))     # the boot disk
    change = two.change()
    two.read_pages(100, gfns)
    two.check_pages(100, gfns, "pages that were mapped")
    lab.equal(change.of("blocks-given", "mapped"), (8, 0),
              "all given: the main loop lets go of them")


def check_out_of_range(lab, one, two):
    """A read that begins before the disk, with a write to what follows."""
    ring = two.ring
    two.guest.fill(0xb01, 80)
    ring.grant(61, 0xb01)
    change = two.change()
    ring.put(pvring.READ, 2 ** 55 - 8, ring.grant_pages(range(B, B + 11)))
    ring.put(pvring.WRITE, 8 * 8, [Segment(61)])
    ring.kick()
    lab.equal(sorted(v == 0 for v in ring.responses(2).values()),
              [False, True], "the write is done, the read is not")
    lab.equal(change.of("blocks-missed", "blocks-given"), (0, 0), "nothing")
    last = pattern.BLOCKS
    lab.check(ring.read((last - 1) * 8, ring.grant_pages([B, B + 1])) != 0,
              "a read beyond the end")
    one.read_pages(0, range(B, B + 10))
    one.check_pages(0, range(B, B + 10), "the other guest, of the base")
    two.read_pages(8, [B])
    two.guest.expect([B], [lab.xen.filled(80)], "what was written")


def check_drains(lab, two):
    """The node is drained and changed with reads in flight."""
    gfns = range(0xc00, 0xc00 + 30)
    refs = two.ring.grant_pages(gfns, 100)
    for round in range(12):
        block = 6000 + 30 * (round // 2)
        for i in range(0, 30, 10):
            two.ring.put(pvring.READ, (block + i) * 8, refs[i:i + 10])
        two.ring.kick()
        two.guest.qmp("blockdev-reopen", options=[{
            "driver": "dedup-share", "node-name": two.disk.node,
            "file": f"{two.disk.vdev}-qcow2", "group": "default",
            "store": "off" if round % 3 == 0 else "xen", "timeout": 60}])
        lab.equal(sorted(two.ring.responses(3).values()), [0] * 3, "a burst")
        two.check_pages(block, gfns, f"drained in round {round}")


def check_reconnect(lab, two):
    """The guest goes away, with a read in flight, and comes again."""
    late(two, SHARE, 200, range(0xd00, 0xd04))
    two.ring.disconnect()
    two.ring.connect()
    two.read_pages(100, range(B, B + 4), 900)
    two.check_pages(100, range(B, B + 4), "after connecting anew")
    lab.check(two.guest.peek(B) == pattern.block(100)[:PAGE], "seen by dom0")
    two.ring.disconnect()
    two.ring.set_version(2)
    two.ring.connect()
    change = two.change()
    for first in (100, 600):
        two.read_pages(200, range(B, B + 4), first)
        two.check_pages(200, range(B, B + 4), "grants of version 2")
    lab.equal(change.of("blocks-given"), 8, "given")
    two.ring.grant(41, B, PERMIT | READONLY)
    lab.check(two.ring.read(100 * 8, [Segment(41)]) != 0, "read-only: an error")
    lab.equal(change.of("grant"), 1, "counted")
