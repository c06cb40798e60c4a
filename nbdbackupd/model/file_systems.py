"""File systems on a disk: what partx and blkid say of it, and which one is meant.

The disk is a stranger's: every number is checked before it is used, and names are only shown.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nbdbackupd.errors import UsageError
from nbdbackupd.units import human_size

EXT: Final = frozenset({"ext2", "ext3", "ext4"})
"""Types that fuse2fs reads."""

GRUB: Final = EXT | {
    "affs",
    "btrfs",
    "exfat",
    "f2fs",
    "hfs",
    "hfsplus",
    "iso9660",
    "jfs",
    "minix",
    "nilfs2",
    "ntfs",
    "reiserfs",
    "romfs",
    "squashfs",
    "udf",
    "ufs",
    "vfat",
    "xfs",
    "zfs_member",
}
"""Types of blkid that GRUB 2.06 has readers for."""

EXTENDED: Final = frozenset({"0x5", "0xf", "0x85"})
MAX_PARTITIONS: Final = 1024
EXT_MAGIC: Final = b"\x53\xef"
EXT_SUPERBLOCK: Final = 1024
"""Position of the superblock of ext2, ext3 and ext4, in bytes, and its length."""

EXT_RECOVER: Final = 0x4
"""Incompatible feature of ext3 and ext4: the journal holds what the tables don't have yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """A row of a partition table: ``offset`` and ``size`` in bytes, ``scheme`` gpt or dos."""

    number: int
    offset: int
    size: int
    scheme: str
    name: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSystem:
    """What lies in one place of a disk, by its signature.

    ``partition`` is the number in the partition table, 0 for a disk without one. ``offset`` and
    ``size`` are in bytes. ``type`` is blkid's word, empty if it knows none; ``is_files`` tells
    that it holds files (and not swap space, LVM, LUKS or nothing known). ``unclean``: its journal
    has to be replayed to see the newest state; known for ext only. ``volume`` is a logical volume,
    as ``group/name``; one that is in several pieces has ``offset`` -1.
    """

    disk: str
    partition: int
    offset: int
    size: int
    volume: str = ""
    scheme: str = ""
    type: str = ""
    label: str = ""
    name: str = ""
    uuid: str = ""
    is_files: bool = False
    unclean: bool = False

    @property
    def place(self) -> str:
        """``vda``, ``partition 2 of vda`` or ``volume vg/root``."""
        if self.volume:
            return f"volume {self.volume}"
        return f"partition {self.partition} of {self.disk}" if self.partition else self.disk

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "disk": self.disk,
            "partition": self.partition or None,
            "volume": self.volume,
            "offset": self.offset,
            "size": self.size,
            "type": self.type,
            "label": self.label,
            "name": self.name,
            "uuid": self.uuid,
            "files": self.is_files,
            "unclean": self.unclean,
        }


def parse_partx(text: str, disk_size: int, sector: int) -> tuple[Partition, ...]:
    """The partitions in the output of ``partx --pairs -o NR,START,SECTORS,TYPE,NAME,SCHEME``.

    Those that do not lie on the disk are left out, and so are extended ones, which hold others.
    """
    found = []
    for line in text.splitlines()[:MAX_PARTITIONS]:
        try:
            row = dict(word.partition("=")[::2] for word in shlex.split(line))
            number, start, count = (int(row[key]) for key in ("NR", "START", "SECTORS"))
        except (ValueError, KeyError):
            continue
        offset, size = start * sector, count * sector
        is_extended = row.get("SCHEME") == "dos" and row.get("TYPE") in EXTENDED
        if min(number, start, count) > 0 and offset + size <= disk_size and not is_extended:
            found.append(
                Partition(
                    number=number,
                    offset=offset,
                    size=size,
                    scheme=row.get("SCHEME", ""),
                    name=_decoded(row.get("NAME", "")),
                )
            )
    return tuple(found)


def parse_blkid(text: str) -> Mapping[str, str]:
    """The tags in the output of ``blkid -p -o udev``, without their prefix ID_FS."""
    pairs = (line.partition("=")[::2] for line in text.splitlines())
    return {
        key.removeprefix("ID_FS_").removesuffix("_ENC"): _decoded(value)
        for key, value in pairs
        if key.startswith("ID_FS_")
    }


def _decoded(text: str) -> str:
    r"""A text in which libblkid and partx write odd bytes as ``\x20``."""
    raw = re.sub(
        rb"\\x([0-9a-fA-F]{2})",
        lambda found: bytes([int(found[1], 16)]),
        text.encode(errors="surrogateescape"),
    )
    return raw.decode(errors="replace").rstrip("\0 ")


def is_unclean(superblock: bytes) -> bool:
    """Whether the superblock of an ext file system asks for a replay of its journal."""
    if len(superblock) < EXT_SUPERBLOCK or superblock[0x38:0x3A] != EXT_MAGIC:
        return False
    return bool(int.from_bytes(superblock[0x60:0x64], "little") & EXT_RECOVER)


def choose(found: Sequence[FileSystem], wanted: str) -> FileSystem:
    """The file system that is meant: ``wanted`` is a partition's number, or a volume's name.

    Empty means the only one that holds files. Raises UsageError: there is none, or several.
    """
    known = listing(found)
    if wanted:
        there = [each for each in found if wanted == (each.volume or str(each.partition))]
        if not there:
            raise UsageError(f"there is no partition {wanted}; there is: {known}")
        if len(there) > 1:
            disks = ", ".join(each.disk for each in there)
            raise UsageError(f"there is a partition {wanted} on {disks}: choose one with -d")
        return there[0]
    usable = [each for each in found if each.is_files]
    if not usable:
        raise UsageError(f"no file system was found; there is: {known}")
    if len(usable) > 1:
        raise UsageError(
            f"there are several file systems, choose one with -d and --partition: {listing(usable)}"
        )
    return usable[0]


def listing(found: Iterable[FileSystem]) -> str:
    """All of them in one line, for messages."""
    return ", ".join(
        f"{each.place} ({each.type or 'unknown'}, {human_size(each.size)})" for each in found
    )
