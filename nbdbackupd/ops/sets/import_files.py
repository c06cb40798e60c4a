"""Bringing the files of a peer's set to another directory: copied, linked, or out of an archive."""

import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import IntegrityError, RepositoryError
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.repo import layout
from nbdbackupd.repo.importing import Stage
from nbdbackupd.repo.peer_place import BROKEN, Archive

CHUNK: Final = 1 << 20
ZEROES: Final = bytes(CHUNK)


def bring(source: Path, stage: Stage, *, link: bool, check: Callable[[], None]) -> None:
    """Copy, or link, all regular files of a set; hidden ones and partial streams stay behind.

    Raises RepositoryError, NoSpaceError.
    """
    with durable.translate_os_errors("read", source):
        found = [path for path in sorted(source.iterdir()) if _wanted(path)]
        folder = source / layout.CHECKPOINTS
        if folder.is_dir() and not folder.is_symlink():
            found += [path for path in sorted(folder.iterdir()) if _wanted(path)]
    for path in found:
        target = stage.place(str(path.relative_to(source)))
        with durable.translate_os_errors("copy", path):
            if link:
                os.link(path, target)
            else:
                _copy(path, target, check)


def _wanted(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name.endswith(".partial")
    return not hidden and stat.S_ISREG(path.lstat().st_mode)


def _copy(source: Path, target: Path, check: Callable[[], None]) -> None:
    reading = layering.open_file(source)
    try:
        writing = durable.create_exclusive(target)
        try:
            size = 0
            while part := os.read(reading, CHUNK):
                check()
                _write(writing, part, size)
                size += len(part)
            os.ftruncate(writing, size)
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _write(fd: int, part: bytes, place: int) -> None:
    """Write a part of a file; one of nothing but zeroes stays a hole."""
    if part == ZEROES[: len(part)]:
        return
    view = memoryview(part)
    while view:
        count = os.pwrite(fd, view, place)
        view = view[count:]
        place += count


def unpack(archive: Path, stage: Stage, check: Callable[[], None]) -> None:
    """Unpack what ``virtnbdbackup -o -`` wrote; the archive's CRC-32 of each file is proven.

    Raises FormatError, IntegrityError, RepositoryError, NoSpaceError.
    """
    os.close(layering.open_file(archive))
    entries = Archive(archive).entries
    try:
        with durable.translate_os_errors("unpack", archive), zipfile.ZipFile(archive) as opened:
            for entry in entries:
                if not entry.filename.endswith(".partial"):
                    _unpack(opened, entry, stage.place(entry.filename), check)
    except BROKEN as err:
        raise IntegrityError(f"archive is damaged: {err}", file=archive) from err


def _unpack(
    opened: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, check: Callable[[], None]
) -> None:
    size = 0
    writing = durable.create_exclusive(target)
    try:
        with opened.open(entry) as reading:
            while part := reading.read(CHUNK):
                check()
                _write(writing, part, size)
                size += len(part)
                if size > entry.file_size:
                    raise IntegrityError("entry is longer than it says", file=target.name)
        os.ftruncate(writing, size)
    finally:
        os.close(writing)


def check_link(source: Path, output: Path) -> None:
    """Refuse to link where that can't be.

    Raises RepositoryError.
    """
    if source.stat().st_dev != output.stat().st_dev:
        raise RepositoryError(f"{output} is another file system than {source}: leave out --link")
