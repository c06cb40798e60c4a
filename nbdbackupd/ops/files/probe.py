"""What lies on a disk: its partitions by partx, its file systems by blkid, in user space.

Both are given a file and open nothing else. What they say of a stranger's disk is checked in
``model/file_systems.py``.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdbackupd import durable, proc
from nbdbackupd.model import file_systems, lvm
from nbdbackupd.model.file_systems import EXT_SUPERBLOCK, FileSystem, Partition

SECONDS: Final = 60.0
EDGE: Final = 1 << 20
"""Where signatures of disks lie, in bytes from both ends."""

LVM_MEMBER: Final = "LVM2_member"
SECTORS: Final = (512, 4096)
"""Sizes of a logical sector, in bytes: a partition table counts in them and does not say which."""


def probe_all(disks: Sequence[tuple[str, Path]]) -> tuple[FileSystem, ...]:
    """What is on several disks of a point, given as target and file, and in their LVM groups.

    Raises as ``probe``.
    """
    found = [each for target, file in disks for each in probe(file, target)]
    files = dict(disks)
    groups = [
        (each, lvm.volumes(_reader(files[each.disk], each)))
        for each in found
        if each.type == LVM_MEMBER
    ]
    places = {physical: each for each, (physical, _) in groups if physical}
    # every physical volume of a group tells of all of its volumes
    known = {volume.name: volume for _, (_, volumes) in groups for volume in volumes}
    for name, volume in sorted(known.items()):
        place = places.get(volume.physical)
        if place is not None and volume.offset + volume.size <= place.size:
            lies = FileSystem(
                disk=place.disk,
                partition=place.partition,
                offset=place.offset + volume.offset,
                size=volume.size,
                volume=name,
            )
            found.append(_identified(files[place.disk], lies))
        else:
            first = groups[0][0].disk
            found.append(
                FileSystem(disk=first, partition=0, offset=-1, size=volume.size, volume=name)
            )
    return tuple(found)


def _reader(file: Path, place: FileSystem) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        if not 0 <= offset <= offset + length <= place.size:
            return b""
        with durable.translate_os_errors("read", file), file.open("rb") as opened:
            return os.pread(opened.fileno(), length, place.offset + offset)

    return read


def probe(disk: Path, target: str) -> tuple[FileSystem, ...]:
    """All partitions of a disk with what is in them, or the disk itself if it has none.

    ``disk`` is a file that holds the disk's bytes. Raises ProcessError, RepositoryError if it
    can't be read.
    """
    size = _readable(disk)
    whole = FileSystem(disk=target, partition=0, offset=0, size=size)
    # a file system without partitions may hold what looks like a table of them (vfat does)
    alone = _identified(disk, whole)
    if alone.type:
        return (alone,)
    found = next((each for sector in SECTORS if (each := _partitions(disk, size, sector))), ())
    return tuple(
        _identified(
            disk,
            replace(
                whole,
                partition=each.number,
                offset=each.offset,
                size=each.size,
                scheme=each.scheme,
                name=each.name,
            ),
        )
        for each in found
    ) or (alone,)


def _readable(disk: Path) -> int:
    """The size of a disk whose beginning and end can be read: partx and blkid hide errors there."""
    with durable.translate_os_errors("read", disk), disk.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for offset in (0, max(0, size - EDGE)):
            os.pread(file.fileno(), EDGE, offset)
    return size


def _partitions(disk: Path, size: int, sector: int) -> tuple[Partition, ...]:
    # 1: there is no table
    columns = "NR,START,SECTORS,TYPE,NAME,SCHEME"
    argv = ["partx", "--sector-size", str(sector), "--pairs", "--output", columns, "--", str(disk)]
    text = proc.output(argv, timeout=SECONDS, ok=(0, 1), max_output=1 << 20)
    return file_systems.parse_partx(text, size, sector)


def _identified(disk: Path, place: FileSystem) -> FileSystem:
    # 2: nothing is known there, 8: several types contradict one another
    argv = ["blkid", "-p", "-o", "udev", "--offset", str(place.offset), "--size", str(place.size)]
    text = proc.output([*argv, "--", str(disk)], timeout=SECONDS, ok=(0, 2, 8), max_output=1 << 20)
    tags = file_systems.parse_blkid(text)
    kind = tags.get("TYPE", "")
    return replace(
        place,
        type=kind,
        label=tags.get("LABEL", ""),
        uuid=tags.get("UUID", ""),
        is_files=tags.get("USAGE") == "filesystem",
        unclean=kind in file_systems.EXT and _is_unclean(disk, place.offset),
    )


def _is_unclean(disk: Path, offset: int) -> bool:
    with durable.translate_os_errors("read", disk):
        fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return file_systems.is_unclean(os.pread(fd, EXT_SUPERBLOCK, offset + EXT_SUPERBLOCK))
        finally:
            os.close(fd)
