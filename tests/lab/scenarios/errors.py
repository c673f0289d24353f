# SPDX-License-Identifier: GPL-2.0-or-later
"""Bad input and bad hosts: one clear error each, and nothing left behind."""
import hashlib
import os
import struct

import probe
from labdom0 import DATA_GFN, Disk

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
    check_orphan(lab, domid)
    for name in ("a/b", ".xen", "x" * 33):
        probe.refused(lab, domid, f",group={name}", ["group:", name])
    for size in (0, 6000, 1 << 45):
        probe.refused(lab, domid, f",group=new,store-size={size}",
                      ["store-size:", str(size)])
    check_index_dir(lab, domid)
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


def check_orphan(lab, domid):
    """A store domain whose QEMU was killed before it made an index."""
    group = probe.INDEX_DIR / "orphan"
    group.mkdir(mode=0o700)
    st = group.stat()
    uuid = bytearray(hashlib.sha256(b"dedup-share" + struct.pack(
        "=QQ", st.st_dev, st.st_ino)).digest()[:16])
    uuid[6] = uuid[6] & 0x0f | 0x80
    uuid[8] = uuid[8] & 0x3f | 0x80
    orphan = lab.xen.create(hvm=True, uuid=bytes(uuid))
    other = lab.xen.create(hvm=True)
    code, text, stats = probe.run(domid, ",store=xen,group=orphan,"
                                         "store-size=1048576")
    lab.equal((code, text, stats["store"]), (0, "", "xen"), "its group works")
    lab.equal((lab.xen.domain(orphan), lab.xen.domain(other) is not None),
              (None, True), "the orphan is gone, the other domain is not")
    lab.xen.destroy(other)
    lab.check(not group.exists(), "its folder is gone")


def header(magic, version):
    return struct.pack("<QI", magic, version) + bytes(8192 - 12)


def check_index_dir(lab, domid):
    """A group's directory that is not as we would have made it."""
    group = probe.INDEX_DIR / "bad"
    group.mkdir(mode=0o700)
    where = ["index-dir:", str(group)]

    os.chown(group, 1000, -1)
    probe.refused(lab, domid, ",group=bad", [*where, "user 1000"])
    os.chown(group, 0, -1)
    group.chmod(0o755)
    probe.refused(lab, domid, ",group=bad", [*where, "mode 0755"])
    group.chmod(0o700)
    (group / "notes.txt").write_text("mine")
    (group / "lock").touch(0o600)
    probe.refused(lab, domid, ",group=bad", [*where, "notes.txt"])
    lab.equal((group / "notes.txt").read_text(), "mine", "it is untouched")
    (group / "notes.txt").unlink()

    magic = 0x58444950554445
    (group / "index").write_bytes(header(magic, 77 | (0xffff & ~77) << 16))
    probe.refused(lab, domid, ",group=bad", [*where, "another version"])
    for content in (b"short", header(1, 1), header(magic, 3)):
        group.mkdir(mode=0o700, exist_ok=True)
        (group / "index").write_bytes(content)
        code, text, stats = probe.run(domid, ",store=xen,group=bad")
        lab.equal((code, stats["store"]), (0, "xen"),
                  "a damaged index is dropped")
        lab.check(str(group) in text, f"with a warning: {text}")
    probe.refused(lab, domid, ",index-dir=/t/not-tmpfs", ["index-dir:",
                                                          "tmpfs"])
    probe.refused(lab, domid, ",index-dir=relative", ["index-dir:",
                                                      "absolute"])


def check_good(lab, domid):
    """And good input is not refused, and leaves nothing when it ends."""
    before = probe.listing(lab)
    code, text, stats = probe.run(domid, ",store=xen,group=good,"
                                         "store-size=1048576")
    lab.equal((code, text, stats["store"]), (0, "", "xen"), "a good node")
    lab.equal(probe.listing(lab), before, "nothing is left behind")
