# SPDX-License-Identifier: GPL-2.0-or-later
"""Bad input and bad hosts: one clear error each, and nothing left behind."""
import socket
import threading

import probe
import storeclient as sc
from labdom0 import DATA_GFN, Disk
from storedaemon import SOCKETS

BOOT = {"xen": "sharing", "fast": True, "timeout": 300}

GFNS = range(DATA_GFN, DATA_GFN + 4)


def run(lab):
    guest = lab.tiny("g1")
    guest.start()
    guest.read_pages(100, GFNS)
    domid = guest.domid

    probe.refused(lab, None, "", ["store:", "device model of a Xen guest"])
    probe.refused(lab, 999, "", ["store:", "no domain 999"])
    probe.refused(lab, domid, "", ["store:", "dm_restrict"],
                  ["-xen-domid-restrict"])
    check_pv(lab)
    check_nested(lab)
    check_pod(lab)
    for name in ("a/b", ".xen", "x" * 33):
        probe.refused(lab, domid, f",group={name}", ["group:", name],
                      always=True)
    for size in (0, 6000):
        probe.refused(lab, domid, f",store-size={size}",
                      ["store-size:", str(size)], always=True)
    probe.refused(lab, domid, ",store-size=4096", ["store-size:"],
                  always=True)
    check_daemon(lab, domid)
    check_false_daemon(lab, domid)
    check_good(lab, domid)
    guest.read_pages(100, GFNS)
    guest.expect_blocks(GFNS, 100, "the guest that goes on meanwhile")
    lab.equal([guest.references(g) for g in GFNS], [2] * 4, "and shares")


def check_pv(lab):
    domid = lab.xen.create(hvm=False)
    probe.refused(lab, domid, "", ["store:", "PV guest"])
    lab.xen.destroy(domid)


def check_nested(lab):
    """Xen 4.17 would panic when it shares a page of such a guest."""
    nested = lab.tiny("nested", [Disk(filter=False)], cfg="nestedhvm = 1\n")
    nested.start(wait=False)
    probe.refused(lab, nested.domid, "", ["store:", "nestedhvm=0"])
    nested.destroy()


def check_pod(lab):
    """Xen would clear pages of such a guest although they are shared."""
    pod = lab.tiny("pod", [Disk(filter=False)], maxmem=64)
    pod.start(wait=False)
    probe.refused(lab, pod.domid, "", ["store:", "maxmem"])
    pod.destroy()


def check_daemon(lab, domid):
    """No daemon, and one of another kind."""
    probe.refused(lab, domid, ",group=nobody", ["socket:", "nobody.sock",
                                                "qemu-dedup-store"])
    lab.store("wrong", store="linux", frames=64)
    probe.refused(lab, domid, ",group=wrong", ["socket:", "Linux store"])


def check_false_daemon(lab, domid):
    """One that names a domain which is no store domain."""
    named = 0

    def serve(listener):
        while True:
            one, _ = listener.accept()
            one.recv(4096)
            one.send(sc.HEADER.pack(sc.WELCOME, 0, 0) + sc.WELCOME_BODY.pack(
                sc.VERSION, 2, 64, named, 64 << 12, 0, 0, bytes(16),
                bytes(range(16))))
            one.recv(4096)
            one.close()

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(SOCKETS / "false.sock"))
        listener.listen()
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        for named in (0, domid, 12345):
            probe.refused(lab, domid, ",group=false",
                          [f"domain {named}", "no store domain"])
    (SOCKETS / "false.sock").unlink()


def check_good(lab, domid):
    """And good input is not refused, and leaves nothing when it ends."""
    lab.store("good", options=["--size", "1M"])
    before = probe.listing(lab)
    code, text, stats = probe.run(domid, ",store=xen,group=good,"
                                         "store-size=1048576")
    lab.equal((code, text, stats["store"]), (0, "", "xen"), "a good node")
    lab.equal(probe.listing(lab), before, "nothing is left behind")
