# SPDX-License-Identifier: GPL-2.0-or-later
"""The tmpfs of the index is full: that is no SIGBUS, and reads go on."""
import probe
from dedup import Change
from labdom0 import DATA_GFN

from disks import Disk

BOOT = {"xen": "sharing", "fast": True, "timeout": 150}

N = 16
GFNS = range(DATA_GFN, DATA_GFN + N)
FAR = 12000                     # in another chunk of the block map
FILLER = probe.INDEX_DIR / "filler"


def run(lab):
    probe.INDEX_DIR.mkdir(mode=0o700, exist_ok=True)
    lab.run("mount", "-t", "tmpfs", "-o", "size=512k,mode=0700", "tmpfs",
            probe.INDEX_DIR)
    try:
        check(lab)
    finally:
        FILLER.unlink(missing_ok=True)
        lab.run("umount", "-l", probe.INDEX_DIR)


def fill_up():
    with open(FILLER, "wb", buffering=0) as f:
        try:
            while f.write(bytes(4096)):
                pass
        except OSError:
            pass


def check(lab):
    guest = lab.tiny("g1", [Disk(store_size=1 << 20)])
    guest.start()
    fill_up()
    change = Change(guest)
    guest.read_pages(100, GFNS)
    guest.expect_blocks(GFNS, 100, "where the block map has memory")
    lab.equal(change.of("store-full", "blocks-given"), (0, N), "given")
    for block in (FAR, 100, FAR):
        guest.read_pages(block, GFNS)
        guest.expect_blocks(GFNS, block, "no memory for the block map")
    lab.equal(change.of("store-full", "blocks-given"), (2 * N, 2 * N),
              "the counter says why")
    lab.equal(guest.shared(), 0, "pages shared")
    probe.refused(lab, guest.domid, ",group=other,store-size=67108864",
                  ["index-dir:", "store-size"])

    FILLER.unlink()
    guest.read_pages(FAR, GFNS)
    guest.expect_blocks(GFNS, FAR, "when there is memory again")
    lab.equal(guest.shared(), N, "pages shared then")
    guest.destroy()
