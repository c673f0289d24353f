# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab itself: two tiny guests read and write disks without the filter."""
from labdom0 import DATA_GFN, Disk, pattern

BOOT = {"xen": "sharing", "fast": True, "timeout": 90}


def run(lab):
    one = lab.tiny("g1", [Disk(filter=False),
                          Disk(filter=False, throttle=1 << 18)])
    two = lab.tiny("g2", [Disk(filter=False)])
    lab.start_all(one, two)
    check_reads(lab, one)
    check_reads(lab, two)
    check_writes(lab, one, two)
    check_memory(lab, one)
    check_management(lab, one, two)


def check_reads(lab, guest):
    gfns = range(DATA_GFN, DATA_GFN + 16)
    guest.read_pages(100, gfns)
    guest.expect_blocks(gfns, 100, "16 blocks by DMA")
    lab.check(guest.peek(DATA_GFN + 3) == pattern.block(103),
              "dom0 sees the same bytes")
    pieces = [(0x900, 512, 1024), (0xa00, 0, 4096), (0xb00, 1024, 3072)]
    guest.read(17, pieces)
    got = b"".join(guest.peek(g)[o:o + n] for g, o, n in pieces)
    lab.check(got == pattern.base(17 * 512, 8192),
              "sub-page pieces of an unaligned read")
    guest.read_pio(808, 8, 0xc00)
    guest.expect_blocks([0xc00], 101, "PIO read")
    guest.read_pages(pattern.HOLE + 5, [0xc01])
    guest.expect([0xc01], [bytes(4096)], "a block of the hole")


def check_writes(lab, one, two):
    one.fill(0xd00, 7)
    one.write_pages(200, [0xd00])
    for guest, page in ((one, lab.xen.filled(7)), (two, pattern.block(200))):
        guest.read_pages(200, [0xd01])
        guest.expect([0xd01], [page], "a block that one guest wrote")
    lab.check(True, "a write is seen by its guest alone")


def check_memory(lab, guest):
    guest.poke(0xe00, 8, 0x12345678)
    lab.equal(guest.word(0xe00, 8), 0x12345678, "poke and read back")
    lab.equal(guest.decrease(0xe01), 1, "decrease_reservation")
    lab.equal(guest.populate(0xe01), 1, "populate_physmap")
    guest.copy((0xe01, 0), (0xe00, 8), 4)
    lab.equal(guest.word(0xe01), 0x12345678, "copy into the new page")
    first = (guest.disks[0], 80, [(0xf00, 0, 65536)])
    second = (guest.disks[1], 160, [(0xf80, 0, 65536)])
    guest.read_both(first, second)
    guest.expect_blocks(range(0xf00, 0xf10), 10, "primary channel")
    guest.expect_blocks(range(0xf80, 0xf90), 20, "secondary channel")
    guest.poke(0xe00, 0, 0)
    writes = guest.read_hammered(400, [(0xf00, 0, 65536)], 0xe00, 0,
                                 guest.disks[1])
    lab.check(writes == guest.word(0xe00) > 0, f"{writes} writes in a DMA")
    guest.expect_blocks(range(0xf00, 0xf10), 50, "read under writes")


def check_management(lab, one, two):
    lab.equal(one.qmp("query-status")["running"], True, "QMP")
    disk = one.disks[0]
    before = lab.image_bytes(), one.disk_stats(disk)["rd_bytes"]
    lab.drop_caches()
    one.read_pages(5000, range(0x1000, 0x1010))
    lab.check(lab.image_bytes() - before[0] >= 65536,
              "the images' disk counts what is read of it")
    lab.equal(one.disk_stats(disk)["rd_bytes"] - before[1], 65536,
              "and so does the device")
    lab.equal(one.references(DATA_GFN), None, "nothing is shared")
    lab.equal(sorted(lab.strangers().values()), ["g1", "g2"], "domain names")
    two.kill_dm()
    lab.check(not two.dm_alive(), "the device model is killed")
    one.read_pages(300, [0xd02])
    one.expect_blocks([0xd02], 300, "the other guest goes on")
    one.destroy()
    two.destroy()
    lab.eventually(lambda: not lab.strangers(), "both domains are gone")
