# SPDX-License-Identifier: GPL-2.0-or-later
"""The hypervisor, in the variants that scenarios ask for.

Xen 4.17 refuses memory sharing unless the CPU has VMX.  The emulator has SVM
with nested paging instead, for which the sharing code is complete, so the lab
widens that one test.  Nothing else of Xen is changed.
"""
import shutil

from . import cache

LAB_EDIT = ("xen/arch/x86/mm/mem_sharing.c",
            "!is_hvm_domain(d) || !cpu_has_vmx)",
            "!is_hvm_domain(d) || !(cpu_has_vmx || cpu_has_svm))")

# name: (CONFIG_MEM_SHARING, with the lab edit, what a scenario wants it for)
VARIANTS = {
    "sharing": (True, True, "memory sharing works"),
    "nosharing": (False, False, "built without it: ENOSYS"),
    "amd": (True, False, "as released, on AMD: EOPNOTSUPP"),
}


def source(repo):
    """Debian's Xen source, unpacked; we only ever copy from it."""
    out = cache.root() / "xen-src"
    with open(cache.lab() / "xen-src.log", "w") as log:
        cache.run(log, repo / "scripts" / "debsource", "xen", "4.17", out)
    return out


def apply_edit(tree):
    name, old, new = LAB_EDIT
    text = (tree / name).read_text()
    if text.count(old) != 1:
        raise cache.StepFailed(
            f"lab edit of Xen: {old!r} is in {name} {text.count(old)} times "
            "instead of once; see tests/lab/host/xen.py")
    (tree / name).write_text(text.replace(old, new))


def edit_notice(variant):
    """What to tell whoever reads a log about the Xen that made it."""
    if not VARIANTS[variant][1]:
        return f"Xen variant '{variant}': unedited ({VARIANTS[variant][2]})"
    return (f"Xen variant '{variant}': THIS XEN IS EDITED FOR THE LAB: "
            f"{LAB_EDIT[0]} accepts SVM beside VMX, nothing else")


def fresh_tree(tree, src, version):
    """A build tree of this source version; kept, so make has less to do."""
    stamp = tree / ".lab-version"
    if not stamp.exists() or stamp.read_text() != version:
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(src, tree, symlinks=True)
        stamp.write_text(version)


def write_config(tree, config, sharing):
    line = "CONFIG_MEM_SHARING=y\n" if sharing \
        else "# CONFIG_MEM_SHARING is not set\n"
    (tree / "xen" / ".config").write_text(config + line)


def check_config(tree, sharing):
    on = "CONFIG_MEM_SHARING=y" in (tree / "xen/.config").read_text()
    if on != sharing:
        raise cache.StepFailed("Xen's configuration dropped our choice of "
                               "CONFIG_MEM_SHARING")


def hypervisor(repo, variant):
    """The folder with the `xen` binary of a variant."""
    sharing, edited, _ = VARIANTS[variant]
    src = source(repo)
    version = (src.parent / (src.name + ".version")).read_text().strip()
    config = (repo / "tests/lab/xen.config").read_text()
    # the edit is part of the tree's name and version: it is applied only once
    tree = cache.lab() / f"xen-tree-{variant}"

    def make(out, log):
        fresh_tree(tree, src, f"{version} {LAB_EDIT if edited else ''}")
        if edited and LAB_EDIT[2] not in (tree / LAB_EDIT[0]).read_text():
            apply_edit(tree)
        write_config(tree, config, sharing)
        build = ["make", "-C", tree / "xen", "CC=ccache gcc"]
        cache.run(log, *build, "olddefconfig")
        check_config(tree, sharing)
        cache.run(log, *build, "-j2")
        shutil.copy(tree / "xen" / "xen", out / "xen")

    return cache.step(f"xen-{variant}", make, version, config, VARIANTS,
                      LAB_EDIT)
