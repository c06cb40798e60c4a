"""Restore points and the chains they form.

A set holds one chain: a full, the increments and differentials that hang on it, and copies
beside it. Order comes from parent links alone (never from file names, sequence numbers or
times), and each link carries the digest of the parent's manifest.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from nbdbackupd.errors import ChainBrokenError, NoFullError, RepositoryError


class Level(StrEnum):
    """What a run saves; ``AUTO`` exists only in requests, never in stored data."""

    AUTO = "auto"
    FULL = "full"
    INC = "inc"
    DIFF = "diff"
    COPY = "copy"


class DiskMode(StrEnum):
    """How one disk was read in a point: whole, or only what changed since the parent."""

    FULL = "full"
    DELTA = "delta"


class Consistency(StrEnum):
    """State of the guest at the instant of the point, best first.

    ``OFFLINE``: it was off, and had ended by itself as far as libvirt knows; one that was
    destroyed, crashed or saved to a file is ``CRASH``, though it was off, too.
    """

    OFFLINE = "offline"
    FILESYSTEM = "filesystem"
    PAUSED = "paused"
    CRASH = "crash"


class Layout(StrEnum):
    """How a disk's blocks lie in its file: framed stream, or raw image (guest offset = place).

    ``QCOW2``: as clusters of an image. Only other programs write such sets.
    """

    STREAM = "stream"
    RAW = "raw"
    QCOW2 = "qcow2"


class DigestKind(StrEnum):
    """How an index proves its blocks. XXH128 finds accidents; who may write can forge it."""

    SHA256 = "sha256"
    BLAKE3 = "blake3"
    XXH128 = "xxh128"

    @property
    def label(self) -> str:
        """As it is written in a sentence."""
        return "SHA-256" if self is DigestKind.SHA256 else self.value.upper()


class Codec(StrEnum):
    """How a stream's blocks are packed; virtnbdrestore reads LZ4 and none."""

    NONE = "none"
    LZ4 = "lz4"
    ZSTD = "zstd"


@dataclass(frozen=True, slots=True)
class Compression:
    """A codec and its level: ``lz4:2``."""

    codec: Codec
    level: int

    def __str__(self) -> str:
        return f"{self.codec}:{self.level}"


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """One image of a disk's backing chain, top first; what tells it from another image.

    ``device`` and ``inode`` are 0 where the image is not a file on this host.
    """

    path: str
    format: str
    device: int = 0
    inode: int = 0


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of the set that is not a stream: name relative to the set, bytes, SHA-256 (hex).

    ``role`` is one of: domain-xml, domain-xml-live, machine, checkpoint-xml, image-info, loader,
    nvram, kernel, initrd, tpm-state, host, guest-info, disk-index.
    ``origin`` is the path on the hypervisor that it was copied from, or empty.
    """

    name: str
    role: str
    size: int
    sha256: str
    origin: str = ""
    disk: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskPoint:
    """One disk in one restore point. All sizes in bytes.

    ``size`` is the virtual size at that instant; ``file_size`` and ``adler32`` describe the
    stream file; ``data_bytes`` and ``zero_bytes`` are guest bytes that it holds as data and as
    explicit zeroes. ``reason`` says why a disk was read in full within an increment, ``digest`` how
    the index proves the blocks. ``sha256`` (hex) is that of a whole qcow2 image, else empty.
    """

    target: str
    mode: DiskMode
    size: int
    format: str
    source: str
    file: str
    file_size: int
    adler32: int
    index: StoredFile
    data_bytes: int
    zero_bytes: int
    codec: Codec = Codec.NONE
    layout: Layout = Layout.STREAM
    reason: str = ""
    serial: str = ""
    layers: tuple[ImageLayer, ...] = ()
    bitmap: str = ""
    digest: DigestKind = DigestKind.SHA256
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class SkippedDisk:
    """A disk of the domain that the point does not hold, and why."""

    target: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)
class RestorePoint:
    """The result of one run: all of its disks at one instant.

    ``created`` is RFC 3339 UTC. ``parent`` and ``parent_digest`` (SHA-256 of the parent's
    manifest file, hex) are empty for a full and a copy. ``checkpoint`` is the libvirt checkpoint
    that this point made (empty for diff and copy), ``base_checkpoint`` the one that its deltas
    start from. ``merged``: ids of older points that have become a part of it, oldest first.
    """

    id: str
    sequence: int
    chain: str
    level: Level
    created: str
    domain: str
    uuid: str
    disks: tuple[DiskPoint, ...]
    consistency: Consistency
    parent: str = ""
    parent_digest: str = ""
    checkpoint: str = ""
    base_checkpoint: str = ""
    skipped: tuple[SkippedDisk, ...] = ()
    files: tuple[StoredFile, ...] = ()
    warnings: tuple[str, ...] = ()
    autostart: bool = False
    program: str = ""
    merged: tuple[str, ...] = ()
    digest: str = field(default="", compare=False)

    def disk(self, target: str) -> DiskPoint:
        """The disk of that target name.

        Raises RepositoryError if the point does not hold it.
        """
        for disk in self.disks:
            if disk.target == target:
                return disk
        held = ", ".join(disk.target for disk in self.disks)
        raise RepositoryError(f"restore point {self.id} holds no disk {target}, only: {held}")

    @property
    def makes_base(self) -> bool:
        """Whether a later increment or differential may start from this point.

        An increment of disks that can't be tracked makes no checkpoint and is a leaf, as a
        differential is. A full is a base in any case: that of raw disks, too, has increments,
        in which they are read in full.
        """
        return self.level is Level.FULL or (self.level is Level.INC and bool(self.checkpoint))


@dataclass(frozen=True, slots=True)
class BackupSet:
    """All points of a set, oldest first (a parent always before its children)."""

    points: tuple[RestorePoint, ...]

    @classmethod
    def from_points(cls, points: Iterable[RestorePoint]) -> "BackupSet":
        """Prove that the points form one chain and put them in order.

        Sequence numbers come from inside the manifests, are unique and must agree with the
        links; they decide only between points that no link orders (a copy, a differential).

        Raises ChainBrokenError: a missing parent, a parent of other digest or chain, two points
        of one id, two fulls, or two increments with checkpoints on one parent.
        """
        found, seen = list(points), _Seen()
        for point in found:
            seen.add(point)
        for point in found:
            _check_link(point, seen.by_id)
        return cls(tuple(sorted(found, key=lambda point: point.sequence)))

    @classmethod
    def from_sound(cls, points: Iterable[RestorePoint]) -> "tuple[BackupSet, tuple[str, ...]]":
        """The points that hang together, and for each other one why it does not.

        For the worst day: a point whose own ancestors are sound can be restored, whatever
        happened to those that came later or beside it.
        """
        seen, problems = _Seen(), []
        for point in sorted(points, key=lambda each: (each.sequence, each.id)):
            try:
                _check_link(point, seen.by_id)
                seen.add(point)
            except ChainBrokenError as err:
                problems.append(err.message)
        return cls(tuple(seen.by_id.values())), tuple(problems)

    @property
    def head(self) -> RestorePoint | None:
        """The newest point that the next increment starts from, or None without a full."""
        return next((point for point in reversed(self.points) if point.makes_base), None)

    @property
    def full(self) -> RestorePoint | None:
        """The chain's full."""
        for point in self.points:
            if point.level is Level.FULL:
                return point
        return None

    @property
    def next_sequence(self) -> int:
        """The number of the next point."""
        return max((point.sequence for point in self.points), default=0) + 1

    @property
    def newest(self) -> RestorePoint:
        """The point that was made last.

        Raises RepositoryError on an empty set.
        """
        if not self.points:
            raise RepositoryError("the set holds no restore point")
        return self.points[-1]

    def path(self, point: RestorePoint, target: str) -> tuple[RestorePoint, ...]:
        """The points that one disk of ``point`` is made of, newest first, its full last.

        Raises ChainBrokenError if the links end before a full read of that disk.
        """
        by_id = {each.id: each for each in self.points}
        path = [point]
        while path[-1].disk(target).mode is not DiskMode.FULL:
            parent = by_id.get(path[-1].parent)
            if parent is None or all(disk.target != target for disk in parent.disks):
                raise ChainBrokenError(
                    f"disk {target}: restore point {path[-1].id} is a delta and its parent "
                    f"{path[-1].parent or '(none)'} does not hold the disk"
                )
            path.append(parent)
        return tuple(path)

    def needed(self, point: RestorePoint) -> tuple[RestorePoint, ...]:
        """The points that any disk of ``point`` is made of, itself first.

        Raises ChainBrokenError.
        """
        found = {point.id: point}
        for disk in point.disks:
            found |= {each.id: each for each in self.path(point, disk.target)}
        return tuple(found.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignSet:
    """What another program left: the sound points, a line for each that is not sound, and hints."""

    known: BackupSet
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def _check_link(point: RestorePoint, by_id: dict[str, RestorePoint]) -> None:
    if point.level in (Level.FULL, Level.COPY):
        if point.parent:
            raise ChainBrokenError(f"{point.level} point {point.id} names a parent")
        return
    parent = by_id.get(point.parent)
    if parent is None:
        raise ChainBrokenError(
            f"restore point {point.id} needs its parent {point.parent or '(none)'}, "
            f"which is not among the sound points"
        )
    if not parent.makes_base or parent.chain != point.chain:
        raise ChainBrokenError(f"restore point {point.id} hangs on {parent.id}, which is no base")
    if parent.sequence >= point.sequence:
        raise ChainBrokenError(f"restore point {point.id} is older than its parent {parent.id}")
    if parent.digest != point.parent_digest:
        raise ChainBrokenError(
            f"restore point {point.id} was made on another manifest of {parent.id} "
            f"than the one that is there"
        )
    if parent.checkpoint != point.base_checkpoint:
        raise ChainBrokenError(
            f"restore point {point.id} starts from checkpoint {point.base_checkpoint}, "
            f"its parent made {parent.checkpoint}"
        )


@dataclass(slots=True)
class _Seen:
    """Points that can be in one set, in the making; each is compared with all in one look."""

    by_id: dict[str, RestorePoint] = field(default_factory=dict)
    sequences: set[int] = field(default_factory=set)
    parents: set[str] = field(default_factory=set)
    full: str = ""

    def add(self, point: RestorePoint) -> None:
        """One more. Raises ChainBrokenError, and leaves it out."""
        if point.id in self.by_id:
            raise ChainBrokenError("two restore points carry the same id")
        if point.sequence in self.sequences:
            raise ChainBrokenError("two restore points carry the same sequence number")
        if point.level is Level.FULL and self.full:
            raise ChainBrokenError(f"the set holds more than one full: {self.full}, {point.id}")
        parent = point.parent if point.makes_base else ""
        if parent in self.parents:
            raise ChainBrokenError(f"two increments hang on restore point {parent}")
        self.by_id[point.id] = point
        self.sequences.add(point.sequence)
        if parent:
            self.parents.add(parent)
        if point.level is Level.FULL:
            self.full = point.id


def effective_level(wanted: Level, known: BackupSet) -> Level:
    """The level that a request means for this set.

    Raises NoFullError for an increment without a full, RepositoryError for a second full.
    """
    if wanted is Level.AUTO:
        return Level.FULL if known.head is None else Level.INC
    if wanted in (Level.INC, Level.DIFF) and known.head is None:
        raise NoFullError(f"level {wanted} needs a full first: use '-l full' or '-l auto'")
    if wanted is Level.FULL and known.full is not None:
        raise RepositoryError(
            f"the set already holds a full ({known.full.id}): "
            f"give another directory with -o, or use '-l inc'"
        )
    return wanted
