# SPDX-License-Identifier: GPL-2.0-or-later
"""A file system on a disk that is as slow as one wants.

A loop device over the FUSE file system of tests/bench/dedup-slow-disk.c, with
ext4 on it.  Only reads are slow.  Needs root, FUSE and a free loop device.
"""
import os
import subprocess
import tempfile
import time


class Unavailable(Exception):
    """This host cannot have a slow disk; says why."""


def run(*command):
    try:
        return subprocess.run(command, check=True, capture_output=True,
                              text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as e:
        said = getattr(e, 'stderr', None) or str(e)
        raise Unavailable(f'{command[0]}: {said.strip()}') from e


class SlowDisk:
    """A context: self.path is where the file system is mounted.

    With self.hang() all its reads and writes wait, until self.go_on().
    """

    def __init__(self, program, size, latency_us, mb_per_s=0):
        self.program, self.size = program, size
        self.limits = [f'--latency-us={latency_us}', f'--mb-per-s={mb_per_s}']
        self.undo = []
        self.flag = ''

    def __enter__(self):
        try:
            self.make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def make(self):
        if os.geteuid():
            raise Unavailable('it takes root')
        if not os.path.exists(self.program):
            raise Unavailable('it was built without libfuse3 3.12 or newer')
        top = tempfile.mkdtemp(prefix='dedup-slow-disk-')
        self.undo.append(lambda: subprocess.run(['rm', '-r', top],
                                                check=False))
        fuse, self.path = os.path.join(top, 'fuse'), os.path.join(top, 'mnt')
        os.mkdir(fuse)
        os.mkdir(self.path)
        backing, self.flag = (os.path.join(top, n) for n in ('backing', 'hang'))
        with open(backing, 'wb') as f:
            f.truncate(self.size)
        self.start(backing, fuse)
        loop = run('losetup', '--find', '--show', '--direct-io=on',
                   os.path.join(fuse, 'disk'))
        self.undo.append(lambda: run('losetup', '--detach', loop))
        run('mkfs.ext4', '-q', loop)
        run('mount', loop, self.path)
        self.undo.append(lambda: run('umount', self.path))

    def start(self, backing, fuse):
        # pylint: disable-next=consider-using-with
        p = subprocess.Popen([self.program, '-f', f'--file={backing}',
                              f'--hang-file={self.flag}', *self.limits, fuse])
        self.undo.append(lambda: (run('umount', fuse), p.wait()))
        for _ in range(100):
            if os.path.exists(os.path.join(fuse, 'disk')):
                return
            if p.poll() is not None:
                break
            time.sleep(0.05)
        self.undo.pop()
        p.kill()
        p.wait()
        raise Unavailable('the FUSE file system did not come up')

    def hang(self):
        with open(self.flag, 'wb'):
            pass

    def go_on(self):
        if os.path.exists(self.flag):
            os.unlink(self.flag)

    def __exit__(self, *_):
        self.go_on()
        while self.undo:
            try:
                self.undo.pop()()
            except Unavailable as e:
                print(f'slow disk, taking it down: {e}')
