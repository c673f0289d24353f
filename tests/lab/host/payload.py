# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 runs: scenarios, programs, guests and the device model under test.

An ext4 image that dom0 mounts read-only as /t.
"""
import shutil
import subprocess
from pathlib import Path

from . import cache, dom0, examples, guests, tools

FREE = 8 << 20
QEMU = "qemu-system-x86_64"
STORE_DAEMON = "dedup-store/qemu-dedup-store"


def has_filter(qemu):
    """Whether a QEMU binary knows our block driver."""
    binary = qemu / QEMU if qemu else None
    return bool(binary) and b"dedup-share" in binary.read_bytes()


def libraries(binary, root):
    """The shared libraries of a binary that dom0's packages do not bring."""
    shown = subprocess.run(["ldd", binary], check=True, text=True,
                           capture_output=True).stdout
    for line in shown.splitlines():
        if "not found" in line:
            raise cache.StepFailed(f"{binary}: {line.strip()}")
        if "=>" in line:
            path = Path(line.split("=>")[1].split()[0])
            places = (root / "usr/lib/x86_64-linux-gnu", root / "usr/lib")
            if not any((p / path.name).exists() for p in places):
                yield path


def device_model(qemu, root):
    """A folder with the stripped device model, qemu-img and libraries."""
    binaries = [qemu / name for name in (QEMU, "qemu-img", "qemu-io",
                                         STORE_DAEMON)
                if (qemu / name).exists()]

    def make(out, log):
        (out / "lib").mkdir()
        for binary in binaries:
            target = out / binary.name
            cache.run(log, "strip", "-g", "-o", target, binary)
            for library in libraries(binary, root):
                shutil.copy(library, out / "lib" / library.name)

    return cache.step("device-model", make, root.parent.name, *binaries)


def copy_python(source, target):
    target.mkdir()
    for f in source.iterdir():
        if f.is_file():
            shutil.copy(f, target / f.name)


def image(lab_dir, qemu):
    """The payload; qemu is a build folder, or None for Debian's own."""
    root = dom0.packages() / "root"
    programs = tools.programs(lab_dir)
    linux = guests.linux(lab_dir)
    boot_disks = [guests.tiny(lab_dir) / "tiny-boot.img",
                  *(linux / name for name in
                    ("linux-boot.img", "linux-both-boot.img", "vmlinuz",
                     "initrd.gz"))]
    model = device_model(qemu, root) if qemu else None
    page = lab_dir.parent.parent / "docs/system/dedup-share.rst"
    client = lab_dir.parent / "hostile/client.py"

    def make(out, log):
        tree = out / "tree"
        tree.mkdir()
        copy_python(lab_dir / "dom0", tree / "dom0")
        shutil.copy(client, tree / "dom0" / "storeclient.py")
        copy_python(lab_dir / "scenarios", tree / "scenarios")
        shutil.copytree(programs, tree / "bin")
        examples.write(page, tree / "examples")
        (tree / "guests").mkdir()
        for disk in boot_disks:
            shutil.copy(disk, tree / "guests" / disk.name)
        if model:
            shutil.copytree(model, tree / "dm")
        size = sum(f.stat().st_size for f in tree.rglob("*") if f.is_file())
        cache.run(log, "mke2fs", "-q", "-F", "-t", "ext4", "-O",
                  "^has_journal", "-d", tree, out / "payload.ext4",
                  f"{(size + size // 10 + FREE) >> 10}k")
        shutil.rmtree(tree)

    return cache.step("payload", make, lab_dir / "dom0",
                      lab_dir / "scenarios", page, client, programs, *boot_disks,
                      model or "Debian's") / "payload.ext4"
