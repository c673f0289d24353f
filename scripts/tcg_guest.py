# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux guests under TCG, on overlays of images."""
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tests/lab'))
# pylint: disable=wrong-import-position
from host import guests                                 # noqa: E402

TIMEOUT = 600


def boot_image():
    """Debian's kernel and an initrd, on a disk that boots."""
    return guests.linux(ROOT / 'tests/lab') / 'linux-boot.img'


class Guest:
    """Boots from the first of @images; @build is where its QEMU was built.

    Each disk is an overlay of its own.  @node: options of the filter above it,
    or None.  @copies: it is an overlay on a copy of its own, too.
    """

    def __init__(self, build, work, name, memory, images, node=None,
                 copies=False, trace=()):
        self.name, self.build, self.work = name, build, work
        self.node, self.copies = node, copies
        self.serial, self.qmp = work / f'{name}.s', work / f'{name}.q'
        for path in (self.serial, self.qmp):
            path.unlink(missing_ok=True)
        disks = [option for n, image in enumerate(images)
                 for option in self.disk(n, image)]
        self.process = subprocess.Popen([
            build / 'qemu-system-x86_64', '-M', 'q35',
            '-accel', 'tcg,thread=multi,tb-size=64', '-m', f'{memory}M',
            '-nodefaults', '-display', 'none', '-L', '/usr/share/seabios',
            '-L', '/usr/share/qemu',
            '-serial', f'unix:{self.serial},server=on,wait=off',
            '-qmp', f'unix:{self.qmp},server=on,wait=off', *trace, *disks],
            stdin=subprocess.DEVNULL)
        self.stream = self.connect(self.serial).makefile('rw', newline='\n')
        self.sums = []

    def disk(self, n, image):
        """Options of the n-th disk."""
        if self.copies:
            own = self.work / f'{self.name}-{n}.raw'
            shutil.copyfile(image, own)
            image = own
        overlay = self.work / f'{self.name}-{n}.qcow2'
        subprocess.run([self.build / 'qemu-img', 'create', '-q', '-f', 'qcow2',
                        overlay, str(image.stat().st_size)], check=True)
        drive = f'd{n}' if self.node else f'img{n}'
        return ['-blockdev', f'driver=raw,node-name=base{n},read-only=on,'
                f'file.driver=file,file.filename={image}',
                '-blockdev', f'driver=qcow2,node-name=img{n},backing=base{n},'
                f'file.driver=file,file.filename={overlay}',
                *(['-blockdev', f'driver=dedup-share,node-name=d{n},'
                   f'file=img{n},{self.node}'] if self.node else []),
                '-device', f'ide-hd,drive={drive},bus=ide.{n}']

    def connect(self, path):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT)
        for _ in range(200):
            try:
                sock.connect(str(path))
                return sock
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f'{self.name} did not start')

    def read_line(self):
        line = self.stream.readline()
        if not line:
            raise RuntimeError(f'{self.name} has ended')
        return line

    def wait_up(self):
        while 'LAB GUEST UP' not in self.read_line():
            pass

    def run(self, command):
        """Run it in the guest; returns its last line."""
        self.stream.write(command + '\n')
        self.stream.flush()
        last = ''
        while True:
            line = self.read_line().strip()
            if line.startswith('LAB-END'):
                if line != 'LAB-END 0':
                    raise RuntimeError(f'{self.name}: {command}: {last}')
                return last
            last = line or last

    def stats(self):
        """What the filter counted, of each disk."""
        with self.connect(self.qmp) as sock, sock.makefile('rw') as f:
            for command in ('qmp_capabilities', 'query-dedup-stats'):
                f.write(json.dumps({'execute': command}) + '\n')
                f.flush()
                answer = {}
                while 'return' not in answer:
                    answer = json.loads(f.readline())
        return answer['return']


def in_all(these, function):
    """Call it for all guests at once; raises what any of them raised."""
    errors = []

    def one(guest):
        try:
            function(guest)
        except Exception as e:          # pylint: disable=broad-except
            errors.append(e)

    threads = [threading.Thread(target=one, args=(g,)) for g in these]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
