"""``restore``: the disks of one restore point as images, with the domain's XML beside them.

Everything is proven before the first byte is written: the links of the chain, the presence and
size of every file that is needed, the digest of every index. Then the chain is flattened while it
is read, each block is proven by its digest, and each image gets its name only when all of them
are complete and on the device. Whatever fails leaves ``.incomplete`` files and raises.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from nbdbackupd import durable
from nbdbackupd import log as runlog
from nbdbackupd.crew import Crew
from nbdbackupd.errors import (
    BusyError,
    ChainBrokenError,
    FormatError,
    NbdbackupError,
    RepositoryError,
    UsageError,
)
from nbdbackupd.model.chain import BackupSet
from nbdbackupd.ops import layers as layering
from nbdbackupd.ops import (
    output_names,
    outputs,
    points,
    restore_files,
    restore_options,
    sequence,
    telling,
)
from nbdbackupd.ops.definer import Definer, Definition, Planned, PlannedDisk
from nbdbackupd.ops.fill import fill
from nbdbackupd.ops.layers import Layer
from nbdbackupd.ops.restore_files import FileCopy
from nbdbackupd.qemu.image import CreateOptions
from nbdbackupd.repo.repository import Repository

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
Format = Literal["qcow2", "raw"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreRequest:
    """What to restore and where to.

    Either ``source`` is the directory of a set, or ``sequence`` names stream files of one disk,
    oldest first. ``disks`` empty means all. At most one of ``point`` (id), ``until`` (checkpoint)
    and ``at`` chooses the point, else it is the newest. ``format`` None keeps the original's.
    """

    output: Path
    source: Path | None = None
    disks: tuple[str, ...] = ()
    point: str = ""
    until: str = ""
    at: datetime | None = None
    sequence: tuple[Path, ...] = ()
    format: str | None = None
    preallocate: bool = False
    force: bool = False
    workers: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoredDisk:
    """One image: size of the disk and ``data_bytes`` that were written, in bytes."""

    target: str
    path: Path
    format: str
    size: int
    data_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreReport:
    """What was restored; ``config`` is the domain's XML, ``files`` what else lies beside it."""

    point: str
    domain: str
    created: str
    disks: tuple[RestoredDisk, ...]
    config: Path | None
    files: tuple[Path, ...]
    warnings: tuple[str, ...]
    seconds: float
    definition: Definition | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        return {
            "version": 1,
            "point": self.point,
            "domain": self.domain,
            "created": self.created,
            "disks": [
                {
                    "target": disk.target,
                    "path": str(disk.path),
                    "format": disk.format,
                    "size": disk.size,
                    "data_bytes": disk.data_bytes,
                    "seconds": round(disk.seconds, 3),
                }
                for disk in self.disks
            ],
            "config": str(self.config) if self.config else None,
            "files": [str(path) for path in self.files],
            "definition": self.definition.to_json() if self.definition else None,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One disk to write: open layers, newest first, and what becomes of them."""

    target: str
    layers: tuple[Layer, ...]
    format: str
    options: CreateOptions
    final: Path

    @property
    def size(self) -> int:
        return self.layers[0].size

    @property
    def incomplete(self) -> Path:
        return self.final.with_name(f"{self.final.name}{output_names.INCOMPLETE}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """All that is to be done, everything but the blocks proven."""

    point: str
    domain: str
    created: str
    jobs: tuple[_Job, ...]
    files: tuple[FileCopy, ...]
    warnings: tuple[str, ...]


def run(
    request: RestoreRequest, *, progress: Progress, cancelled: Callable[[], None],
    definer: Definer | None = None,
) -> RestoreReport:  # fmt: skip
    """Restore; ``progress`` gets disk, guest bytes done and in all, from any thread.

    ``cancelled`` is polled and raises to end the run. ``definer`` makes a domain of the images.
    Raises UsageError, RepositoryError (also for an existing target without ``force``),
    ChainBrokenError, FormatError, IntegrityError, NoSpaceError, BusyError, ProcessError or
    NbdError of qemu-nbd, and what ``definer`` raises.
    """
    _check_request(request)
    ending = telling.Ending(log, telling.restore_ending)
    with ExitStack() as stack:
        stack.enter_context(runlog.context(SET=request.source or ""))
        stack.enter_context(ending.told())
        if request.sequence:
            plan = _plan_sequence(request, stack, cancelled)
        else:
            plan = _plan_set(request, stack, cancelled)
        with durable.translate_os_errors("create", request.output):
            durable.make_directory(request.output)
        stack.enter_context(_locked(request.output))
        _check_targets(plan, force=request.force)
        if definer is not None:
            definer.prepare(_planned(plan, request))
        for warning in plan.warnings:
            log.warning("%s", warning)
        disks = tuple(_restore_disk(job, request, progress, cancelled) for job in plan.jobs)
        for each in plan.files:
            with durable.translate_os_errors("write", each.incomplete):
                restore_files.copy(each, cancelled, point=plan.point)
        _name_all(plan, force=request.force)
        definition = definer.finish() if definer is not None else None
    xml = [each.final for each in plan.files if each.stored.role == restore_files.XML_ROLE]
    report = RestoreReport(
        point=plan.point,
        domain=plan.domain,
        created=plan.created,
        disks=disks,
        config=xml[0] if xml else None,
        files=tuple(each.final for each in plan.files if each.final not in xml),
        warnings=plan.warnings + (definition.warnings if definition else ()),
        seconds=ending.seconds,
        definition=definition,
    )
    with runlog.context(DOMAIN=plan.domain, SET=request.source or ""):
        telling.restored(log, report)
    return report


def _planned(plan: _Plan, request: RestoreRequest) -> Planned:
    return Planned(
        point=plan.point, domain=plan.domain, output=request.output, files=plan.files,
        disks=tuple(PlannedDisk(target=j.target, path=j.final, format=j.format) for j in plan.jobs),
        force=request.force,
    )  # fmt: skip


def _check_request(request: RestoreRequest) -> None:
    if bool(request.sequence) == (request.source is not None):
        raise UsageError("give either a backup set or a sequence of stream files")
    if request.sequence and (request.point or request.until or request.at or request.disks):
        raise UsageError("a sequence of stream files is one point of one disk: choose none")
    if request.format not in (None, "qcow2", "raw"):
        raise UsageError(f"can't restore to format {request.format}, only qcow2 and raw")
    if request.workers < 1:
        raise UsageError("at least one worker is needed")


def _plan_set(request: RestoreRequest, stack: ExitStack, cancelled: Callable[[], None]) -> _Plan:
    assert request.source is not None  # noqa: S101 - for the type checker
    repository = Repository.open(request.source)
    known, damage = _load(repository, request)
    if not known.points:
        raise RepositoryError(f"{request.source} holds no restore point: is it a backup set?")
    point = points.choose(known, point=request.point, until=request.until, at=request.at)
    disks = [point.disk(target) for target in dict.fromkeys(request.disks)] or list(point.disks)
    made = [
        restore_options.choose(
            repository, point, disk, wanted=request.format, preallocate=request.preallocate
        )
        for disk in disks
    ]
    names = output_names.choose(
        [
            output_names.Wanted(
                target=disk.target, source=disk.source, original=disk.format, format=each.format
            )
            for disk, each in zip(disks, made, strict=True)
        ],
        point.domain,
    )
    jobs = tuple(
        _Job(
            target=disk.target,
            layers=tuple(
                stack.enter_context(
                    layering.open_proven(repository.path, each, each.disk(disk.target), cancelled)
                )
                for each in known.path(point, disk.target)
            ),
            format=each.format,
            options=each.options,
            final=request.output / names[disk.target],
        )
        for disk, each in zip(disks, made, strict=True)
    )
    files = restore_files.plan(request.source, point, request.output)
    for each in files:
        layering.check_size(each.source, each.stored.size, point=point.id)
    return _Plan(
        point=point.id,
        domain=point.domain,
        created=point.created,
        jobs=jobs,
        files=files,
        warnings=(*damage, *(text for each in made for text in each.warnings)),
    )


def _load(repository: Repository, request: RestoreRequest) -> tuple[BackupSet, tuple[str, ...]]:
    """All points proven; or the sound ones, with warnings, if the user names one of them.

    Which point is the newest, or the newest at a time, can't be told from a damaged set.
    """
    try:
        return repository.load(), ()
    except (FormatError, ChainBrokenError) as err:
        if request.point not in ("", "latest") or request.until:
            return repository.load_sound()
        err.message += "; 'nbdbackupctl list' shows the sound points, --point restores one of them"
        raise


def _plan_sequence(
    request: RestoreRequest, stack: ExitStack, cancelled: Callable[[], None]
) -> _Plan:
    given = sequence.load(request.sequence, stack, cancelled)
    format_, warnings = restore_options.choose_format(given.format, request.format, given.disk)
    wanted = output_names.Wanted(
        target=given.disk, source="", original=given.format, format=format_
    )
    name = output_names.choose([wanted], "")[given.disk]
    job = _Job(
        target=given.disk,
        layers=given.layers,
        format=format_,
        options=restore_options.plain(format_, preallocate=request.preallocate),
        final=request.output / name,
    )
    return _Plan(
        point="", domain="", created=given.created, jobs=(job,), files=(),
        warnings=(*given.warnings, *warnings),
    )  # fmt: skip


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep a second restore out of the output directory.

    Raises BusyError.
    """
    with durable.translate_os_errors("open", directory):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # network file systems may know no locks on directories; then there is just none
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                raise BusyError(f"another restore writes to {directory}") from err
        yield
    finally:
        os.close(fd)


def _check_targets(plan: _Plan, *, force: bool) -> None:
    """Refuse to replace what exists; what is no file is not replaced even by force."""
    for final in [*(job.final for job in plan.jobs), *(each.final for each in plan.files)]:
        if not os.path.lexists(final):
            continue
        if not force:
            raise RepositoryError(f"{final} exists: use --force to replace it, or another -o")
        if not final.is_file() and not final.is_symlink():
            raise RepositoryError(f"{final} exists and is no file: give another -o")


def _restore_disk(
    job: _Job, request: RestoreRequest, progress: Progress, cancelled: Callable[[], None]
) -> RestoredDisk:
    begun = time.monotonic()
    crew = Crew(cancelled)

    def tell(done: int) -> None:
        progress(job.target, done, job.size)

    try:
        with (
            durable.translate_os_errors("restore", job.incomplete),
            _output(job, request, crew, cancelled) as output,
        ):
            written = fill(output, list(job.layers), crew=crew, progress=tell)
    except NbdbackupError as err:
        err.fields.setdefault("disk", job.target)
        raise
    seconds = time.monotonic() - begun
    log.info("disk %s restored, %d bytes written in %.1f s", job.target, written, seconds)
    return RestoredDisk(
        target=job.target, path=job.final, format=job.format, size=job.size,
        data_bytes=written, seconds=seconds,
    )  # fmt: skip


def _output(
    job: _Job, request: RestoreRequest, crew: Crew, cancelled: Callable[[], None]
) -> AbstractContextManager[outputs.Output]:
    if job.format == "raw":
        return outputs.raw(
            job.incomplete, job.size, preallocate=request.preallocate, workers=request.workers
        )
    return outputs.qcow2(
        job.incomplete, job.size, job.options,
        workers=request.workers, cancelled=cancelled, check=crew.check,
    )  # fmt: skip


def _name_all(plan: _Plan, *, force: bool) -> None:
    """Give everything its name, durably."""
    _check_targets(plan, force=force)
    parts: list[_Job | FileCopy] = [*plan.files, *plan.jobs]
    with durable.translate_os_errors("rename", "the restored files"):
        for each in parts:
            os.rename(each.incomplete, each.final)  # noqa: PTH104 - as in durable
        for directory in dict.fromkeys(each.final.parent for each in parts):
            durable.fsync_directory(directory)
