# SPDX-License-Identifier: GPL-2.0-or-later
"""A PV disk's frontend, driven from dom0 page by page.

The ring and the grants are in a tiny guest's memory; what a guest's driver
would write there this writes, and what only the guest can do, to send an event,
the guest does.  So a scenario decides on each segment, and on what the grants
say at each moment.
"""
import ctypes
import struct
import time

from checks import CheckFailed
from tiny import PAGE

# of Xen's io/blkif.h and grant_table.h
READ, WRITE = 0, 1
RING_SLOTS = 32
RING_HEADER = 64
SLOT = 112                      # a request of the x86_64 protocol
PERMIT, READONLY = 1, 4
STATE_INITIALISED, STATE_CONNECTED, STATE_CLOSED = 3, 4, 6
GRANT_FRAMES = 4                # 512 grants each

RING_GFN = 0x700                # a MiB of its own: it stays mapped
RING_REF = 8
FIRST_REF = 16


class Segment:
    """A part of a page that is granted; sectors of 512 bytes."""

    def __init__(self, ref, first=0, last=7):
        self.ref, self.first, self.last = ref, first, last

    def pack(self):
        return struct.pack("<IBBxx", self.ref, self.first, self.last)


class PvRing:
    def __init__(self, lab, guest, disk):
        self.lab, self.guest, self.disk = lab, guest, disk
        self.xen = lab.xen
        self.version = 1
        self.grants = self.xen.map_grants(guest.domid, GRANT_FRAMES)
        self.ring = self.xen.map_rw(guest.domid, RING_GFN, 1)
        self.produced = self.consumed = 0
        self.port = None
        self.connect()

    # life

    def paths(self):
        number = (202 << 8 | (ord(self.disk.vdev[3]) - ord("a")) << 4)
        front = f"/local/domain/{self.guest.domid}/device/vbd/{number}"
        return front, self.xen.xenstore(f"{front}/backend")

    def connect(self):
        ctypes.memset(self.ring, 0, PAGE)
        self.store_ring("req_event", 1)
        self.store_ring("rsp_event", 1)
        self.produced = self.consumed = 0
        self.grant(RING_REF, RING_GFN)
        self.port = self.xen.event_port(self.guest.domid)
        front, back = self.paths()
        for key, value in (("ring-ref", RING_REF),
                           ("event-channel", self.port),
                           ("protocol", "x86_64-abi"),
                           ("state", STATE_INITIALISED)):
            self.xen.xenstore_write(f"{front}/{key}", value)
        self.wait_state(back, STATE_CONNECTED)
        self.xen.xenstore_write(f"{front}/state", STATE_CONNECTED)

    def disconnect(self):
        front, back = self.paths()
        self.xen.xenstore_write(f"{front}/state", STATE_CLOSED)
        self.wait_state(back, STATE_CLOSED)
        self.xen.xenstore_write(f"{front}/state", 1)

    def wait_state(self, back, state):
        self.lab.eventually(lambda: self.xen.xenstore(f"{back}/state") ==
                            str(state), f"the backend is in state {state}")

    # grants

    def grant(self, ref, gfn, flags=PERMIT, peer=0):
        entry = struct.pack("<HHI" if self.version == 1 else "<HHxxxxQ",
                            flags, peer, gfn)
        if (ref + 1) * len(entry) > GRANT_FRAMES * PAGE:
            raise ValueError("more grants than are mapped")
        ctypes.memmove(self.grants + ref * len(entry), entry, len(entry))

    def set_version(self, version):
        """Between disconnect() and connect(): the other kind of table."""
        self.xen.unmap(self.ring, 1)
        ctypes.memset(self.grants + 8 * RING_REF, 0,
                      GRANT_FRAMES * PAGE - 8 * RING_REF)
        self.guest.set_grants(version)
        self.version = version
        self.grants = self.xen.map_grants(self.guest.domid, GRANT_FRAMES)
        self.ring = self.xen.map_rw(self.guest.domid, RING_GFN, 1)

    def revoke(self, ref):
        self.grant(ref, 0, 0)

    def grant_pages(self, gfns, first=FIRST_REF):
        """Segments of whole pages."""
        refs = range(first, first + len(gfns))
        for ref, gfn in zip(refs, gfns):
            self.grant(ref, gfn)
        return [Segment(ref) for ref in refs]

    # the ring

    OFFSETS = {"req_prod": 0, "req_event": 4, "rsp_prod": 8, "rsp_event": 12}

    def word(self, name):
        return ctypes.c_uint32.from_address(self.ring + self.OFFSETS[name])

    def store_ring(self, name, value):
        self.word(name).value = value

    def slot(self, index):
        return self.ring + RING_HEADER + index % RING_SLOTS * SLOT

    def put(self, operation, sector, segments):
        """Put a request on the ring; the backend does not look yet."""
        request = struct.pack("<BBHxxxxQQ", operation, len(segments), 0,
                              self.produced, sector)
        request += b"".join(s.pack() for s in segments)
        ctypes.memmove(self.slot(self.produced), request, len(request))
        self.produced += 1

    def send(self, operation, sector, segments):
        self.put(operation, sector, segments)
        self.kick()

    def kick(self):
        self.store_ring("req_prod", self.produced)
        self.guest.notify(self.port)

    def responses(self, count, timeout=30):
        """{id: status} of so many responses."""
        found, end = {}, time.monotonic() + timeout
        while len(found) < count:
            while self.consumed == self.word("rsp_prod").value:
                if time.monotonic() > end:
                    raise CheckFailed(f"the ring is stuck: {found}")
                time.sleep(0.001)
            data = ctypes.string_at(self.slot(self.consumed), 12)
            number, _, status = struct.unpack("<QBxh", data)
            if number >= self.produced or number in found or \
                    number < self.produced - RING_SLOTS:
                raise CheckFailed(f"response {self.consumed} of "
                                  f"{self.word('rsp_prod').value} is for "
                                  f"request {number} of {self.produced}: "
                                  f"{data.hex()}")
            found[number] = status
            self.consumed += 1
            self.store_ring("rsp_event", self.consumed + 1)
        return found

    def request(self, operation, sector, segments):
        """One request; returns its status, 0 if all is well."""
        self.send(operation, sector, segments)
        (number, status), = self.responses(1).items()
        if number != self.produced - 1:
            raise CheckFailed(f"a response for {number}, not for "
                              f"{self.produced - 1}")
        return status

    def read(self, sector, segments):
        return self.request(READ, sector, segments)
