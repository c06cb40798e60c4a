"""The source of a run: the domain's running QEMU, or its images while it is off."""

import logging
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nbdbackupd import durable, rundir
from nbdbackupd.errors import NbdbackupError, NotSupportedError, RepositoryError
from nbdbackupd.model.chain import Consistency, Layout, RestorePoint
from nbdbackupd.model.freeze_memory import FreezeMemory, after
from nbdbackupd.model.policy import FreezePolicy
from nbdbackupd.nbdio.client import Patience
from nbdbackupd.ops.backup import metadata
from nbdbackupd.ops.backup.run import BackupRun
from nbdbackupd.ops.checkpoints import foreign, origin, reconcile
from nbdbackupd.ops.domain import domains
from nbdbackupd.ops.domain.survey import Survey
from nbdbackupd.repo import layout
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.source import Snapshot, kept, offline, running
from nbdbackupd.source.lease import Lease
from nbdbackupd.source.offline import OfflineDisk, OfflineRequest
from nbdbackupd.source.quiesce import Quiet
from nbdbackupd.virt.domain import Domain, Ending

log = logging.getLogger(__name__)
PASSING: Final = 0o011
"""What QEMU's account needs of a directory to reach its image there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LibvirtDomain:
    """A domain of libvirt, see ``run.Subject``.

    ``lease``: the domain is off, and its images are ours to read until somebody starts it.
    ``at_rest``: it was started paused for this run; what its disks are while nobody resumes it.
    """

    domain: Domain
    lease: Lease | None = None
    at_rest: Consistency | None = None

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.domain.name

    @property
    def uuid(self) -> str:
        """The domain's UUID."""
        return self.domain.uuid

    def open(
        self, run: BackupRun, on_trouble: Callable[[NbdbackupError], None]
    ) -> AbstractContextManager[Snapshot]:
        """Its QEMU's job, or a server that reads its images."""
        if self.lease is None and run.request.layout is Layout.QCOW2:
            return self._open_push(run, on_trouble)
        if self.lease is None:
            return running.open_running(self._running_request(run, on_trouble))
        return offline.open_offline(
            OfflineRequest(
                domain=self.domain,
                disks=_offline_disks(run.survey),
                socket=rundir.offline_socket(run.request.runtime_dir, self.uuid),
                lease=self.lease,
                on_trouble=on_trouble,
                cancelled=run.cancelled,
                base_checkpoint=run.parent.checkpoint if run.parent is not None else "",
                new_checkpoint=run.checkpoint,
                created=int(run.request.now.timestamp()),
                ending=self._ending(run),
            )
        )

    @contextmanager
    def _open_push(
        self, run: BackupRun, on_trouble: Callable[[NbdbackupError], None]
    ) -> Iterator[Snapshot]:
        """Its QEMU writes images into the draft, where its account can't do anything else."""
        request, parent = self._running_request(run, on_trouble), run.parent
        demoted = self._swapped(run, request)
        disks = tuple(
            replace(disk, delta=True, backing=parent.disk(disk.target).file)
            if parent is not None and disk.delta and disk.target not in demoted
            else replace(disk, delta=False)
            for disk in request.disks
        )
        place = run.set_dir.path / layout.draft(run.request.run_id)
        for each in (run.set_dir.path, place):
            with durable.translate_os_errors("let QEMU into", each):
                durable.set_mode(each, stat.S_IMODE(each.stat().st_mode) | PASSING)
        request = replace(request, disks=disks, scratch_dir=place, scratch_reserve=0, is_push=True)
        with running.open_running(request) as snapshot:
            yield replace(snapshot, demoted={**snapshot.demoted, **demoted})

    def _swapped(self, run: BackupRun, request: running.RunningRequest) -> dict[str, str]:
        """Why changes of disks can't be relied on, see ``origin``.

        A push job offers nothing to look at, so a short pull job comes before it. While QEMU runs
        no image is put in the place of another.
        """
        parent = run.parent
        if parent is None:
            return {}
        doubtful = tuple(
            disk for disk in request.disks if disk.delta and origin.candidates(parent, disk.target)
        )
        if not doubtful:
            return {}
        request = replace(request, disks=doubtful, new_checkpoint="", freeze=FreezePolicy.NEVER)
        patience = Patience(run.request.settings.limits_timeout, run.cancelled)
        with running.open_running(request) as snapshot:
            proven = origin.prove(snapshot, run.set_dir.path, run.known, parent, patience)
        return dict(proven.demoted)

    def prove(self, run: BackupRun, parent: RestorePoint, snapshot: Snapshot) -> Snapshot:
        """Another program's checkpoint may be of another chain."""
        return foreign.prove(snapshot, self.domain, run.set_dir, parent)

    def collect(self, run: BackupRun) -> metadata.Collected:
        """What libvirt tells, and files of this host."""
        return metadata.collect(self.domain, run.survey.definition)

    def drop_failed(self, run: BackupRun) -> bool:
        """By libvirt, or in the images."""
        erase = reconcile.eraser(self.lease) if self.lease is not None else None
        return reconcile.drop_failed(self.domain, run.checkpoint, run.survey.states, erase)

    def _ending(self, run: BackupRun) -> Ending:
        """How the guest ended, as libvirt's hook noted it: libvirt forgets it when it restarts."""
        known = kept.read(run.request.runtime_dir, self.name)
        if known is not None and known.end is not None and known.uuid == self.uuid:
            return known.end.ending
        return run.request.ending

    def _running_request(
        self, run: BackupRun, on_trouble: Callable[[NbdbackupError], None]
    ) -> running.RunningRequest:
        if run.request.by_nbdinfo and run.survey.definition.has_iothreads:
            raise NotSupportedError(
                f"domain {self.name} has iothreads, and nbdinfo closes its connection first: "
                f"its QEMU might end by that; use '--extents own'",
                domain=self.name,
            )
        request, settings = run.request, run.request.settings
        directory = rundir.socket_dir(request.runtime_dir, self.domain.uuid)
        quiet = quiet_of(run, running.marker(directory), domains.instance_of(self.domain))
        return running.RunningRequest(
            domain=self.domain,
            disks=tuple(
                running.RunningDisk(target=plan.target, delta=plan.delta, tracked=plan.tracked)
                for plan in run.survey.plans
            ),
            run_id=request.run_id,
            runtime_dir=directory,
            scratch_dir=settings.scratch_directory,
            scratch_reserve=settings.scratch_reserve,
            on_trouble=on_trouble,
            base_checkpoint=run.parent.checkpoint if run.parent is not None else "",
            base_xml=foreign.stored_xml(run.set_dir, run.parent),
            new_checkpoint=run.checkpoint,
            freeze=quiet.freeze,
            was_frozen=quiet.was_frozen,
            freeze_obstacle=quiet.obstacle,
            on_freeze=quiet.on_freeze,
            freeze_mountpoints=quiet.mountpoints,
            at_rest=self.at_rest,
        )


def quiet_of(run: BackupRun, marker: Path, current: str) -> Quiet:
    """How the guest, which runs as instance ``current``, is to be held."""
    request, settings = run.request, run.request.settings
    memory = StateDirectory(settings.checkpoint_directory).freeze_memory(run.subject.uuid)
    return Quiet(
        marker=marker,
        run_id=request.run_id,
        freeze=settings.freeze_policy,
        was_frozen=any(point.consistency is Consistency.FILESYSTEM for point in run.known.points),
        obstacle=memory.obstacle(request.now, current) if memory is not None else "",
        on_freeze=lambda is_unanswered: _remember(
            run, memory, is_unanswered=is_unanswered, current=current
        ),
        mountpoints=tuple(map(str, settings.freeze_mountpoints)),
    )


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


def _remember(
    run: BackupRun, known: FreezeMemory | None, *, is_unanswered: bool, current: str
) -> None:
    """Note how the agent has answered a freeze; to be told again is better than no backup."""
    memory = after(known, run.request.now, is_unanswered=is_unanswered, instance=current)
    if memory == known:
        return
    try:
        StateDirectory(run.request.settings.checkpoint_directory).remember_freeze(
            run.subject.uuid, memory
        )
    except RepositoryError as err:
        log.info("domain %s: its freeze is not remembered: %s", run.subject.name, err)
