# SPDX-License-Identifier: GPL-2.0-or-later
"""Two Linux guests on AHCI read a file system's files without the filter."""
from labdom0 import Disk

BOOT = {"xen": "sharing", "timeout": 300}


def run(lab):
    one = lab.linux("l1", [Disk("files", filter=False)])
    two = lab.linux("l2", [Disk("files", filter=False)])
    lab.start_all(one, two)
    for guest in (one, two):
        guest.mount(guest.disks[0])
        lab.equal(guest.digest(), lab.digest(),
                  f"{guest.name}: all {len(lab.manifest())} files are right")
    overwrite(lab, one, two)


def overwrite(lab, one, two):
    """A block that one guest overwrites is the other's as it was."""
    read = "dd if=/dev/disk1 bs=4096 skip=5 count=1 2>/dev/null | md5sum"
    before = two.cmd(read)
    one.cmd("umount /mnt && yes lab | head -c 4096 | "
            "dd of=/dev/disk1 bs=4096 seek=5 conv=notrunc 2>/dev/null; sync")
    for guest in (one, two):
        guest.drop_caches()
    lab.check(one.cmd(read) != before, "the writer has its own block")
    lab.equal(two.cmd(read), before, "the other one has the image's")
