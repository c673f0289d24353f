# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies that share physical blocks share frames, which their content finds."""
import time
from pathlib import Path

from dedup import Change
from disks import IMAGES, SCRATCH, FileDisk
from labdom0 import DATA_GFN, PAGE

BOOT = {"xen": "sharing", "fast": True, "timeout": 200}

FIRST, COUNT, STEP = 64, 512, 128
A = DATA_GFN
WHERE = SCRATCH / "xfs"
CHANGED = FIRST + 200


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


def run(lab):
    stat = mount(lab)
    try:
        check(lab, lambda: int(stat.read_text().split()[2]) * 512)
    finally:
        lab.run("umount", "-l", WHERE)


def check(lab, disk_bytes):
    a, b = WHERE / "a.raw", WHERE / "b.raw"
    with open(IMAGES / "base.raw", "rb") as base, open(a, "wb") as f:
        f.write(base.read((FIRST + COUNT) * PAGE))
    lab.run("cp", "--reflink=always", a, b)
    lab.run("sync")
    one, two = (lab.tiny(f"g{i}", [FileDisk(path)])
                for i, path in enumerate((a, b), 1))
    lab.start_all(one, two)
    lab.drop_caches()
    before = disk_bytes()
    one.expect_blocks(read_all(one), FIRST, "of the first copy")
    lab.check(disk_bytes() - before >= COUNT * PAGE,
              "the first's blocks are read from the disk")

    lab.drop_caches()
    change = Change(two)
    two.expect_blocks(read_all(two), FIRST, "of the second copy")
    lab.equal(change.of("blocks-given", "bytes-passed"), (COUNT, 0),
              "all are given")
    shared = sum((two.references(A + i) or 0) >= 3 for i in range(COUNT))
    lab.show(f"reflink copies: {shared} of {COUNT} pages shared, "
             f"{shared / COUNT:.4f}")
    lab.check(shared >= 0.99 * COUNT, "both guests hold one frame a block")
    check_changed(lab, a, one, two)


def check_changed(lab, a, one, two):
    """A block of the first copy is changed when no guest has it open."""
    one.destroy()
    with open(a, "r+b") as f:
        f.seek(CHANGED * PAGE)
        f.write(b"\x5a" * PAGE)
    lab.run("sync")
    time.sleep(1.1)
    three = lab.tiny("g3", [FileDisk(a)])
    three.start()
    gfns = read_all(three)
    three.expect([gfns[CHANGED - FIRST]], [b"\x5a" * PAGE],
                 "what was changed in the first copy")
    three.expect_blocks(gfns[:CHANGED - FIRST], FIRST, "what is before it")
    three.expect_blocks(gfns[CHANGED - FIRST + 1:], CHANGED + 1,
                        "what is behind it")
    two.expect_blocks(read_all(two), FIRST, "the second copy, as it was")
