# SPDX-License-Identifier: GPL-2.0-or-later
"""How a scenario can end before its end."""


class CheckFailed(AssertionError):
    """What the scenario asserts is not so.  Never tried again."""


class LostRun(Exception):
    """The emulator lost a guest, which says nothing about what is tested.

    The lab runs the scenario once more, and says so."""


class Skip(Exception):
    """The scenario does not apply here; the text says why."""
