"""``backup``: one run that saves one domain into one set.

Life of a run: locks, sweep up after dead runs, read the chain, decide the level, look at disks
and images, draft, snapshot (freeze, begin, thaw), copy each disk, end the job, publish. Only the
published manifest makes the new checkpoint the base of the next run; on every other way out the
draft and the new checkpoint go away and the old base stays what it was.
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from nbdbackupd import durable
from nbdbackupd import log as runlog
from nbdbackupd.errors import CheckpointError, NotSupportedError, RepositoryError
from nbdbackupd.model.chain import BackupSet, Level, RestorePoint, effective_level
from nbdbackupd.ops import leftovers, recording
from nbdbackupd.ops.backup_job import Job
from nbdbackupd.ops.backup_request import BackupReport, BackupRequest
from nbdbackupd.ops.survey import Survey, Wish, survey_domain
from nbdbackupd.repo.repository import Repository
from nbdbackupd.source import running
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int, int], None]
Cancelled = Callable[[], None]


def run(
    request: BackupRequest, connection: Connection, *, progress: Progress, cancelled: Cancelled
) -> BackupReport:
    """Save the domain; the report holds the published point.

    ``progress`` gets disk, guest position reached, disk size and data bytes so far.

    Raises BusyError if set or domain are locked, and the errors of all layers; whatever is
    raised, nothing of this run is left and the old base is valid.
    """
    begun = time.monotonic()
    domain = Domain.find(connection, request.domain)
    with ExitStack() as stack:
        directory = leftovers.prepare_domain_dir(request.runtime_dir, domain.uuid)
        who = f"backup of {domain.name}"
        wait = request.wait_seconds
        stack.enter_context(
            durable.Lock(
                directory / leftovers.LOCK, owner=who, wait_seconds=wait, cancelled=cancelled
            )
        )
        repository = Repository.open(request.directory)
        repository.check_can_begin()
        stack.enter_context(repository.lock(owner=who, wait_seconds=wait, cancelled=cancelled))
        stack.enter_context(runlog.run_log(repository.log_path(request.run_id)))
        log.info("backup of %s (%s), level %s", domain.name, domain.uuid, request.level)
        try:
            report = _run_locked(request, domain, repository, progress, cancelled)
        except BaseException as err:
            log.info("run %s failed: %s", request.run_id, err)
            raise
        log.info("run %s done", request.run_id)
    return replace(report, seconds=time.monotonic() - begun)


def _run_locked(
    request: BackupRequest,
    domain: Domain,
    repository: Repository,
    progress: Progress,
    cancelled: Cancelled,
) -> BackupReport:
    """The run proper, with both locks held."""
    leftovers.sweep(domain, repository, request.runtime_dir, request.scratch_dir)
    known = repository.load()
    _check_binding(domain, known)
    leftovers.reclaim(domain, known)
    level = effective_level(request.level, known)
    if not domain.is_active():
        raise NotSupportedError(
            f"domain {domain.name} is not running: start it, its disks can't be read otherwise"
        )
    parent = known.head if level in (Level.INC, Level.DIFF) else None
    if parent is not None:
        repository.check_present(known.points)
    wish = Wish(include=request.include, exclude=request.exclude, raw=request.raw)
    survey = survey_domain(domain, wish, level, parent)
    cancelled()
    small = _below_threshold(request, domain, repository, survey, parent)
    if small:
        log.info("nothing saved: %s", small)
        return BackupReport(point=None, skipped=small)
    point, seconds = recording.record(
        Job(
            request=request, domain=domain, repository=repository, survey=survey, level=level,
            known=known, parent=parent, progress=progress, cancelled=cancelled,
        )
    )  # fmt: skip
    if parent is not None and point.checkpoint:
        leftovers.drop_checkpoint(domain, parent.checkpoint)
    return BackupReport(point=point, disk_seconds=seconds)


def _check_binding(domain: Domain, known: BackupSet) -> None:
    """A chain belongs to a UUID; the name is a label (F-30)."""
    for point in known.points:
        if point.uuid != domain.uuid:
            raise RepositoryError(
                f"the set belongs to domain {point.domain} with UUID {point.uuid}, "
                f"not to {domain.name} with UUID {domain.uuid}: give another directory with -o"
            )


def _below_threshold(
    request: BackupRequest,
    domain: Domain,
    repository: Repository,
    survey: Survey,
    parent: RestorePoint | None,
) -> str:
    """Why the run can be left out, or nothing: then it must go on."""
    if request.threshold is None or parent is None:
        return ""
    if any(not plan.delta for plan in survey.plans):
        return ""
    stored = repository.checkpoint_xml(parent)
    targets = [plan.target for plan in survey.plans]
    try:
        sizes = running.changed_bytes(domain, parent.checkpoint, stored, targets)
    except CheckpointError:
        return ""
    if any(plan.target not in sizes for plan in survey.plans):
        return ""
    amount = sum(sizes[plan.target] for plan in survey.plans)
    if amount >= request.threshold:
        return ""
    return f"{amount} bytes changed, less than the threshold of {request.threshold}"
