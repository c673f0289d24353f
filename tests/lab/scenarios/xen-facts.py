# SPDX-License-Identifier: GPL-2.0-or-later
"""What the Xen store takes for granted about Xen, fact by fact."""
from labdom0 import PROGRAMS

BOOT = {"xen": "sharing", "fast": True, "timeout": 120}


def run(lab):
    one, two = lab.tiny("g1", []), lab.tiny("g2", [])
    lab.start_all(one, two)
    text = lab.run(PROGRAMS / "xen-facts", one.domid, two.domid, check=False)
    wrong = [line for line in text.splitlines() if line.startswith("WRONG")]
    lab.check("0 facts wrong" in text and not wrong,
              f"all facts hold; {'; '.join(wrong) or text[-200:]}")
    for line in text.splitlines():
        if line.startswith("cost:"):
            lab.show(line)
