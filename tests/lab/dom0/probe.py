# SPDX-License-Identifier: GPL-2.0-or-later
"""A device model that only opens a filter node, to see what it says."""
import json
import os
import subprocess

from disks import IMAGES
from guests import qemu_command
from storedaemon import SOCKETS



def listing(lab):
    """All that dedup-share could leave behind: files, and domains."""
    files = sorted(str(p) for p in SOCKETS.rglob("*"))
    return files, sorted(lab.xen.domains())


def command(domid, options, extra=()):
    q = qemu_command()
    who = [] if domid is None else ["-xen-domid", str(domid)]
    return [str(q["qemu"]), *who, "-M", "none", "-nodefaults", "-display",
            "none", "-S", "-qmp", "stdio", *extra, "-blockdev",
            f"driver=file,node-name=f,filename={IMAGES}/base.raw,read-only=on",
            "-blockdev", "driver=raw,node-name=r,file=f,read-only=on",
            "-blockdev", f"driver=dedup-share,node-name=d,file=r,"
                         f"read-only=on{options}"]


def run(domid, options, extra=()):
    """Open a node; returns (exit code, stderr, query-dedup-stats or None)."""
    q = qemu_command()
    env = dict(os.environ)
    if q["environment"]:
        name, value = q["environment"].split()[1].split("=")
        env[name] = value
    talk = '{"execute":"qmp_capabilities"}{"execute":"query-dedup-stats"}' \
           '{"execute":"quit"}'
    done = subprocess.run(command(domid, options, extra), input=talk, env=env,
                          text=True, capture_output=True, timeout=60,
                          check=False)
    print(options, "->", done.returncode, done.stderr.strip(), flush=True)
    stats = [json.loads(line)["return"] for line in done.stdout.splitlines()
             if '"node-name"' in line]
    return done.returncode, done.stderr, stats[0][0] if stats else None


def refused(lab, domid, options, words, extra=(), always=False):
    """One clear error with these words, nothing left; with auto, a warning.

    always: what the user has said is wrong, so it is an error with auto, too.
    """
    before = listing(lab)
    code, text, _ = run(domid, f",store=xen{options}", extra)
    lab.check(code != 0, f"refused: {options or words}")
    lines = [line for line in text.splitlines() if "dedup-share" in line]
    lab.equal(len(lines), 1, "one line of error")
    for word in words:
        lab.check(word in lines[0], f"the error says {word!r}: {lines[0]}")
    lab.equal(listing(lab), before, "nothing is left behind")

    if not domid:
        return                  # auto has the Linux store then
    if always:
        code, text, _ = run(domid, f",store=auto{options}", extra)
        lab.check(code and words[0] in text, "auto: an error, too")
        return
    code, text, stats = run(domid, f",store=auto{options}", extra)
    lab.equal((code, text.count("warning:")), (0, 1), "auto: one warning")
    lab.equal(stats["store"], "off", "auto: requests pass through")
    for word in words:
        lab.check(word in stats["reason"], f"auto: the reason says {word!r}")
    lab.equal(listing(lab), before, "auto: nothing is left behind")
