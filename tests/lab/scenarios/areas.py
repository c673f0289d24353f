# SPDX-License-Identifier: GPL-2.0-or-later
"""Shared pages all over the guest: the device model's mappings stay few."""
from pathlib import Path

from labdom0 import PAGE, CheckFailed, pattern

BOOT = {"xen": "sharing", "fast": True, "timeout": 200}

MEMORY = 512                    # MiB
FIRST, LAST = 0x2000, 0x1f000   # gfns
MIB = 256                       # gfns; a bucket of the map cache
RAGGED = 16                     # MiB with every second page shared
STEP = 32                       # elsewhere, every so many
REQUEST = 32                    # pages
MAX_AREAS = 4096                # see hw/xen/memshr/mapcache.c.inc


def run(lab):
    guest = lab.tiny("g1", memory=MEMORY)
    guest.start()
    edge = FIRST + RAGGED * MIB
    gfns = [*range(FIRST, edge, 2), *range(edge, LAST, STEP)]
    for i in range(0, len(gfns), REQUEST):
        guest.read_pages(i, gfns[i:i + REQUEST])
    lab.equal(guest.shared(), len(gfns), "pages shared")

    before = areas(guest)
    read_each_mib(guest, FIRST, edge)
    made = areas(guest) - before
    lab.check(RAGGED <= made <= 4 * RAGGED, f"{made} areas in ragged MiBs")
    most = read_each_mib(guest, edge, LAST)
    made = (LAST - edge) // MIB * 2 * (MIB // STEP)
    lab.check(made > MAX_AREAS * 3 // 2, f"{made} areas, if all were kept")
    lab.check(most - before < MAX_AREAS * 5 // 4, f"at most {most} at a time")
    lab.equal(guest.shared(), len(gfns) + (LAST - FIRST) // MIB,
              "pages that are still shared")
    guest.expect(gfns, [pattern.block(i) for i in range(len(gfns))],
                 "shared pages")


def areas(guest):
    return len(Path(f"/proc/{guest.dm_pid()}/maps").read_text().splitlines())


def read_each_mib(guest, first, last):
    """A page and a sector to each MiB; returns the most areas seen.

    The page is given, the sector copied, through a mapping that is kept.
    """
    most = 0
    for mib in range(first, last, MIB):
        guest.read(100 * 8, [(mib + 1, 0, PAGE), (mib + 3, 512, 512)])
        most = max(most, areas(guest))
        guest.expect_blocks([mib + 1], 100, "a page")
        if guest.peek(mib + 3)[512:1024] != pattern.block(101)[:512]:
            raise CheckFailed(f"the sector in {mib + 3:#x}")
    return most
