# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0: a Debian root image, its kernel, and an initramfs that finds it."""
import shutil
import subprocess
from pathlib import Path

from . import cache

SUITE = "bookworm"
PACKAGES = """
    xen-utils-4.17 xen-utils-common xenstore-utils
    qemu-system-xen seabios qemu-system-data
    kmod busybox-static python3 strace
""".split()
# What to leave out of the image: nobody reads it there, and it is half of it.
EXCLUDE = ("doc", "locale", "man", "info", "icons", "bash-completion")
IMAGE_SIZE = "768M"

INITRAMFS_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
ROOT_MODULES = ("xen-gntdev", "xen-gntalloc", "xen-evtchn", "xen-privcmd",
                "xenfs", "9pnet_virtio", "9p", "loop", "tun", "bridge",
                "xfs")
APPLETS = "sh mount insmod switch_root mkdir echo cat sleep ls umount".split()


def apt_lines():
    """The system's own Debian lines for our suite, one-line format."""
    base = Path("/etc/apt")
    files = [base / "sources.list", *base.glob("sources.list.d/*.list")]
    lines = [line for f in files if f.exists()
             for line in f.read_text().splitlines() if line.startswith("deb ")]
    for f in base.glob("sources.list.d/*.sources"):
        for stanza in f.read_text().split("\n\n"):
            lines += stanza_lines(stanza)
    lines = [line for line in lines if SUITE in line and "-backports" not in line]
    if not lines:
        raise cache.StepFailed(f"no line for {SUITE} in this system's apt "
                               "sources; the lab builds Debian 12 images")
    return lines


def stanza_lines(stanza):
    fields = dict(line.split(":", 1) for line in stanza.splitlines()
                  if ":" in line and line[0] not in "# \t")
    if "deb" not in fields.get("Types", "").split():
        return []
    return [f"deb {uri} {suite} {fields.get('Components', 'main').strip()}"
            for uri in fields.get("URIs", "").split()
            for suite in fields.get("Suites", "").split()]


def versions():
    """The packages' versions, where apt knows them; part of the key."""
    try:
        return subprocess.run(
            ["apt-cache", "madison", *PACKAGES, "linux-image-amd64"], text=True,
            check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


# Runs in mmdebstrap's own apt configuration, so it needs no list of the host.
# The kernel is unpacked, not installed: no initramfs-tools, no boot loader.
FETCH_KERNEL = r"""
set -e; export APT_CONFIG=$MMDEBSTRAP_APT_CONFIG
k=$(apt-cache depends linux-image-amd64 |
    awk '/Depends: linux-image/ { print $2; exit }')
cd "$1"/.. && apt-get download -qq "$k"
"""


def packages():
    """The folder with `root` (a Debian tree) and `kernel` (unpacked)."""
    def make(out, log):
        root = out / "root"
        options = [f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in EXCLUDE]
        sources = out / "sources.list"
        sources.write_text("\n".join(apt_lines()) + "\n")
        cache.run(log, "mmdebstrap", "--variant=minbase", *options,
                  "--include=" + ",".join(PACKAGES),
                  f"--customize-hook={FETCH_KERNEL}", SUITE, root, sources)
        for deb in out.glob("linux-image-*.deb"):
            cache.run(log, "dpkg-deb", "-x", deb, out / "kernel")
            deb.unlink()
        for junk in ("var/lib/apt/lists", "var/cache/apt", "var/cache/debconf"):
            shutil.rmtree(root / junk, ignore_errors=True)
        cache.run(log, "depmod", "-b", out / "kernel", kernel_version(out))

    return cache.step("packages", make, SUITE, *PACKAGES, versions())


def kernel_version(pkgs):
    return next((pkgs / "kernel/lib/modules").iterdir()).name


def kernel_image(pkgs):
    return next((pkgs / "kernel/boot").glob("vmlinuz-*"))


def module_files(pkgs, names):
    """The files of modules and of all that they need, in loading order."""
    files = []
    for name in names:
        shown = subprocess.run(
            ["modprobe", "-d", pkgs / "kernel", "-S", kernel_version(pkgs),
             "--show-depends", name], check=True, text=True,
            capture_output=True).stdout
        for line in shown.splitlines():
            word = line.split()
            if word[0] == "insmod" and Path(word[1]) not in files:
                files.append(Path(word[1]))
    return files


def make_initramfs(pkgs, init, modules, applets, out, log):
    """A gzipped initramfs: busybox, /init, and modules listed in /modules."""
    tree = out / "initramfs"
    for d in ("bin", "m", "proc", "sys", "dev", "newroot", "mnt"):
        (tree / d).mkdir(parents=True)
    shutil.copy(pkgs / "root/bin/busybox", tree / "bin/busybox")
    for applet in applets:
        (tree / "bin" / applet).symlink_to("busybox")
    files = module_files(pkgs, modules)
    for f in files:
        shutil.copy(f, tree / "m" / f.name)
    (tree / "modules").write_text("".join(f"{f.name}\n" for f in files))
    shutil.copy(init, tree / "init")
    (tree / "init").chmod(0o755)
    cache.run(log, "sh", "-c", f"cd '{tree}' && find . | sort | "
              f"cpio -o -H newc --quiet | gzip -n1 > '{out}/initrd.gz'")
    shutil.rmtree(tree)


def initramfs(lab_dir):
    pkgs = packages()
    init = lab_dir / "dom0/initramfs-init"

    def make(out, log):
        make_initramfs(pkgs, init, INITRAMFS_MODULES, APPLETS, out, log)

    return cache.step("dom0-initrd", make, pkgs, init) / "initrd.gz"


def add_modules(pkgs, root):
    version = kernel_version(pkgs)
    source = pkgs / "kernel/lib/modules" / version
    target = root / "lib/modules" / version
    target.mkdir(parents=True)
    for f in module_files(pkgs, ROOT_MODULES):
        place = target / f.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, place)
    for f in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(source / f, target / f)
    return version


def image(lab_dir):
    """dom0's root file system; what changes often comes in the payload."""
    pkgs = packages()
    init = lab_dir / "dom0/labinit"

    def make(out, log):
        root = out / "root"
        cache.run(log, "cp", "-al", pkgs / "root", root)
        cache.run(log, "depmod", "-b", root, add_modules(pkgs, root))
        shutil.copy(init, root / "sbin/labinit")
        (root / "sbin/labinit").chmod(0o755)
        for d in ("t", "images", "logs"):
            (root / d).mkdir()
        cache.run(log, "mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal",
                  "-d", root, out / "dom0.ext4", IMAGE_SIZE)
        shutil.rmtree(root)

    return cache.step("dom0-image", make, pkgs, init) / "dom0.ext4"
