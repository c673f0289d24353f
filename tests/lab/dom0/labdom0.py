# SPDX-License-Identifier: GPL-2.0-or-later
"""What a scenario gets: run(lab) is called with a Lab.

Scenarios import from here; README.rst has an example.
"""
import hashlib
import json
import os
import subprocess
import time
from pathlib import Path

import pattern  # noqa: F401  (for scenarios)
from checks import CheckFailed, LostRun, Skip  # noqa: F401
from disks import (IMAGES, SCRATCH, BootDisk, Disk, PvDisk,  # noqa: F401
                   RawBlockdevs)
from guests import QEMU, LinuxGuest, PvGuest, PvhGuest
from labxen import Xen
from storedaemon import StoreDaemon
from tiny import DATA_GFN, END_GFN, PAGE, TinyGuest, pages_of  # noqa: F401

IMAGES_STAT = Path("/sys/block/vdc/stat")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
PROGRAMS = Path("/t/bin")


class Lab:
    """Xen, guests and checks for one scenario.

    logs is a folder that the host sees, as logs of this scenario; note() says
    on the host's terminal what is being done.
    """

    def __init__(self, name, logs, emit):
        self.name = name
        self.logs = logs
        self.emit = emit
        self.xen = Xen()
        self.start = time.monotonic()
        self.stores = {}                # group: its daemon

    # store daemons; they are killed when the scenario ends

    def store(self, group="default", **options):
        """Start the store daemon of a group, as a service of dom0 would be."""
        self.stores[group] = StoreDaemon(self, group, **options).start()
        return self.stores[group]

    def need_store(self, group):
        """A guest of the group is about to start."""
        if group not in self.stores:
            self.store(group)

    def end_stores(self):
        """End all store daemons; their store domains go with them."""
        for daemon in self.stores.values():
            self.equal(daemon.end(), 0, f"exit code of {daemon.group}'s store")
        self.stores = {}

    # guests; they are destroyed when the scenario ends

    def tiny(self, name, disks=None, **options):
        """A tiny guest with one disk over base.raw, not yet started."""
        return TinyGuest(self, name, [Disk()] if disks is None else disks,
                         **options)

    def linux(self, name, disks=None, **options):
        """A Linux guest with one disk over files.raw, not yet started."""
        return LinuxGuest(self, name, [Disk("files")] if disks is None
                          else disks, **options)

    def pv(self, name, disks=None, **options):
        """A Linux HVM guest with a PV disk over files.raw."""
        return PvGuest(self, name, [PvDisk()] if disks is None else disks,
                       **options)

    def pvh(self, name, disks=None, **options):
        """A Linux PVH guest with a PV disk over files.raw."""
        return PvhGuest(self, name, [PvDisk()] if disks is None else disks,
                        **options)

    @staticmethod
    def start_all(*guests):
        """Start guests side by side."""
        for guest in guests:
            guest.start(wait=False)
        for guest in guests:
            guest.wait_up()

    # checks

    def note(self, text):
        print(f"[{time.monotonic() - self.start:6.1f}] {text}", flush=True)
        self.emit(event="note", text=text)

    def show(self, text):
        """A line for the host's terminal."""
        print(text, flush=True)
        self.emit(event="show", text=text)

    def check(self, condition, what):
        if not condition:
            raise CheckFailed(what)
        print(f"[{time.monotonic() - self.start:6.1f}] ok: {what}", flush=True)

    def equal(self, actual, expected, what):
        self.check(actual == expected,
                   f"{what}: {actual!r}" if actual == expected else
                   f"{what}: got {actual!r}, expected {expected!r}")

    def eventually(self, condition, what, timeout=10):
        """Wait until condition() holds."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                raise CheckFailed(f"{what}: not within {timeout} s")
            time.sleep(0.05)
        self.check(True, what)

    # the images' disk, and what is on it

    @staticmethod
    def image_bytes():
        """Bytes read so far from the disk that holds the base images."""
        return int(IMAGES_STAT.read_text().split()[2]) * 512

    @staticmethod
    def drop_caches():
        """Empty dom0's page cache, so that each read of an image is real.

        The folder's own blocks are read at once: to look a name up there is no
        read of an image.
        """
        os.sync()
        DROP_CACHES.write_text("3")
        for path in IMAGES.iterdir():
            path.stat()

    @staticmethod
    def manifest():
        """{path: md5} of the file system in files.raw."""
        return json.loads((IMAGES / "files.json").read_text())

    @classmethod
    def digest(cls):
        """What LinuxGuest.digest() is for files.raw, if all is right."""
        lines = (f"{md5}  ./{path}\n" for path, md5
                 in sorted(cls.manifest().items(),
                           key=lambda entry: entry[0].encode()))
        return hashlib.md5("".join(lines).encode()).hexdigest()

    # the rest of dom0

    def run(self, *command, timeout=120, check=True):
        """Run a program of dom0; returns what it wrote."""
        done = subprocess.run([str(c) for c in command], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=timeout, check=False)
        print(done.stdout, end="", flush=True)
        if check and done.returncode:
            raise CheckFailed(f"{command[0]} failed with {done.returncode}: "
                              + done.stdout[-1000:])
        return done.stdout

    @staticmethod
    def has_filter_build():
        """Whether the device model is the lab's, not Debian's."""
        return QEMU.exists()

    def strangers(self):
        """{domid: name} of all domains but dom0: guests, and store domains."""
        return {d: n for d, n in self.xen.names().items() if d}
