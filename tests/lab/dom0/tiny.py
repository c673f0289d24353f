# SPDX-License-Identifier: GPL-2.0-or-later
"""The tiny guest: single pages and single requests, from dom0's hand.

Memory is named by gfn.  The pages from DATA_GFN to END_GFN are a scenario's
to use; see guest/mailbox.h, which this file has to agree with.
"""
import ctypes
import time
from ctypes import c_uint32

import pattern
from checks import CheckFailed
from guests import Guest

PAGE = 4096
SECTOR = 512
MAILBOX_GFN = 0x400
PAGES = 3
LIST_MAX = 512
MAGIC = 0x4C414247
DATA_GFN = 0x800
END_GFN = 0x2000
DMA_WRITE = 1
DMA_OK = 0x0450
MAX_PIECE = 0x10000

(WRITE32, READ32, SUMS, FILL, DMA, DMA_BOTH, DMA_HAMMER, PIO_READ, DECREASE,
 POPULATE, COPY, NOTIFY, GRANTS) = range(1, 14)


class Mailbox(ctypes.Structure):
    _fields_ = [("magic", c_uint32), ("command", c_uint32),
                ("done", c_uint32), ("ticks", c_uint32),
                ("arg", c_uint32 * 8), ("result", c_uint32 * 2)]


class Piece(ctypes.Structure):
    _fields_ = [("addr", c_uint32), ("len", c_uint32)]


def bytes_of(pieces):
    return sum(length for _, _, length in pieces)


def pages_of(gfns):
    """Whole pages as pieces."""
    return [(gfn, 0, PAGE) for gfn in gfns]


class TinyGuest(Guest):
    memory = 32
    boot_image = "tiny-boot.img"
    up_timeout = 60
    # boot is 0, the primary master; the first data disk gets a channel alone
    drives = (2, 1, 3)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mailbox = None
        self.lists = []

    # life

    def serial(self):
        return f"file:{self.serial_path}"

    def devices(self):
        emulated = [d for d in self.disks if not hasattr(d, "xl")]
        for drive, disk in zip(self.drives, emulated):
            disk.drive = drive
        return [f"ide-hd,bus=ide.{drive >> 1},unit={drive & 1},"
                f"drive={disk.node}" for drive, disk
                in zip((0, *self.drives), [self.boot, *emulated])]

    def poll_up(self):
        try:
            return "LAB GUEST UP" in self.serial_path.read_text() and \
                self.map_mailbox()
        except FileNotFoundError:
            return False

    def map_mailbox(self):
        address = self.xen.map_rw(self.domid, MAILBOX_GFN, PAGES)
        self.mailbox = Mailbox.from_address(address)
        self.lists = [(Piece * LIST_MAX).from_address(address + i * PAGE)
                      for i in range(1, PAGES)]
        return self.mailbox.magic == MAGIC

    def disconnect(self):
        if self.mailbox is not None:
            self.xen.unmap(ctypes.addressof(self.mailbox), PAGES)
            self.mailbox = None

    # commands

    def send(self, command, *args):
        for i, value in enumerate(args):
            self.mailbox.arg[i] = value
        self.mailbox.command = command

    def finish(self, timeout=30):
        """Wait for the guest; returns its two results."""
        end = time.monotonic() + timeout
        while self.mailbox.command:
            if time.monotonic() > end:
                self.fail_if_dead("died")
                raise CheckFailed(f"{self.name} did not answer in {timeout} s")
            time.sleep(0.0005)
        return tuple(self.mailbox.result)

    def command(self, *args):
        self.send(*args)
        return self.finish()

    def put_list(self, number, pieces):
        """Fill a list with (address, length); returns the count."""
        if len(pieces) > LIST_MAX:
            raise ValueError(f"a list holds {LIST_MAX} pieces")
        for i, (address, length) in enumerate(pieces):
            self.lists[number][i] = Piece(address, length)
        return len(pieces)

    def notify(self, port):
        """Send an event."""
        if self.command(NOTIFY, port)[0]:
            raise CheckFailed(f"{self.name}: cannot send on port {port}")

    def set_grants(self, version):
        """Set the version of the grant table; nothing may be granted."""
        result = self.command(GRANTS, version)[0]
        if result:
            raise CheckFailed(f"{self.name}: grant table version {version}: "
                              f"{ctypes.c_int32(result).value}")

    # memory

    def poke(self, gfn, offset, value):
        """The guest writes 32 bits."""
        self.command(WRITE32, gfn * PAGE + offset, value)

    def word(self, gfn, offset=0):
        """The guest reads 32 bits."""
        return self.command(READ32, gfn * PAGE + offset)[0]

    def fill(self, gfn, seed):
        """The guest writes a whole page: xen.filled(seed)."""
        self.command(FILL, gfn * PAGE, seed)

    def copy(self, to, source, length):
        """Copy bytes between (gfn, offset) pairs."""
        self.command(COPY, to[0] * PAGE + to[1],
                     source[0] * PAGE + source[1], length)

    def sums(self, gfns):
        """The hash of each page, as the guest sees it."""
        result, gfns = [], list(gfns)
        for start in range(0, len(gfns), LIST_MAX):
            part = gfns[start:start + LIST_MAX]
            count = self.put_list(0, [(gfn * PAGE, PAGE) for gfn in part])
            self.command(SUMS, count)
            result += [p.len << 32 | p.addr for p in self.lists[0][:count]]
        return result

    def sum(self, gfn):
        return self.sums([gfn])[0]

    def decrease(self, gfn):
        """The guest gives a page back, as its balloon would."""
        return self.command(DECREASE, gfn)[0]

    def populate(self, gfn):
        return self.command(POPULATE, gfn)[0]

    # disks

    def dma_args(self, number, lba, pieces, write, disk):
        """Fill a list with (gfn, offset, length); the command's arguments."""
        split = []
        for gfn, offset, length in pieces:
            address = gfn * PAGE + offset
            for at in range(0, length, MAX_PIECE):
                split.append((address + at, min(MAX_PIECE, length - at)))
        count = self.put_list(number, split)
        drive = (disk or self.disks[0]).drive
        return (drive, lba, bytes_of(pieces) // SECTOR,
                count << 16 | (DMA_WRITE if write else 0))

    def check_dma(self, status, what):
        if status != DMA_OK:
            raise CheckFailed(f"{self.name}: {what}: status {status:#x}")

    def dma(self, lba, pieces, write=False, disk=None, check=True):
        """One request; pieces are (gfn, offset, length), lba in sectors."""
        args = self.dma_args(0, lba, pieces, write, disk)
        status = self.command(DMA, *args)[0]
        if check:
            self.check_dma(status, f"DMA at sector {lba}")
        return status

    def read(self, lba, pieces, disk=None):
        self.dma(lba, pieces, False, disk)

    def write(self, lba, pieces, disk=None):
        self.dma(lba, pieces, True, disk)

    def read_pages(self, block, gfns, disk=None):
        """Consecutive blocks from `block` on, one to each gfn."""
        self.read(block * 8, pages_of(gfns), disk)

    def write_pages(self, block, gfns, disk=None):
        self.write(block * 8, pages_of(gfns), disk)

    def read_both(self, first, second):
        """Two reads at once, each (disk, lba, pieces), on both channels."""
        args = self.dma_args(0, first[1], first[2], False, first[0])
        args += self.dma_args(1, second[1], second[2], False, second[0])
        if args[0] >> 1 == args[4] >> 1:
            raise ValueError("both disks are on one channel")
        for status in self.command(DMA_BOTH, *args):
            self.check_dma(status, "one of two DMAs at once")

    def read_hammered(self, lba, pieces, gfn, offset=0, disk=None):
        """Read, and count up a word all the while; returns the writes."""
        args = self.dma_args(0, lba, pieces, False, disk)
        status, writes = self.command(DMA_HAMMER, *args, gfn * PAGE + offset)
        self.check_dma(status, "DMA under writes")
        return writes

    def start_read(self, lba, pieces, disk=None):
        """Start a read and return; finish_read() waits for it."""
        self.send(DMA, *self.dma_args(0, lba, pieces, False, disk))

    def finish_read(self, timeout=30):
        self.check_dma(self.finish(timeout)[0], "DMA")

    def read_pio(self, lba, sectors, gfn, disk=None):
        """Read without DMA."""
        drive = (disk or self.disks[0]).drive
        status = self.command(PIO_READ, drive, lba, sectors, gfn * PAGE)[0]
        if status & 0xA1:               # busy, fault, error
            raise CheckFailed(f"{self.name}: PIO read: status {status:#x}")

    # what pages should hold

    def expect(self, gfns, pages, what):
        """The guest's hashes of gfns are those of these pages."""
        gfns, pages = list(gfns), list(pages)
        for gfn, got, page in zip(gfns, self.sums(gfns), pages, strict=True):
            if got != self.xen.page_hash(page):
                raise CheckFailed(
                    f"{what}: {self.name} gfn {gfn:#x} holds wrong bytes")

    def expect_blocks(self, gfns, first, what="bytes of the base"):
        """gfns hold blocks of base.raw from `first` on."""
        gfns = list(gfns)
        self.expect(gfns, [pattern.block(first + i)
                           for i in range(len(gfns))], what)
