# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs in dom0: one scenario after the other, each in a process of its own.

The host learns what happens from lines on the second serial port, one JSON
object each after a fixed word; and from files in /logs, which is its own.
"""
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import tty
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from checks import CheckFailed, LostRun, Skip  # noqa: E402
from labdom0 import SCRATCH, Lab  # noqa: E402
from labxen import Xen  # noqa: E402

PORT = "/dev/ttyS1"
LOGS = Path("/logs")
XEN_LOGS = Path("/var/log/xen")
SCENARIOS = Path("/t/scenarios")
TRACE_LINES = 12
ALIVE = 5               # seconds between two signs of life


class Reporter:
    """Lines for the host."""

    def __init__(self):
        self.port = os.open(PORT, os.O_WRONLY | os.O_NOCTTY)
        tty.setraw(self.port)

    def emit(self, **event):
        os.write(self.port, f"@lab {json.dumps(event)}\n".encode())


def load(name):
    path = SCENARIOS / f"{name}.py"
    spec = importlib.util.spec_from_file_location("scenario", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome_of(name, lab):
    """Run a scenario; returns (result, reason)."""
    try:
        load(name).run(lab)
        return "ok", ""
    except CheckFailed as failure:
        traceback.print_exc()
        return "fail", str(failure)
    except LostRun as lost:
        return "lost", str(lost)
    except Skip as skip:
        return "skip", str(skip)
    except BaseException as error:      # a broken scenario is a failed one
        traceback.print_exc()
        trace = traceback.format_exc().splitlines()[-TRACE_LINES:]
        return "fail", f"{type(error).__name__}: {error} " + " | ".join(trace)


def child(name, logs, reporter, result):
    """The process of one scenario; does not return."""
    os.setsid()
    output = os.open(logs / "output.log", os.O_WRONLY | os.O_CREAT, 0o644)
    for fd in (1, 2):
        os.dup2(output, fd)
    lab = Lab(name, logs, reporter.emit)
    outcome = outcome_of(name, lab)
    sys.stdout.flush()
    os.write(result, json.dumps(outcome).encode())
    os._exit(0)


def wait(pid, timeout, reporter):
    """Whether the process ended in time; meanwhile, say that dom0 lives."""
    end = time.monotonic() + timeout
    beat = time.monotonic() + ALIVE
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        if time.monotonic() > beat:
            reporter.emit(event="alive")
            beat += ALIVE
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def run_one(name, timeout, reporter):
    logs = LOGS / name
    logs.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        child(name, logs, reporter, writing)
    os.close(writing)
    in_time = wait(pid, timeout, reporter)
    if not in_time:
        os.close(reading)
        return "fail", f"not done after {timeout} s"
    with os.fdopen(reading) as result:
        text = result.read(65536)
    if not text:
        return "fail", "the scenario's process died"
    return json.loads(text)


def keep_logs(name):
    """Copy what the toolstack and Xen said during a scenario."""
    logs = LOGS / name
    listing = subprocess.run(["xl", "list", "-v"], capture_output=True,
                             text=True, check=False).stdout
    info = subprocess.run(["xl", "info"], capture_output=True, text=True,
                          check=False).stdout
    (logs / "xl.log").write_text(listing + info)
    with open(logs / "xl-dmesg.log", "w") as dmesg:
        subprocess.run(["xl", "dmesg", "-c"], stdout=dmesg, check=False)
    with open(logs / "dmesg.log", "w") as dmesg:
        subprocess.run(["busybox", "dmesg", "-c"], stdout=dmesg, check=False)
    for log in XEN_LOGS.iterdir():
        if log.is_file() and log.stat().st_size:
            shutil.copyfile(log, logs / log.name)
            log.unlink()


def kill_all(word):
    """What is left of programs with this word in their command lines."""
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            line = (proc / "cmdline").read_bytes()
        except OSError:
            continue
        if word in line:
            os.kill(int(proc.name), signal.SIGKILL)


def clean_up(xen):
    """Leave nothing of a scenario to the next one."""
    kill_all(b"/qemu-dedup-store")
    names = xen.names()
    for domid in xen.domains():
        if domid == 0:
            continue
        done = subprocess.run(["xl", "destroy", str(domid)],
                              capture_output=True, check=False)
        if done.returncode and xen.domain(domid):
            xen.destroy(domid)
        print(f"lab: removed domain {domid} {names.get(domid)}", flush=True)
    kill_all(b"-xen-domid")
    for path in SCRATCH.iterdir():
        path.unlink() if not path.is_dir() else shutil.rmtree(path)
    settle(xen)


def settle(xen):
    """Dying domains keep their memory for a moment."""
    end = time.monotonic() + 20
    while len(xen.domains()) > 1 and time.monotonic() < end:
        time.sleep(0.1)


def main():
    reporter = Reporter()
    plan = json.loads((LOGS / "plan.json").read_text())
    xen = Xen()
    reporter.emit(event="up", free_pages=xen.free_pages())
    for scenario in plan["scenarios"]:
        name = scenario["name"]
        start = time.monotonic()
        print(f"lab: scenario {name}", flush=True)
        reporter.emit(event="start", name=name)
        result, reason = run_one(name, scenario["timeout"], reporter)
        seconds = round(time.monotonic() - start, 1)
        keep_logs(name)
        clean_up(xen)
        reporter.emit(event="result", name=name, result=result,
                      reason=reason, seconds=seconds,
                      free_pages=xen.free_pages())
    reporter.emit(event="end")


main()
