# SPDX-License-Identifier: GPL-2.0-or-later
"""The examples of the user page, as they stand there."""
import json
import shlex
import shutil
import subprocess
from pathlib import Path

from dedup import stats
from guests import WRAPPER, LinuxGuest, qemu_command
from labdom0 import Disk

BOOT = {"xen": "sharing", "timeout": 300}

EXAMPLES = Path("/t/examples")
PROGRAMS = Path("/usr/local/bin")


class Example(LinuxGuest):
    """A guest whose xl.cfg is the page's, with another name if need be."""

    def write_config(self):
        text = (EXAMPLES / "xl.cfg").read_text().replace("vm1", self.name)
        self.devices()          # finds out what the disks are called inside
        path = Path(f"/run/lab/{self.name}.cfg")
        path.write_text(text)
        print(text, flush=True)
        return path


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
    guests = [Example(lab, name, [Disk("files")]) for name in ("vm1", "vm2")]
    for guest in guests:
        make_overlay(lab, guest.name)
        shutil.copyfile("/t/guests/linux-boot.img",
                        f"/run/lab/{guest.name}-boot.img")
    lab.start_all(*guests)
    for guest in guests:
        guest.mount(guest.disks[0])
        lab.equal(guest.digest(), lab.digest(), f"{guest.name}: all files")
    lab.equal([stats(g)["group"] for g in guests], ["default"] * 2, "group")
    lab.equal([stats(g)["store"] for g in guests], ["xen"] * 2, "store")
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
              [("dedup1", "web", "off")], "the node, outside of a Xen guest")
    lab.check("device model of a Xen guest" in done.stderr, "and the warning")
