# SPDX-License-Identifier: GPL-2.0-or-later
"""The same with PVH guests, which have nothing but PV disks."""
import measure
from labdom0 import PvDisk

BOOT = {"xen": "sharing", "timeout": 590,
        "xen_args": "memop-max-order=8"}


def run(lab):
    measure.run(lab, [lab.pvh(name, [PvDisk("files"), PvDisk(None)])
                      for name in ("pvh1", "pvh2")])
