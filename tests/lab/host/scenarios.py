# SPDX-License-Identifier: GPL-2.0-or-later
"""Which scenarios there are and what each needs, without running them.

A scenario says it in a literal:

    BOOT = {"xen": "sharing", "fast": True, "timeout": 60, "needs": ["filter"]}
"""
import ast
from dataclasses import dataclass

from . import xen

TIMEOUT = 120
KEYS = {"xen", "fast", "timeout", "needs", "xen_args", "iommu"}
NEEDS = {"filter"}


class BadScenario(Exception):
    """A scenario's file or name is wrong; the text says how."""


@dataclass(frozen=True)
class Scenario:
    name: str
    title: str
    xen: str
    fast: bool
    timeout: int
    needs: tuple
    xen_args: str
    iommu: bool

    @property
    def boot(self):
        """Scenarios with the same value share a boot."""
        return self.xen, self.xen_args, self.iommu


def title(text):
    """The first line of the header comment that is not the license."""
    for line in text.splitlines():
        line = line.lstrip("# \"")
        if line and "SPDX" not in line:
            return line.rstrip('."')
    return ""


def literal(tree, path):
    for node in tree.body:
        if isinstance(node, ast.Assign) and \
                getattr(node.targets[0], "id", "") == "BOOT":
            return ast.literal_eval(node.value)
    raise BadScenario(f"{path}: no BOOT = {{...}}")


def parse(path):
    text = path.read_text()
    try:
        boot = literal(ast.parse(text), path)
    except (SyntaxError, ValueError) as error:
        raise BadScenario(f"{path}: {error}") from None
    if unknown := set(boot) - KEYS:
        raise BadScenario(f"{path}: unknown in BOOT: {', '.join(unknown)}; "
                          f"known are {', '.join(sorted(KEYS))}")
    variant = boot.get("xen", "sharing")
    if variant not in xen.VARIANTS:
        raise BadScenario(f"{path}: xen is one of {', '.join(xen.VARIANTS)}")
    if unknown := set(boot.get("needs", ())) - NEEDS:
        raise BadScenario(f"{path}: unknown needs: {', '.join(unknown)}")
    return Scenario(path.stem, title(text), variant, boot.get("fast", False),
                    boot.get("timeout", TIMEOUT), tuple(boot.get("needs", ())),
                    boot.get("xen_args", ""), boot.get("iommu", False))


def load_all(lab_dir):
    return {path.stem: parse(path)
            for path in sorted((lab_dir / "scenarios").glob("*.py"))}


def choose(every, names, fast):
    """The scenarios asked for, in the order of their names."""
    if unknown := [n for n in names if n not in every]:
        raise BadScenario(f"no scenario named {', '.join(unknown)}; "
                          f"there are: {', '.join(every)}")
    return [s for s in every.values() if (not names or s.name in names) and
            (s.fast or not fast)]


def by_boot(chosen):
    groups = {}
    for scenario in chosen:
        groups.setdefault(scenario.boot, []).append(scenario)
    return groups
