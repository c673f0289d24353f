# SPDX-License-Identifier: GPL-2.0-or-later
"""Every second page is shared: the device model's mappings stay few enough."""
from pathlib import Path

from labdom0 import pattern

BOOT = {"xen": "sharing", "timeout": 400}

MEMORY = 512                    # MiB; twice the areas a process may have
FIRST, LAST = 0x2000, 0x1f000   # gfns
MIB = 256                       # gfns
LIMIT = 65530                   # vm.max_map_count, the kernel's default
REQUEST = 32                    # pages


def run(lab):
    guest = lab.tiny("g1", memory=MEMORY)
    guest.start()
    gfns = list(range(FIRST, LAST, 2))
    for i in range(0, len(gfns), REQUEST):
        guest.read_pages(i % pattern.DATA_BLOCKS, gfns[i:i + REQUEST])
        if i % 8192 == 0:
            lab.note(f"{i} of {len(gfns)} pages given")
    lab.equal(guest.shared(), len(gfns), "pages shared")

    most = made = 0
    for mib in range(FIRST, LAST, MIB):
        guest.read_pio(100 * 8, 8, mib + 1)
        areas = len(Path(f"/proc/{guest.dm_pid()}/maps").read_text()
                    .splitlines())
        most, made = max(most, areas), made + MIB
    lab.check(made > LIMIT, f"{made} areas, if all were kept")
    lab.check(10000 < most < LIMIT // 2, f"at most {most} at a time")
    guest.expect_blocks([LAST - MIB + 1], 100, "what was read last")
    lab.equal(guest.shared(), len(gfns), "pages that are still shared")
    sample = gfns[:REQUEST] + gfns[-REQUEST:]
    first = (len(gfns) - REQUEST) % pattern.DATA_BLOCKS
    guest.expect(sample, [pattern.block(i) for i in range(REQUEST)] +
                 [pattern.block(first + i) for i in range(REQUEST)],
                 "shared pages")
