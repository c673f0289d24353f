# SPDX-License-Identifier: GPL-2.0-or-later
"""Two guests read the same files: what that costs and what it saves.

What the keys of the figures mean is said in FIGURES.  make demo shows them.
"""
import json

from dedup import Change, flat, stats

AROUND_SECONDS = 60
PAGE = 4096
STORE_GFN = 0x10000             # of slot 0, see include/dedup-store/xen-calls.h
SPARE_SLOTS = 256               # slots that were taken and given back

FIGURES = {
    "guests": "guests",
    "blocks_read": "blocks that each guest asked for by reads that offered "
                   "their pages",
    "image_bytes_first": "bytes read from the disk that holds the base image "
                         "while the first guest read (below everything in "
                         "dom0, page cache emptied before)",
    "image_bytes_second": "the same while the second guest read the same",
    "frames_given": "frames that each guest was given",
    "copied": "blocks, whole or in part, that each guest was given by "
              "copying from the store",
    "bytes_passed": "bytes that each guest read past the store",
    "xen_freed_pages": "pages that Xen says sharing has freed meanwhile "
                       "(sharing_freed_memory; it counts guest pages, not "
                       "the store's frames that took their place)",
    "shared_pages": "pages of each guest that Xen says are shared",
    "idle_frames": "frames that only the store holds",
    "possible_pages": "guest pages with a whole, page-aligned block of the "
                      "image that both guests read",
    "shared_ratio": "(xen_freed_pages - idle_frames) / possible_pages",
    "net_saved_pages": "xen_freed_pages less the frames that the store holds",
    "net_possible_pages": "half of possible_pages: one frame for two guests",
    "shared_ratio_later": f"the same after {AROUND_SECONDS} s of other DMA",
    "hypercalls_per_hit": "second guest, frames given on the common path: to "
                          "pages that were never given one before",
    "hypercalls_per_hit_all": "second guest, all frames given and all that "
                              "giving took",
    "syscalls_per_hit": "the same, calls into the kernel",
    "given_fresh_again": "frames given to the second guest's pages that "
                         "never held one, and that held one before",
    "hit_frames": "frames given to the second guest",
    "not_given": "blocks of each guest that were not given, by reason",
    "checksums_ok": "every file of both guests is as in the image, before "
                    "and after one guest overwrote a shared page",
    "isolation_ok": "the page that one guest overwrote is unchanged for the "
                    "other",
    "stats": "query-dedup-stats of both guests",
    "around": "what went on around the shared pages for a minute",
}


def of(guest):
    """query-dedup-stats of a guest's first disk."""
    return stats(guest, guest.disks[0].node)


def frames(lab):
    """Frames that the store has."""
    return sum(lab.stores["default"].frames())


def idle_frames(lab):
    """Frames of the store that no guest shares, as Xen counts references."""
    store = lab.xen.domid("dedup-share-default")
    used = frames(lab) + SPARE_SLOTS
    return sum(lab.xen.references(store, gfn) == 1 for gfn
               in range(STORE_GFN, STORE_GFN + used))


def read_all(lab, guest):
    """Mount and read every file; returns (bytes of the image, checksums ok)."""
    lab.drop_caches()
    before = lab.image_bytes()
    guest.mount(guest.disks[0])
    found = guest.digest()
    return lab.image_bytes() - before, found == lab.digest()


def sharing(lab, possible, freed_before):
    freed = lab.xen.freed() - freed_before
    idle = idle_frames(lab)
    return freed, idle, round((freed - idle) / possible, 4)


def possible_pages(changes):
    """Both guests read the same whole blocks; each has a page for each."""
    whole = [c.of("blocks-read") - sum(c.of("unaligned", "not-ram"))
             for c in changes]
    return 2 * min(whole)


def dma_around(lab, guests):
    """A minute of reads and writes of another disk, which does not share."""
    for guest in guests:
        guest.send(
            f"end=$(($(cut -d. -f1 /proc/uptime) + {AROUND_SECONDS})); n=0; "
            "while [ $(cut -d. -f1 /proc/uptime) -lt $end ]; do "
            f"dd if={guest.disks[1].drive} of=/tmp/x bs=64k count=16 "
            "skip=$((n % 512)) 2>/dev/null; "
            f"dd if=/tmp/x of={guest.disks[1].drive} bs=4k count=64 "
            "conv=notrunc "
            "seek=$((n * 64 % 8192)) 2>/dev/null; "
            "sync; n=$((n + 16)); done; echo rounds $((n / 16))")
    replies = [guest.reply(AROUND_SECONDS + 120)[0] for guest in guests]
    counts = [guest.disk_stats(guest.disks[1]) for guest in guests]
    return [{"rounds": int(r[-1].split()[1]), "bytes_read": c["rd_bytes"],
             "bytes_written": c["wr_bytes"], "reads": c["rd_operations"],
             "writes": c["wr_operations"]} for r, c in zip(replies, counts)]


def overwrite(lab, one, two):
    """One guest overwrites a page that both share; True if only it sees it.

    A block of a file: those of no file are zeroes, and not shared.  So it is
    put back, as the file is read again.
    """
    block = 8192
    drive = one.disks[0].drive
    show = f"dd if={drive} bs=4096 skip={block} count=1 2>/dev/null | md5sum"
    before = [g.cmd(show)[0] for g in (one, two)]
    one.cmd(f"dd if={drive} of=/tmp/was bs=4096 skip={block} count=1 "
            "2>/dev/null")
    freed = lab.xen.freed()
    one.cmd(f"yes overwritten | head -c 4096 | dd of={drive} bs=4096 "
            f"seek={block} conv=notrunc 2>/dev/null")
    after = [g.cmd(show)[0] for g in (one, two)]
    freed_after = lab.xen.freed()
    lab.note(f"overwrote block {block}; freed {freed} -> {freed_after}")
    one.cmd(f"dd if=/tmp/was of={drive} bs=4096 seek={block} conv=notrunc "
            "2>/dev/null; sync")
    return before[0] == before[1] == after[1] and after[0] != before[0] and \
        freed_after < freed


def table(figures):
    lines = []
    for key, what in FIGURES.items():
        if key in figures and key not in ("stats", "around", "not_given"):
            lines.append(f"{key:20} {figures[key]!s:22} {what}")
    return "\n".join(lines)


def run(lab, guests):
    """Two guests, each with the image and another disk, not yet started."""
    lab.start_all(*guests)
    one, two = guests
    changes = [Change(g, g.disks[0].node) for g in guests]
    freed_before = lab.xen.freed()      # by what the boots read
    frames_before = frames(lab)

    first, ok1 = read_all(lab, one)
    lab.note(f"{one.name} has read {first} bytes of the image")
    second, ok2 = read_all(lab, two)
    lab.note(f"{two.name} has read {second} bytes of the image")
    possible = possible_pages(changes)
    freed, idle, ratio = sharing(lab, possible, freed_before)
    given = changes[1].of("given-fresh", "fresh-hypercalls",
                          "give-system-calls", "blocks-given",
                          "give-hypercalls")
    figures = {
        "guests": 2,
        "blocks_read": [c.of("blocks-read") for c in changes],
        "image_bytes_first": first,
        "image_bytes_second": second,
        "frames_given": [c.of("blocks-given") for c in changes],
        "xen_freed_pages": freed,
        "shared_pages": [g.shared() for g in guests],
        "idle_frames": idle,
        "possible_pages": possible,
        "shared_ratio": ratio,
        "net_saved_pages": freed + frames_before - frames(lab),
        "copied": [c.of("blocks-copied") for c in changes],
        "bytes_passed": [c.of("bytes-passed") for c in changes],
        "net_possible_pages": possible // 2,
        "hypercalls_per_hit": round(given[1] / given[0], 4),
        "hypercalls_per_hit_all": round(given[4] / given[3], 4),
        "given_fresh_again": changes[1].of("given-fresh", "given-again"),
        "syscalls_per_hit": round(given[2] / given[3], 4),
        "hit_frames": given[3],
        "not_given": [{k: v for k, v in of(g)["not-given"].items() if v}
                      for g in guests],
    }
    lab.note(f"shared {ratio} of the possible; a minute of other DMA")
    figures["around"] = dma_around(lab, guests)
    figures["shared_ratio_later"] = sharing(lab, possible, freed_before)[2]
    figures["isolation_ok"] = overwrite(lab, two, one)
    again = [g.digest() == lab.digest() for g in guests]
    figures["checksums_ok"] = ok1 and ok2 and all(again)
    figures["stats"] = [of(g) for g in guests]
    print([flat(s) for s in figures["stats"]])
    (lab.logs / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    (lab.logs / "demo.txt").write_text(table(figures) + "\n")
    check(lab, figures)


def check(lab, f):
    """The bars of the demonstration."""
    lab.check(f["checksums_ok"], "all checksums are right")
    lab.check(f["isolation_ok"], "a guest's write is its own")
    for given in f["frames_given"]:
        lab.check(given * PAGE >= 32 << 20, f"{given} frames given, 32 MiB")
    lab.equal(f["image_bytes_second"], 0, "bytes read for the second guest")
    lab.check(f["possible_pages"] >= 2 * 8192 * 0.97,
              f"both read {f['possible_pages'] // 2} whole blocks")
    lab.check(f["shared_ratio"] >= 0.97, f"shared {f['shared_ratio']}")
    lab.check(f["shared_ratio_later"] >= 0.97,
              f"still shared after a minute: {f['shared_ratio_later']}")
    net = f["net_saved_pages"] / f["net_possible_pages"]
    lab.check(net >= 0.97, f"memory really saved, of the possible: {net}")
    lab.check(f["hypercalls_per_hit"] <= 3.1,
              f"hypercalls a hit: {f['hypercalls_per_hit']}")
    common = f["given_fresh_again"][0] / f["hit_frames"]
    lab.check(common >= 0.9, f"the common path is common: {common:.4f}")
    # three a batch: Xen's memory is looked at, two multicalls
    lab.check(f["syscalls_per_hit"] <= 0.3,
              f"system calls a hit: {f['syscalls_per_hit']}")
