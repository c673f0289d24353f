# SPDX-License-Identifier: GPL-2.0-or-later
"""The same with PV disks: the guests boot from emulated ones and go on."""
import measure
from labdom0 import PvDisk

BOOT = {"xen": "sharing", "timeout": 590,
        "xen_args": "memop-max-order=8"}


def run(lab):
    measure.run(lab, [lab.pv(name, [PvDisk("files"), PvDisk(None)])
                      for name in ("pv1", "pv2")])
