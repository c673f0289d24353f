# SPDX-License-Identifier: GPL-2.0-or-later
"""Shared pages stay shared whatever DMA goes on around them.

QEMU's map cache would map the whole MiB writable at each of these, and Xen
then unshare all of it.
"""
from dedup import Change
from labdom0 import DATA_GFN, PAGE, pattern

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

# every other page of a MiB is shared; the rest is for DMA
SHARED = range(DATA_GFN, DATA_GFN + 64, 2)
OTHERS = range(DATA_GFN + 1, DATA_GFN + 64, 2)
GIVEN = 0xb40                   # of another MiB


def run(lab):
    one, two = lab.tiny("g1"), lab.tiny("g2")
    lab.start_all(one, two)
    for guest in (one, two):
        guest.read_pages(100, SHARED)
        lab.equal(guest.shared(), len(SHARED), f"shared by {guest.name}")

    two.read_pages(900, [GIVEN])
    check(lab, two, "copies", copies)
    check(lab, two, "writes to the disk", writes)
    check(lab, two, "unaligned reads", unaligned_reads)
    check(lab, two, "PIO reads", pio_reads)
    check(lab, two, "sub-page reads", sub_page_reads)
    check(lab, two, "large requests", large_requests)
    check_own_write(lab, one, two)
    check_later_gives(lab, two)
    check_across(lab, two)


def check(lab, guest, what, dma):
    before = guest.shared(), lab.xen.freed()
    dma(guest)
    lab.equal((guest.shared(), lab.xen.freed()), before,
              f"pages still shared after {what}")
    guest.expect_blocks(SHARED, 100, f"shared pages after {what}")


def copies(guest):
    """What is not given of a request is copied: through whole buckets."""
    for gfn in list(OTHERS)[:4]:
        guest.read(900 * 8, [(GIVEN, 0, PAGE), (gfn, 512, 512)])


def writes(guest):
    for i, gfn in enumerate(OTHERS):
        guest.fill(gfn, i)
        guest.write_pages(3000 + i, [gfn])


def unaligned_reads(guest):
    for i, gfn in enumerate(OTHERS):
        guest.read(17 + 8 * i, [(gfn, 0, PAGE)])


def pio_reads(guest):
    for gfn in OTHERS[:3]:              # slow: a trap for each sector
        guest.read_pio(64, 8, gfn)


def sub_page_reads(guest):
    for gfn in OTHERS:
        guest.read(800, [(gfn, 512, 1024), (gfn, 2048, 512)])


def large_requests(guest):
    guest.read(4000 * 8 + 3, [(gfn, 0, PAGE) for gfn in list(OTHERS)[:31]])


def check_own_write(lab, one, two):
    """A request that writes to a shared page unshares that page alone."""
    before = two.shared()
    gfn = SHARED[7]
    two.read(808, [(gfn, 512, 512)])
    lab.equal(two.shared(), before - 1, "one page less is shared")
    lab.equal(two.references(gfn), None, "namely the one that was written")
    one.expect_blocks(SHARED, 100, "the other guest")
    page = bytearray(two.peek(gfn))
    lab.check(bytes(page[512:1024]) == pattern.base(808 * 512, 512),
              "what was read is where it should be")


def check_later_gives(lab, guest):
    """Pages that ordinary DMA went to before are given all the same."""
    change = Change(guest)
    guest.read_pages(200, OTHERS)
    guest.expect_blocks(OTHERS, 200, "pages that had DMA")
    lab.equal(change.of("blocks-given", "mapped"), (len(OTHERS), 0),
              "all given, none found mapped")


def check_across(lab, guest):
    """A copy across the border of two MiBs keeps no page of either mapped."""
    border = 0xa00
    # the first page is given, the rest copied: to the sector before the border
    # and to the page behind it
    pieces = [(border - 8, 0, PAGE), (border - 1, 2048, PAGE)]
    guest.read(500 * 8, pieces)
    data = guest.peek(border - 1)[2048:] + guest.peek(border)[:2048]
    lab.check(data == pattern.block(501), "a copy across the border")
    change = Change(guest)
    pages = range(border + 16, border + 32)
    guest.read_pages(600, pages)
    guest.expect_blocks(pages, 600, "pages behind the border")
    lab.equal(change.of("blocks-given", "mapped"), (16, 0),
              "all given, none found mapped")
