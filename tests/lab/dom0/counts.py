# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device model asks of Xen; see labcount.c."""
import struct

from disks import SCRATCH

NAMES = ("hypercalls", "system_calls", "copied_segments", "copied_bytes")


class Counts:
    """Give it to a guest as its faults: lab.pvh("g1", faults=Counts("g1"))."""

    def __init__(self, name):
        self.path = SCRATCH / f"{name}.count"
        self.path.write_bytes(bytes(4096))

    def environment(self):
        return (f"export LABCOUNT={self.path} "
                "LD_PRELOAD=/t/bin/labcount.so")

    def now(self):
        return dict(zip(NAMES, struct.unpack("<4Q",
                                             self.path.read_bytes()[:32])))
