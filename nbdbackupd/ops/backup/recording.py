"""Making one restore point: draft, snapshot, copies, manifest.

What is left by which way out: the libvirt job, its socket and scratch files never outlive the
snapshot's context; a draft that was not published is removed, and so is its checkpoint.
"""

import hashlib
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from nbdbackupd import durable, events
from nbdbackupd import log as runlog
from nbdbackupd.errors import DomainError, GaveWayError, NbdbackupError
from nbdbackupd.format.stream import StreamMeta
from nbdbackupd.model.chain import DiskMode, DiskPoint, Level, RestorePoint, StoredFile
from nbdbackupd.model.plan import DiskState
from nbdbackupd.nbdio import copy
from nbdbackupd.nbdio.client import Patience
from nbdbackupd.nbdio.throttle import Throttle
from nbdbackupd.ops.backup import metadata
from nbdbackupd.ops.backup.job import Job
from nbdbackupd.ops.backup.sources import open_source
from nbdbackupd.ops.backup.transfer import Copied, Transfer, copy_disk
from nbdbackupd.ops.checkpoints import foreign, leftovers, origin, reconcile
from nbdbackupd.qemu import image
from nbdbackupd.repo import layout
from nbdbackupd.repo.draft import Draft, Intent
from nbdbackupd.repo.set_directory import CHECKPOINT_XML
from nbdbackupd.repo.state import State
from nbdbackupd.source import Export, Snapshot
from nbdbackupd.units import local_time

log = logging.getLogger(__name__)


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


def record(job: Job) -> tuple[RestorePoint, Mapping[str, float]]:
    """Make and publish the point; returns it with the seconds that each disk took.

    Raises the errors of all layers; then no point was made, unless the error says so.
    """
    notes = _Notes()
    intent = Intent(
        uuid=job.domain.uuid,
        domain=job.domain.name,
        chain=job.chain,
        checkpoint=job.checkpoint,
        run_id=job.request.run_id,
        point_id=job.point_id,
    )
    try:
        with ExitStack() as stack:
            draft = stack.enter_context(job.set_dir.draft(intent))
            leftovers.note(job.request.runtime_dir, intent, job.set_dir.path)
            stack.callback(_settle, job, draft)
            point = _fill(job, draft, notes)
            if notes.trouble is not None:
                raise notes.trouble
            job.cancelled()
            _check_strict(job, notes)
            published = draft.publish(point)
    except GaveWayError:
        raise
    except NbdbackupError as err:
        if notes.trouble is not None and err is not notes.trouble:
            # the job was ended because of it; what the copy saw is only the consequence
            raise notes.trouble from err
        raise
    return published, notes.seconds


def _settle(job: Job, draft: Draft) -> None:
    """After the job's end: a checkpoint without a point goes; then the run is forgotten."""
    gone = draft.published or not job.checkpoint
    erase = reconcile.eraser(job.lease) if job.lease is not None else None
    if gone or reconcile.drop_failed(job.domain, job.checkpoint, job.survey.states, erase):
        leftovers.forget(job.request.runtime_dir, job.domain.uuid)


def _fill(job: Job, draft: Draft, notes: _Notes) -> RestorePoint:
    """Copy everything into the draft and describe it; the libvirt job has ended afterwards."""
    notes.warnings += [*job.warnings, *_lost(job), *_unsaved(job)]
    _check_strict(job, notes)

    def trouble(error: NbdbackupError) -> None:
        notes.trouble = notes.trouble or error

    with open_source(job, trouble) as opened:
        snapshot = _proven(job, opened, notes)
        notes.warnings += snapshot.warnings
        reasons = _reasons(job, snapshot, notes)
        collected = metadata.collect(job.domain, job.survey.definition)
        notes.warnings += collected.warnings
        _check_strict(job, notes)
        _tell_demotions(job, snapshot, reasons, notes)
        files = _save_metadata(job, draft, collected, snapshot, notes)
        _check_strict(job, notes)
        disks = _copy_disks(job, draft, snapshot, reasons, notes)
    for warning in notes.warnings:
        if warning not in notes.told:
            log.warning("%s", warning)
    return _describe(job, snapshot, disks, files, notes, autostart=collected.autostart)


def _proven(job: Job, snapshot: Snapshot, notes: _Notes) -> Snapshot:
    """Without the changes of images that may not be those of their disks."""
    if job.parent is None:
        return snapshot
    snapshot = foreign.prove(snapshot, job.domain, job.set_dir, job.parent)
    patience = _patience(job, notes)
    return origin.prove(snapshot, job.set_dir.path, job.known, job.parent, patience)


def _patience(job: Job, notes: _Notes) -> Patience:
    def cancelled() -> None:
        if notes.trouble is not None:
            raise notes.trouble
        job.cancelled()

    return Patience(job.request.settings.limits_timeout, cancelled)


def _lost(job: Job) -> list[str]:
    """What the point does not hold any more, though nobody asked for that (F-11)."""
    if job.parent is None:
        return []
    why = {skipped.target: skipped.reason for skipped in job.survey.selection.skipped}
    return [
        f"disk {target} is part of restore point {job.parent.id} but "
        + (f"left out now: it is {why[target]}" if target in why else "no longer of the domain")
        for target in job.survey.lost
    ]


def _unsaved(job: Job) -> list[str]:
    """Disks that hold data and are in no point, though nobody excluded them."""
    return [
        f"disk {each.target} is not saved: it is {each.reason}"
        for each in job.survey.selection.unsaved
        if each.target not in job.survey.lost
    ]


def _reasons(job: Job, snapshot: Snapshot, notes: _Notes) -> dict[str, str]:
    """Why disks are read in full; what is not their nature is a warning."""
    reasons = {plan.target: plan.reason for plan in job.survey.plans if plan.reason}
    reasons |= snapshot.demoted
    notes.expected = {plan.target for plan in job.survey.plans if plan.is_expected}
    if job.parent is not None:
        state = State(job.request.settings.checkpoint_directory)
        moment = state.released(job.domain.uuid, job.parent.checkpoint)
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
    job: Job, snapshot: Snapshot, reasons: Mapping[str, str], notes: _Notes
) -> None:
    for target, reason in reasons.items():
        if target in notes.expected:
            continue
        notes.told.add(_demotion(target, reason))
        events.emit(log, events.DISK_DEMOTED, disk=target, reason=reason)
    is_delta = job.level in (Level.INC, Level.DIFF) and job.parent is not None
    if is_delta and reasons and not any(each.bitmap for each in snapshot.exports.values()):
        events.emit(log, events.BASE_LOST, checkpoint=job.parent.checkpoint if job.parent else "")


def _check_strict(job: Job, notes: _Notes) -> None:
    warnings = (*notes.warnings, *runlog.warned())
    if job.request.settings.strict and warnings:
        raise DomainError(f"stopped, since warnings are errors (strict): {warnings[0]}")


def _save_metadata(
    job: Job,
    draft: Draft,
    collected: metadata.Collected,
    snapshot: Snapshot,
    notes: _Notes,
) -> list[StoredFile]:
    """Everything beside the disks; a component that can't be read costs a warning (F-92)."""
    held = [file for point in job.known.points for file in point.files]
    files, unread = metadata.save(draft, collected, job.point_id, held)
    notes.warnings += unread
    if snapshot.checkpoint_xml:
        name = layout.checkpoint_xml(job.checkpoint)
        data = snapshot.checkpoint_xml.encode()
        files.append(draft.add_bytes(name, data, CHECKPOINT_XML))
    for plan in job.survey.plans:
        text = job.survey.infos.get(plan.target)
        if text:
            name = layout.image_info(plan.target, job.point_id)
            data = image.as_object(text).encode()
            files.append(draft.add_bytes(name, data, "image-info", disk=plan.target))
    return files


def _copy_disks(
    job: Job,
    draft: Draft,
    snapshot: Snapshot,
    reasons: Mapping[str, str],
    notes: _Notes,
) -> list[DiskPoint]:
    """One disk after the other: the pipeline keeps all processors busy with one."""
    request, settings = job.request, job.request.settings
    tuning = copy.Tuning(workers=settings.limits_workers or copy.default_workers())
    rate = settings.limits_bandwidth
    transfer = Transfer(
        tuning=tuning,
        arena=tuning.arena(),
        patience=_patience(job, notes),
        level=settings.compression,
        layout=request.layout,
        by_nbdinfo=request.by_nbdinfo,
        progress=job.progress,
        throttle=Throttle(rate) if rate is not None else None,
    )
    disks = []
    for target, export in snapshot.exports.items():
        log.info("disk %s: reading %s", target, "changes" if export.bitmap else "all of it")
        name = layout.stream(
            target,
            job.level,
            checkpoint=job.checkpoint or job.point_id,
            point_id=job.point_id,
            layout=request.layout,
        )
        paths = draft.create(name), draft.create(layout.index(name))
        copied = copy_disk(transfer, export, _meta(job, export), *paths)
        notes.seconds[target] = copied.seconds
        reason = reasons.get(target, "")
        disks.append(_disk_point(job, export, paths[1], copied, reason=reason))
    return disks


def _meta(job: Job, export: Export) -> StreamMeta:
    definition = job.survey.definition.disk(export.target)
    return StreamMeta(
        virtual_size=export.size,
        data_size=0,
        date=job.request.now.isoformat(),
        disk_name=export.target,
        disk_format=definition.format,
        checkpoint=job.checkpoint,
        compressed=job.request.settings.compression or 0,
        parent_checkpoint=job.parent.checkpoint if job.parent is not None else "",
        incremental=bool(export.bitmap),
        extra=(("point", job.point_id), ("program", job.request.program)),
    )


def _disk_point(job: Job, export: Export, index: Path, copied: Copied, *, reason: str) -> DiskPoint:
    definition = job.survey.definition.disk(export.target)
    state = job.survey.states.get(export.target, DiskState(size=export.size))
    written = copied.written
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
        compressed=job.request.settings.compression is not None,
        layout=job.request.layout,
        reason=reason,
        serial=state.serial,
        layers=state.layers,
        bitmap=job.checkpoint if job.survey.plan(export.target).tracked else "",
    )


def _describe(
    job: Job,
    snapshot: Snapshot,
    disks: list[DiskPoint],
    files: list[StoredFile],
    notes: _Notes,
    *,
    autostart: bool,
) -> RestorePoint:
    parent = job.parent
    return RestorePoint(
        id=job.point_id,
        sequence=job.known.next_sequence,
        chain=job.chain,
        level=job.level,
        created=job.request.now.isoformat(timespec="seconds").replace("+00:00", "Z"),
        domain=job.domain.name,
        uuid=job.domain.uuid,
        disks=tuple(disks),
        consistency=snapshot.consistency,
        parent=parent.id if parent is not None else "",
        parent_digest=parent.digest if parent is not None else "",
        checkpoint=job.checkpoint,
        base_checkpoint=parent.checkpoint if parent is not None else "",
        skipped=job.survey.selection.skipped,
        files=tuple(files),
        warnings=tuple(notes.warnings),
        autostart=autostart,
        program=job.request.program,
    )
