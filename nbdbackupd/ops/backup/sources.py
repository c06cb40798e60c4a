"""The source of a run: the domain's running QEMU, or its images while it is off."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from nbdbackupd import rundir
from nbdbackupd.errors import NbdbackupError, NotSupportedError, RepositoryError
from nbdbackupd.model.chain import Consistency, RestorePoint
from nbdbackupd.model.freeze_memory import FreezeMemory, after
from nbdbackupd.ops.backup.run import BackupRun
from nbdbackupd.ops.checkpoints import foreign
from nbdbackupd.ops.domain import domains
from nbdbackupd.ops.domain.survey import Survey
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.source import Snapshot, kept, offline, running
from nbdbackupd.source.lease import Lease
from nbdbackupd.source.offline import OfflineDisk, OfflineRequest
from nbdbackupd.virt.domain import Domain, Ending

log = logging.getLogger(__name__)


def open_source(
    run: BackupRun, on_trouble: Callable[[NbdbackupError], None]
) -> AbstractContextManager[Snapshot]:
    """The disks of the domain at one instant, as exports, for the body.

    ``on_trouble`` is told, from another thread, what ends the source in the middle. Raises the
    errors of the source when it is entered.
    """
    if run.lease is None:
        if run.request.by_nbdinfo and run.survey.definition.has_iothreads:
            raise NotSupportedError(
                f"domain {run.domain.name} has iothreads, and nbdinfo closes its connection first: "
                f"its QEMU might end by that; use '--extents own'",
                domain=run.domain.name,
            )
        return running.open_running(_running_request(run, on_trouble))
    return offline.open_offline(
        OfflineRequest(
            domain=run.domain,
            disks=_offline_disks(run.survey),
            socket=rundir.offline_socket(run.request.runtime_dir, run.domain.uuid),
            lease=run.lease,
            on_trouble=on_trouble,
            cancelled=run.cancelled,
            base_checkpoint=run.parent.checkpoint if run.parent is not None else "",
            new_checkpoint=run.checkpoint,
            created=int(run.request.now.timestamp()),
            ending=_ending(run),
        )
    )


def _ending(run: BackupRun) -> Ending:
    """How the guest ended, as libvirt's hook noted it: libvirt forgets it when it restarts."""
    known = kept.read(run.request.runtime_dir, run.domain.name)
    if known is not None and known.end is not None and known.uuid == run.domain.uuid:
        return known.end.ending
    return run.request.ending


def changed_bytes(
    domain: Domain,
    set_dir: SetDirectory,
    parent: RestorePoint,
    survey: Survey,
    *,
    held: Lease | None,
    runtime_dir: Path,
    cancelled: Callable[[], None],
) -> dict[str, int]:
    """The bytes that changed since ``parent``, for each disk whose changes are known.

    Raises CheckpointError if libvirt can't tell for any disk, and the errors of the source.
    """
    if held is None:
        targets = [plan.target for plan in survey.plans if plan.delta]
        stored = foreign.stored_xml(set_dir, parent)
        return running.changed_bytes(domain, parent.checkpoint, stored, targets)
    return offline.changed_bytes(
        OfflineRequest(
            domain=domain,
            disks=_offline_disks(survey),
            socket=rundir.offline_socket(runtime_dir, domain.uuid),
            lease=held,
            on_trouble=_ignore,
            cancelled=cancelled,
            base_checkpoint=parent.checkpoint,
        )
    )


def _ignore(_error: NbdbackupError) -> None:
    """Nothing is read that could be wrong."""


def _offline_disks(survey: Survey) -> tuple[OfflineDisk, ...]:
    return tuple(
        OfflineDisk(
            target=plan.target,
            layers=survey.states[plan.target].layers,
            delta=plan.delta,
            tracked=plan.tracked,
            bitmap_layers=plan.bitmap_layers,
        )
        for plan in survey.plans
    )


def _running_request(
    run: BackupRun, on_trouble: Callable[[NbdbackupError], None]
) -> running.RunningRequest:
    request, settings = run.request, run.request.settings
    memory = StateDirectory(settings.checkpoint_directory).freeze_memory(run.domain.uuid)
    current = domains.instance_of(run.domain)
    return running.RunningRequest(
        domain=run.domain,
        disks=tuple(
            running.RunningDisk(target=plan.target, delta=plan.delta, tracked=plan.tracked)
            for plan in run.survey.plans
        ),
        run_id=request.run_id,
        runtime_dir=rundir.socket_dir(request.runtime_dir, run.domain.uuid),
        scratch_dir=settings.scratch_directory,
        scratch_reserve=settings.scratch_reserve,
        on_trouble=on_trouble,
        base_checkpoint=run.parent.checkpoint if run.parent is not None else "",
        base_xml=foreign.stored_xml(run.set_dir, run.parent),
        new_checkpoint=run.checkpoint,
        freeze=settings.freeze_policy,
        was_frozen=any(point.consistency is Consistency.FILESYSTEM for point in run.known.points),
        freeze_obstacle=memory.obstacle(request.now, current) if memory is not None else "",
        on_freeze=lambda is_unanswered: _remember(
            run, memory, is_unanswered=is_unanswered, current=current
        ),
        freeze_mountpoints=tuple(map(str, settings.freeze_mountpoints)),
        at_rest=run.at_rest,
    )


def _remember(
    run: BackupRun, known: FreezeMemory | None, *, is_unanswered: bool, current: str
) -> None:
    """Note how the agent has answered a freeze; to be told again is better than no backup."""
    memory = after(known, run.request.now, is_unanswered=is_unanswered, instance=current)
    if memory == known:
        return
    try:
        StateDirectory(run.request.settings.checkpoint_directory).remember_freeze(
            run.domain.uuid, memory
        )
    except RepositoryError as err:
        log.info("domain %s: its freeze is not remembered: %s", run.domain.name, err)
