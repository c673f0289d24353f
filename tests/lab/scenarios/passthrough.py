# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain that may have a device passed through cannot share memory."""
import probe

BOOT = {"xen": "sharing", "iommu": True, "timeout": 90}


def run(lab):
    domid = lab.xen.create(hvm=True, iommu=True)
    probe.refused(lab, domid, "", ["store:", "passed through"])
