"""``verify``: prove a backup set, and name everything that is wrong with it.

Manifests and their links, presence and size of every file, each index against its manifest, each
stream against its index, every block against its SHA-256, that each disk is covered completely.
What is found is returned, not raised: one damaged file must not hide the next.
"""

import functools
import logging
import mmap
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from nbdbackupd import durable, events
from nbdbackupd import log as runlog
from nbdbackupd.errors import (
    ChainBrokenError,
    FormatError,
    IntegrityError,
    RepositoryError,
    UsageError,
    one_line,
)
from nbdbackupd.files import open_regular
from nbdbackupd.format import manifest
from nbdbackupd.format.index import Kind
from nbdbackupd.model.chain import BackupSet, Codec, DiskPoint, RestorePoint, StoredFile
from nbdbackupd.model.choice import Choice
from nbdbackupd.model.proof import Proof, content_of
from nbdbackupd.ops.sets import layers, opened, originals
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets.layers import Layer
from nbdbackupd.ops.sets.opened import OpenedSet
from nbdbackupd.ops.verify.blocks import Prover
from nbdbackupd.ops.verify.disk import DiskCheck
from nbdbackupd.ops.verify.findings import Findings, Problem, VerifyReport, VerifyRequest
from nbdbackupd.repo import foreign, generation, layout, reading, removing, verified, written
from nbdbackupd.repo.set_directory import refuse_links
from nbdbackupd.repo.virtnbdbackup.storage import Storage
from nbdbackupd.units import utc_time


class Notes:
    """Without a clock nothing is noted. ``problem`` says why the first note was not written."""

    def __init__(self, set_path: Path, clock: Callable[[], datetime] | None) -> None:
        self.problem = ""
        self._path = set_path
        self._clock = clock

    def note(self, point: RestorePoint, size: int, problems: Sequence[Problem]) -> None:
        """Note that all files of a point were looked at, ``size`` bytes, and what is wrong.

        What could not be read is neither sound nor damaged: then nothing is noted.
        """
        if self._clock is None or self.problem or any(each.is_unread for each in problems):
            return
        proof = Proof(
            point=point.id,
            content=content_of(point),
            verified=utc_time(self._clock()),
            size=size,
            damage=tuple(" ".join(each.text.split()) for each in problems),
        )
        try:
            verified.write(self._path, proof)
        except RepositoryError as err:
            self.problem = one_line(err)


__all__ = ["Progress", "VerifyReport", "VerifyRequest", "run"]

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
STREAM_SUFFIXES: Final = frozenset({".data", ".raw"})


def run(
    request: VerifyRequest, *, progress: Progress, cancelled: Callable[[], None]
) -> VerifyReport:
    """Verify; ``progress`` gets a label, and bytes done and in all of that file.

    ``cancelled`` is polled and raises to end the run. Raises UsageError, and RepositoryError if
    there is no set or no such point; never for damage.
    """
    if request.workers < 1:
        raise UsageError("at least one worker is needed")
    refuse_links(request.path)
    with runlog.context(SET=request.path):
        if foreign.find(request.path) is not None:
            report = _verify_foreign(request, progress, cancelled)
        else:
            with reading.held(request.path):
                report = _verify(request, progress, cancelled)
        _tell(report)
    return report


def _tell(report: VerifyReport) -> None:
    """Tell what was found, as an event."""
    size, duration = report.checked_bytes, events.usec(report.seconds)
    if not report.problems:
        events.emit(log, events.VERIFY_SOUND, bytes=size, duration_usec=duration)
        return
    first, more = report.problems[0].text, len(report.problems) - 1
    reason = " ".join(first.split()) + (f", and {more} more" if more else "")
    events.emit(log, events.VERIFY_DAMAGED, reason=reason, bytes=size, duration_usec=duration)


def _verify(
    request: VerifyRequest, progress: Progress, cancelled: Callable[[], None]
) -> VerifyReport:
    begun = time.monotonic()
    findings = Findings()
    # before the manifests: a backup that publishes meanwhile must not seem to have lost its own
    streams = _list_streams(request.path)
    found = _load_points(request.path, findings)
    if not findings.problems():
        _check_strays(request.path, streams, found, findings)
    known = _link(found, findings)
    chosen = _choose(known, request, findings)
    notes = Notes(request.path, request.clock)
    with Prover(request.workers, cancelled) as prover:
        work = _Work(request.path, findings, prover, progress, cancelled)
        for point, targets in chosen:
            before = work.size
            work.prove(point, targets)
            if all(disk.target in targets for disk in point.disks):
                notes.note(point, work.size - before, findings.of_point(point.id))
    problems = findings.problems()
    points = [point for point, _ in chosen]
    accepts = request.accept and not problems
    accepted = written.accept(request.state_dirs, points) if accepts else ()
    return VerifyReport(
        points=len(chosen),
        files=work.files,
        checked_bytes=work.size,
        problems=problems,
        seconds=time.monotonic() - begun,
        warnings=(
            *written.warnings(request.state_dirs, points),
            *(() if problems else _useless(request.path, chosen)),
        ),
        accepted=accepted,
        unnoted=notes.problem,
    )


class _Work:
    """Proves the files of points, one after the other, and counts what was read."""

    def __init__(
        self,
        directory: Path,
        findings: Findings,
        prover: Prover,
        progress: Progress,
        cancelled: Callable[[], None],
    ) -> None:
        self.files = 0
        self.size = 0
        self._directory = directory
        self._findings = findings
        self._prover = prover
        self._progress = progress
        self._cancelled = cancelled
        self._proven: set[StoredFile] = set()

    def prove(self, point: RestorePoint, targets: Collection[str]) -> None:
        """Prove what a point holds beside its disks, and these disks of it."""
        for stored in point.files:
            # points may share one; what is wrong with it is told of each
            if (file := replace(stored, origin="")) in self._proven:
                continue
            if _check_file(self._directory, point, stored, self._findings, self._cancelled):
                self._proven.add(file)
            self._count(stored.size)
        for disk in (each for each in point.disks if each.target in targets):
            DiskCheck(
                directory=self._directory,
                point=point,
                disk=disk,
                findings=self._findings,
                prover=self._prover,
                progress=functools.partial(self._tell, disk),
                cancelled=self._cancelled,
            ).run()
            self._count(disk.file_size, disk.index.size)

    def _count(self, *sizes: int) -> None:
        self.files += len(sizes)
        self.size += sum(sizes)

    def _tell(self, disk: DiskPoint, done: int) -> None:
        self._progress(disk.target, done, disk.file_size)


def _useless(directory: Path, chosen: list[tuple[RestorePoint, frozenset[str]]]) -> tuple[str, ...]:
    """What a restore can do without and is of no use: no damage, but worth a word."""
    return tuple(
        f"{text}: restored images get qemu-img's own options"
        for point, targets in chosen
        for text in originals.problems(directory, point)
        if targets
    )


def _verify_foreign(
    request: VerifyRequest, progress: Progress, cancelled: Callable[[], None]
) -> VerifyReport:
    """A set that another program wrote, see ``ForeignCheck``."""
    begun = time.monotonic()
    findings = Findings()
    source = opened.open_set(request.path, sound=True)
    if not request.point or not source.known.points:
        for message in source.problems:
            findings.add(Problem(message=message))
    chosen = _choose(source.known, request, findings) if source.known.points else []
    check = ForeignCheck(source=source, findings=findings, progress=progress, cancelled=cancelled)
    files, size = check.run(chosen)
    return VerifyReport(
        points=len(chosen),
        files=files,
        checked_bytes=size,
        problems=findings.problems(),
        seconds=time.monotonic() - begun,
        warnings=(*source.hints, *_useless(source.path, chosen)),
    )


def _load_points(path: Path, findings: Findings) -> list[RestorePoint]:
    """The points whose manifests can be read, in the order of their numbers."""
    if path.is_dir() and not os.path.lexists(path / layout.POINTS):
        raise RepositoryError(f"{path} is no backup set: it has no directory {layout.POINTS}")
    files = generation.manifests(generation.directory(path))
    if not files:
        raise RepositoryError(f"{path} holds no restore point: is it a backup set?")
    found = []
    for each in files:
        file = f"{each.parent.name}/{each.name}"
        try:
            point = manifest.parse(_read_manifest(each))
            if each.name != layout.manifest(point.sequence, point.id):
                raise IntegrityError(f"manifest is of another point: {point.id}")
        except (FormatError, OSError) as err:
            findings.add_error(err, point="", disk="", file=file)
        else:
            found.append(point)
    return sorted(found, key=lambda each: each.sequence)


def _list_streams(path: Path) -> list[str]:
    with durable.translate_os_errors("read", path):
        return sorted(each.name for each in path.iterdir() if each.suffix in STREAM_SUFFIXES)


def _check_strays(
    path: Path, streams: list[str], found: list[RestorePoint], findings: Findings
) -> None:
    """A stream that no manifest names tells of a lost one; but a draft's are on their way in."""
    named = {disk.file for point in found for disk in point.disks}
    for draft in path.glob(f"{layout.DRAFT_PREFIX}*/{layout.DRAFT_MANIFEST}"):
        try:
            named |= {disk.file for disk in manifest.parse(_read_manifest(draft)).disks}
        except (FormatError, OSError) as err:
            log.warning("%s can't be read: %s", draft, err)
    for removal in removing.unfinished(path).values():
        named.update(removal.adds, removal.removes)
    for name in streams:
        if name not in named and (path / name).exists():
            message = "stream of no restore point: its manifest is missing"
            findings.add(Problem(message=message, file=name))


def _read_manifest(path: Path) -> bytes:
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(manifest.MAX_SIZE + 1)


def _link(found: list[RestorePoint], findings: Findings) -> BackupSet:
    """The points as a set; if they do not hang together, that is a problem of its own."""
    try:
        return BackupSet.from_points(found)
    except ChainBrokenError as err:
        findings.add(Problem(message=err.message))
        return BackupSet(tuple(found))


def _choose(
    known: BackupSet, request: VerifyRequest, findings: Findings
) -> list[tuple[RestorePoint, frozenset[str]]]:
    """The points to look at, oldest first, each with the disks that matter."""
    if not request.point:
        everything = [
            (each, frozenset(disk.target for disk in each.disks)) for each in known.points
        ]
        for point in known.points:
            for disk in point.disks:
                _path(known, point, disk.target, findings)
        return [each for each in everything if not request.only or each[0].id in request.only]
    point = Choice(point=request.point).find(known)
    needed: dict[str, set[str]] = {point.id: set()}
    for disk in point.disks:
        for each in _path(known, point, disk.target, findings):
            needed.setdefault(each.id, set()).add(disk.target)
    return [(each, frozenset(needed[each.id])) for each in known.points if each.id in needed]


def _path(
    known: BackupSet, point: RestorePoint, target: str, findings: Findings
) -> tuple[RestorePoint, ...]:
    try:
        return known.path(point, target)
    except (ChainBrokenError, RepositoryError) as err:
        findings.add(Problem(message=err.message, point=point.id, disk=target))
        return (point,)


def _check_file(
    directory: Path,
    point: RestorePoint,
    stored: StoredFile,
    findings: Findings,
    cancelled: Callable[[], None],
) -> bool:
    path = directory / stored.name
    try:
        layers.check_size(path, stored.size)
        if layers.sha256_file(path, cancelled) != stored.sha256:
            raise IntegrityError("SHA-256 of the file is not the manifest's")
    except (FormatError, OSError) as err:
        findings.add_error(err, point=point.id, disk=stored.disk, file=stored.name)
        return False
    return True


BLOCK: Final = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignCheck:
    """Proves a set that another program wrote, by what it says of itself.

    The links of its points, the structure of each stream or image, the Adler-32 of each file that
    has one beside it, and each compressed block by its lz4 frame's checksums, or that it can be
    decompressed. No digest vouches for
    plain blocks without a checksum file: that is told as a warning, for it is no damage.
    ``progress`` gets disk, bytes done and in all of a file.
    """

    source: OpenedSet
    findings: Findings
    progress: Callable[[str, int, int], None]
    cancelled: Callable[[], None]

    def run(self, chosen: Iterable[tuple[RestorePoint, frozenset[str]]]) -> tuple[int, int]:
        """Prove the disks of these points; how many files and bytes were looked at."""
        files = size = 0
        for point, targets in chosen:
            for disk in point.disks:
                if disk.target not in targets:
                    continue
                self._prove(point, disk)
                files, size = files + 1, size + disk.file_size
        return files, size

    def _prove(self, point: RestorePoint, disk: DiskPoint) -> None:
        where: dict[str, object] = {"disk": disk.target, "point": point.id}
        assert self.source.storage is not None  # noqa: S101 - for the type checker
        storage = self.source.storage
        self._note(
            lambda: opened.check_sum(storage, disk, self.cancelled, where),
            point,
            disk,
            layout.checksum(disk.file),
        )
        self._note(lambda: self._prove_blocks(storage, point, disk), point, disk, disk.file)

    def _note(
        self, prove: Callable[[], object], point: RestorePoint, disk: DiskPoint, file: str
    ) -> None:
        try:
            prove()
        except (FormatError, OSError) as err:
            told = err.fields.get("file") if isinstance(err, FormatError) else None
            name = str(told).rpartition("/")[2] if told else file
            self.findings.add_error(err, point=point.id, disk=disk.target, file=name)

    def _prove_blocks(self, storage: Storage, point: RestorePoint, disk: DiskPoint) -> None:
        with ExitStack() as stack:
            layer = stack.enter_context(
                opened.open_foreign(storage, point, disk, self.cancelled, deep=False)
            )
            if layer.codec is not Codec.NONE or layer.deflated:
                self._decompress(layer, disk)
            self.progress(disk.target, disk.file_size, disk.file_size)

    def _decompress(self, layer: Layer, disk: DiskPoint) -> None:
        view = memoryview(mmap.mmap(-1, BLOCK))
        scratch = memoryview(mmap.mmap(-1, layering.MAX_STORED))
        for record in layer.records():
            self.cancelled()
            if record.kind == Kind.DATA:
                layer.read(record, view[: record.length], scratch)
                self.progress(disk.target, record.position, disk.file_size)
