# SPDX-License-Identifier: GPL-2.0-or-later
"""Two Linux guests on AHCI read the files of one image."""
import measure
from labdom0 import Disk

BOOT = {"xen": "sharing", "timeout": 590,
        "xen_args": "memop-max-order=8"}


def run(lab):
    measure.run(lab, [lab.linux(name, [Disk("files"), Disk("base", filter=False)])
                      for name in ("vm1", "vm2")])
