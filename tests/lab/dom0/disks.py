# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests' disks, as -blockdev arguments."""
import shutil
from pathlib import Path

IMAGES = Path("/images")
PAYLOAD = Path("/t")
SCRATCH = Path("/run/lab")


class Disk:
    """An image's overlay, behind the filter unless told otherwise.

    The nodes of disk N, from the bottom: base-fileN, baseN, overlay-fileN,
    overlayN, and with a filter dedupN.

    The base goes through dom0's page cache, because O_DIRECT into guest memory
    fails: a PV dom0's kernel cannot pin pages of other domains (EFAULT, which
    the guest sees as a disk error).  To see in Lab.image_bytes() all that a
    device model reads, call Lab.drop_caches() first.

    throttle slows reads of the base down to so many bytes a second, so that a
    request is in flight long enough to do something meanwhile.  A request waits
    while the last second's reads exceed a tenth of that: the first never does.
    """

    def __init__(self, image="base", filter=True, group="default",
                 store="xen", store_size=None, options=None,
                 throttle=None):
        self.image = image
        self.filter = filter
        # the emulated host is slow
        self.options = {"group": group, "store": store,
                        "store-size": store_size, "timeout": 60,
                        **(options or {})}
        self.throttle = throttle
        self.number = self.overlay = self.drive = None

    def prepare(self, guest, number):
        """Called by the guest that takes the disk, before it starts."""
        self.number = number
        self.overlay = SCRATCH / f"{guest}-{number}.qcow2"
        if not self.overlay.exists():
            shutil.copyfile(IMAGES / f"{self.image}.qcow2", self.overlay)

    @property
    def base_path(self):
        return IMAGES / f"{self.image}.raw"

    @property
    def node(self):
        """The name of the topmost node, which the device uses."""
        return f"{'dedup' if self.filter else 'overlay'}{self.number}"

    @property
    def base_node(self):
        return f"base{self.number}"

    def objects(self):
        if not self.throttle:
            return []
        return [f"throttle-group,id=slow{self.number},"
                f"x-bps-read={self.throttle}"]

    def base_options(self):
        n = self.number
        below, nodes = f"base-file{n}", [
            f"driver=file,node-name=base-file{n},"
            f"filename={self.base_path},read-only=on"]
        if self.throttle:
            below = f"slow{n}"
            nodes.append(f"driver=throttle,node-name=slow{n},read-only=on,"
                         f"throttle-group=slow{n},file=base-file{n}")
        return nodes + [
            f"driver=raw,node-name=base{n},file={below},read-only=on"]

    def filter_options(self):
        n = self.number
        extra = "".join(f",{key}={value}" for key, value
                        in self.options.items() if value is not None)
        return f"driver=dedup-share,node-name=dedup{n},file=overlay{n}{extra}"

    def blockdevs(self):
        n = self.number
        nodes = self.base_options() + [
            f"driver=file,node-name=overlay-file{n},filename={self.overlay}",
            f"driver=qcow2,node-name=overlay{n},file=overlay-file{n},"
            f"backing=base{n}"]
        if self.filter:
            nodes.append(self.filter_options())
        return nodes


class CopyDisk(Disk):
    """The same over a copy of the base of the guest's own.

    Only the first blocks are copied; then come blocks of zeroes, written ones.
    """

    ZEROES = 16

    def __init__(self, blocks, **options):
        super().__init__(**options)
        self.blocks = blocks
        self.copy = None

    def prepare(self, guest, number):
        super().prepare(guest, number)
        self.copy = SCRATCH / f"{guest}-{number}.raw"
        if not self.copy.exists():
            with open(IMAGES / f"{self.image}.raw", "rb") as f:
                data = f.read(self.blocks * 4096)
            self.copy.write_bytes(data + bytes(self.ZEROES * 4096))

    @property
    def base_path(self):
        return self.copy


class FileDisk(Disk):
    """The same over a base that lies elsewhere."""

    def __init__(self, path, **options):
        super().__init__(**options)
        self.path = path

    @property
    def base_path(self):
        return self.path


class ReflinkDisk(Disk):
    """A raw copy of an image, by "cp --reflink", that the guest writes to."""

    def __init__(self, path, origin, **options):
        super().__init__(**options)
        self.path = path
        self.origin = origin

    def prepare(self, guest, number):
        self.number = number

    def blockdevs(self):
        n = self.number
        return [
            f"driver=file,node-name=copy-file{n},filename={self.path}",
            f"driver=raw,node-name=overlay{n},file=copy-file{n}",
            f"{self.filter_options()},origin.driver=file,"
            f"origin.filename={self.origin}"]


class PvDisk:
    """A disk for xen-blkfront, which the toolstack makes from disk=[...].

    image: an image's overlay; None: an empty file of the guest's own, which no
    other guest shares.  Disk n is xvd[e-], because libxl gives the first four
    disks of an HVM guest emulated twins.  Whether it has a filter is said for
    all of a guest's PV disks: see PvGuest.
    """
    SIZE = 64 << 20

    def __init__(self, image="files"):
        self.image = image
        self.vdev = self.path = self.drive = None

    def prepare(self, guest, number):
        self.vdev = f"xvd{'defgh'[number]}"
        self.drive = f"/dev/{self.vdev}"
        self.path = SCRATCH / f"{guest}-{number}.{self.format}"
        if self.path.exists():
            return
        if self.image:
            shutil.copyfile(IMAGES / f"{self.image}.qcow2", self.path)
        else:
            with open(self.path, "wb") as f:
                f.truncate(self.SIZE)

    @property
    def format(self):
        return "qcow2" if self.image else "raw"

    @property
    def node(self):
        """The filter's node."""
        return f"{self.vdev}-{self.format}-dedup-share"

    def xl(self):
        return (f"format={self.format},vdev={self.vdev},access=rw,"
                f"backendtype=qdisk,target={self.path}")

    def objects(self):
        return []

    def blockdevs(self):
        return []


class BootDisk:
    """A guest's own copy of a raw boot disk of the payload, unfiltered."""
    node = "boot"

    def __init__(self, image):
        self.image = image
        self.path = None

    def prepare(self, guest, _number):
        self.path = SCRATCH / f"{guest}-boot.img"
        if not self.path.exists():
            shutil.copyfile(PAYLOAD / "guests" / self.image, self.path)

    def objects(self):
        return []

    def blockdevs(self):
        return [f"driver=file,node-name=boot-file,filename={self.path}",
                "driver=raw,node-name=boot,file=boot-file"]


class RawBlockdevs:
    """Blockdevs as a scenario wrote them; the last one is the disk."""

    def __init__(self, *nodes):
        self.nodes = list(nodes)
        self.drive = None

    def prepare(self, guest, number):
        pass

    @property
    def node(self):
        fields = dict(f.split("=", 1) for f in self.nodes[-1].split(","))
        return fields["node-name"]

    def objects(self):
        return []

    def blockdevs(self):
        return self.nodes
