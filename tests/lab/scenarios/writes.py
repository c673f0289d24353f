# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest reads what it has written, in its own overlay; nobody else does."""
import time

from dedup import Change
from labdom0 import DATA_GFN, PAGE, Disk, pages_of, pattern

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

A = DATA_GFN


def run(lab):
    one = lab.tiny("g1", [Disk(options={"share": "all"})])
    two = lab.tiny("g2")
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
        lab.equal(change.of("no-layer", "blocks-given"), (0, 8),
                  "its own block is given as well")
        two.read_pages(100, gfns)
        two.expect_blocks(gfns, 100, "the other guest's read")

    check_partial(lab, one, two)
    check_in_flight(lab, two)


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


def write_to_disk(guest, block, byte):
    """Write a block as the guest's disk would, from the monitor."""
    for entry in guest.qmp("query-block"):
        if entry.get("inserted", {}).get("node-name") == "dedup1":
            line = f'qemu-io -d {entry["qdev"]} '
            line += f'"write -P {byte} {block * PAGE} {PAGE}"'
            guest.hmp(line)


def check_in_flight(lab, two):
    """Write to a block while it is read: the read gets what was, or is."""
    slow = lab.tiny("g3", [Disk(throttle=1 << 13)])
    slow.start()
    gfns = range(A, A + 16)
    slow.read_pages(600, gfns)          # the first is never throttled
    slow.start_read(5000 * 8, pages_of(gfns))
    time.sleep(0.3)                     # it is in flight
    write_to_disk(slow, 5003, 0x77)
    slow.finish_read()
    lab.check(slow.peek(gfns[3]) in (pattern.block(5003), b"\x77" * PAGE),
              "the block that was written meanwhile")
    others = [i for i in range(16) if i != 3]
    slow.expect([gfns[i] for i in others],
                [pattern.block(5000 + i) for i in others], "the other blocks")
    slow.read_pages(5000, gfns)
    slow.expect([gfns[3]], [b"\x77" * PAGE], "what was written")
    slow.expect([gfns[i] for i in others],
                [pattern.block(5000 + i) for i in others], "the other blocks")
    two.read_pages(5000, gfns)
    two.expect_blocks(gfns, 5000, "another guest, of the base")
