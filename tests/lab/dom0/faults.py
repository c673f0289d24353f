# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules for a program whose calls to Xen are to fail; see labfault.c."""
import ctypes
import mmap
from ctypes import c_int32, c_uint32

from disks import SCRATCH

(NOMINATE, SHARE, COUNT, MULTICALL, STORE_POPULATE, STORE_MAP, PRIVATE,
 PAUSE) = range(1, 9)
RULES = 4


class Rule(ctypes.Structure):
    _fields_ = [("kind", c_uint32), ("result", c_int32),
                ("delay_ms", c_uint32), ("skip", c_uint32),
                ("count", c_uint32), ("done", c_uint32)]


class Faults:
    """Give it to a guest, as lab.tiny("g1", faults=Faults("g1")), or a store."""

    def __init__(self, name):
        self.path = SCRATCH / f"{name}.fault"
        self.path.write_bytes(bytes(mmap.PAGESIZE))
        with open(self.path, "r+b") as f:
            self.memory = mmap.mmap(f.fileno(), mmap.PAGESIZE)
        self.rules = (Rule * RULES).from_buffer(self.memory)

    def variables(self):
        return {"LABFAULT": str(self.path),
                "LD_PRELOAD": "/t/bin/labfault.so"}

    def environment(self):
        return "export " + " ".join(f"{name}={value}" for name, value
                                    in self.variables().items())

    def set(self, *rules):
        """Each rule: a kind, and fields of Rule.  None: no faults."""
        for i in range(RULES):
            self.rules[i].kind = 0
        for slot, (kind, fields) in zip(self.rules, rules):
            for name, value in {"result": 0, "delay_ms": 0, "skip": 0,
                                "count": 1 << 30, "done": 0,
                                **fields}.items():
                setattr(slot, name, value)
            slot.kind = kind

    def done(self):
        return [r.done for r in self.rules]
