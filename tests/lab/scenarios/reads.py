# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests of all shapes: bytes are right, and counters say why not shared."""
from dedup import Change
from labdom0 import DATA_GFN, PAGE, pattern

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

A = DATA_GFN


def run(lab):
    one, two = lab.tiny("g1"), lab.tiny("g2")
    lab.start_all(one, two)
    for guest in (one, two):
        check_unaligned(lab, guest)
        check_mixed_pieces(lab, guest)
        check_repeated(lab, guest)
        check_hole(lab, guest)
    check_hits_and_misses(lab, one, two)
    check_large(lab, one, two)
    check_copied(lab, two)


def check_copied(lab, guest):
    """Parts of blocks that the store has are copied from there."""
    lab.drop_caches()
    change, before = Change(guest), lab.image_bytes()
    check_bytes(lab, guest, 2001 * 8 + 3, [(A, 512, 1024)], "part of a block")
    check_bytes(lab, guest, 2002 * 8 - 1, [(A, 512, 1024)], "of two blocks")
    guest.read_pio(2003 * 8, 8, A)
    guest.expect_blocks([A], 2003, "PIO")
    lab.equal(lab.image_bytes() - before, 0, "bytes read of the image")
    lab.check(change.of("blocks-copied") >= 4, "blocks copied")
    lab.equal(change.of("bytes-passed"), 0, "bytes passed through")


def bytes_at(guest, pieces):
    return b"".join(guest.peek(g)[o:o + n] for g, o, n in pieces)


def check_bytes(lab, guest, lba, pieces, what):
    guest.read(lba, pieces)
    length = sum(n for _, _, n in pieces)
    lab.check(bytes_at(guest, pieces) == pattern.base(lba * 512, length), what)


def check_unaligned(lab, guest):
    change = Change(guest)
    check_bytes(lab, guest, 801, [(A + i, 0, PAGE) for i in range(4)],
                "blocks off by a sector")
    check_bytes(lab, guest, 800, [(A, 512, PAGE - 512), (A + 1, 0, PAGE),
                                  (A + 2, 0, 512)], "pages off by a sector")
    check_bytes(lab, guest, 805, [(A, 0, 512)], "a sector")
    lab.equal(change.of("blocks-given"), 0, "none of it is given")


def check_mixed_pieces(lab, guest):
    change = Change(guest)
    pieces = [(A, 1024, 3072), (A + 1, 0, PAGE), (A + 2, 0, PAGE),
              (A + 3, 0, 1024)]
    # 3072 + 4096 + 4096 + 1024 bytes, the whole pages at blocks 101 and 102
    check_bytes(lab, guest, 802, pieces, "partial blocks around whole ones")
    lab.equal(change.of("blocks-given", "unaligned"), (2, 2),
              "the whole blocks are given, the others not")
    lab.equal([guest.references(A + i) is not None for i in range(4)],
              [False, True, True, False], "which Xen says as well")


def check_repeated(lab, guest):
    """A page that occurs twice holds what comes last."""
    guest.read_pages(120, [A + 8, A + 9, A + 8])
    guest.expect_blocks([A + 9], 121, "the page that occurs once")
    guest.expect_blocks([A + 8], 122, "the page that occurs twice")


def check_hole(lab, guest):
    guest.fill(A + 10, 3)
    guest.fill(A + 11, 3)
    guest.read_pages(pattern.HOLE - 1, [A + 10, A + 11])
    guest.expect_blocks([A + 10, A + 11], pattern.HOLE - 1, "data and a hole")


def check_hits_and_misses(lab, one, two):
    one.read_pages(1002, range(A + 16, A + 18))
    one.read_pages(1006, range(A + 18, A + 19))
    lab.drop_caches()
    change = Change(two)
    gfns = range(A + 32, A + 41)
    two.read_pages(1000, gfns)
    two.expect_blocks(gfns, 1000, "hits among misses")
    lab.equal(change.of("blocks-hit", "blocks-missed", "blocks-given"),
              (3, 6, 9), "hit, missed, given")
    lab.equal(change.of("bytes-filled"), 6 * PAGE, "read of the image")
    one.expect_blocks(range(A + 16, A + 18), 1002, "the other guest")


def check_large(lab, one, two):
    """The largest request that the disk takes: 32 pages."""
    gfns = range(0x1000, 0x1020)
    for guest in (one, two):
        guest.read_pages(2000, gfns)
        guest.expect_blocks(gfns, 2000, "32 pages at once")
    lab.equal([two.references(g) for g in gfns], [3] * 32, "references")
