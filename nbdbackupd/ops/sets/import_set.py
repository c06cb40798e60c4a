"""``import``: make a set that virtnbdbackup wrote one of ours, where it lies or in a copy.

Each stream gets an index with a SHA-256 for each block, each point a manifest. All of the set must
be sound. The streams themselves are not changed, and the peer can go on reading them.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nbdbackupd import __version__, durable
from nbdbackupd.errors import (
    ChainBrokenError,
    CheckpointError,
    FormatError,
    IntegrityError,
    RepositoryError,
    UsageError,
)
from nbdbackupd.format import adler
from nbdbackupd.model import jobxml
from nbdbackupd.model.chain import DiskMode, DiskPoint, Layout, RestorePoint, StoredFile
from nbdbackupd.model.space import own_bytes
from nbdbackupd.ops.sets import catalog, import_files, opened, originals, peer_index
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets.opened import OpenedSet
from nbdbackupd.plain import versioned
from nbdbackupd.repo import importing, layout
from nbdbackupd.repo.importing import Stage
from nbdbackupd.repo.set_directory import CHECKPOINT_XML, SetDirectory
from nbdbackupd.repo.virtnbdbackup import peer
from nbdbackupd.repo.virtnbdbackup.storage import Folder, is_archive, read_small

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
INDEX_ROLE: Final = "disk-index"
PROGRAM: Final = "virtnbdbackup, imported by nbdbackupd"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportRequest:
    """Which set, a directory or an archive; into ``output``, or where it lies.

    ``link``: the streams in ``output`` are hard links. ``sound``: what is not sound is left out,
    which needs an ``output``. ``run_id`` becomes the id of the chain.
    """

    source: Path
    run_id: str
    output: Path | None = None
    link: bool = False
    sound: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """The set that is ours now; ``done`` is false if it was already."""

    path: Path
    points: tuple[RestorePoint, ...]
    done: bool
    warnings: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        sizes = own_bytes(self.points)
        return versioned(
            set=str(self.path),
            imported=self.done,
            points=[catalog.describe(point, sizes[point.id]) for point in self.points],
            warnings=list(self.warnings),
            seconds=round(self.seconds, 3),
        )


def run(
    request: ImportRequest, *, progress: Progress, cancelled: Callable[[], None]
) -> ImportReport:
    """Import; ``progress`` gets a file's name, and bytes done and in all of it.

    ``cancelled`` is polled and raises to end the run; then, as after any error, the set is what
    it was. Raises UsageError, RepositoryError, ChainBrokenError, FormatError, IntegrityError,
    NoSpaceError, BusyError.
    """
    begun = time.monotonic()
    archive = is_archive(request.source)
    _check(request, archive=archive)
    root = request.output or request.source
    set_dir = SetDirectory.open(root)
    with ExitStack() as stack:
        stack.enter_context(set_dir.lock(owner=f"import of {request.source}"))
        if set_dir.exists and not set_dir.is_empty:
            return _already(set_dir, request, begun)
        stage = stack.enter_context(importing.staged(root))
        if request.output is not None:
            set_dir.check_can_begin()
            if archive:
                import_files.unpack(request.source, stage, cancelled)
            else:
                if request.link:
                    import_files.check_link(request.source, root)
                import_files.bring(request.source, stage, link=request.link, check=cancelled)
        made = _Import(request, stage, progress, cancelled)
        points, warnings = made.points()
        known = stage.commit(points)
    log.info("imported %d restore points into %s", len(known.points), root)
    return ImportReport(
        path=root,
        points=known.points,
        done=True,
        warnings=warnings,
        seconds=time.monotonic() - begun,
    )


def _check(request: ImportRequest, *, archive: bool) -> None:
    if request.link and request.output is None:
        raise UsageError("--link needs -o: where a set is imported in place nothing is linked")
    if request.sound and request.output is None:
        raise UsageError("--sound needs -o: what is not sound stays where it is")
    if archive:
        if request.output is None or request.link:
            raise UsageError(f"{request.source} is an archive: give a directory with -o, no --link")
    elif not request.source.is_dir():
        raise RepositoryError(f"{request.source} is neither a directory nor a zip archive")
    elif not peer.is_peer(Folder(request.source)):
        # before anything is written there: it may be no set at all
        mine = SetDirectory.open(request.source)
        if request.output is not None or not mine.exists or mine.is_empty:
            raise RepositoryError(_no_peer(request))
    if request.output is not None and request.output.resolve() == request.source.resolve():
        raise UsageError("leave out -o to import a set where it lies")


def _no_peer(request: ImportRequest) -> str:
    return f"{request.source} holds no backup that virtnbdbackup wrote"


def _already(set_dir: SetDirectory, request: ImportRequest, begun: float) -> ImportReport:
    """A set that was imported before; anything else is refused."""
    known = set_dir.load()
    if not all(point.program.startswith(PROGRAM) for point in known.points[:1]):
        raise RepositoryError(f"{set_dir.path} is a set of this program already")
    if request.output is not None and not is_archive(request.source):
        theirs = {each.name: each.size for each in peer.read_files(Folder(request.source)).files}
        ours = {disk.file: disk.file_size for point in known.points for disk in point.disks}
        if any(ours.get(name) != size for name, size in theirs.items()):
            raise RepositoryError(f"{set_dir.path} holds another set: give another -o")
    return ImportReport(
        path=set_dir.path,
        points=known.points,
        done=False,
        warnings=(),
        seconds=time.monotonic() - begun,
    )


class _Import:
    """One import under way."""

    def __init__(
        self,
        request: ImportRequest,
        stage: Stage,
        progress: Progress,
        cancelled: Callable[[], None],
    ) -> None:
        self._request = request
        self._stage = stage
        self._progress = progress
        self._cancelled = cancelled
        self._from = request.source if request.output is None else stage.path

    def points(self) -> tuple[list[RestorePoint], tuple[str, ...]]:
        """The points as manifests tell them, their indexes written, and warnings."""
        if not peer.is_peer(Folder(self._from)):
            raise RepositoryError(_no_peer(self._request))
        try:
            source = opened.open_set(self._from, sound=self._request.sound)
        except ChainBrokenError as err:
            err.message = err.message.replace(str(self._from), str(self._request.source), 1)
            err.message += "; 'import --sound -o DIR' leaves out what is not sound"
            raise
        if source.problems:
            self._leave_out(source)
        made = []
        for point in source.known.points:
            if not point.uuid or not point.domain:
                raise FormatError(
                    f"no sound vmconfig file tells whose {point.id} is: its UUID is needed"
                )
            made.append(self._point(point))
        useless = [text for point in made for text in originals.problems(self._from, point)]
        return made, (*source.warnings, *useless)

    def _leave_out(self, source: OpenedSet) -> None:
        """Take the streams that are in no sound point out of the stage."""
        if not source.known.points:
            raise RepositoryError(f"{self._request.source}: nothing is sound")
        held = {disk.file for point in source.known.points for disk in point.disks}
        for name in peer.stream_names(Folder(self._from)):
            if name not in held:
                self._stage.place(name).unlink()
                self._stage.place(layout.checksum(name)).unlink(missing_ok=True)

    def _point(self, point: RestorePoint) -> RestorePoint:
        files = [self._stored(each) for each in point.files]
        tracked: Mapping[str, str] = {}
        name = layout.checkpoint_xml(point.checkpoint) if point.checkpoint else ""
        if name and (self._from / name).is_file():
            xml = read_small(self._from / name, peer.MAX_FILE)
            try:
                tracked = jobxml.tracked(xml.decode(errors="replace"))
            except CheckpointError as err:
                raise FormatError(err.message, file=self._from / name) from err
            files.append(self._stored(StoredFile(name, CHECKPOINT_XML, len(xml), "")))
        disks = [self._disk(point, disk, tracked.get(disk.target, "")) for disk in point.disks]
        return replace(
            point,
            chain=self._request.run_id,
            disks=tuple(disks),
            files=tuple(files),
            program=f"{PROGRAM} {__version__}",
        )

    def _stored(self, file: StoredFile) -> StoredFile:
        path = self._from / file.name
        layering.check_size(path, file.size)
        return replace(file, sha256=layering.sha256_file(path, self._cancelled))

    def _disk(self, point: RestorePoint, disk: DiskPoint, bitmap: str) -> DiskPoint:
        whole = disk.mode is DiskMode.FULL
        name = layout.index(disk.file)
        index = self._stage.place(name)
        before = (self._from / disk.file).stat()
        self._progress(disk.file, 0, disk.file_size)
        with (
            durable.translate_os_errors("import", self._from / disk.file),
            opened.open_peer(Folder(self._from), point, disk, self._cancelled, deep=False) as layer,
        ):
            found = peer_index.write(index, layer, whole=whole, check=self._cancelled)
        total = self._checksum(disk)
        after = (self._from / disk.file).stat()
        if (before.st_ino, before.st_size, before.st_mtime_ns) != (
            after.st_ino,
            after.st_size,
            after.st_mtime_ns,
        ):
            raise IntegrityError("changed while it was imported", file=self._from / disk.file)
        self._progress(disk.file, disk.file_size, disk.file_size)
        return replace(
            disk,
            adler32=total,
            bitmap=bitmap if disk.layout is Layout.STREAM else "",
            data_bytes=found.data_bytes,
            zero_bytes=found.zero_bytes,
            index=StoredFile(
                name,
                INDEX_ROLE,
                index.stat().st_size,
                layering.sha256_file(index, self._cancelled),
                "",
                disk.target,
            ),
        )

    def _checksum(self, disk: DiskPoint) -> int:
        """The Adler-32 of the file, as the checksum file beside it says, which is made if missing.

        Raises IntegrityError.
        """
        if disk.layout is Layout.RAW:
            return adler.START
        total = layering.adler32_file(self._from / disk.file, self._cancelled)
        beside = layout.checksum(disk.file)
        path = self._from / beside
        if os.path.lexists(path):
            if layering.read_checksum(path) != total:
                raise IntegrityError(
                    "file is damaged: its Adler-32 does not match", file=self._from / disk.file
                )
        else:
            fd = durable.create_exclusive(self._stage.place(beside))
            try:
                durable.write_all(fd, str(total).encode())
            finally:
                os.close(fd)
        return total
