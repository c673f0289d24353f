# SPDX-License-Identifier: GPL-2.0-or-later
"""One boot of the lab: the emulator, its console, and what dom0 reports."""
import json
import os
import re
import selectors
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from . import cache

# Debian 12's QEMU.  Later ones lose guests: see README.rst.
OUTER = os.environ.get("LAB_OUTER_QEMU", "/usr/bin/qemu-system-x86_64")
OUTER_VERSION = "version 7.2."
# Without these: with AVX the emulator corrupts vector state across domains,
# with SMAP the PV dom0 faults, with RDTSCP Xen fails to emulate it.
CPU = ("max,-smap,-rdtscp,-xsave,-xsaveopt,-avx,-avx2,-fma,-f16c,-pku")
CPUS = "1"              # with two, about every second boot was lost
MEMORY = 3072
XEN_ARGS = ("console=com1 com1=115200,8n1 loglvl=all guest_loglvl=all "
            "dom0_mem=1024M,max:1024M dom0_max_vcpus=1 conring_size=4M")
DOM0_ARGS = ("console=hvc0 earlyprintk=xen quiet loglevel=4 panic=5 "
             "mitigations=off nomodeset")
PANIC = re.compile(r"Panic on CPU|mm locking order violation|"
                   r"Xen BUG at|FATAL (TRAP|PAGE FAULT)")
MARK = "@lab "

BOOT_TIMEOUT = 150      # until dom0 reports
SILENCE = 60            # dom0 says every 5 s that it is alive
POWER_OFF = 10          # for dom0 to shut down; nothing depends on it
PANIC_LINGER = 3        # to let the rest of a panic's message come
DIAGNOSIS = 8           # for Xen to say where a lost machine hangs
# Xen's console takes keys after three Ctrl-A: registers, then dom0's too
DEBUG_KEYS = (b"\x01\x01\x01", b"d", b"d", b"0", b"q", b"r")
HEARTBEAT = 15
# The emulator at times loses the timer interrupt of an idle machine, which
# then sleeps until some other interrupt comes ("Platform timer appears to have
# unexpectedly wrapped").  So it gets one, from its serial port, now and then.
NUDGE = 1


@dataclass
class Machine:
    """The files that a boot is made of."""
    xen: Path
    kernel: Path
    initrd: Path
    root: Path
    payload: Path
    images: Path
    xen_args: str = ""
    iommu: bool = False

    def command(self, logs, port):
        drives = [(self.root, "snapshot=on"), (self.payload, "readonly=on"),
                  (self.images, "readonly=on")]
        command = [OUTER, "-name", "dedup-share-lab", "-M", "q35",
                   "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", CPU,
                   "-smp", CPUS, "-m", str(MEMORY), "-kernel", str(self.xen),
                   "-append", f"{XEN_ARGS} {self.xen_args}".strip(),
                   "-initrd", f"{self.kernel} {DOM0_ARGS.replace(',', ',,')},"
                   f"{self.initrd}"]
        for path, option in drives:
            command += ["-drive", f"file={path},format=raw,if=virtio,{option}"]
        if self.iommu:
            command += ["-device", "intel-iommu"]
        return command + [
            "-fsdev", f"local,id=logs,path={logs},security_model=none",
            "-device", "virtio-9p-pci,fsdev=logs,mount_tag=logs",
            "-display", "none", "-vga", "none", "-nodefaults", "-no-reboot",
            "-serial", "stdio", "-serial", f"file:/dev/fd/{port}"]


def check_outer():
    """A warning if the outer emulator is not the one known to work."""
    try:
        version = subprocess.run([OUTER, "--version"], capture_output=True,
                                 text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise cache.StepFailed(f"cannot run {OUTER}: {error}; install the "
                               "package qemu-system-x86") from None
    if OUTER_VERSION not in version:
        cache.say(f"lab: warning: {OUTER} is not Debian 12's QEMU 7.2; "
                  "others were seen to lose guests")


@dataclass
class Outcome:
    """How a boot ended: done, panic or lost."""
    kind: str = "done"
    reason: str = ""
    running: str = ""                   # the scenario that was cut short
    results: dict = field(default_factory=dict)


class Lines:
    """Complete lines from a pipe."""

    def __init__(self, stream):
        self.fd = stream
        self.rest = b""

    def read(self):
        """New lines, or None at the end."""
        data = os.read(self.fd, 65536)
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in lines]


class Boot:
    """Runs the emulator and follows it until it ends or is lost."""

    def __init__(self, machine, scenarios, logs, on_event):
        self.machine, self.scenarios = machine, scenarios
        self.logs, self.on_event = logs, on_event
        self.outcome = Outcome()
        self.ended = False
        self.start = time.monotonic()
        self.deadline = self.start + BOOT_TIMEOUT
        self.waiting_for = "dom0 to boot"
        self.beat = self.nudged = self.start
        self.console = None

    def run(self):
        self.logs.mkdir(parents=True)
        plan = [{"name": s.name, "timeout": s.timeout} for s in self.scenarios]
        (self.logs / "plan.json").write_text(json.dumps({"scenarios": plan}))
        port, port_writer = os.pipe()
        command = self.machine.command(self.logs, port_writer)
        with open(self.logs / "serial.log", "w") as self.console:
            print("+", *command, file=self.console, flush=True)
            with subprocess.Popen(command, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT,
                                  pass_fds=[port_writer]) as process:
                os.close(port_writer)
                try:
                    self.follow(process, port)
                finally:
                    process.kill()
                    self.drop_input(process)
        os.close(port)
        return self.outcome

    def follow(self, process, port):
        console = Lines(process.stdout.fileno())
        reports = Lines(port)
        with selectors.DefaultSelector() as selector:
            selector.register(console.fd, selectors.EVENT_READ,
                              (console, self.console_line))
            selector.register(port, selectors.EVENT_READ,
                              (reports, self.report_line))
            while not self.over():
                self.nudge(process)
                for key, _ in selector.select(timeout=1):
                    lines, handler = key.data
                    got = lines.read()
                    if got is None:
                        selector.unregister(lines.fd)
                    for line in got or ():
                        handler(line)
                if not selector.get_map():
                    break
            if self.is_late():
                self.diagnose(process, selector)
        self.conclude()

    @staticmethod
    def drop_input(process):
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass                        # keys that nobody will take

    def nudge(self, process):
        now = time.monotonic()
        if now > self.nudged + NUDGE:
            self.nudged = now
            self.press(process, b"\n")

    @staticmethod
    def press(process, key):
        try:
            process.stdin.write(key)
            process.stdin.flush()
        except BrokenPipeError:
            pass                        # it has just ended

    def is_late(self):
        return not self.ended and self.outcome.kind != "panic" and \
            time.monotonic() > self.deadline

    def diagnose(self, process, selector):
        """Have Xen say on the console what it and dom0 are doing."""
        for key in DEBUG_KEYS:
            self.press(process, key)
            end = time.monotonic() + DIAGNOSIS / len(DEBUG_KEYS)
            while time.monotonic() < end:
                for ready, _ in selector.select(timeout=0.2):
                    lines, handler = ready.data
                    for line in lines.read() or ():
                        handler(line)

    def over(self):
        now = time.monotonic()
        if now > self.beat + HEARTBEAT:
            self.beat = now
            self.on_event({"event": "heartbeat", "for": self.waiting_for,
                           "seconds": round(now - self.start)})
        return now > self.deadline

    def conclude(self):
        if self.ended or self.outcome.kind == "panic":
            return
        late = time.monotonic() > self.deadline
        self.outcome.kind = "lost"
        self.outcome.reason = (
            f"no sign of life while waiting for {self.waiting_for}" if late
            else f"the emulated machine reset while waiting for "
                 f"{self.waiting_for}")

    def console_line(self, line):
        stamp = time.monotonic() - self.start
        print(f"[{stamp:7.1f}] {line}", file=self.console, flush=True)
        if PANIC.search(line) and self.outcome.kind != "panic":
            self.outcome.kind = "panic"
            self.outcome.reason = line.strip()
            self.deadline = time.monotonic() + PANIC_LINGER

    def report_line(self, line):
        if not line.startswith(MARK):
            return
        try:
            event = json.loads(line[len(MARK):])
        except ValueError:
            return
        self.take(event)

    def take(self, event):
        kind = event["event"]
        self.deadline = time.monotonic() + SILENCE
        if kind == "start":
            self.outcome.running = self.waiting_for = event["name"]
        elif kind == "result":
            self.outcome.results[event["name"]] = event
            self.outcome.running = ""
        elif kind == "end":
            self.ended = True
            self.waiting_for = "dom0 to power off"
            self.deadline = time.monotonic() + POWER_OFF
        if kind != "alive":
            self.beat = time.monotonic()
            self.on_event(event)
