"""Bringing a foreign set to another directory: copied, linked, unpacked, or as streams of ours."""

import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from zipfile import ZIP_STORED

from nbdbackupd import durable, files
from nbdbackupd.errors import NoSpaceError, RepositoryError
from nbdbackupd.format.index import MAX_BLOCK, Kind, Record
from nbdbackupd.format.stream import StreamMeta
from nbdbackupd.format.writer import StreamWriter, Written
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets import peer_index
from nbdbackupd.ops.sets.layers import Layer
from nbdbackupd.repo import layout
from nbdbackupd.repo.importing import Stage
from nbdbackupd.repo.virtnbdbackup.storage import Archive

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
    reading = files.open_regular(source)
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
    os.close(files.open_regular(archive))
    opened = Archive(archive)
    entries = [each for each in opened.entries if not each.filename.endswith(".partial")]
    with durable.translate_os_errors("unpack", archive):
        packed = (each.file_size for each in entries if each.compress_type != ZIP_STORED)
        _check_room(stage.path, sum(packed))
        for entry in entries:
            _unpack(opened, entry.filename, stage.place(entry.filename), check)


def _check_room(path: Path, size: int) -> None:
    """Refuse what a few bytes of an archive would grow to, zeroes included."""
    room = os.statvfs(path)
    if size > room.f_bavail * room.f_frsize:
        raise NoSpaceError(f"the archive unpacks to {size} bytes, more than {path.parent} has free")


def _unpack(opened: Archive, name: str, target: Path, check: Callable[[], None]) -> None:
    size = 0
    writing = durable.create_exclusive(target)
    try:
        for part in opened.chunks(name):
            check()
            _write(writing, part, size)
            size += len(part)
        os.ftruncate(writing, size)
    finally:
        os.close(writing)


def write_stream(
    layer: Layer, file: Path, index: Path, meta: StreamMeta, check: Callable[[], None]
) -> Written:
    """Write what a layer holds as a stream and its index, both new and durable afterwards.

    A disk that was read in full is covered. Raises IntegrityError for damage, NoSpaceError,
    RepositoryError.
    """
    view = memoryview(mmap.mmap(-1, MAX_BLOCK))
    scratch = memoryview(mmap.mmap(-1, layering.MAX_STORED))
    with durable.translate_os_errors("write", file):
        writer = StreamWriter(file, index, meta=meta)
        try:
            for some in _together(peer_index.covered(layer, whole=not meta.incremental)):
                check()
                if some[0].kind == Kind.ZERO:
                    block = writer.zero(some[0].offset, some[0].length)
                else:
                    start = some[0].offset
                    for each in some:
                        part = view[each.offset - start : each.end - start]
                        layer.read(each, part, scratch)
                    block = writer.prepare(start, view[: some[-1].end - start])
                writer.place(block)
                writer.write(block)
            return writer.finish()
        finally:
            writer.close()


def _together(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Blocks of data that follow one another within the same ``MAX_BLOCK``; others alone."""
    held: list[Record] = []
    for record in records:
        follows = held and held[-1].end == record.offset and record.kind == Kind.DATA
        if not (follows and held[0].offset // MAX_BLOCK == (record.end - 1) // MAX_BLOCK):
            if held:
                yield held
            held = []
        held.append(record)
        if record.kind == Kind.ZERO:
            yield held
            held = []
    if held:
        yield held


def check_link(source: Path, output: Path) -> None:
    """Refuse to link where that can't be.

    Raises RepositoryError.
    """
    if source.stat().st_dev != output.stat().st_dev:
        raise RepositoryError(f"{output} is another file system than {source}: leave out --link")
