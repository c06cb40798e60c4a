"""``estimate``: what the next increment into a set would save, disk by disk."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdbackupd import durable, rundir
from nbdbackupd.errors import CheckpointError, RepositoryError
from nbdbackupd.model.chain import Level, RestorePoint
from nbdbackupd.model.domain import Domain as DomainModel
from nbdbackupd.model.selection import BY_REQUEST
from nbdbackupd.ops.backup import standalone
from nbdbackupd.ops.backup.sources import changed_bytes
from nbdbackupd.ops.domain import qemu as qemus
from nbdbackupd.ops.domain.images import ALONE, Sharing, images_of
from nbdbackupd.ops.domain.survey import DiskFilter, Survey, survey_domain
from nbdbackupd.plain import versioned
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.source import running
from nbdbackupd.source.lease import Lease
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateRequest:
    """Which domain, and the set that the increment would go to."""

    domain: str
    directory: Path
    runtime_dir: Path
    run_id: str
    sharing: Sharing = ALONE


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskEstimate:
    """Guest bytes that would be read of one disk.

    With a ``reason`` (or mode ``full``) the disk would be read whole: then ``bytes`` is its
    virtual size, the most that it can be, since holes are not saved.
    """

    target: str
    mode: str
    bytes: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateReport:
    """All disks of the next point; ``base`` is the point that it would start from, if any."""

    domain: str
    base: str
    disks: tuple[DiskEstimate, ...]

    @property
    def total(self) -> int:
        """The sum of all disks, in bytes."""
        return sum(disk.bytes for disk in self.disks)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return versioned(
            domain=self.domain,
            base=self.base,
            bytes=self.total,
            disks=[
                {
                    "target": disk.target,
                    "mode": disk.mode,
                    "bytes": disk.bytes,
                    "reason": disk.reason,
                }
                for disk in self.disks
            ],
        )


def run(
    request: EstimateRequest,
    connection: Connection,
    *,
    cancelled: Callable[[], None] = lambda: None,
) -> EstimateReport:
    """Ask what changed since the set's newest point; nothing is saved.

    A checkpoint that libvirt has lost is made known to it again, as the next backup would do. The
    images of a domain that is off are opened for it, and let go if somebody starts it. Raises
    BusyError if a run reads them just now, RepositoryError if the set belongs to another domain,
    and the errors of reading the set.
    """
    domain = Domain.find(connection, request.domain)
    set_dir = SetDirectory.open(request.directory)
    head = _head(set_dir, domain.name, domain.uuid)
    with ExitStack() as stack:
        lease = None
        if not domain.is_active():
            directory = rundir.make_domain_dir(request.runtime_dir, domain.uuid)
            lock = durable.Lock(directory / rundir.LOCK, owner=f"estimate of {domain.name}")
            stack.enter_context(lock)
            lease = stack.enter_context(
                images_of(domain, request.runtime_dir, request.run_id, cancelled, request.sharing)
            )
        survey = survey_domain(domain, _wish(domain.definition(), head), Level.INC, head)
        measuring = _Measuring(
            request=request, domain=domain, set_dir=set_dir, lease=lease, cancelled=cancelled
        )
        disks = _disks(measuring, head, survey)
    return EstimateReport(domain=domain.name, base=head.id if head is not None else "", disks=disks)


def run_of_qemu(request: EstimateRequest, path: Path) -> EstimateReport:
    """The same for a QEMU without libvirt, whose monitor is ``path``.

    Raises BusyError if another program, or a run, holds the monitor, RepositoryError.
    """
    with qemus.connect(path, request.domain) as qemu:
        head = _head(SetDirectory.open(request.directory), qemu.name, qemu.uuid)
        looked = qemus.look(qemu)
        wanted = _wish(looked.definition, head)
        found = standalone.survey(qemu, looked, wanted, Level.INC, head)
        disks = _told(found, head, standalone.changed(qemu, found, head))
    return EstimateReport(domain=qemu.name, base=head.id if head is not None else "", disks=disks)


def _head(set_dir: SetDirectory, name: str, uuid: str) -> RestorePoint | None:
    head = set_dir.load().head
    if head is not None and head.uuid != uuid:
        raise RepositoryError(f"the set belongs to domain {head.domain}, not to {name}")
    return head


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measuring:
    """What asking for changes needs; ``lease``: the domain is off."""

    request: EstimateRequest
    domain: Domain
    set_dir: SetDirectory
    lease: Lease | None
    cancelled: Callable[[], None]

    def changes(self, head: RestorePoint, survey: Survey) -> dict[str, int]:
        """The bytes that changed, by disk. Raises CheckpointError if nobody knows."""
        return changed_bytes(
            self.domain,
            self.set_dir,
            head,
            survey,
            held=self.lease,
            runtime_dir=self.request.runtime_dir,
            cancelled=self.cancelled,
        )


def _wish(definition: DomainModel, head: RestorePoint | None) -> DiskFilter:
    """Take the same disks as the last point did, and new ones."""
    if head is None:
        return DiskFilter()
    known = {disk.target for disk in definition.disks}
    return DiskFilter(
        exclude=tuple(
            skip.target
            for skip in head.skipped
            if skip.target in known and skip.reason in BY_REQUEST
        ),
        raw=any(disk.format == "raw" for disk in head.disks),
    )


def _disks(
    measuring: _Measuring, head: RestorePoint | None, survey: Survey
) -> tuple[DiskEstimate, ...]:
    sizes: dict[str, int] = {}
    lost = ""
    if head is not None and any(plan.delta for plan in survey.plans):
        try:
            sizes = measuring.changes(head, survey)
        except CheckpointError as err:
            lost = err.message
    return _told(survey, head, sizes, lost)


def _told(
    survey: Survey, head: RestorePoint | None, sizes: Mapping[str, int], lost: str = ""
) -> tuple[DiskEstimate, ...]:
    """``sizes`` are the bytes that changed, by disk; ``lost`` is why they are not known."""
    found = []
    for plan in survey.plans:
        if plan.delta and plan.target in sizes:
            found.append(DiskEstimate(target=plan.target, mode="delta", bytes=sizes[plan.target]))
            continue
        reason = plan.reason
        if plan.delta:
            reason = lost or running.unsound(head.checkpoint if head is not None else "")
        size = survey.states[plan.target].size
        found.append(DiskEstimate(target=plan.target, mode="full", bytes=size, reason=reason))
    return tuple(found)
