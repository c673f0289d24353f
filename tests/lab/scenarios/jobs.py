# SPDX-License-Identifier: GPL-2.0-or-later
"""Reopen, backup, snapshot, commit and stream under a guest that shares."""
import shutil
import time

from checks import CheckFailed
from dedup import Change, stats
from disks import IMAGES, SCRATCH
from labdom0 import DATA_GFN, Disk, pattern

BOOT = {"xen": "sharing", "fast": True, "timeout": 240}

N = 16
A = DATA_GFN
GFNS = range(A, A + N)


def run(lab):
    one = lab.tiny("g1", [Disk(options={"share": "all"})])
    two = lab.tiny("g2")
    lab.start_all(one, two)
    two.read_pages(100, GFNS)
    guest = Disked(lab, one)
    check_reopen(lab, guest, two)
    check_backup(lab, guest)
    for round in range(2):
        check_snapshot(lab, guest, round)
    check_stream(lab, guest)
    guest.check("at the end")
    two.read_pages(100, GFNS)
    two.expect_blocks(GFNS, 100, "the other guest, of the base")
    check_last(lab, guest, two)


class Disked:
    """A guest, and what its disk holds at blocks 100 to 115."""

    def __init__(self, lab, guest):
        self.lab, self.guest = lab, guest
        self.pages = [pattern.block(100 + i) for i in range(N)]
        self.seed = 1000

    def write(self, i):
        """The guest writes block i."""
        self.seed += 1
        self.guest.fill(A + 64, self.seed)
        self.guest.write_pages(100 + i, [A + 64])
        self.pages[i] = self.lab.xen.filled(self.seed)

    def check(self, when):
        """Read all, by pages and by the sector."""
        for _ in range(2):
            self.guest.read_pages(100, GFNS)
            self.guest.expect(GFNS, self.pages, when)
        self.guest.read(100 * 8 + 1, [(A + 80 + i, 0, 4096)
                                      for i in range(N - 1)])
        data = b"".join(self.pages)[512:]
        self.guest.expect(range(A + 80, A + 80 + N - 1),
                          [data[i * 4096:(i + 1) * 4096]
                           for i in range(N - 1)], f"{when}, off by a sector")
        self.lab.check(True, f"the disk reads as written: {when}")


def reopen(guest, store):
    guest.qmp("blockdev-reopen", options=[{
        "driver": "dedup-share", "node-name": "dedup1", "file": "overlay1",
        "group": "default", "store": store, "timeout": 60, "share": "all"}])


def check_reopen(lab, disk, two):
    guest = disk.guest
    disk.check("before")
    disk.write(3)
    for _ in range(2):
        reopen(guest, "off")
        lab.equal(stats(guest)["store"], "off", "the store is off")
        change = Change(guest)
        disk.check("store off")
        lab.equal(change.of("blocks-read"), 0, "nothing is offered")
        disk.write(4)
        reopen(guest, "xen")
        change = Change(guest)
        disk.check("store on again")
        lab.equal(change.of("blocks-hit") > 0, True, "and hits")
    two.expect_blocks(GFNS, 100, "the other guest meanwhile")


def wait_job(guest, job, status):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = [j for j in guest.qmp("query-jobs") if j["id"] == job]
        if found and "error" in found[0]:
            raise CheckFailed(f"{job}: {found[0]['error']}")
        if found and found[0]["status"] == status:
            return
        time.sleep(0.05)
    raise CheckFailed(f"{job} did not get {status}")


def check_backup(lab, disk):
    """Writes while a backup copies, through a filter below ours."""
    guest = disk.guest
    size = (SCRATCH / "backup.raw")
    with open(size, "wb") as f:
        f.truncate(pattern.BLOCKS * 4096)
    guest.qmp("blockdev-add", driver="raw", node_name="target",
              file={"driver": "file", "filename": str(size)})
    before = list(disk.pages)
    guest.qmp("blockdev-backup", job_id="b", device="overlay1",
              target="target", sync="full", speed=4 << 20,
              auto_dismiss=False)
    for i in (5, 6):
        disk.write(i)
        disk.check("while a backup runs")
    guest.qmp("job-pause", id="b")
    disk.write(7)
    disk.check("while it is paused")
    guest.qmp("job-resume", id="b")
    guest.qmp("block-job-set-speed", device="b", speed=0)
    wait_job(guest, "b", "concluded")
    guest.qmp("job-dismiss", id="b")
    guest.qmp("blockdev-del", node_name="target")
    with open(size, "rb") as f:
        f.seek(100 * 4096)
        lab.check(f.read(N * 4096) == b"".join(before),
                  "the backup is of the moment it began")
    disk.check("after the backup")


def check_snapshot(lab, disk, round):
    """An overlay over the overlay, and back: the same file is a layer twice."""
    guest, path = disk.guest, SCRATCH / f"snapshot{round}.qcow2"
    shutil.copyfile(IMAGES / "base.qcow2", path)
    disk.write(8)
    guest.qmp("blockdev-add", driver="qcow2", node_name="ov2", backing=None,
              file={"driver": "file", "filename": str(path)})
    guest.qmp("blockdev-snapshot", node="overlay1", overlay="ov2")
    change = Change(guest)
    disk.check("after a snapshot")
    lab.check(change.of("no-layer") == 0, "its old overlay takes part")
    for i in (8, 9):
        disk.write(i)
    disk.check("in the new overlay")
    guest.qmp("block-commit", job_id="c", device="dedup1",
              top_node="ov2", base_node="overlay1", auto_dismiss=False)
    wait_job(guest, "c", "ready")
    disk.write(10)
    disk.check("while a commit is about to end")
    guest.qmp("job-complete", id="c")
    wait_job(guest, "c", "concluded")
    guest.qmp("job-dismiss", id="c")
    disk.check("after the commit")
    guest.qmp("blockdev-del", node_name="ov2")


def check_stream(lab, disk):
    """All of the base is copied into the overlay, under the guest."""
    guest = disk.guest
    guest.qmp("block-stream", job_id="s", device="overlay1",
              speed=8 << 20, auto_dismiss=False)
    disk.write(11)
    disk.check("while it streams")
    guest.qmp("block-job-set-speed", device="s", speed=0)
    wait_job(guest, "s", "concluded")
    guest.qmp("job-dismiss", id="s")
    disk.write(12)
    disk.check("after the stream")


def check_last(lab, disk, two):
    """The store ends under pages that share it."""
    guest = disk.guest
    two.read_pages(100, GFNS)
    two.destroy()
    reopen(guest, "off")
    lab.end_stores()
    guest.expect(GFNS, disk.pages, "pages that were shared")
    disk.check("store off for good")
