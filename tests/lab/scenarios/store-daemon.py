# SPDX-License-Identifier: GPL-2.0-or-later
"""The store daemon alone: frames, what Xen counts of them, and their end."""
import hashlib
import os
import signal
import uuid

import faults as f
import pattern
import storeclient as sc
from labdom0 import DATA_GFN, Disk
from storedaemon import GFN_BASE, StoreDaemon

BOOT = {"xen": "sharing", "fast": True, "timeout": 240, "needs": ["filter"]}

FRAMES = 48
N = 16
A = DATA_GFN


def run(lab):
    guest = lab.tiny("g1", [Disk(filter=False)])
    guest.start()
    lab.xen.sharing(guest.domid)
    image = os.open(guest.disks[0].base_path, os.O_RDONLY)
    free = lab.xen.free_pages()
    daemon = StoreDaemon(lab, frames=FRAMES).start()
    c = daemon.client()
    lab.equal((c.store, c.nslots, c.domid, c.frames),
              (2, FRAMES, daemon.domid(), None), "WELCOME")
    lab.equal(c.layer(image), (sc.LEASED, ""), "the base image")
    check_tools(lab, c.domid)
    slots = check_fill(lab, c)
    check_shared(lab, daemon, c, guest, slots)
    check_full(lab, daemon, c)
    c.close()
    lab.equal(daemon.end(), 0, "exit code")
    lab.eventually(lambda: daemon.domid() is None, "the store domain is gone")
    lab.eventually(lambda: lab.xen.free_pages() >= free, "so is its memory")
    check_end(lab, image)
    check_half_made(lab, daemon.socket)
    check_successor(lab, guest, image)


def pages(lab, domid):
    """Frames of a store domain, by Xen's count."""
    info = lab.xen.domain(domid)
    return info.pages + info.shared - 1


def check_tools(lab, domid):
    """Tools that look at a domain's vCPUs find one."""
    lab.run("/usr/lib/xen-4.17/bin/xen-hvmctx", domid, check=False)
    lab.run("xl", "vcpu-list", domid)
    lab.equal(pages(lab, domid), 0, "frames at first")


def check_fill(lab, c):
    """Frames are nominated pages that hold what the image has there."""
    answers = c.read(100, N)
    lab.equal({a for a, _, _ in answers}, {sc.FRAME}, "answers")
    slots = [slot for _, slot, _ in answers]
    for i, slot in enumerate(slots):
        lab.equal(lab.xen.references(c.domid, GFN_BASE + slot), 1,
                  f"references of slot {slot}")
        lab.check(lab.xen.peek(c.domid, GFN_BASE + slot) ==
                  pattern.block(100 + i), f"content of slot {slot}")
    lab.equal(len({c.handles[s] for s in slots}), N, "handles")
    lab.equal(pages(lab, c.domid), N, "frames")
    again = c.put([pattern.block(100 + i) for i in range(N)])
    lab.equal([a[:2] for a in again], [(sc.FRAME, s) for s in slots],
              "the same content, put")
    lab.equal(lab.xen.references(c.domid, GFN_BASE + slots[0]), 1,
              "references after it was compared")
    return slots


def check_shared(lab, daemon, c, guest, slots):
    """What a guest uses stays, though no client holds it."""
    lab.xen.share(c.domid, GFN_BASE + slots[0], c.handles[slots[0]],
                  guest.domid, A)
    guest.expect_blocks([A], 100, "a page that shares a frame")
    free = lab.xen.free_pages()
    c.release(slots)
    daemon.run("reclaim")
    lab.equal(pages(lab, c.domid), 1, "frames that are left")
    lab.equal(lab.xen.free_pages() - free, N - 1, "pages that are free again")
    lab.equal(lab.xen.references(c.domid, GFN_BASE + slots[0]), 2,
              "references of the one that the guest uses")
    guest.expect_blocks([A], 100, "the guest's page")
    check_zeroed(lab)
    (again,) = c.read(100)
    lab.equal(again[:2], (sc.FRAME, slots[0]), "it is found by its content")
    c.release([slots[0]])
    guest.poke(A, 0, 7)
    daemon.run("reclaim")
    lab.equal(pages(lab, c.domid), 0, "frames when the guest has written to it")


def check_zeroed(lab):
    """The next domain's pages hold nothing of what was evicted."""
    other = lab.xen.create(hvm=True)
    lab.xen.populate(other, 0, 256)
    known = {pattern.block(100 + i) for i in range(N)}
    lab.check(not any(lab.xen.peek(other, gfn) in known
                      for gfn in range(256)), "no evicted content is there")
    lab.xen.destroy(other)


def check_full(lab, daemon, c):
    """Slots that nobody holds are used again, with other content and handles."""
    first = c.read(200, FRAMES)
    slots = [slot for answer, slot, _ in first if answer == sc.FRAME]
    lab.check(len(slots) >= FRAMES * 3 // 4, f"{len(slots)} are held")
    old = dict(c.handles)
    c.release(slots)
    second = c.read(400, FRAMES // 2)
    lab.equal({a for a, _, _ in second}, {sc.FRAME}, "others in their place")
    for i, (_, slot, _) in enumerate(second):
        lab.check(lab.xen.peek(c.domid, GFN_BASE + slot) ==
                  pattern.block(400 + i), f"content of slot {slot}")
    lab.check(all(c.handles[s] != old.get(s) for _, s, _ in second),
              "no handle names two contents")
    lab.check(pages(lab, c.domid) <= FRAMES, "frames are within the size")
    c.release([s for _, s, _ in second])


def check_end(lab, image):
    """The daemon is told to end while it fills, and leaves no memory."""
    late = f.Faults("store")
    daemon = StoreDaemon(lab, frames=FRAMES, faults=late).start()
    c = daemon.client()
    c.layer(image)
    late.set((f.STORE_POPULATE, {"delay_ms": 700, "count": 1}))
    c.send_read([(0, 100, N)])
    lab.eventually(lambda: late.done()[0], "a fill is under way")
    lab.equal(daemon.end(), 0, "exit code")
    c.close()
    lab.equal(sorted(lab.strangers().values()), ["g1"], "domains")


def check_half_made(lab, socket):
    """A store domain of a daemon that was killed when it had just made it."""
    handle = bytearray(hashlib.sha256(
        f"qemu-dedup-store default {socket}".encode()).digest()[:16])
    handle[6] = handle[6] & 0x0f | 0x80
    handle[8] = handle[8] & 0x3f | 0x80
    half = lab.xen.create(hvm=True, uuid=bytes(handle))
    daemon = StoreDaemon(lab, frames=FRAMES).start()
    lab.check(str(uuid.UUID(bytes=bytes(handle))) in
              lab.run("xl", "list", "-v", daemon.domid()), "the handle")
    lab.eventually(lambda: lab.xen.domain(half) is None, "it is gone")
    lab.equal(daemon.end(), 0, "exit code")


def check_successor(lab, guest, image):
    """A daemon is killed; the next one frees what its store domain leaves."""
    daemon = StoreDaemon(lab, frames=FRAMES).start()
    c = daemon.client()
    c.layer(image)
    answers = c.read(100, N)
    slot = answers[3][1]
    lab.xen.share(c.domid, GFN_BASE + slot, c.handles[slot], guest.domid, A)
    daemon.end(signal.SIGKILL)
    c.close()
    old = c.domid
    daemon = StoreDaemon(lab, frames=FRAMES).start()
    lab.equal(lab.xen.names()[old], "dedup-share-default-draining",
              "the old store domain")
    lab.eventually(lambda: pages(lab, old) == 1, "frames but one are gone")
    guest.expect_blocks([A], 103, "the guest's page")
    lab.equal(daemon.status()["memory"], 4096, "memory")
    guest.poke(A, 0, 7)
    lab.eventually(lambda: lab.xen.domain(old) is None,
                   "so is the domain, when the guest has let go")
    lab.equal(daemon.end(), 0, "exit code")
    lab.equal(sorted(lab.strangers()), [guest.domid], "the guest is left")
