# SPDX-License-Identifier: GPL-2.0-or-later
"""What dedup-share says of itself, and how it changes."""


def stats(guest, node="dedup1"):
    """query-dedup-stats of one filter node."""
    for s in guest.qmp("query-dedup-stats"):
        if s["node-name"] == node:
            return s
    raise KeyError(node)


def flat(s):
    """The counters of a node, those not 0, by their names."""
    counts = {k: v for k, v in s.items() if isinstance(v, int)}
    counts.update(s["not-given"])
    counts.update(s.get("store-stats", {}))
    return {k: v for k, v in counts.items() if v}


class Change:
    """How counters changed since this was made."""

    def __init__(self, guest, node="dedup1"):
        self.guest, self.node = guest, node
        self.before = flat(stats(guest, node))

    def of(self, *names):
        now = flat(stats(self.guest, self.node))
        values = tuple(now.get(n, 0) - self.before.get(n, 0) for n in names)
        return values[0] if len(values) == 1 else values

    def all(self):
        now = flat(stats(self.guest, self.node))
        return {k: v - self.before.get(k, 0) for k, v in now.items()
                if v != self.before.get(k, 0)}
