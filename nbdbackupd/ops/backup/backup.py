"""``backup``: one run that saves one domain into one set.

Life of a run: locks, a lease if the domain is off, sweep up after dead runs, read the chain,
reconcile, decide the level, draft, open the source, copy each disk, close the source, publish.
Only the published manifest makes the new checkpoint the base of the next run; on every other way
out the draft and the new checkpoint go away and the old base stays what it was.
"""

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

from nbdbackupd import durable, events, rundir
from nbdbackupd import log as runlog
from nbdbackupd.errors import (
    CheckpointError,
    DomainError,
    IntegrityError,
    NotSupportedError,
    RepositoryError,
)
from nbdbackupd.format import blocks
from nbdbackupd.model.chain import (
    BackupSet,
    Codec,
    Consistency,
    Layout,
    Level,
    RestorePoint,
    effective_level,
)
from nbdbackupd.model.space import own_bytes
from nbdbackupd.ops.backup import metadata, outcome, recording, room
from nbdbackupd.ops.backup.request import BackupReport, BackupRequest
from nbdbackupd.ops.backup.run import BackupRun
from nbdbackupd.ops.backup.sources import LibvirtDomain, changed_bytes
from nbdbackupd.ops.checkpoints import foreign, leftovers, reconcile
from nbdbackupd.ops.checkpoints.checkpoints import OWNER as CHECKPOINTS
from nbdbackupd.ops.checkpoints.others import OtherChain, check_name, other_chains
from nbdbackupd.ops.domain import domains, endings, locks
from nbdbackupd.ops.domain.images import images_of, note_saved, prove_start
from nbdbackupd.ops.domain.survey import DiskFilter, Looked, Survey, look, survey_domain
from nbdbackupd.repo import verified, written
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.state import Record, StateDirectory
from nbdbackupd.source.lease import Lease
from nbdbackupd.source.paused_start import started_paused
from nbdbackupd.virt import checkpoints
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain
from nbdbackupd.where import Where

log = logging.getLogger(__name__)
notice = functools.partial(log.log, runlog.NOTICE, "%s")
ENCRYPTED: Final = (
    "the image of disk {disk} is encrypted, its data in the set is not: keep the set where that "
    "may lie"
)
Progress = Callable[[str, int, int, int], None]
Cancelled = Callable[[], None]


def run(
    request: BackupRequest, connection: Connection, *, progress: Progress, cancelled: Cancelled
) -> BackupReport:
    """Save the domain; the report holds the published point.

    ``progress`` gets disk, guest position reached, disk size and data bytes so far.

    Raises BusyError if set or domain are locked, or it is being migrated, ElsewhereError if
    another host has it, and the errors of all layers; whatever is raised, nothing of this run is
    left and the old base is valid.
    """
    ending = endings.Ending(log, outcome.event_of)
    with ExitStack() as stack:
        stack.enter_context(
            runlog.context(DOMAIN=request.domain, RUN=request.run_id, SET=request.directory)
        )
        stack.enter_context(ending.told())
        domain = _find(request, connection)
        set_dir = stack.enter_context(begun(request, domain.name, domain.uuid, cancelled, ending))
        directory = rundir.domain_dir(request.runtime_dir, domain.uuid)
        leftovers.sweep_gone(connection, request.runtime_dir, request.now)
        dead = leftovers.sweep(
            domain, set_dir, request.runtime_dir, request.settings.scratch_directory
        )
        with (
            started_paused(domain, directory, wanted=request.settings.start_paused) as started,
            _images(request, domain, cancelled) as lease,
        ):
            report = _run_locked(
                _Run(
                    request=request, domain=domain, set_dir=set_dir, lease=lease,
                    at_rest=started.at_rest, dead=dead, progress=progress, cancelled=cancelled,
                )
            )  # fmt: skip
        report = replace(report, seconds=ending.seconds)
        outcome.tell(log, report)
    return report


@contextmanager
def begun(
    request: BackupRequest, name: str, uuid: str, cancelled: Cancelled, ending: endings.Ending
) -> Iterator[SetDirectory]:
    """The set that the run goes into, with its lock and the domain's, and the run's log open.

    Raises BusyError if set or domain are locked, RepositoryError; ConfigError if a library is
    missing that the wanted digest or compression needs.
    """
    wanted = request.settings.compression
    blocks.require(request.settings.digest, wanted.codec if wanted else Codec.NONE)
    with ExitStack() as stack:
        stack.enter_context(runlog.context(DOMAIN=name, UUID=uuid))
        directory = rundir.make_domain_dir(request.runtime_dir, uuid)
        who = f"{locks.BACKUP}{name}, run {request.run_id}"
        wait = _wait(request.settings.limits_wait, cancelled)
        stack.enter_context(durable.Lock(directory / rundir.LOCK, owner=who, wait=wait))
        set_dir = SetDirectory.open(request.directory)
        set_dir.check_can_begin()
        stack.enter_context(set_dir.lock(owner=who, wait=wait))
        stack.enter_context(runlog.run_log(set_dir.log_path(request.run_id)))
        stack.enter_context(ending.told())
        events.emit(log, events.BACKUP_STARTED, level=request.level)
        yield set_dir


def _find(request: BackupRequest, connection: Connection) -> Domain:
    """The domain, unless a migration is under way, or it is to be started and may run elsewhere."""
    domain = domains.find_at_rest(connection, request.domain, request.runtime_dir)
    if request.settings.start_paused and not connection.where.is_here:
        raise NotSupportedError(
            f"no domain of another host is started for a run: start {domain.name} yourself, or "
            f"run nbdbackupctl on {connection.where.name}",
            domain=domain.name,
        )
    if request.settings.start_paused and not domain.is_active():
        prove_start(domain, request.sharing)
    return domain


def _images(
    request: BackupRequest, domain: Domain, cancelled: Cancelled
) -> AbstractContextManager[Lease | None]:
    where = domain.connection.where
    if not where.is_here and not domain.is_active():
        raise NotSupportedError(
            f"domain {domain.name} of {where.name} is off, and its images can't be read by ssh: "
            f"start it, or run nbdbackupctl on that host",
            domain=domain.name,
        )
    sharing = replace(request.sharing, disks=disk_filter(request))
    return images_of(domain, request.runtime_dir, request.run_id, cancelled, sharing)


def disk_filter(request: BackupRequest) -> DiskFilter:
    """Which disks the settings want."""
    settings = request.settings
    return DiskFilter(
        include=settings.disks_include, exclude=settings.disks_exclude, raw=settings.disks_raw
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One run with its locks held; ``lease``: the domain is off.

    ``at_rest``: it was started paused for this run; what its disks are while nobody resumes it.
    ``dead`` are the checkpoints of dead runs.
    """

    request: BackupRequest
    domain: Domain
    set_dir: SetDirectory
    lease: Lease | None
    at_rest: Consistency | None
    dead: frozenset[str]
    progress: Progress
    cancelled: Cancelled


def _run_locked(run: _Run) -> BackupReport:
    """Reconcile, decide, make the point, let the base advance."""
    request, domain, set_dir = run.request, run.domain, run.set_dir
    if request.only_off and run.lease is None:
        return BackupReport(point=None, skipped="the domain runs")
    erase = reconcile.eraser(run.lease) if run.lease is not None else None
    state = StateDirectory(request.settings.checkpoint_directory)
    known = set_dir.load()
    check_binding(domain.name, domain.uuid, known)
    check_host(domain.connection.where, known)
    check_layout(request, known, domain, is_off=run.lease is not None)
    looked = look(domain)
    records = state.records(domain.uuid)
    chain = reconcile.of_set(set_dir, known, records)
    left = reconcile.prepare(
        domain, chain, looked, run.dead, state=state, erase=erase, cancelled=run.cancelled
    )
    if not left & run.dead:
        leftovers.finish(domain.uuid, set_dir, request.runtime_dir)
    level = effective_level(request.level, known)
    parent = known.head if level in (Level.INC, Level.DIFF) else None
    if parent is not None:
        set_dir.check_present(known.points)
        check_undamaged(set_dir, known, parent)
    wanted = disk_filter(request)
    survey = survey_domain(domain, wanted, level, parent, looked)
    doubts = _doubts(run.lease, survey)
    if doubts:
        # neither needs a bitmap of its own: a differential from the same base, or a copy
        level = Level.COPY if parent is None else Level.DIFF
        survey = survey_domain(domain, wanted, level, parent, looked)
    run.cancelled()
    beside = _others(run, looked, records, known, run.dead)
    skipped = _skipped(run, looked, survey, parent)
    if skipped is not None:
        return skipped
    point, seconds = recording.record(
        BackupRun(
            request=request, set_dir=set_dir, survey=survey, level=level,
            subject=LibvirtDomain(domain=domain, lease=run.lease, at_rest=run.at_rest),
            known=known, parent=parent, progress=run.progress, cancelled=run.cancelled,
            warnings=(*doubts, *(str(each) for each in beside if each.is_gone)),
        )
    )  # fmt: skip
    if run.lease is not None:
        note_saved(domain, request.sharing, point.id)
    written.note(state.directory, point)
    reconcile.advance(domain, set_dir, point, parent, looked, state=state, erase=erase)
    return report_of(known, point, seconds, looked, beside)


def _skipped(
    run: _Run, looked: Looked, survey: Survey, parent: RestorePoint | None
) -> BackupReport | None:
    """Why no point is to be made now, if so; warns of one that may not fit."""
    small = _below_threshold(run, survey, parent)
    if small:
        return BackupReport(point=None, skipped=small, is_current=True)
    sizes = functools.partial(checkpoints.sound_sizes, run.domain)
    short = room.shortage(looked, survey, parent, run.set_dir.path, sizes)
    if short and run.request.may_make_room:
        return BackupReport(point=None, skipped=short, is_short=True)
    if short:
        log.warning("%s", short)
    return None


def report_of(
    known: BackupSet,
    point: RestorePoint,
    seconds: Mapping[str, float],
    looked: Looked,
    beside: tuple[OtherChain, ...],
) -> BackupReport:
    """What is told of a point."""
    encrypted = [each.target for each in point.disks if each.target in looked.encrypted]
    notes = [ENCRYPTED.format(disk=target) for target in encrypted]
    notes += [str(each) for each in beside if not each.is_gone]
    return BackupReport(
        point=point,
        stored_bytes=own_bytes([*known.points, point])[point.id],
        disk_seconds=seconds,
        notes=tuple(notes),
    )


def _wait(seconds: float, cancelled: Cancelled) -> durable.Wait:
    """The check of the bitmaps after a start is ours, and short."""
    return durable.Wait(
        seconds=seconds, cancelled=cancelled, brief=CHECKPOINTS, told=notice, option="--wait"
    )


def _doubts(lease: Lease | None, survey: Survey) -> tuple[str, ...]:
    """Why images may be open on another host, or a start not be seen; each is a warning.

    Raises DomainError if one even looks as if it were: its bitmaps are in use.
    """
    if lease is None:
        return ()
    found = []
    for target, state in survey.states.items():
        for path in dict.fromkeys(layer.path for layer in state.layers):
            why = lease.doubt(path)
            if why and not all(state.bitmaps.get(path, {}).values()):
                raise DomainError(
                    f"disk {target} may be in use: a QEMU has opened the bitmaps of {path} and not "
                    f"closed them, and {why}"
                )
            if why:
                found.append(f"disk {target} is read without a bitmap of its own: {why}")
    if lease.is_read_only and not found:
        found.append(f"the disks are read without bitmaps of their own: {lease.unhooked}")
    return tuple(found)


def check_binding(name: str, uuid: str, known: BackupSet) -> None:
    """A chain belongs to a UUID; the name is a label (F-30). Raises RepositoryError."""
    for point in known.points:
        if point.uuid != uuid:
            raise RepositoryError(
                f"the set belongs to domain {point.domain} with UUID {point.uuid}, "
                f"not to {name} with UUID {uuid}: give another directory with -o"
            )


def check_host(where: Where, known: BackupSet) -> None:
    """A chain belongs to one host: another one may have the same UUIDs. Raises RepositoryError."""
    own = "" if where.is_here else metadata.host_item(where).digest
    for point in known.points:
        found = next((each.sha256 for each in point.files if each.role == metadata.HOST), "")
        if found != own:
            held = "another host, which was saved by ssh" if found else "a host by its own run"
            raise RepositoryError(
                f"the set holds point {point.id} of {held}, not of {where.name}: give another "
                f"directory with -o"
            )


def check_layout(request: BackupRequest, known: BackupSet, domain: Domain, *, is_off: bool) -> None:
    """A set holds images that QEMU writes, or what we do. Raises RepositoryError, DomainError."""
    is_push = request.layout is Layout.QCOW2
    held = {disk.layout is Layout.QCOW2 for point in known.points for disk in point.disks}
    if held - {is_push}:
        found, cure = ("with", "give that, too") if not is_push else ("without", "leave it out")
        raise RepositoryError(
            f"{request.directory} was begun {found} --push: {cure}, or another directory with -o"
        )
    if is_push and not domain.connection.where.is_here:
        raise NotSupportedError(
            f"domain {domain.name} runs on another host, whose QEMU can't write here: leave --push "
            f"out",
            domain=domain.name,
        )
    if is_push and is_off:
        raise NotSupportedError(
            f"domain {request.domain} is off, and only the QEMU of a running one writes images: "
            f"start it, or leave --push out",
            domain=request.domain,
        )


def check_undamaged(set_dir: SetDirectory, known: BackupSet, parent: RestorePoint) -> None:
    """Nothing may hang on what a verification has found damaged. Raises IntegrityError."""
    damage = verified.damage_of(set_dir.path, known, parent)
    if damage:
        raise IntegrityError(
            f"{set_dir.path} can't be continued, {damage}; begin a new set with another -o, or if "
            f"that has been repaired, let 'nbdbackupctl verify {set_dir.path}' note it"
        )


def _others(
    run: _Run, looked: Looked, records: Collection[Record], known: BackupSet, dead: Collection[str]
) -> tuple[OtherChain, ...]:
    """Other chains whose bitmaps the domain carries (L-1)."""
    carried = reconcile.carried(run.domain, looked)
    names = carried.union(checkpoints.names(run.domain)).difference(dead)
    check_name(run.domain.name, run.request.chain_name, known, names, records)
    return other_chains(
        run.domain.name,
        names,
        records,
        [point.chain for point in known.points],
        carried=carried,
        retired=run.request.retired,
    )


def _below_threshold(run: _Run, survey: Survey, parent: RestorePoint | None) -> str:
    """Why the run can be left out, or nothing: then it must go on."""
    threshold = run.request.settings.threshold
    if threshold is None or parent is None:
        return ""
    if any(not plan.delta for plan in survey.plans):
        return ""
    if foreign.why_other(run.domain, run.set_dir, parent):
        return ""
    try:
        sizes = changed_bytes(
            run.domain,
            run.set_dir,
            parent,
            survey,
            held=run.lease,
            runtime_dir=run.request.runtime_dir,
            cancelled=run.cancelled,
        )
    except CheckpointError:
        return ""
    if any(plan.target not in sizes for plan in survey.plans):
        return ""
    return below(threshold, sum(sizes[plan.target] for plan in survey.plans))


def below(threshold: int, amount: int) -> str:
    """Why a run that would save ``amount`` bytes can be left out, or nothing."""
    if amount >= threshold:
        return ""
    if not amount:
        return "nothing has changed since the newest point"
    return f"{amount} bytes changed, less than the threshold of {threshold}"
