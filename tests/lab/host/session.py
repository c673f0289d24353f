# SPDX-License-Identifier: GPL-2.0-or-later
"""A run: boots as they are needed, results as they come, retries said."""
import fcntl
import json
import shutil
import time

from . import cache, dom0, images, payload, xen
from .boot import Boot, Machine
from .scenarios import by_boot

TAIL = 15


class Session:
    def __init__(self, repo, qemu, logs):
        self.repo, self.lab_dir = repo, repo / "tests/lab"
        self.qemu, self.logs = qemu, logs
        self.results, self.reasons, self.seconds = {}, {}, {}
        self.retried = {}               # scenario: why it was run again
        self.boots = []
        self.start = time.monotonic()
        self.running = self.note = ""

    # what to boot

    def machine(self, variant, xen_args, iommu):
        with cache.locked():
            pkgs = dom0.packages()
            return Machine(
                xen=xen.hypervisor(self.repo, variant) / "xen",
                kernel=dom0.kernel_image(pkgs),
                initrd=dom0.initramfs(self.lab_dir),
                root=dom0.image(self.lab_dir),
                payload=payload.image(self.lab_dir, self.qemu),
                images=images.disk(self.lab_dir), xen_args=xen_args,
                iommu=iommu)

    def prepare_logs(self):
        self.logs.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.logs / ".lock", "w")  # held until we end
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise cache.StepFailed(f"another run writes its logs to "
                                   f"{self.logs}; use --keep-logs") from None
        for old in self.logs.glob("boot-*"):
            shutil.rmtree(old)

    # running

    def run(self, chosen):
        self.prepare_logs()
        chosen = self.skip_unmet(chosen)
        for (variant, *rest), group in by_boot(chosen).items():
            cache.say(f"lab: {xen.edit_notice(variant)}")
            self.run_group(self.machine(variant, *rest), variant, group)
        return self.finish()

    def skip_unmet(self, chosen):
        if payload.has_filter(self.qemu):
            return chosen
        for s in chosen:
            if "filter" in s.needs:
                self.record(s.name, "skip",
                            "this QEMU has no block driver dedup-share", 0)
        return [s for s in chosen if "filter" not in s.needs]

    def run_group(self, machine, variant, group):
        """Boot until each scenario of the group has a result."""
        pending = list(group)
        while pending:
            logs = self.logs / f"boot-{len(self.boots) + 1}-{variant}"
            names = ", ".join(s.name for s in pending)
            cache.say(f"lab: boot {len(self.boots) + 1} ({variant}): {names}")
            boot = Boot(machine, pending, logs, self.on_event)
            outcome = boot.run()
            self.boots.append({"xen": variant, "ended": outcome.kind,
                               "reason": outcome.reason, "logs": logs.name,
                               "seconds": round(time.monotonic() - boot.start,
                                                1)})
            pending = self.after_boot(pending, outcome, logs)

    def after_boot(self, pending, outcome, logs):
        """Record results; returns what is to run in another boot."""
        again, cut_short = [], outcome.running or pending[0].name
        for s in pending:
            event = outcome.results.get(s.name)
            if event:
                if event["result"] == "lost" and \
                        self.retry(s.name, event["reason"]):
                    again.append(s)
            elif outcome.kind == "panic" and s.name == cut_short:
                self.record(s.name, "fail", f"Xen: {outcome.reason}", 0, logs)
            elif s.name != cut_short or self.retry(s.name, outcome.reason):
                again.append(s)
            else:
                self.record(s.name, "fail",
                            f"lost twice: {outcome.reason}", 0, logs)
        return again

    def retry(self, name, reason):
        """Whether a lost scenario may run again: only once."""
        if name in self.retried:
            self.record(name, "fail", f"lost twice: {reason}", 0)
            return False
        self.retried[name] = reason
        cache.say(f"retried: {name}: the emulator lost it ({reason})")
        return True

    # reporting

    def record(self, name, result, reason, seconds, logs=None):
        if name in self.results:
            return
        self.results[name] = result
        self.reasons[name], self.seconds[name] = reason, seconds
        if result == "ok":
            cache.say(f"ok {name} ({seconds} s)")
        elif result == "skip":
            cache.say(f"skip {name}: {reason}")
        else:
            cache.say(f"FAIL {name}: {reason}")
            self.show_tail(name, logs)

    def show_tail(self, name, logs=None):
        found = sorted(self.logs.glob(f"boot-*/{name}/output.log"))
        if not found and logs:
            found = [logs / "serial.log"]
        if found:
            lines = found[-1].read_text(errors="replace").splitlines()
            for line in lines[-TAIL:]:
                cache.say(f"    {line}")
            cache.say(f"    (from {found[-1]})")

    def on_event(self, event):
        kind = event["event"]
        if kind == "up":
            cache.say("lab: dom0 is up")
        elif kind == "start":
            self.running, self.note = event["name"], ""
        elif kind == "note":
            self.note = event["text"]
        elif kind == "show":
            cache.say(event["text"])
        elif kind == "heartbeat":
            cache.say(f"lab: {event['seconds']} s: waiting for {event['for']}"
                      + (f" ({self.note})" if self.note else ""))
        elif kind == "result" and event["result"] != "lost":
            self.record(event["name"], event["result"], event["reason"],
                        event["seconds"])

    def count(self, result):
        return sum(1 for r in self.results.values() if r == result)

    def finish(self):
        """The last line, result.json, and the exit code."""
        summary = {
            "passed": self.count("ok"), "failed": self.count("fail"),
            "skipped": self.count("skip"), "retries": len(self.retried),
            "retried": self.retried, "boots": self.boots,
            "seconds": round(time.monotonic() - self.start, 1),
            "scenarios": {n: {"result": r, "reason": self.reasons[n],
                              "seconds": self.seconds[n]}
                          for n, r in self.results.items()}}
        (self.logs / "result.json").write_text(json.dumps(summary, indent=2))
        cache.say(f"logs are in {self.logs}; {summary['seconds']} s, "
                  f"{summary['retries']} retries")
        cache.say(f"{summary['passed']} passed, {summary['failed']} failed"
                  + (f", {summary['skipped']} skipped"
                     if summary["skipped"] else ""))
        return 1 if summary["failed"] or not self.results else 0
