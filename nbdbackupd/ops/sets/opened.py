"""Opening a set, whoever wrote it, for all that only reads: list, verify, restore, map, boot."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import ChainBrokenError, FormatError, IntegrityError, RepositoryError
from nbdbackupd.format import stream
from nbdbackupd.model.chain import BackupSet, DiskMode, DiskPoint, Layout, RestorePoint
from nbdbackupd.model.choice import Choice
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets.frames import FrameCache
from nbdbackupd.ops.sets.layers import Layer, Qcow2Layer, RawLayer, ScannedLayer
from nbdbackupd.repo import foreign, layout, reading
from nbdbackupd.repo.foreign import Foreign
from nbdbackupd.repo.reading import Held
from nbdbackupd.repo.set_directory import SetDirectory, refuse_links
from nbdbackupd.repo.virtnbdbackup import peer
from nbdbackupd.repo.virtnbdbackup.storage import Archive, Storage

MAX_MEMBER: Final = 1 << 30
"""Bytes of a file beside the streams (an initrd) that is taken out of an archive."""


class Unpacked:
    """A private directory, removed with the last who knows it, or by ``remove``, also twice."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="nbdbackup-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedSet:
    """A set whose points and links are proven; ``known`` holds them.

    ``problems`` tell what of the set is not sound, ``hints`` what else should be known, a line
    each. ``written_by``: another program wrote it, and no manifest of ours vouches for it; then
    digests are empty. ``storage`` is where its streams are: of an archive, ``path`` is a directory
    with its small files, which lives as long as this object or until ``close``. So does
    ``reading``, which keeps the files of a set of ours from being removed.
    """

    path: Path
    known: BackupSet
    problems: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    written_by: str = ""
    storage: Storage | None = None
    unpacked: Unpacked | None = None
    reading: Held | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Problems and hints alike."""
        return (*self.problems, *self.hints)

    def close(self) -> None:
        """Let go of the files; what was taken out of an archive is removed. Safe to call twice."""
        if self.unpacked is not None:
            self.unpacked.remove()
        if self.reading is not None:
            self.reading.release()

    def layers(
        self,
        point: RestorePoint,
        target: str,
        stack: ExitStack,
        check: Callable[[], None],
        *,
        deep: bool = False,
    ) -> tuple[Layer, ...]:
        """What one disk of a point is made of, newest first; all but the blocks is proven.

        ``stack`` owns the open files, ``check`` is called now and then and may raise. ``deep``: of
        a foreign set the checksums of whole files, too, as nothing else vouches for plain blocks.
        Raises RepositoryError if the point does not hold the disk, ChainBrokenError, FormatError,
        IntegrityError.
        """
        cache = FrameCache()
        found: list[Layer] = []
        for each in self.known.path(point, target):
            disk = each.disk(target)
            if self.storage is not None:
                layer = open_foreign(self.storage, each, disk, check, deep=deep)
            else:
                layer = layering.open_proven(self.path, each, disk, check)
            layer.frames = cache
            found.append(stack.enter_context(layer))
        return tuple(found)


def open_set(path: Path, *, sound: bool = False, keep: bool = False) -> OpenedSet:
    """Read and prove what the set says of itself; with ``keep`` its files stay meanwhile.

    With ``sound`` only what is sound, with a warning for the rest: which point is the newest, or
    the newest at a time, can't be told then. Raises RepositoryError if the path is no directory
    or can't be read, FormatError, IntegrityError or ChainBrokenError for a damaged set.
    """
    refuse_links(path)
    found = foreign.find(path)
    if found is not None:
        return _open_foreign_set(path, found, sound=sound)
    set_dir = SetDirectory.open(path)
    held = reading.hold(path) if keep and set_dir.exists else None
    if sound:
        known, problems = set_dir.load_sound()
        return OpenedSet(path=path, known=known, problems=problems, reading=held)
    return OpenedSet(path=path, known=set_dir.load(), reading=held)


def open_point(path: Path, choice: Choice) -> tuple[OpenedSet, RestorePoint]:
    """Open a set and choose a point of it, of a damaged set one that is named.

    Which point is the newest, or the newest at a time, can't be told from a damaged set. Raises as
    ``open_set`` and ``Choice.find``.
    """
    try:
        given = open_set(path, keep=True)
    except (FormatError, ChainBrokenError) as err:
        if not choice.is_named:
            err.message += "; 'nbdbackupctl list' shows the sound points, --point chooses one"
            raise
        given = open_set(path, sound=True, keep=True)
        if not given.known.points:
            raise
    if not os.path.lexists(path):
        raise RepositoryError(f"there is no backup set at {path}: no such directory")
    if not given.known.points:
        raise RepositoryError(f"{path} holds no restore point: is it a backup set?")
    return given, choice.find(given.known)


def _open_foreign_set(path: Path, source: Foreign, *, sound: bool) -> OpenedSet:
    found, storage = source.read(), source.storage
    if found.problems and not sound:
        more = len(found.problems) - 1
        rest = f" (and {more} more problem{'s' * (more > 1)})" if more else ""
        raise ChainBrokenError(f"{path}: {found.problems[0]}{rest}")
    unpacked = None
    if not path.is_dir():
        unpacked = Unpacked()
        try:
            for file in {file for point in found.known.points for file in point.files}:
                _take_out(storage, file.name, unpacked.path)
        except BaseException:
            unpacked.remove()
            raise
    return OpenedSet(
        path=unpacked.path if unpacked else path,
        known=found.known,
        problems=found.problems,
        hints=found.warnings,
        written_by=source.program,
        storage=storage,
        unpacked=unpacked,
    )


def _take_out(storage: Storage, name: str, directory: Path) -> None:
    """Put a file of an archive that is no stream into a directory."""
    if not isinstance(storage, Archive) or storage.sizes()[name] > MAX_MEMBER:
        raise IntegrityError(f"larger than {MAX_MEMBER} bytes", file=name)
    writing = durable.create_exclusive(directory / name)
    try:
        for part in storage.chunks(name):
            durable.write_all(writing, part)
    finally:
        os.close(writing)


def open_foreign(
    storage: Storage,
    point: RestorePoint,
    disk: DiskPoint,
    check: Callable[[], None],
    *,
    deep: bool,
) -> Layer:
    """The layer of one disk in a point of a foreign set, its frames or tables walked once.

    Raises IntegrityError, FormatError.
    """
    where: dict[str, object] = {"disk": disk.target, "point": point.id}
    path, window = storage.file(disk.file), storage.window(disk.file)
    if window is None:
        layering.check_size(path, disk.file_size, **where)
    if deep:
        check_sum(storage, disk, check, where)
    if disk.layout is Layout.RAW:
        return RawLayer(path, **where)
    if disk.layout is Layout.QCOW2:
        image = Qcow2Layer(path, check, **where)
        if image.size != disk.size:
            image.close()
            raise IntegrityError("the image has changed since the set was read", **image.where)
        return image
    meta = stream.read_meta(path, window)
    if (meta.disk_name, meta.virtual_size) != (disk.target, disk.size) or meta.incremental != (
        disk.mode is DiskMode.DELTA
    ):
        raise IntegrityError("the stream has changed since the set was read", file=path, **where)
    layer = ScannedLayer(path, meta, window)
    try:
        for _ in layer.records():
            check()
    except BaseException:
        layer.close()
        raise
    return layer


def check_sum(
    storage: Storage, disk: DiskPoint, check: Callable[[], None], where: dict[str, object]
) -> bool:
    """Prove a file by the peer's checksum beside it or the archive's; whether there is one.

    Raises IntegrityError.
    """
    told = peer.read_checksum(storage, layout.checksum(disk.file))
    path, window = storage.file(disk.file), storage.window(disk.file)
    crc = storage.crc(disk.file)
    if crc is not None and crc != layering.crc32_file(path, check, window):
        raise IntegrityError(
            f"archive is damaged: the CRC-32 of {disk.file} does not match", file=path, **where
        )
    if told is None:
        return crc is not None
    if told != layering.adler32_file(path, check, window):
        raise IntegrityError("file is damaged: its Adler-32 does not match", file=path, **where)
    return True
