# SPDX-License-Identifier: GPL-2.0-or-later
"""Xen as released, on an AMD processor, says so."""
import probe

BOOT = {"xen": "amd", "timeout": 90}


def run(lab):
    domid = lab.xen.create(hvm=True)
    probe.refused(lab, domid, "", ["store:", "Intel"])
