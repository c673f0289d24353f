# SPDX-License-Identifier: GPL-2.0-or-later
"""A Xen built without memory sharing says so."""
import probe

BOOT = {"xen": "nosharing", "timeout": 90}


def run(lab):
    domid = lab.xen.create(hvm=True)
    probe.refused(lab, domid, "", ["store:", "CONFIG_MEM_SHARING"])
