# SPDX-License-Identifier: GPL-2.0-or-later
"""Build steps whose results are kept, by the content of what they are made of.

A step is a function that fills a directory.  Its key is a hash over its
inputs (strings, and files by their content) and over the module that it is
written in, so a changed input rebuilds this step and those that depend on it,
and nothing else.
"""
import contextlib
import fcntl
import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

KEEP = 2                # results of one step: the current and the one before
HEARTBEAT = 15          # seconds between two signs of life of a long step


class StepFailed(Exception):
    """A step could not be built; the text says why and where the log is."""


def root():
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dedup-share"


def lab():
    path = root() / "lab"
    path.mkdir(parents=True, exist_ok=True)
    return path


def say(text):
    print(text, flush=True)


@contextlib.contextmanager
def locked():
    """One builder at a time: two would prune each other's results."""
    with open(lab() / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another lab build to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def hash_path(path, sha):
    """Add a file, or all files below a folder, to a hash."""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for f in files:
        if f.is_file() and "__pycache__" not in f.parts:
            sha.update(f"{f.relative_to(path)} {f.stat().st_mode}\0".encode())
            with open(f, "rb") as data:
                while chunk := data.read(1 << 20):
                    sha.update(chunk)


def key_of(make, inputs):
    sha = hashlib.sha256(Path(inspect.getsourcefile(make)).read_bytes())
    for item in inputs:
        if isinstance(item, Path) and lab() not in item.parents:
            hash_path(item, sha)    # a step's result says all by its name
        else:
            sha.update(f"{item}\0".encode())
    return sha.hexdigest()[:16]


def prune(name):
    """Drop all but the latest results of a step."""
    old = [p for p in lab().glob(f"{name}-" + "?" * 16) if p.is_dir()]
    old.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    for path in old[KEEP:]:
        shutil.rmtree(path, ignore_errors=True)


def step(name, make, *inputs):
    """The folder that make(folder, log) filled, built now if it must be."""
    out = lab() / f"{name}-{key_of(make, inputs)}"
    if out.is_dir():
        os.utime(out)
        return out
    say(f"lab: {name}: building")
    start = time.monotonic()
    tmp = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=lab()))
    try:
        tmp.chmod(0o755)
        with open(lab() / f"{name}.log", "w") as log, heartbeat(name):
            make(tmp, log)
        tmp.rename(out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    say(f"lab: {name}: built in {time.monotonic() - start:.1f} s")
    prune(name)
    return out


@contextlib.contextmanager
def heartbeat(name):
    """Say now and then that a silent step is still at work."""
    done = threading.Event()
    start = time.monotonic()

    def beat():
        while not done.wait(HEARTBEAT):
            say(f"lab: {name}: still building, "
                f"{time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def run(log, *command, **options):
    """Run a command of a step; its output goes to the step's log."""
    command = [str(c) for c in command]
    print("+", *command, file=log, flush=True)
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL,
                       stdout=log, stderr=subprocess.STDOUT, **options)
    except (OSError, subprocess.CalledProcessError) as error:
        log.flush()
        tail = Path(log.name).read_text(errors="replace").splitlines()[-25:]
        print(*tail, sep="\n", file=sys.stderr)
        raise StepFailed(f"{error}; the log is {log.name}") from None
