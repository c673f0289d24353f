# SPDX-License-Identifier: GPL-2.0-or-later
"""Xen as scenarios see it: labxen.so through ctypes.

An EINVAL from a query about one page means "not shared" and is None here;
every other error is an OSError with Xen's errno.
"""
import ctypes
import errno
import os
from ctypes import c_char_p, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

PAGE = 4096
BATCH = 64

LIBRARY = Path(__file__).resolve().parent.parent / "bin" / "labxen.so"


class Domain(ctypes.Structure):
    """A domain's numbers and flags, as of one moment."""
    _fields_ = [(name, c_uint32) for name in
                ("domid", "paused", "crashed", "dying", "shutdown", "pad")]
    _fields_ += [(name, c_uint64) for name in ("pages", "shared", "max_kib")]

    def __repr__(self):
        flags = [f for f in ("paused", "crashed", "dying", "shutdown")
                 if getattr(self, f)]
        return (f"<domain {self.domid}: {self.pages} pages, "
                f"{self.shared} shared {' '.join(flags)}>")


PROTOTYPES = {
    "lab_open": (c_int, []),
    "lab_freed": (c_int64, []),
    "lab_used": (c_int64, []),
    "lab_free_pages": (c_int64, []),
    "lab_claimed_pages": (c_int64, []),
    "lab_domains": (c_int, [c_uint32, c_void_p, c_int]),
    "lab_references": (c_int, [c_uint32, c_uint64]),
    "lab_set_max_kib": (c_int, [c_uint32, c_uint64]),
    "lab_claim": (c_int, [c_uint32, c_uint64]),
    "lab_sharing": (c_int, [c_uint32, c_int]),
    "lab_share": (c_int, [c_uint32, c_uint64, c_uint64, c_uint32, c_uint64]),
    "lab_populate": (c_int, [c_uint32, c_uint64, c_int]),
    "lab_take_memory": (c_int, [c_uint32, c_uint64]),
    "lab_pause": (c_int, [c_uint32, c_int]),
    "lab_create": (c_int, [c_int, c_int, c_char_p]),
    "lab_destroy": (c_int, [c_uint32]),
    "lab_map_rw": (c_void_p, [c_uint32, c_uint64, c_int]),
    "lab_unmap": (c_int, [c_void_p, c_int]),
    "lab_peek": (c_int, [c_uint32, c_uint64, c_void_p]),
    "lab_poke": (c_int, [c_uint32, c_uint64, c_uint32, c_char_p, c_uint32]),
    "lab_map_grants": (c_void_p, [c_uint32, c_uint32]),
    "lab_event_port": (c_int, [c_uint32]),
    "lab_hash": (c_uint64, [c_char_p]),
    "lab_fill": (None, [c_void_p, c_uint32]),
    "lab_xenstore_read": (c_int, [c_char_p, c_void_p, c_uint32]),
    "lab_xenstore_write": (c_int, [c_char_p, c_char_p]),
    "lab_xenstore_remove": (c_int, [c_char_p]),
}


def load():
    library = ctypes.CDLL(str(LIBRARY), use_errno=True)
    for name, (result, arguments) in PROTOTYPES.items():
        getattr(library, name).restype = result
        getattr(library, name).argtypes = arguments
    return library


def checked(what, result):
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


class Xen:
    """One process's handles to the hypervisor and to xenstore."""

    def __init__(self):
        self.lib = load()
        self.call("open")

    def call(self, name, *args):
        return checked(name, getattr(self.lib, "lab_" + name)(*args))

    # the whole host

    def freed(self):
        """sharing_freed_memory, in pages."""
        return self.call("freed")

    def used(self):
        """sharing_used_memory, in pages."""
        return self.call("used")

    def free_pages(self):
        return self.call("free_pages")

    def claimed_pages(self):
        return self.call("claimed_pages")

    def domains(self):
        """{domid: Domain} of all domains, dom0 too."""
        found, first = {}, 0
        while True:
            array = (Domain * BATCH)()
            count = self.call("domains", first, array, BATCH)
            for i in range(count):
                found[array[i].domid] = array[i]
            if count < BATCH:
                return found
            first = array[count - 1].domid + 1

    def names(self):
        """{domid: name}, "" where xenstore has none."""
        return {domid: self.xenstore(f"/local/domain/{domid}/name") or ""
                for domid in self.domains()}

    def domid(self, name):
        """The domid of a name, or None."""
        for domid, other in self.names().items():
            if name == other:
                return domid
        return None

    # one domain

    def domain(self, domid):
        """A Domain, or None if there is no such domain."""
        array = (Domain * 1)()
        count = self.lib.lab_domains(domid, array, 1)
        if count < 1 or array[0].domid != domid:
            return None
        return array[0]

    def set_max_kib(self, domid, kib):
        self.call("set_max_kib", domid, kib)

    def claim(self, domid, pages):
        self.call("claim", domid, pages)

    def sharing(self, domid, enable=True):
        """Enable sharing as the filter will; raises what Xen says."""
        self.call("sharing", domid, int(enable))

    def share(self, store, frame, handle, domid, gfn):
        """Have a guest's page be a frame of a store, as a device model does."""
        self.call("share", store, frame, handle, domid, gfn)

    def populate(self, domid, gfn, count):
        """Pages for an empty HVM domain."""
        self.call("populate", domid, gfn, count)

    def take_memory(self, domid, leave=0):
        """An empty PV domain takes all of Xen's memory but some pages."""
        self.call("take_memory", domid, leave)

    def pause(self, domid, pause=True):
        self.call("pause", domid, int(pause))

    def create(self, hvm=False, iommu=False, uuid=bytes(16)):
        """An empty domain; returns its domid."""
        return self.call("create", int(hvm), int(iommu), uuid)

    def destroy(self, domid):
        self.call("destroy", domid)

    # one page

    def references(self, domid, gfn):
        """1 + the others that hold this frame; None: it is not shared."""
        result = self.lib.lab_references(domid, gfn)
        if result == -errno.EINVAL:
            return None
        return checked(f"references of {domid}:{gfn:#x}", result)

    def peek(self, domid, gfn):
        """A page's content, by a read-only mapping: it stays shared."""
        page = ctypes.create_string_buffer(PAGE)
        self.call("peek", domid, gfn, page)
        return page.raw

    def poke(self, domid, gfn, offset, data):
        """Write to a page from dom0, which unshares it."""
        self.call("poke", domid, gfn, offset, data, len(data))

    def map_rw(self, domid, gfn, count):
        """The address of a lasting mapping, which unshares the pages."""
        address = self.lib.lab_map_rw(domid, gfn, count)
        if not address:
            raise OSError(errno.EFAULT, f"cannot map {domid}:{gfn:#x}")
        return address

    def unmap(self, address, count):
        self.call("unmap", address, count)

    def map_grants(self, domid, frames):
        """The address of a domain's grant table, writable."""
        address = self.lib.lab_map_grants(domid, frames)
        if not address:
            raise OSError(errno.EFAULT, f"cannot map grants of {domid}")
        return address

    def event_port(self, domid):
        """A port of a domain, for a backend in dom0 to bind to."""
        return self.call("event_port", domid)

    def page_hash(self, page):
        """What the tiny guest answers for a page with these bytes."""
        return self.lib.lab_hash(page)

    def filled(self, seed):
        """The page that the tiny guest's fill command writes."""
        page = ctypes.create_string_buffer(PAGE)
        self.lib.lab_fill(page, seed)
        return page.raw

    # xenstore

    def xenstore(self, path):
        """A xenstore value, or None."""
        value = ctypes.create_string_buffer(PAGE)
        length = self.lib.lab_xenstore_read(path.encode(), value, PAGE)
        return value.raw[:length].decode() if length >= 0 else None

    def xenstore_write(self, path, value):
        self.call("xenstore_write", path.encode(), str(value).encode())

    def xenstore_remove(self, path):
        self.call("xenstore_remove", path.encode())
