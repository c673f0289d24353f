# SPDX-License-Identifier: GPL-2.0-or-later
"""The images that guests read, on a disk of their own.

dom0 mounts that disk as /images, so /sys/block/vdc/stat counts what is read
from the base images below everything that runs in dom0.
"""
import hashlib
import json
import os
import shutil
import sys

from . import cache, dom0

FILES_SIZE = 48 << 20           # of real files
FILES_IMAGE = "64M"
FILES_UUID = "6c616266-696c-4573-8000-000000000001"
# Real files of all kinds and sizes: libraries, programs, Python, text.
FILES_FROM = ("usr/lib/x86_64-linux-gnu", "usr/bin", "usr/lib/python3.11",
              "usr/share/perl")
XFS_SIZE = 320 << 20
IMAGES_FREE = 16 << 20          # what ext4 takes for itself, with room


def pattern(lab_dir):
    """The module that knows each block of base.raw; dom0 uses the same."""
    sys.path.insert(0, str(lab_dir / "dom0"))
    sys.dont_write_bytecode = True
    try:
        import pattern as module
    finally:
        sys.path.pop(0)
    return module


def write_base(module, path):
    with open(path, "wb") as image:
        for number in range(module.DATA_BLOCKS):
            image.write(module.block(number))
        image.truncate(module.BLOCKS * module.BLOCK)


def choose_files(root):
    """Regular files, in a fixed order, until there are enough."""
    total = 0
    for top in FILES_FROM:
        for path in sorted((root / top).rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            if total + path.stat().st_size > FILES_SIZE:
                return
            total += path.stat().st_size
            yield path


def copy_files(root, tree):
    """Copy the files and return {path: md5}; all times are the epoch."""
    manifest = {}
    for path in choose_files(root):
        name = path.relative_to(root / "usr")
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        manifest[str(name)] = hashlib.md5(path.read_bytes()).hexdigest()
    for folder, _, names in os.walk(tree, topdown=False):
        for name in names:
            os.utime(os.path.join(folder, name), (0, 0))
        os.utime(folder, (0, 0))
    return manifest


def write_files(root, out, images, log):
    """files.raw: a file system with real files, the same on each build."""
    tree = out / "tree"
    tree.mkdir()
    manifest = copy_files(root, tree)
    environment = dict(os.environ, E2FSPROGS_FAKE_TIME="1")
    cache.run(log, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096",
              "-O", "^has_journal,^metadata_csum", "-U", FILES_UUID,
              "-E", f"hash_seed={FILES_UUID},root_owner=0:0", "-d", tree,
              images / "files.raw", FILES_IMAGE, env=environment)
    shutil.rmtree(tree)
    (images / "files.json").write_text(json.dumps(manifest, indent=0))


def write_empty_xfs(images, log):
    """A file system whose files can share blocks, for dom0 to mount a copy."""
    with open(images / "empty-xfs.img", "wb") as f:
        f.truncate(XFS_SIZE)
    cache.run(log, "/sbin/mkfs.xfs", "-q", "-m", "reflink=1",
              images / "empty-xfs.img")


def write_overlays(images, log):
    """An empty overlay of each image: scenarios copy them."""
    for base in sorted(images.glob("*.raw")):
        cache.run(log, "qemu-img", "create", "-q", "-u", "-f", "qcow2",
                  "-F", "raw", "-b", f"/images/{base.name}",
                  images / f"{base.stem}.qcow2", str(base.stat().st_size))


def give_fractions(images, filesystem, log):
    """Change times with fractions of a second, as a kernel sets them.

    mke2fs copies whole seconds, which the filter takes for doubtful.
    """
    commands = "".join(f"set_inode_field /{f.name} ctime_extra {4 * 1000 * n}\n"
                       for n, f in enumerate(sorted(images.iterdir()), 1))
    script = filesystem.with_suffix(".commands")
    script.write_text(commands)
    cache.run(log, "debugfs", "-w", "-f", script, filesystem)
    script.unlink()


def disk(lab_dir):
    """The disk with all images, for dom0's /images."""
    pkgs = dom0.packages()
    source = lab_dir / "dom0/pattern.py"

    def make(out, log):
        images = out / "images"
        images.mkdir()
        write_base(pattern(lab_dir), images / "base.raw")
        write_files(pkgs / "root", out, images, log)
        write_overlays(images, log)
        write_empty_xfs(images, log)
        size = sum(f.stat().st_blocks * 512
                   for f in images.iterdir()) + IMAGES_FREE
        cache.run(log, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096",
                  "-O", "^has_journal", "-d", images, out / "images.ext4",
                  f"{size >> 10}k")
        give_fractions(images, out / "images.ext4", log)
        shutil.rmtree(images)

    return cache.step("images", make, pkgs, source) / "images.ext4"
