# SPDX-License-Identifier: GPL-2.0-or-later
"""The guests' boot disks: the tiny one's, and Debian's kernel on a FAT disk."""
import shutil

from . import cache, dom0

TINY_FLAGS = """
    -m32 -march=i686 -mgeneral-regs-only -ffreestanding -fno-pic -fno-pie
    -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables
    -fomit-frame-pointer -Os -Wall -Wextra -Werror
""".split()
TINY_LIMIT = 49 * 512           # the boot sector and what it loads
TINY_DISK = 1 << 20

LINUX_MODULES = ("ahci", "ata_piix", "sd_mod", "xen-blkfront", "ext4",
                 "crc32c_generic")
LINUX_APPLETS = """
    sh mount umount insmod mkdir echo cat sleep ls ln dd md5sum find sort xargs
    sync stty readlink seq cut grep hexdump cmp wc head tail rm cp printf true
    poweroff free blockdev basename tr
""".split()
# noearly and noaperture: probing for chipsets that the guest does not have
# costs tens of seconds in the emulator.
LINUX_CMDLINE = ("console=ttyS0 quiet loglevel=3 mitigations=off pci=noearly "
                 "iommu=noaperture nomodeset panic=5 tsc=reliable")
SYSLINUX = """\
DEFAULT linux
PROMPT 0
LABEL linux
  KERNEL vmlinuz
  INITRD initrd.gz
  APPEND {}
"""
# Of a guest that has PV disks, too: keep the emulated ones.
KEEP = " xen_emul_unplug=unnecessary"


def tiny(lab_dir):
    """The tiny guest's disk, as a folder with tiny-boot.img."""
    source = lab_dir / "guest"

    def make(out, log):
        for name in ("boot.S", "guest.c"):
            cache.run(log, "gcc", *TINY_FLAGS, "-c", source / name,
                      "-o", out / f"{name}.o")
        cache.run(log, "ld", "-m", "elf_i386", "-T", source / "guest.ld",
                  "-o", out / "guest.bin", out / "boot.S.o", out / "guest.c.o")
        code = (out / "guest.bin").read_bytes()
        if len(code) > TINY_LIMIT:
            raise cache.StepFailed("the tiny guest outgrew its boot sector's "
                                   "SECTORS in tests/lab/guest/boot.S")
        (out / "tiny-boot.img").write_bytes(code.ljust(TINY_DISK, b"\0"))

    return cache.step("tiny-guest", make, source)


def linux(lab_dir):
    """A folder with the kernel, the initrd, and boot disks made of them."""
    pkgs = dom0.packages()
    init = lab_dir / "linux/init"

    def make(out, log):
        dom0.make_initramfs(pkgs, init, LINUX_MODULES, LINUX_APPLETS, out, log)
        shutil.copy(dom0.kernel_image(pkgs), out / "vmlinuz")
        boot_disk(out, "linux-boot.img", LINUX_CMDLINE, log)
        boot_disk(out, "linux-both-boot.img", LINUX_CMDLINE + KEEP, log)

    return cache.step("linux-guest", make, pkgs, init,
                      lab_dir / "host/dom0.py", lab_dir / "host/guests.py")


def boot_disk(out, name, cmdline, log):
    disk, config = out / name, out / "syslinux.cfg"
    config.write_text(SYSLINUX.format(cmdline))
    cache.run(log, "truncate", "-s", "16M", disk)
    cache.run(log, "mkfs.vfat", "-F", "16", "-n", "LAB", disk)
    for source in ("vmlinuz", "initrd.gz", "syslinux.cfg"):
        cache.run(log, "mcopy", "-i", disk, out / source, f"::{source}")
    cache.run(log, "syslinux", "--install", disk)
