"""Making one restore point: draft, snapshot, copies, manifest.

What is left by which way out: the libvirt job, its socket and scratch files never outlive the
snapshot's context; a draft that was not published is removed, and so is its checkpoint.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from nbdbackupd import durable, events
from nbdbackupd import log as runlog
from nbdbackupd.errors import DomainError, GaveWayError, NbdbackupError
from nbdbackupd.format.stream import StreamMeta
from nbdbackupd.model.chain import Codec, DiskMode, DiskPoint, Level, RestorePoint, StoredFile
from nbdbackupd.model.plan import DiskState
from nbdbackupd.nbdio import copy
from nbdbackupd.nbdio.client import Patience
from nbdbackupd.nbdio.throttle import Throttle
from nbdbackupd.ops.backup import metadata
from nbdbackupd.ops.backup.run import BackupRun
from nbdbackupd.ops.backup.transfer import Copied, Transfer, copy_disk, take_image
from nbdbackupd.ops.checkpoints import leftovers, origin
from nbdbackupd.qemu import image
from nbdbackupd.repo import layout
from nbdbackupd.repo.draft import Draft, Intent
from nbdbackupd.repo.set_directory import CHECKPOINT_XML
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.source import Export, Snapshot
from nbdbackupd.threads import side_by_side
from nbdbackupd.units import local_time

log = logging.getLogger(__name__)

MOST_AT_A_TIME: Final = 4
"""Disks that are copied at a time; each has connections of its own."""


@dataclass(slots=True)
class _Notes:
    """What comes up while the point is made; ``told``: warnings that were events already.

    ``expected``: disks that are read in full by their nature.
    """

    warnings: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    expected: set[str] = field(default_factory=set)
    trouble: NbdbackupError | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def record(run: BackupRun) -> tuple[RestorePoint, Mapping[str, float]]:
    """Make and publish the point; returns it with the seconds that each disk took.

    Raises the errors of all layers; then no point was made, unless the error says so.
    """
    notes = _Notes()
    intent = Intent(
        uuid=run.subject.uuid,
        domain=run.subject.name,
        chain=run.chain,
        checkpoint=run.checkpoint,
        run_id=run.request.run_id,
        point_id=run.point_id,
    )
    try:
        with ExitStack() as stack:
            draft = stack.enter_context(run.set_dir.draft(intent))
            leftovers.note(run.request.runtime_dir, intent, run.set_dir.path)
            stack.callback(_settle, run, draft)
            point = _fill(run, draft, notes)
            if notes.trouble is not None:
                raise notes.trouble
            run.cancelled()
            _check_strict(run, notes)
            published = draft.publish(point)
    except GaveWayError:
        raise
    except NbdbackupError as err:
        if notes.trouble is not None and err is not notes.trouble:
            # the job was ended because of it; what the copy saw is only the consequence
            raise notes.trouble from err
        raise
    return published, notes.seconds


def _settle(run: BackupRun, draft: Draft) -> None:
    """After the job's end: a checkpoint without a point goes; then the run is forgotten."""
    gone = draft.published or not run.checkpoint
    if gone or run.subject.drop_failed(run):
        leftovers.forget(run.request.runtime_dir, run.subject.uuid)


def _fill(run: BackupRun, draft: Draft, notes: _Notes) -> RestorePoint:
    """Copy everything into the draft and describe it; the libvirt job has ended afterwards."""
    notes.warnings += [*run.warnings, *_lost(run), *_unsaved(run)]
    _check_strict(run, notes)

    def trouble(error: NbdbackupError) -> None:
        notes.trouble = notes.trouble or error

    with run.subject.open(run, trouble) as opened:
        snapshot = _proven(run, opened, notes)
        notes.warnings += snapshot.warnings
        reasons = _reasons(run, snapshot, notes)
        collected = run.subject.collect(run)
        notes.warnings += collected.warnings
        _check_strict(run, notes)
        _tell_demotions(run, snapshot, reasons, notes)
        files = _save_metadata(run, draft, collected, snapshot, notes)
        _check_strict(run, notes)
        disks = _copy_disks(run, draft, snapshot, reasons, notes)
    for warning in notes.warnings:
        if warning not in notes.told:
            log.warning("%s", warning)
    return _describe(run, snapshot, disks, files, notes, autostart=collected.autostart)


def _proven(run: BackupRun, snapshot: Snapshot, notes: _Notes) -> Snapshot:
    """Without the changes of images that may not be those of their disks."""
    if run.parent is None or snapshot.finish is not None:
        return snapshot
    snapshot = run.subject.prove(run, run.parent, snapshot)
    patience = _patience(run, notes)
    return origin.prove(snapshot, run.set_dir.path, run.known, run.parent, patience)


def _patience(run: BackupRun, notes: _Notes) -> Patience:
    def cancelled() -> None:
        if notes.trouble is not None:
            raise notes.trouble
        run.cancelled()

    return Patience(run.request.settings.limits_timeout, cancelled)


def _lost(run: BackupRun) -> list[str]:
    """What the point does not hold any more, though nobody asked for that (F-11)."""
    if run.parent is None:
        return []
    why = {skipped.target: skipped.reason for skipped in run.survey.selection.skipped}
    return [
        f"disk {target} is part of restore point {run.parent.id} but "
        + (f"left out now: it is {why[target]}" if target in why else "no longer of the domain")
        for target in run.survey.lost
    ]


def _unsaved(run: BackupRun) -> list[str]:
    """Disks that hold data and are in no point, though nobody excluded them."""
    return [
        f"disk {each.target} is not saved: it is {each.reason}"
        for each in run.survey.selection.unsaved
        if each.target not in run.survey.lost
    ]


def _reasons(run: BackupRun, snapshot: Snapshot, notes: _Notes) -> dict[str, str]:
    """Why disks are read in full; what is not their nature is a warning."""
    reasons = {plan.target: plan.reason for plan in run.survey.plans if plan.reason}
    reasons |= snapshot.demoted
    notes.expected = {plan.target for plan in run.survey.plans if plan.is_expected}
    if run.parent is not None:
        state = StateDirectory(run.request.settings.checkpoint_directory)
        moment = state.released(run.subject.uuid, run.parent.checkpoint)
        for target in reasons.keys() - notes.expected if moment else ():
            reasons[target] += f"; 'checkpoints --release' let go of it at {local_time(moment)}"
    notes.warnings += [
        _demotion(target, reason)
        for target, reason in reasons.items()
        if target not in notes.expected
    ]
    return reasons


def _demotion(target: str, reason: str) -> str:
    return f"disk {target} is read in full: {reason}"


def _tell_demotions(
    run: BackupRun, snapshot: Snapshot, reasons: Mapping[str, str], notes: _Notes
) -> None:
    for target, reason in reasons.items():
        if target in notes.expected:
            continue
        notes.told.add(_demotion(target, reason))
        events.emit(log, events.DISK_DEMOTED, disk=target, reason=reason)
    is_delta = run.level in (Level.INC, Level.DIFF) and run.parent is not None
    if is_delta and reasons and not any(each.bitmap for each in snapshot.exports.values()):
        events.emit(log, events.BASE_LOST, checkpoint=run.parent.checkpoint if run.parent else "")


def _check_strict(run: BackupRun, notes: _Notes) -> None:
    warnings = (*notes.warnings, *runlog.warned())
    if run.request.settings.strict and warnings:
        raise DomainError(f"stopped, since warnings are errors (strict): {warnings[0]}")


def _save_metadata(
    run: BackupRun,
    draft: Draft,
    collected: metadata.Collected,
    snapshot: Snapshot,
    notes: _Notes,
) -> list[StoredFile]:
    """Everything beside the disks; a component that can't be read costs a warning (F-92)."""
    held = [file for point in run.known.points for file in point.files]
    files, unread = metadata.save(draft, collected, run.point_id, held)
    notes.warnings += unread
    if snapshot.checkpoint_xml:
        name = layout.checkpoint_xml(run.checkpoint)
        data = snapshot.checkpoint_xml.encode()
        files.append(draft.add_bytes(name, data, CHECKPOINT_XML))
    for plan in run.survey.plans:
        text = run.survey.infos.get(plan.target)
        if text:
            name = layout.image_info(plan.target, run.point_id)
            data = image.as_object(text).encode()
            files.append(draft.add_bytes(name, data, "image-info", disk=plan.target))
    return files


def _copy_disks(
    run: BackupRun,
    draft: Draft,
    snapshot: Snapshot,
    reasons: Mapping[str, str],
    notes: _Notes,
) -> list[DiskPoint]:
    """As many disks at a time as there are workers: their waits for the target overlap."""
    exports = list(snapshot.exports.values())
    if snapshot.finish is not None:
        return _take_images(run, draft, snapshot, reasons, notes)
    tuning = copy.Tuning(workers=run.request.settings.limits_workers or copy.default_workers())
    count = min(tuning.workers, MOST_AT_A_TIME)
    transfer = _transfer(run, tuning, _patience(run, notes))
    if min(count, len(exports)) > 1:
        transfer = replace(transfer, progress=_Together(exports, run.progress).moved)

    def copied(export: Export, check: Callable[[], None]) -> DiskPoint:
        target = export.target
        log.info("disk %s: reading %s", target, "changes" if export.bitmap else "all of it")
        paths = _files(run, draft, target)
        mine = replace(transfer, patience=replace(transfer.patience, cancelled=check))
        done = copy_disk(mine, export, _meta(run, export), *paths)
        notes.seconds[target] = done.seconds
        return _disk_point(run, export, paths[1], done, reason=reasons.get(target, ""))

    return side_by_side(exports, count, copied, transfer.patience.cancelled)


def _files(run: BackupRun, draft: Draft, target: str) -> tuple[Path, Path]:
    """Where a disk's data and its index go."""
    name = layout.stream(
        target,
        run.level,
        checkpoint=run.checkpoint or run.point_id,
        point_id=run.point_id,
        layout=run.request.layout,
    )
    return draft.create(name), draft.create(layout.index(name))


def _take_images(
    run: BackupRun, draft: Draft, snapshot: Snapshot, reasons: Mapping[str, str], notes: _Notes
) -> list[DiskPoint]:
    """Wait for QEMU, then take over what it has written."""
    exports = list(snapshot.exports.values())
    patience = _patience(run, notes)
    label = exports[0].target if len(exports) == 1 else f"{len(exports)} disks"
    if snapshot.finish is not None:
        snapshot.finish(
            lambda done, total: run.progress(label, done, total, done), patience.cancelled
        )
    found = []
    for export in exports:
        target = export.target
        paths = _files(run, draft, target)
        is_delta = bool(export.bitmap) and run.parent is not None
        backing = run.parent.disk(target).file if is_delta and run.parent is not None else ""
        done = take_image(
            export,
            *paths,
            backing=backing,
            digest=run.request.settings.digest,
            check=patience.cancelled,
        )
        notes.seconds[target] = done.seconds
        found.append(_disk_point(run, export, paths[1], done, reason=reasons.get(target, "")))
    return found


def _transfer(run: BackupRun, tuning: copy.Tuning, patience: Patience) -> Transfer:
    request, settings = run.request, run.request.settings
    rate = settings.limits_bandwidth
    return Transfer(
        tuning=tuning,
        arena=tuning.arena(),
        patience=patience,
        digest=settings.digest,
        layout=request.layout,
        by_nbdinfo=request.by_nbdinfo,
        progress=run.progress,
        throttle=Throttle(rate) if rate is not None else None,
    )


class _Together:
    """Tells of several disks as if they were one; for any thread."""

    def __init__(self, exports: list[Export], tell: Callable[[str, int, int, int], None]) -> None:
        self._label = f"{len(exports)} disks"
        self._size = sum(export.size for export in exports)
        self._tell = tell
        self._lock = threading.Lock()
        self._reached: dict[str, tuple[int, int]] = {}

    def moved(self, disk: str, position: int, _size: int, data: int) -> None:
        """As ``Transfer.progress``."""
        with self._lock:
            self._reached[disk] = (position, data)
            reached = self._reached.values()
            position, data = (sum(each) for each in zip(*reached, strict=True))
            self._tell(self._label, position, self._size, data)


def _meta(run: BackupRun, export: Export) -> StreamMeta:
    definition = run.survey.definition.disk(export.target)
    return StreamMeta(
        virtual_size=export.size,
        data_size=0,
        date=run.request.now.isoformat(),
        disk_name=export.target,
        disk_format=definition.format,
        checkpoint=run.checkpoint,
        compression=run.request.settings.compression,
        parent_checkpoint=run.parent.checkpoint if run.parent is not None else "",
        incremental=bool(export.bitmap),
        extra=(("point", run.point_id), ("program", run.request.program)),
    )


def _disk_point(
    run: BackupRun, export: Export, index: Path, copied: Copied, *, reason: str
) -> DiskPoint:
    definition = run.survey.definition.disk(export.target)
    state = run.survey.states.get(export.target, DiskState(size=export.size))
    compression, written = run.request.settings.compression, copied.written
    name = index.name.removesuffix(layout.INDEX_SUFFIX)
    with durable.translate_os_errors("read", index), index.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return DiskPoint(
        target=export.target,
        mode=DiskMode.DELTA if export.bitmap else DiskMode.FULL,
        size=export.size,
        format=definition.format,
        source=definition.source,
        file=name,
        file_size=written.file_size,
        adler32=written.adler32,
        index=StoredFile(
            layout.index(name), "disk-index", written.index_size, digest, disk=export.target
        ),
        data_bytes=written.data_bytes,
        zero_bytes=written.zero_bytes,
        codec=Codec.NONE if compression is None else compression.codec,
        layout=run.request.layout,
        reason=reason,
        serial=state.serial,
        layers=state.layers,
        bitmap=run.checkpoint if run.survey.plan(export.target).tracked else "",
        digest=run.request.settings.digest,
        sha256=copied.sha256,
    )


def _describe(
    run: BackupRun,
    snapshot: Snapshot,
    disks: list[DiskPoint],
    files: list[StoredFile],
    notes: _Notes,
    *,
    autostart: bool,
) -> RestorePoint:
    parent = run.parent
    return RestorePoint(
        id=run.point_id,
        sequence=run.known.next_sequence,
        chain=run.chain,
        level=run.level,
        created=run.request.now.isoformat(timespec="seconds").replace("+00:00", "Z"),
        domain=run.subject.name,
        uuid=run.subject.uuid,
        disks=tuple(disks),
        consistency=snapshot.consistency,
        parent=parent.id if parent is not None else "",
        parent_digest=parent.digest if parent is not None else "",
        checkpoint=run.checkpoint,
        base_checkpoint=parent.checkpoint if parent is not None else "",
        skipped=run.survey.selection.skipped,
        files=tuple(files),
        warnings=tuple(notes.warnings),
        autostart=autostart,
        program=run.request.program,
    )
