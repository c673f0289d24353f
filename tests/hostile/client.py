# SPDX-License-Identifier: GPL-2.0-or-later
"""An honest client of the store daemon, for tests that make it hostile.

The numbers and structures are those of include/dedup-store/protocol.h;
check_header() compares them.
"""
import array
import mmap
import os
import re
import select
import socket
import struct

BLOCK = 4096
MAGIC, VERSION = 0x54534444, 1
HELLO, LAYER, UNLAYER, READ, PUT, RELEASE, ASK_STATUS, RECLAIM, \
    CLAIM = range(1, 10)
WELCOME, REFUSED, LAYER_STATE, ANSWER, ALIVE, TRIM, STATUS, RECLAIMED = \
    range(65, 73)
OBSERVER = 1
NO_FILL, SECOND_READ = 1, 2
LEASED, BROKEN, BUSY_FILE, FORBIDDEN, UNSUITABLE, SMALL, LIMIT = range(1, 8)
FRAME, ZEROES, ABSENT, SEEN_ONCE, NO_LEASE, FULL, FAILED, BUSY = range(1, 9)

HEADER = struct.Struct('=IIQ')
HELLO_BODY = struct.Struct('=IIIIII16s')
WELCOME_BODY = struct.Struct('=IIIIQQQ16s16s')
CLAIM_BODY = struct.Struct('=IIQ')
CLAIM_FIRST, CLAIM_LAST = 1, 2
TWO = struct.Struct('=II')
EXTENT = struct.Struct('=IIQ')
ANSWER_BODY = struct.Struct('=Q')
FRAME_ENTRY = struct.Struct('=IIIIQ')
STATE_BODY = struct.Struct('=II256s')


def check_header(path):
    """Do the C header's message types have the numbers that we think?"""
    with open(path, encoding='utf-8') as f:
        text = f.read()
    found = dict(re.findall(r'\b(DEDUP_(?:MSG|LAYER|ANSWER)_\w+) = (\d+)',
                            text))
    ours = {
        'MSG': 'HELLO LAYER UNLAYER READ PUT RELEASE ASK_STATUS RECLAIM '
               'CLAIM WELCOME REFUSED LAYER_STATE ANSWER ALIVE TRIM STATUS '
               'RECLAIMED',
        'LAYER': 'LEASED BROKEN FORBIDDEN UNSUITABLE SMALL LIMIT',
        'ANSWER': 'FRAME ZEROES ABSENT SEEN_ONCE NO_LEASE FULL FAILED BUSY',
    }
    for kind, names in ours.items():
        for name in names.split():
            if int(found[f'DEDUP_{kind}_{name}']) != globals()[name]:
                raise AssertionError(f'{name} is not what the header says')


class Ended(Exception):
    """The daemon has ended the connection; says why, if it did."""


class Silent(Exception):
    """The daemon has not said anything for too long."""


class Client:
    LIMIT = 2.0                 # seconds of silence

    def __init__(self, path, hello=None, token=bytes(16), fds=(), **kwargs):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(path)
        self.request = self.serial = 0
        self.trims = 0
        self.states = {}
        self.handles = {}           # Xen: of slots that were named
        self.frames = None
        self.send(hello or self.hello(token=token, **kwargs), fds)
        body, fds = self.expect(WELCOME)
        (self.version, self.store, self.nslots, self.domid, self.size, _,
         self.lock, self.token, _) = WELCOME_BODY.unpack(body)
        if fds:
            self.frames = fds[0]

    @staticmethod
    def hello(magic=MAGIC, version=VERSION, flags=0, store=0, reserved=0,
              count=0, token=bytes(16)):
        return HEADER.pack(HELLO, count, 0) + HELLO_BODY.pack(
            magic, version, flags, store, 0, reserved, token)

    def close(self):
        self.sock.close()
        if self.frames is not None:
            os.close(self.frames)
            self.frames = None

    # --- messages ---------------------------------------------------------

    def send(self, message, fds=()):
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS,
                    array.array('i', fds))] if fds else []
        try:
            self.sock.sendmsg([message], control)
        except (BrokenPipeError, ConnectionResetError):
            self.receive()          # it may have said why
            raise Ended('no reason given') from None

    def receive(self, limit=None):
        """(type, count, request, body, descriptors) of the next message."""
        if not select.select([self.sock], [], [], limit or self.LIMIT)[0]:
            raise Silent
        for _ in range(2):
            try:
                data, control, _, _ = self.sock.recvmsg(
                    1 << 18, socket.CMSG_SPACE(4 * 16),
                    socket.MSG_CMSG_CLOEXEC)
                break
            except ConnectionResetError:
                data, control = b'', ()     # what was said comes behind that
        fds = array.array('i')
        for level, kind, part in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(part[:len(part) // 4 * 4])
        if not data:
            raise Ended('no reason given')
        what, count, request = HEADER.unpack_from(data)
        body = data[HEADER.size:]
        if what == REFUSED:
            raise Ended(body.rstrip(b'\0').decode())
        return what, count, request, body, list(fds)

    def expect(self, wanted, request=None, limit=None):
        """The next message of a type; notes what else is said."""
        while True:
            what, count, number, body, fds = self.receive(limit)
            if what == wanted and request in (None, number):
                return (body, fds) if wanted == WELCOME else (count, body)
            if what == LAYER_STATE:
                layer, state, _ = STATE_BODY.unpack(body)
                self.states[layer] = state
            elif what == TRIM:
                self.trims += 1
            elif what != ALIVE and what != wanted:
                raise AssertionError(f'message {what} was not expected')

    def next_request(self):
        self.request += 1
        return self.request

    # --- what an honest client does ---------------------------------------

    def layer(self, fd, number=0, reserved=0, count=0):
        """Name an image; returns its state, and the text."""
        self.send(HEADER.pack(LAYER, count, 0) + TWO.pack(number, reserved),
                  [fd])
        while True:
            _, body = self.expect(LAYER_STATE)
            layer, state, text = STATE_BODY.unpack(body)
            self.states[layer] = state
            if layer == number:
                return state, text.rstrip(b'\0').decode()

    def unlayer(self, number=0):
        self.send(HEADER.pack(UNLAYER, 0, 0) + TWO.pack(number, 0))

    def send_read(self, extents, flags=0, reserved=0, request=None,
                  count=None):
        request = request or self.next_request()
        self.send(HEADER.pack(READ, len(extents) if count is None else count,
                              request) + TWO.pack(flags, reserved) +
                  b''.join(EXTENT.pack(layer, n, first)
                           for layer, first, n in extents))
        return request

    def answers(self, request, blocks):
        """[(answer, slot, generation)] of all blocks."""
        count, body = self.expect(ANSWER, request)
        if count != blocks:
            raise AssertionError(f'{count} blocks of {blocks} are answered')
        self.serial, = ANSWER_BODY.unpack_from(body)
        got = [FRAME_ENTRY.unpack_from(
            body, ANSWER_BODY.size + i * FRAME_ENTRY.size)
               for i in range(count)]
        self.handles.update((slot, handle) for answer, slot, _, _, handle
                            in got if answer == FRAME)
        return [entry[:3] for entry in got]

    def read(self, first, n=1, layer=0, **kwargs):
        request = self.send_read([(layer, first, n)], **kwargs)
        return self.answers(request, n)

    def send_put(self, blocks, flags=0, reserved=0, request=None, count=None):
        request = request or self.next_request()
        self.send(HEADER.pack(PUT, len(blocks) if count is None else count,
                              request) + TWO.pack(flags, reserved) +
                  b''.join(blocks))
        return request

    def put(self, blocks, **kwargs):
        return self.answers(self.send_put(blocks, **kwargs), len(blocks))

    def release(self, slots, serial=None, count=None):
        self.send(HEADER.pack(RELEASE, len(slots) if count is None else count,
                              0) +
                  struct.pack('=Q', self.serial if serial is None else serial)
                  + struct.pack(f'={len(slots)}I', *slots))

    def claim(self, fd, lock, slots=(), flags=CLAIM_FIRST | CLAIM_LAST,
              reserved=0, count=None):
        """What this process may map of the file of a daemon that has ended."""
        self.send(HEADER.pack(CLAIM, len(slots) if count is None else count,
                              0) + CLAIM_BODY.pack(flags, reserved, lock) +
                  struct.pack(f'={len(slots)}I', *slots), [fd])

    def status(self):
        request = self.next_request()
        self.send(HEADER.pack(ASK_STATUS, 0, request))
        text = b''
        while True:
            count, body = self.expect(STATUS, request)
            flags, _ = TWO.unpack_from(body)
            text += body[TWO.size:TWO.size + count]
            if not flags & 1:
                return text

    def reclaim(self):
        request = self.next_request()
        self.send(HEADER.pack(RECLAIM, 0, request))
        return self.expect(RECLAIMED, request)[0]

    def content(self, slot):
        return os.pread(self.frames, BLOCK, slot * BLOCK)

    def map(self, slot, n=1):
        """Map frames as a QEMU gives them to its guest."""
        return mmap.mmap(self.frames, n * BLOCK, flags=mmap.MAP_PRIVATE,
                         prot=mmap.PROT_READ | mmap.PROT_WRITE,
                         offset=slot * BLOCK)
