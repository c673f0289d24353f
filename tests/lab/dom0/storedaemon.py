# SPDX-License-Identifier: GPL-2.0-or-later
"""A store daemon in dom0."""
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from checks import CheckFailed
from storeclient import Client

PROGRAM = Path("/t/dm/qemu-dedup-store")
SOCKETS = Path("/run/qemu-dedup-store")
GFN_BASE = 0x10000              # of slot 0, in the store domain
FRAME_SIZE = 4096 + 160         # what a frame costs of a store's size


class StoreDaemon:
    """qemu-dedup-store of a group; frames is how many its store has."""

    def __init__(self, lab, group="default", frames=None, store="xen",
                 options=(), faults=None):
        self.lab, self.group = lab, group
        self.socket = SOCKETS / f"{group}.sock"
        self.arguments = ["--group", group, "--store", store, *options]
        if frames:
            self.arguments += ["--size", str(frames * FRAME_SIZE)]
        self.faults = faults
        self.process = None

    @staticmethod
    def environment():
        return {**os.environ, "LD_LIBRARY_PATH": "/t/dm/lib"}

    def start(self):
        log = open(self.lab.logs / f"store-{self.group}.log", "a")
        env = self.environment()
        if self.faults:
            env |= self.faults.variables()
        self.process = subprocess.Popen(
            [PROGRAM, *self.arguments], env=env,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + 30
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                raise CheckFailed(f"the store daemon of {self.group} did not "
                                  "start: " + Path(log.name).read_text())
            time.sleep(0.05)
        return self

    def run(self, *arguments, check=True):
        """A command for the daemon; returns what it wrote."""
        done = subprocess.run([PROGRAM, *arguments, "--group", self.group],
                              env=self.environment(), text=True,
                              capture_output=True, timeout=60, check=False)
        print(done.stdout, done.stderr, flush=True)
        if check and done.returncode:
            raise CheckFailed(f"{arguments}: {done.stderr}")
        return done.stdout

    def is_up(self):
        return self.socket.exists() and self.run("status", check=False)

    def status(self):
        return json.loads(self.run("status", "--json"))

    def frames(self):
        """What the store has: frames that are used, and idle ones."""
        s = self.status()
        return s["frames-used"], s["frames-idle"]

    def client(self):
        return Client(str(self.socket))

    def domid(self):
        """The store domain."""
        return self.lab.xen.domid(f"dedup-share-{self.group}")

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.process.wait(60)
