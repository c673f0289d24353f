# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies by "cp --reflink" read their origin's blocks without I/O, on XFS."""
import fcntl
import os
import struct
from pathlib import Path

import pattern
from dedup import Change
from disks import IMAGES, SCRATCH, ReflinkDisk
from labdom0 import DATA_GFN, PAGE

BOOT = {"xen": "sharing", "fast": True, "timeout": 240}

FIRST, COUNT, STEP = 64, 512, 128
BYTES = (FIRST + COUNT) * PAGE
SOURCE = DATA_GFN               # a page that is written from
A = DATA_GFN + 16
WHERE = SCRATCH / "xfs"
GOLDEN = WHERE / "golden.raw"
FIDEDUPERANGE = 0xC0189436
WRITTEN = [10, 11, 300]         # by the second guest; blocks from FIRST on
CHANGED = 200                   # between copying and opening
DEDUPED = 128                   # blocks from the image's first on


def mount(lab):
    image = SCRATCH / "xfs.img"
    lab.run("cp", "--sparse=always", IMAGES / "empty-xfs.img", image)
    WHERE.mkdir()
    for module in ("loop", "xfs"):
        lab.run("modprobe", module)
    device = lab.run("losetup", "--find", "--show", image).strip()
    lab.run("mount", "-t", "xfs", device, WHERE)
    # in use, so it is detached when the file system goes
    lab.run("losetup", "--detach", device)
    return Path("/sys/block") / Path(device).name / "stat"


def read_all(guest):
    for i in range(0, COUNT, STEP):
        guest.read_pages(FIRST + i, range(A + i, A + i + STEP))
    return range(A, A + COUNT)


def expect_all(lab, guest, other, what):
    """All blocks are the origin's, but for other: a number, and its page."""
    guest.expect(read_all(guest),
                 [other.get(i) or pattern.block(FIRST + i)
                  for i in range(COUNT)], what)


def run(lab):
    stat = mount(lab)
    try:
        check(lab, lambda: int(stat.read_text().split()[2]) * 512)
    finally:
        lab.run("umount", "-l", WHERE)


def copy(lab, source, name):
    path = WHERE / name
    lab.run("cp", "--reflink=always", source, path)
    return lab.tiny(f"g-{name}", [ReflinkDisk(path, GOLDEN)]), path


def wait_for_look(lab, guest):
    """What was written has to be synced first; no read waits long for that."""
    last = COUNT - 1            # it is always the origin's

    def is_given():
        change = Change(guest)
        guest.read_pages(FIRST + last, [A + last])
        return change.of("blocks-given") == 1
    lab.eventually(is_given, "blocks are found to be the origin's")


def check(lab, disk_bytes):
    with open(IMAGES / "base.raw", "rb") as base, open(GOLDEN, "wb") as f:
        f.write(base.read(BYTES))
    one, _ = copy(lab, GOLDEN, "a")
    two, path = copy(lab, GOLDEN, "b")
    lab.run("sync")
    lab.start_all(one, two)
    check_first_reads(lab, disk_bytes, one, two)
    written = check_writes(lab, one, two)
    two.destroy()
    three = check_changed(lab, path, written)
    check_dedupe(lab, one, three, written)


def check_first_reads(lab, disk_bytes, one, two):
    lab.drop_caches()
    before = disk_bytes()
    expect_all(lab, one, {}, "of the first copy")
    lab.check(disk_bytes() - before >= COUNT * PAGE,
              "the first's blocks are read from the disk")
    lab.drop_caches()
    before = disk_bytes()
    change = Change(two)
    gfns = read_all(two)
    read = disk_bytes() - before
    two.expect_blocks(gfns, FIRST, "of the second copy")
    lab.show(f"the second copy's first read of {COUNT * PAGE} bytes: "
             f"{read} bytes from the disk")
    lab.equal(read, 0, "bytes from the disk for the second's first read")
    lab.equal(change.of("blocks-hit", "blocks-given", "bytes-filled",
                        "bytes-passed"), (COUNT, COUNT, 0, 0),
              "all are hits, and given")
    shared = sum((two.references(A + i) or 0) >= 3 for i in range(COUNT))
    lab.show(f"reflink copies: {shared} of {COUNT} pages shared, "
             f"{shared / COUNT:.4f}")
    lab.check(shared >= 0.99 * COUNT, "both guests hold one frame a block")


def check_writes(lab, one, two):
    """A guest's own bytes right after it has written them."""
    written = {}
    for i in WRITTEN:
        two.fill(SOURCE, 1000 + i)
        two.write_pages(FIRST + i, [SOURCE])
        written[i] = lab.xen.filled(1000 + i)
        two.read_pages(FIRST + i, [A + i])
        two.expect([A + i], [written[i]], "what was just written")
    change = Change(two)
    expect_all(lab, two, written, "the second copy, with what it has written")
    lab.equal(change.of("blocks-given", "no-layer"),
              (COUNT - len(WRITTEN), len(WRITTEN)), "the others are given")
    expect_all(lab, one, {}, "the first copy, as it was")
    return written


def check_changed(lab, path, written):
    """A copy of a copy, changed before it is opened, and after that."""
    three, path = copy(lab, path, "c")
    with open(path, "r+b") as f:
        f.seek((FIRST + CHANGED) * PAGE)
        f.write(b"\x5a" * PAGE)         # it is not on the disk yet
    three.start()
    # written when it is open, before anything was read
    three.fill(SOURCE, 77)
    three.write_pages(FIRST + CHANGED + 1, [SOURCE])
    other = {**written, CHANGED: b"\x5a" * PAGE, CHANGED + 1:
             lab.xen.filled(77)}
    wait_for_look(lab, three)
    change = Change(three)
    expect_all(lab, three, other, "a copy of a copy")
    lab.equal(change.of("blocks-given", "bytes-filled"),
              (COUNT - len(other), 0), "what is the origin's is given")
    written.update(other)
    return three


def dedupe(lab):
    """A reader has the origin's first blocks be another file's."""
    twin = WHERE / "twin.raw"
    lab.run("cp", "--reflink=never", GOLDEN, twin)
    lab.run("sync")
    with open(twin, "rb") as source, open(GOLDEN, "rb") as target:
        # to: descriptor, offset; what was done: bytes, status
        request = bytearray(struct.pack(
            "=QQHHIqQQiI", 0, DEDUPED * PAGE, 1, 0, 0, target.fileno(), 0,
            0, 0, 0))
        fcntl.ioctl(source, FIDEDUPERANGE, request)
        lab.equal(struct.unpack_from("=Qi", request, 40), (DEDUPED * PAGE, 0),
                  "the origin's blocks are moved")
    os.unlink(twin)


def check_dedupe(lab, one, three, written):
    """The old place is the copies' own then, and they write to it."""
    dedupe(lab)
    change = Change(one)
    expect_all(lab, one, {}, "what was found before")
    lab.equal(change.of("blocks-given", "bytes-passed"), (COUNT, 0),
              "it is still given")
    four, _ = copy(lab, WHERE / "a", "d")
    four.start()
    four.fill(SOURCE, 88)
    four.write_pages(FIRST + 3, [SOURCE])
    wait_for_look(lab, four)
    change = Change(four)
    expect_all(lab, four, {3: lab.xen.filled(88)}, "a copy of the old place")
    lab.equal(change.of("blocks-given", "no-layer"),
              (COUNT - (DEDUPED - FIRST), DEDUPED - FIRST),
              "what was moved is not found to be the same")
    one.fill(SOURCE, 99)
    one.write_pages(FIRST + 4, [SOURCE])
    expect_all(lab, one, {4: lab.xen.filled(99)}, "the first copy")
    expect_all(lab, three, written, "the third copy, as it was")
    expect_all(lab, four, {3: lab.xen.filled(88)}, "the fourth copy, as it was")
