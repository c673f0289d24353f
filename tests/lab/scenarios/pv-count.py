# SPDX-License-Identifier: GPL-2.0-or-later
"""What 32 MiB and more through PV disks cost, with the filter and without."""
import json

from counts import NAMES, Counts
from labdom0 import PvDisk

BOOT = {"xen": "sharing", "timeout": 400, "xen_args": "memop-max-order=8"}

ROUNDS = 3
LEAST = 32 << 20
READ = "find /mnt -type f | sort | xargs cat | wc -c"


def run(lab):
    table = {}
    for filter in ("group=default,store=xen,timeout=60", None):
        guests = [lab.pvh(f"{'with' if filter else 'out'}{i}",
                          [PvDisk("files")], filter=filter,
                          faults=Counts(f"{'with' if filter else 'out'}{i}"))
                  for i in (1, 2)]
        lab.start_all(*guests)
        for guest in guests:
            guest.mount(guest.disks[0])
        guests[0].cmd(READ, timeout=120)
        table["with" if filter else "without"] = measure(lab, guests[1])
        for guest in guests:
            guest.destroy()
    show(lab, table)


def measure(lab, guest):
    """The second guest reads all files, again and again; per round."""
    rounds = []
    for _ in range(ROUNDS):
        guest.drop_caches()
        before = guest.faults.now()
        size = int(guest.cmd(READ, timeout=120)[0])
        lab.check(size >= LEAST, f"read {size} bytes")
        after = guest.faults.now()
        rounds.append({n: after[n] - before[n] for n in NAMES})
    return rounds


def show(lab, table):
    (lab.logs / "pv-count.json").write_text(json.dumps(table, indent=2))
    lab.show(f"a PVH guest reads {LEAST >> 20} MiB and more of files that "
             f"another has read; {ROUNDS} rounds each, least to most")
    lab.show(f"{'':16} {'with the filter':>24} {'without':>24}")
    for name in NAMES:
        cells = []
        for kind in ("with", "without"):
            values = sorted(r[name] for r in table[kind])
            cells.append(f"{values[0]} - {values[-1]}")
        lab.show(f"{name:16} {cells[0]:>24} {cells[1]:>24}")
    most = max(r["copied_bytes"] for r in table["with"])
    least = min(r["copied_bytes"] for r in table["without"])
    lab.show(f"bytes copied, with the filter over without: {most / least:.4f}")
    lab.check(least >= LEAST, "without the filter all is copied")
    lab.check(most * 20 < least, "with it, next to nothing")
