"""``import``: make a set that another program wrote one of ours, where it lies or in a copy.

Each stream of virtnbdbackup gets an index with a SHA-256 for each block, each point a manifest. The
streams themselves are not changed, and the peer can go on reading them. What qmpbackup wrote is
written anew, as streams of ours. All of the set must be sound.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
from nbdbackupd.format.stream import StreamMeta
from nbdbackupd.model import jobxml
from nbdbackupd.model.chain import (
    BackupSet,
    Codec,
    Compression,
    DiskMode,
    DiskPoint,
    Layout,
    RestorePoint,
    StoredFile,
)
from nbdbackupd.model.naming import uuid_of
from nbdbackupd.model.space import own_bytes
from nbdbackupd.ops.sets import catalog, import_files, opened, originals, peer_index
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets.layers import Layer
from nbdbackupd.ops.sets.opened import OpenedSet
from nbdbackupd.plain import versioned
from nbdbackupd.repo import foreign, importing, layout
from nbdbackupd.repo.importing import Stage
from nbdbackupd.repo.set_directory import CHECKPOINT_XML, SetDirectory
from nbdbackupd.repo.virtnbdbackup import peer
from nbdbackupd.repo.virtnbdbackup.storage import Folder, is_archive, read_small

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
INDEX_ROLE: Final = "disk-index"
IMPORTED: Final = ", imported by nbdbackupd"
PACKED: Final = Compression(Codec.LZ4, 2)
"""For a disk whose image was compressed; others stay as plain as they were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportRequest:
    """Which set, a directory or an archive; into ``output``, or where it lies.

    ``link``: the streams in ``output`` are hard links. ``sound``: what is not sound is left out,
    which needs an ``output``. ``run_id`` becomes the id of the chain. ``name`` and ``uuid`` tell
    whose a set is that does not say so; without the latter, the one of a QEMU that was given none.
    """

    source: Path
    run_id: str
    output: Path | None = None
    link: bool = False
    sound: bool = False
    name: str = ""
    uuid: str = ""


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
    program = _check(request, archive=archive)
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
            elif program != foreign.QMPBACKUP:
                if request.link:
                    import_files.check_link(request.source, root)
                import_files.bring(request.source, stage, link=request.link, check=cancelled)
        kind = _Rewriting if program == foreign.QMPBACKUP else _Import
        made = kind(request, stage, progress, cancelled)
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


def _check(request: ImportRequest, *, archive: bool) -> str:
    """Refuse what can't be meant; the program that wrote the set, empty if it is ours already."""
    if request.link and request.output is None:
        raise UsageError("--link needs -o: where a set is imported in place nothing is linked")
    if request.sound and request.output is None:
        raise UsageError("--sound needs -o: what is not sound stays where it is")
    if archive:
        if request.output is None or request.link:
            raise UsageError(f"{request.source} is an archive: give a directory with -o, no --link")
    elif not request.source.is_dir():
        raise RepositoryError(f"{request.source} is neither a directory nor a zip archive")
    found = foreign.find(request.source)
    if found is None and not archive:
        # before anything is written there: it may be no set at all
        mine = SetDirectory.open(request.source)
        if request.output is not None or not mine.exists or mine.is_empty:
            raise RepositoryError(_not_foreign(request))
    program = found.program if found is not None else ""
    if program == foreign.QMPBACKUP:
        _check_rewriting(request)
    elif request.name or request.uuid:
        raise UsageError("--name and --uuid are for sets of qmpbackup: others tell whose they are")
    if request.output is not None and request.output.resolve() == request.source.resolve():
        raise UsageError("leave out -o to import a set where it lies")
    return program


def _check_rewriting(request: ImportRequest) -> None:
    if request.output is None or request.link:
        raise UsageError("a set of qmpbackup is written anew: give a directory with -o, no --link")
    if request.output.resolve() == request.source.resolve():
        raise UsageError("a set of qmpbackup is written anew: give another directory with -o")
    if not request.name or "/" in request.name or not request.name.isprintable():
        raise UsageError(
            "a set of qmpbackup does not tell whose it is: give the name that later backups will "
            "have with --name, and with --uuid the UUID that QEMU was given"
        )


def _not_foreign(request: ImportRequest) -> str:
    return f"{request.source} holds no backup that virtnbdbackup or qmpbackup wrote"


def _already(set_dir: SetDirectory, request: ImportRequest, begun: float) -> ImportReport:
    """A set that was imported before; anything else is refused."""
    known = set_dir.load()
    if not all(IMPORTED in point.program for point in known.points[:1]):
        raise RepositoryError(f"{set_dir.path} is a set of this program already")
    is_copy = request.output is not None and not is_archive(request.source)
    if is_copy and not _is_of(known, request):
        raise RepositoryError(f"{set_dir.path} holds another set: give another -o")
    return ImportReport(
        path=set_dir.path,
        points=known.points,
        done=False,
        warnings=(),
        seconds=time.monotonic() - begun,
    )


def _is_of(known: BackupSet, request: ImportRequest) -> bool:
    """Whether an imported set has all that the source has."""
    found = foreign.find(request.source)
    if found is not None and found.program == foreign.QMPBACKUP:
        theirs = {each.id for each in found.read().known.points}
        ours = {each.id for each in known.points}
        whose = {(each.domain, each.uuid) for each in known.points}
        return theirs <= ours and whose == {(request.name, _uuid(request))}
    sizes = {each.name: each.size for each in peer.read_files(Folder(request.source)).files}
    held = {disk.file: disk.file_size for point in known.points for disk in point.disks}
    return all(held.get(name) == size for name, size in sizes.items())


def _uuid(request: ImportRequest) -> str:
    return request.uuid or uuid_of(request.name)


class _Import:
    """One import under way; of virtnbdbackup's streams."""

    program = foreign.VIRTNBDBACKUP

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
        self._from, self._files = self._places()

    def _places(self) -> tuple[Path, Path]:
        """Where the set is read, and where the files of the points made of it lie."""
        there = self._request.source if self._request.output is None else self._stage.path
        return there, there

    def points(self) -> tuple[list[RestorePoint], tuple[str, ...]]:
        """The points as manifests tell them, their indexes written, and warnings."""
        found = foreign.find(self._from)
        if found is None or found.program != self.program:
            raise RepositoryError(_not_foreign(self._request))
        try:
            source = opened.open_set(self._from, sound=self._request.sound)
        except ChainBrokenError as err:
            err.message = err.message.replace(str(self._from), str(self._request.source), 1)
            err.message += "; 'import --sound -o DIR' leaves out what is not sound"
            raise
        if source.problems:
            self._leave_out(source)
        made = [self._point(point) for point in source.known.points]
        useless = [text for point in made for text in originals.problems(self._files, point)]
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
        if not point.uuid or not point.domain:
            raise FormatError(
                f"no sound vmconfig file tells whose {point.id} is: its UUID is needed"
            )
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
            program=f"{self.program}{IMPORTED} {__version__}",
        )

    def _stored(self, file: StoredFile) -> StoredFile:
        path = self._from / file.name
        layering.check_size(path, file.size)
        return replace(file, sha256=layering.sha256_file(path, self._cancelled))

    def _disk(self, point: RestorePoint, disk: DiskPoint, bitmap: str) -> DiskPoint:
        whole = disk.mode is DiskMode.FULL
        with self._reading(point, disk) as layer:
            found = peer_index.write(
                self._stage.place(layout.index(disk.file)),
                layer,
                whole=whole,
                check=self._cancelled,
            )
            total = self._checksum(disk)
        return replace(
            disk,
            adler32=total,
            bitmap=bitmap if disk.layout is Layout.STREAM else "",
            data_bytes=found.data_bytes,
            zero_bytes=found.zero_bytes,
            index=self._index(disk.file, disk.target),
        )

    @contextmanager
    def _reading(self, point: RestorePoint, disk: DiskPoint) -> Iterator[Layer]:
        """The file of a disk, which must not change meanwhile. Raises IntegrityError."""
        path = self._from / disk.file
        before = path.stat()
        self._progress(disk.file, 0, disk.file_size)
        with (
            durable.translate_os_errors("import", path),
            opened.open_foreign(
                Folder(self._from), point, disk, self._cancelled, deep=False
            ) as layer,
        ):
            yield layer
        after = path.stat()
        if (before.st_ino, before.st_size, before.st_mtime_ns) != (
            after.st_ino,
            after.st_size,
            after.st_mtime_ns,
        ):
            raise IntegrityError("changed while it was imported", file=path)
        self._progress(disk.file, disk.file_size, disk.file_size)

    def _index(self, file: str, target: str) -> StoredFile:
        """The index of a file, as it was written."""
        name = layout.index(file)
        path = self._stage.place(name)
        sha256 = layering.sha256_file(path, self._cancelled)
        return StoredFile(name, INDEX_ROLE, path.stat().st_size, sha256, "", target)

    def _checksum(self, disk: DiskPoint) -> int:
        """The Adler-32 of the file, as the checksum file beside it says, which is made if missing.

        Raises IntegrityError.
        """
        if disk.layout is Layout.RAW:
            return adler.START
        total = layering.adler32_file(self._from / disk.file, self._cancelled)
        path = self._from / layout.checksum(disk.file)
        if not os.path.lexists(path):
            self._put(path.name, str(total).encode())
        elif layering.read_checksum(path) != total:
            raise IntegrityError(
                "file is damaged: its Adler-32 does not match", file=self._from / disk.file
            )
        return total

    def _put(self, name: str, data: bytes) -> None:
        fd = durable.create_exclusive(self._stage.place(name))
        try:
            durable.write_all(fd, data)
        finally:
            os.close(fd)


class _Rewriting(_Import):
    """One import of qmpbackup's images: what each holds itself becomes a stream of ours."""

    program = foreign.QMPBACKUP

    def _places(self) -> tuple[Path, Path]:
        return self._request.source, self._stage.path

    def _leave_out(self, source: OpenedSet) -> None:
        """Nothing is in the stage that no point holds."""
        if not source.known.points:
            raise RepositoryError(f"{self._request.source}: nothing is sound")

    def _point(self, point: RestorePoint) -> RestorePoint:
        return replace(
            point,
            chain=self._request.run_id,
            domain=self._request.name,
            uuid=_uuid(self._request),
            disks=tuple(self._disk(point, disk) for disk in point.disks),
            files=tuple(self._info(point, each) for each in point.files),
            program=f"{self.program}{IMPORTED} {__version__}",
        )

    def _info(self, point: RestorePoint, file: StoredFile) -> StoredFile:
        data = read_small(self._from / file.name, file.size)
        name = layout.image_info(file.disk, point.id)
        self._put(name, data)
        return replace(file, name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())

    def _disk(self, point: RestorePoint, disk: DiskPoint, bitmap: str = "") -> DiskPoint:
        name = layout.stream(
            disk.target, point.level, checkpoint=point.checkpoint, point_id=point.id
        )
        with self._reading(point, disk) as layer:
            packed = PACKED if layer.deflated else None
            written = import_files.write_stream(
                layer,
                self._stage.place(name),
                self._stage.place(layout.index(name)),
                StreamMeta(
                    virtual_size=disk.size,
                    data_size=0,
                    date=point.created,
                    disk_name=disk.target,
                    disk_format=disk.format,
                    checkpoint=point.checkpoint,
                    compression=packed,
                    parent_checkpoint=point.base_checkpoint,
                    incremental=disk.mode is DiskMode.DELTA,
                    extra=(("point", point.id), ("program", f"{self.program}{IMPORTED}")),
                ),
                self._cancelled,
            )
        self._put(layout.checksum(name), str(written.adler32).encode())
        return replace(
            disk,
            file=name,
            file_size=written.file_size,
            adler32=written.adler32,
            index=self._index(name, disk.target),
            data_bytes=written.data_bytes,
            zero_bytes=written.zero_bytes,
            codec=packed.codec if packed is not None else Codec.NONE,
            layout=Layout.STREAM,
            bitmap=bitmap,
        )
