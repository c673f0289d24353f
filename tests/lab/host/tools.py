# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's own programs for dom0, compiled on the host."""
from . import cache

CFLAGS = ["-O2", "-g", "-Wall", "-Wextra", "-Werror"]


def programs(lab_dir):
    """The folder with what is in dom0's /t/bin."""
    dom0, guest = lab_dir / "dom0", lab_dir / "guest"

    def make(out, log):
        gcc = ["gcc", *CFLAGS, "-I", guest]
        cache.run(log, *gcc, "-shared", "-fPIC", "-o", out / "labxen.so",
                  dom0 / "labxen.c", "-lxenctrl", "-lxenforeignmemory",
                  "-lxenstore")
        cache.run(log, *gcc, "-o", out / "xen-facts", dom0 / "xen-facts.c",
                  "-lxenctrl", "-lxenforeignmemory", "-lxencall",
                  "-lxendevicemodel")

        cache.run(log, *gcc, "-shared", "-fPIC", "-o", out / "labfault.so",
                  dom0 / "labfault.c")
        cache.run(log, *gcc, "-shared", "-fPIC", "-o", out / "labcount.so",
                  dom0 / "labcount.c")

    return cache.step("dom0-tools", make, dom0 / "labxen.c",
                      dom0 / "labfault.c", dom0 / "labcount.c",
                      dom0 / "xen-facts.c", guest / "mailbox.h")
