# SPDX-License-Identifier: GPL-2.0-or-later
"""A PV disk comes and goes; a guest uses both kinds of disk at once."""
import shutil

from dedup import Change, stats
from disks import IMAGES, SCRATCH
from labdom0 import Disk, PvDisk

BOOT = {"xen": "sharing", "timeout": 400}


def run(lab):
    both = lab.pv("both", [Disk("files"), PvDisk("files")], keep=True)
    other = lab.pvh("other", [PvDisk("files")])
    lab.start_all(both, other)
    emulated, pv = both.disks
    both.mount(emulated, "/mnt")
    lab.equal(both.digest("/mnt"), lab.digest(), "by the emulated disk")

    change = Change(both, pv.node)
    both.mount(pv, "/pv")
    lab.equal(both.digest("/pv"), lab.digest(), "by the PV disk")
    # the kernel reads a little further ahead on the one than on the other
    hit, missed = change.of("blocks-hit", "blocks-missed")
    lab.check(hit > 8192 and missed < hit // 100,
              f"what one disk read is the other's: {hit} hit, {missed} missed")
    lab.equal(sorted(s["node-name"] for s in both.qmp("query-dedup-stats")),
              sorted([emulated.node, pv.node]), "its filters")
    check_plug(lab, other)


def check_plug(lab, guest):
    """xl block-attach and block-detach."""
    path = SCRATCH / "later.qcow2"
    shutil.copyfile(IMAGES / "files.qcow2", path)
    node = "xvdh-qcow2-dedup-share"
    guest.mount(guest.disks[0], "/mnt")
    lab.equal(guest.digest("/mnt"), lab.digest(), "the disk that was there")
    for _ in range(2):
        lab.run("xl", "block-attach", guest.domid,
                f"format=qcow2,vdev=xvdh,access=rw,backendtype=qdisk,"
                f"target={path}")
        guest.cmd("for i in $(seq 100); do [ -b /dev/xvdh ] && break; "
                  "sleep 0.1; done")
        lab.equal(stats(guest, node)["store"], "xen", "it has a filter")
        change = Change(guest, node)
        guest.cmd("mkdir -p /later; "
                  "mount -t ext4 -o ro,noload /dev/xvdh /later")
        lab.equal(guest.digest("/later"), lab.digest(), "the new disk")
        lab.check(change.of("blocks-given") > 8192, "its blocks are given")
        guest.cmd("umount /later")
        lab.run("xl", "block-detach", guest.domid, "xvdh")
        lab.eventually(lambda: node not in
                       [s["node-name"] for s
                        in guest.qmp("query-dedup-stats")], "the filter is gone")
    guest.drop_caches()
    lab.equal(guest.digest("/mnt"), lab.digest(), "the disk that stayed")
