# SPDX-License-Identifier: GPL-2.0-or-later
"""HVM guests of a scenario: their life, their device model, its monitor."""
import json
import os
import signal
import socket
import subprocess
import threading
import time
import tty
from pathlib import Path

from checks import CheckFailed, LostRun
from disks import SCRATCH, BootDisk

XL_CFG = """\
type = "{type}"
name = "{name}"
memory = {memory}
maxmem = {maxmem}
vcpus = 1
tsc_mode = "native"
{kind}on_crash = "preserve"
on_reboot = "preserve"
disk = [
{disks}
]
device_model_override = "{wrapper}"
device_model_args{suffix} = [
{arguments}
]
{extra}"""

HVM_CFG = """\
hap = 1
nographic = 1
vnc = 0
sdl = 0
vga = "none"
usb = 0
vkb_device = 0
xen_platform_pci = {platform_pci}
serial = "{serial}"
"""

PVH_CFG = """\
kernel = "/t/guests/vmlinuz"
ramdisk = "/t/guests/initrd.gz"
cmdline = "{cmdline}"
"""

# The lab's device model is not installed: it needs its libraries and firmware
# named.  `exec` keeps the process that libxl knows as the device model.
WRAPPER = """\
#!/bin/bash
{environment}
exec {prefix} {qemu} {firmware} "$@"
"""
QEMU = Path("/t/dm/qemu-system-x86_64")
DEBIAN_QEMU = "/usr/libexec/xen-qemu-system-i386"
FIRMWARE = "-L /t/dm/share -L /usr/share/qemu -L /usr/share/seabios"

LIST_SUMS = "find . -type f | sort | xargs md5sum"


def xl_list(items):
    """The inside of a list in xl.cfg."""
    return ",\n".join(f'    "{item}"' for item in items)


def qemu_command():
    """The device model: the payload's, or Debian's if there is none."""
    if QEMU.exists():
        return {"qemu": QEMU, "firmware": FIRMWARE,
                "environment": "export LD_LIBRARY_PATH=/t/dm/lib"}
    return {"qemu": DEBIAN_QEMU, "firmware": "", "environment": ""}


class Guest:
    """What tiny and Linux guests have in common.

    dm_prefix runs the device model under a command, as in
    ["strace", "-f", "-c", "-o", "/logs/strace"]; cfg is text for the end of
    xl.cfg; dm_args go to the device model as they are; faults is a
    faults.Faults, or a counts.Counts.
    """
    type = "hvm"
    memory = 32
    platform_pci = 0
    boot_image = None
    up_timeout = 90

    def __init__(self, lab, name, disks=(), memory=None, dm_prefix=(),
                 dm_args=(), cfg="", faults=None, maxmem=None):
        self.lab = lab
        self.xen = lab.xen
        self.name = name
        self.memory = memory or self.memory
        self.maxmem = maxmem or self.memory
        self.boot = BootDisk(self.boot_image) if self.boot_image else None
        self.disks = list(disks)
        self.dm_prefix, self.dm_args = list(dm_prefix), list(dm_args)
        self.cfg = cfg
        self.faults = faults
        self.domid = None
        self.qmp_path = SCRATCH / f"{name}.qmp"
        self.serial_path = SCRATCH / f"{name}.serial"

    # to be said by the kinds of guests

    def serial(self):
        raise NotImplementedError

    def devices(self):
        """-device arguments, one for each of self.boot and self.disks."""
        raise NotImplementedError

    def poll_up(self):
        """Whether the guest is up."""
        raise NotImplementedError

    def connect(self):
        """Called once the domain exists."""

    def groups(self):
        """The groups of its filters."""
        return {disk.options["group"] for disk in self.disks
                if getattr(disk, "filter", False) and
                disk.options["store"] == "xen"}

    # life

    def kind(self):
        """What xl.cfg says of an HVM guest."""
        return HVM_CFG.format(serial=self.serial(),
                              platform_pci=self.platform_pci)

    def all_disks(self):
        return [self.boot, *self.disks] if self.boot else self.disks

    def arguments(self):
        args = ["-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        for disk in self.all_disks():
            for made in disk.objects():
                args += ["-object", made]
            for node in disk.blockdevs():
                args += ["-blockdev", node]
        for device in self.devices():
            args += ["-device", device]
        return args + self.dm_args

    def write_config(self):
        wrapper = SCRATCH / f"{self.name}.dm"
        q = qemu_command()
        if self.faults:
            q["environment"] += "\n" + self.faults.environment()
        wrapper.write_text(WRAPPER.format(prefix=" ".join(self.dm_prefix),
                                          **q))
        wrapper.chmod(0o755)
        config = XL_CFG.format(
            name=self.name, memory=self.memory, maxmem=self.maxmem,
            type=self.type,
            kind=self.kind(), wrapper=wrapper, extra=self.cfg,
            suffix="_hvm" if self.type == "hvm" else "",
            disks=xl_list(d.xl() for d in self.disks if hasattr(d, "xl")),
            arguments=xl_list(self.arguments()))
        path = SCRATCH / f"{self.name}.cfg"
        path.write_text(config)
        print(f"--- {path}\n{config}---", flush=True)
        return path

    def create(self):
        """xl create; returns its exit code and all that was said."""
        if self.boot:
            self.boot.prepare(self.name, 0)
        for number, disk in enumerate(self.disks, 1):
            disk.prepare(self.name, number)
        for group in self.groups():
            self.lab.need_store(group)
        for stale in (self.qmp_path, self.serial_path):
            stale.unlink(missing_ok=True)
        done = subprocess.run(["xl", "create", "-e", self.write_config()],
                              text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False)
        print(done.stdout, flush=True)
        if done.returncode == 0:
            self.domid = self.xen.domid(self.name)
            self.connect()
        return done.returncode, done.stdout + self.dm_log()

    def start(self, wait=True):
        code, text = self.create()
        if code:
            raise CheckFailed(f"xl create {self.name} failed:\n{text}")
        if wait:
            self.wait_up()
        return self

    def wait_up(self):
        end = time.monotonic() + self.up_timeout
        while not self.poll_up():
            self.fail_if_dead("did not come up")
            if time.monotonic() > end:
                raise LostRun(f"{self.name} did not come up in "
                              f"{self.up_timeout} s")
            time.sleep(0.1)
        self.lab.note(f"{self.name} is up, domain {self.domid}")

    def fail_if_dead(self, what):
        info = self.info()
        if info is None or info.crashed or info.shutdown or info.dying:
            raise CheckFailed(f"{self.name} {what}: {info or 'no domain'}\n"
                              + self.dm_log())
        if not self.dm_alive():
            raise CheckFailed(f"{self.name} {what}: no device model\n"
                              + self.dm_log())

    def destroy(self):
        if self.domid is not None:
            subprocess.run(["xl", "destroy", str(self.domid)], check=False)
        self.disconnect()
        self.domid = None

    def disconnect(self):
        """Called before the guest is forgotten."""

    # what Xen says about it

    def info(self):
        return self.xen.domain(self.domid)

    def shared(self):
        """How many of its pages are shared."""
        return self.info().shared

    def references(self, gfn):
        return self.xen.references(self.domid, gfn)

    def peek(self, gfn):
        return self.xen.peek(self.domid, gfn)

    # its device model

    def dm_pid(self):
        path = f"/local/domain/{self.domid}/image/device-model-pid"
        return int(self.xen.xenstore(path))

    def dm_log(self):
        log = Path(f"/var/log/xen/qemu-dm-{self.name}.log")
        return log.read_text(errors="replace") if log.exists() else ""

    def dm_alive(self):
        try:
            stat = Path(f"/proc/{self.dm_pid()}/stat").read_text()
        except OSError:
            return False
        return stat.rsplit(")", 1)[1].split()[0] != "Z"

    def kill_dm(self, wait=True):
        """kill -9 the device model, as a crash of it would."""
        os.kill(self.dm_pid(), signal.SIGKILL)
        end = time.monotonic() + 10
        while wait and self.dm_alive():
            if time.monotonic() > end:
                raise CheckFailed(f"device model of {self.name} outlives -9")
            time.sleep(0.02)

    def qmp(self, command, **arguments):
        """One QMP command; "_" in argument names stands for "-"."""
        arguments = {k.replace("_", "-"): v for k, v in arguments.items()}
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(self.qmp_path))
            stream = connection.makefile("rw")
            stream.readline()
            self.qmp_exchange(stream, {"execute": "qmp_capabilities"})
            return self.qmp_exchange(stream, {"execute": command,
                                              "arguments": arguments})

    def qmp_exchange(self, stream, message):
        stream.write(json.dumps(message) + "\n")
        stream.flush()
        while True:
            reply = json.loads(stream.readline())
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise CheckFailed(f"{self.name}: {message['execute']}: "
                                  f"{reply['error']['desc']}")

    def hmp(self, line):
        return self.qmp("human-monitor-command", command_line=line)

    def disk_stats(self, disk):
        """What a disk's device has asked for.  (Nodes below a device count
        nothing in QEMU; see Lab.image_bytes() for what is read in the end.)
        """
        for entry in self.qmp("query-blockstats"):
            if entry.get("node-name") == disk.node:
                return entry["stats"]
        raise CheckFailed(f"{self.name} has no disk {disk.node}")


class LinuxGuest(Guest):
    """Debian's kernel and busybox; disks on AHCI; a shell on the console."""
    memory = 160
    boot_image = "linux-boot.img"
    up_timeout = 240

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.console = None
        self.received = b""
        self.lock = threading.Condition()

    def serial(self):
        return f"unix:{self.serial_path},server=on,wait=off"

    def devices(self):
        devices = ["ahci,id=ahci1",
                   f"ide-hd,bus=ahci1.0,drive={self.boot.node},bootindex=1"]
        for port, disk in enumerate(self.disks, 1):
            if not hasattr(disk, "xl"):
                disk.drive = f"/dev/disk{port}"
                devices.append(f"ide-hd,bus=ahci1.{port},drive={disk.node}")
        return devices

    def connect(self):
        self.console = socket.socket(socket.AF_UNIX)
        self.console.connect(str(self.serial_path))
        threading.Thread(target=self.listen, args=(self.console,),
                         daemon=True).start()

    def disconnect(self):
        if self.console:
            self.console.close()

    def listen(self, console):
        """Keep reading, or the guest would wait for us; and log it all."""
        with open(self.lab.logs / f"{self.name}-console.log", "wb") as log:
            while True:
                try:
                    data = console.recv(4096)
                except OSError:
                    return
                if not data:
                    return
                log.write(data)
                log.flush()
                with self.lock:
                    self.received += data.replace(b"\r", b"")
                    self.lock.notify_all()

    def poll_up(self):
        with self.lock:
            up = b"LAB GUEST UP" in self.received
            end = self.received.find(b"\n", self.received.rfind(b"LAB GUEST"))
            if up and end >= 0:
                self.received = self.received[end + 1:]
            return up and end >= 0

    def send(self, line):
        self.console.sendall(line.encode() + b"\n")

    def reply(self, timeout=60):
        """The reply to what was sent: its lines, and its exit code."""
        end = time.monotonic() + timeout
        with self.lock:
            while True:
                head, mark, tail = self.received.partition(b"LAB-END ")
                if mark and b"\n" in tail:
                    code, self.received = tail.split(b"\n", 1)
                    return head.decode(errors="replace").splitlines(), int(code)
                if time.monotonic() > end:
                    break
                self.lock.wait(1)
        self.fail_if_dead("died")
        raise CheckFailed(f"{self.name} did not answer in {timeout} s; "
                          f"so far: {self.received[-300:]!r}")

    def cmd(self, line, timeout=60, check=True):
        """Run a shell line in the guest; returns the lines it wrote."""
        self.send(line)
        lines, code = self.reply(timeout)
        if check and code:
            raise CheckFailed(f"{self.name}: {line!r} failed with {code}: "
                              + "\n".join(lines))
        return lines

    def mount(self, disk, where="/mnt"):
        self.cmd(f"mkdir -p {where} && "
                 f"mount -t ext4 -o ro,noload {disk.drive} {where}")

    def digest(self, where="/mnt", timeout=180):
        """One checksum of all files below a folder, names and contents.

        Compare it with Lab.digest().  (The console carries a thousand bytes
        a second: too slow for the list itself.)
        """
        return self.cmd(f"cd {where}; {LIST_SUMS} | md5sum; cd /",
                        timeout)[0].split()[0]

    def drop_caches(self):
        self.cmd("sync; echo 3 > /proc/sys/vm/drop_caches")


class PvGuest(LinuxGuest):
    """Boots from the emulated disk and goes on with xen-blkfront.

    filter: the options of the filter over its PV disks, or None.  If keep, the
    kernel keeps the emulated disks beside the PV ones.
    """
    platform_pci = 1

    def __init__(self, *args, filter="group=default,store=xen,timeout=60",
                 keep=False, **kwargs):
        if keep:
            self.boot_image = "linux-both-boot.img"
        super().__init__(*args, **kwargs)
        self.filter = filter
        if filter:
            self.dm_args += ["-global", f"xen-disk.dedup-share={filter}"]

    def groups(self):
        fields = dict(f.split("=") for f in (self.filter or "").split(",") if f)
        return super().groups() | ({fields["group"]} if fields else set())


class Terminal:
    """A guest's console that xenconsoled serves, used as a socket is."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self.fd)

    def recv(self, size):
        return os.read(self.fd, size)

    def sendall(self, data):
        while data:
            data = data[os.write(self.fd, data):]

    def close(self):
        os.close(self.fd)


class PvhGuest(PvGuest):
    """No emulated device at all: the kernel is started by the toolstack."""
    type = "pvh"
    boot_image = None
    up_timeout = 90
    cmdline = "console=hvc0 quiet loglevel=3 mitigations=off panic=5"

    def kind(self):
        return PVH_CFG.format(cmdline=self.cmdline)

    def devices(self):
        return []

    def connect(self):
        path = f"/local/domain/{self.domid}/console/tty"
        self.lab.eventually(lambda: self.xen.xenstore(path), "its console")
        self.console = Terminal(self.xen.xenstore(path))
        threading.Thread(target=self.listen, args=(self.console,),
                         daemon=True).start()
