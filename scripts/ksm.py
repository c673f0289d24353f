# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own merging of equal pages, to compare with."""
import os
from pathlib import Path

KSM = Path('/sys/kernel/mm/ksm')


def can_set():
    """It takes root, and a kernel that has it."""
    return os.access(KSM / 'run', os.W_OK)


def set_(**values):
    for name, value in values.items():
        (KSM / name).write_text(str(value), encoding='ascii')


def get(name):
    return int((KSM / name).read_text(encoding='ascii'))


def settings():
    """What set_() takes to have it as it is now."""
    return {name: get(name)
            for name in ('run', 'pages_to_scan', 'sleep_millisecs')}


def cpu():
    """Seconds of the processor that its thread has used."""
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            name, fields = stat.read_text(encoding='ascii',
                                          errors='replace').rsplit(')', 1)
        except OSError:
            continue            # it has just ended
        if name.endswith('(ksmd'):
            user, system = fields.split()[11:13]
            return (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')
    raise RuntimeError('there is no ksmd')
