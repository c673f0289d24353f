# SPDX-License-Identifier: GPL-2.0-or-later
"""The examples of the user page, as they stand there."""
import json
import shlex
import shutil
import subprocess
from pathlib import Path

from dedup import stats
from guests import WRAPPER, LinuxGuest, PvGuest, PvhGuest, qemu_command
from labdom0 import Disk, PvDisk

BOOT = {"xen": "sharing", "timeout": 590}

EXAMPLES = Path("/t/examples")
PROGRAMS = Path("/usr/local/bin")


class Example:
    """A guest whose xl.cfg is the page's, with another name if need be."""
    example = original = None

    def write_config(self):
        text = (EXAMPLES / self.example).read_text().replace(self.original,
                                                             self.name)
        self.devices()          # finds out what the disks are called inside
        path = Path(f"/run/lab/{self.name}.cfg")
        path.write_text(text)
        print(text, flush=True)
        return path


class Emulated(Example, LinuxGuest):
    example, original = "xl.cfg", "vm1"


class Pv(Example, PvGuest):
    example, original = "pv.cfg", "vm3"


class Pvh(Example, PvhGuest):
    example, original = "pvh.cfg", "vm5"


def install():
    """The programs where the page expects them."""
    q = qemu_command()
    for name in ("qemu-system-x86_64", "qemu-img"):
        path = PROGRAMS / name
        options = q["firmware"] if name.startswith("qemu-system") else ""
        path.write_text(WRAPPER.format(
            prefix="", qemu=q["qemu"].with_name(name), firmware=options,
            environment=q["environment"]))
        path.chmod(0o755)


def make_overlay(lab, name):
    command = (EXAMPLES / "overlay").read_text().replace("vm1", name)
    lab.run("sh", "-ec", f"PATH={PROGRAMS}:$PATH; {command.removeprefix('$ ')}")


def run(lab):
    install()
    check_arguments(lab)
    for name in ("vmlinuz", "initrd.gz"):
        shutil.copyfile(f"/t/guests/{name}", f"/run/lab/{name}")
    for kind, disk, names in ((Emulated, Disk, ("vm1", "vm2")),
                              (Pv, PvDisk, ("vm3", "vm4")),
                              (Pvh, PvDisk, ("vm5", "vm6"))):
        guests = [kind(lab, name, [disk("files")]) for name in names]
        check_guests(lab, guests)
        for guest in guests:
            guest.destroy()


def check_guests(lab, guests):
    for guest in guests:
        make_overlay(lab, guest.name)
        shutil.copyfile("/t/guests/linux-boot.img",
                        f"/run/lab/{guest.name}-boot.img")
    lab.start_all(*guests)
    for guest in guests:
        guest.mount(guest.disks[0])
        lab.equal(guest.digest(), lab.digest(), f"{guest.name}: all files")
        s = stats(guest, guest.disks[0].node)
        lab.equal((s["group"], s["store"]), ("default", "xen"), "its filter")
    shared = [g.shared() for g in guests]
    lab.check(min(shared) > 8192, f"pages shared: {shared}")


def check_arguments(lab):
    """The -blockdev example makes the node that it says."""
    make_overlay(lab, "vm1")
    words = shlex.split((EXAMPLES / "arguments").read_text()
                        .replace("\\\n", " "))
    talk = '{"execute":"qmp_capabilities"}{"execute":"query-dedup-stats"}' \
           '{"execute":"quit"}'
    done = subprocess.run(
        [PROGRAMS / "qemu-system-x86_64", "-M", "q35", "-accel", "qtest",
         "-display", "none", "-qmp", "stdio", *words], input=talk,
        text=True, capture_output=True, timeout=60, check=False)
    print(done.stdout, done.stderr, flush=True)
    found = [json.loads(line)["return"] for line in done.stdout.splitlines()
             if '"node-name"' in line]
    lab.equal([(s["node-name"], s["group"], s["store"]) for s in found[0]],
              [("dedup1", "web", "linux")], "the node, outside of a Xen guest")
