"""``estimate``: what the next increment into a set would save, disk by disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdbackupd.errors import CheckpointError, NotSupportedError, RepositoryError
from nbdbackupd.model.chain import Level, RestorePoint
from nbdbackupd.model.selection import BY_REQUEST
from nbdbackupd.ops.survey import Survey, Wish, survey_domain
from nbdbackupd.repo.repository import Repository
from nbdbackupd.source import running
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateRequest:
    """Which domain, and the set that the increment would go to."""

    domain: str
    directory: Path


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
        return {
            "version": 1,
            "domain": self.domain,
            "base": self.base,
            "bytes": self.total,
            "disks": [
                {
                    "target": disk.target,
                    "mode": disk.mode,
                    "bytes": disk.bytes,
                    "reason": disk.reason,
                }
                for disk in self.disks
            ],
        }


def run(request: EstimateRequest, connection: Connection) -> EstimateReport:
    """Ask libvirt what changed since the set's newest point; nothing is saved.

    A checkpoint that libvirt has lost is made known to it again, as the next backup would do.
    Raises NotSupportedError if the domain does not run, RepositoryError if the set belongs to
    another domain, and the errors of reading the set.
    """
    domain = Domain.find(connection, request.domain)
    if not domain.is_active():
        raise NotSupportedError(
            f"domain {domain.name} is not running: libvirt tells no changes then",
            domain=domain.name,
        )
    repository = Repository.open(request.directory)
    head = repository.load().head
    if head is not None and head.uuid != domain.uuid:
        raise RepositoryError(f"the set belongs to domain {head.domain}, not to {domain.name}")
    survey = survey_domain(domain, _wish(domain, head), Level.INC, head)
    return EstimateReport(
        domain=domain.name,
        base=head.id if head is not None else "",
        disks=_disks(domain, repository, head, survey),
    )


def _wish(domain: Domain, head: RestorePoint | None) -> Wish:
    """Take the same disks as the last point did, and new ones."""
    if head is None:
        return Wish()
    known = {disk.target for disk in domain.definition().disks}
    return Wish(
        exclude=tuple(
            skip.target
            for skip in head.skipped
            if skip.target in known and skip.reason in BY_REQUEST
        ),
        raw=any(disk.format == "raw" for disk in head.disks),
    )


def _disks(
    domain: Domain, repository: Repository, head: RestorePoint | None, survey: Survey
) -> tuple[DiskEstimate, ...]:
    sizes: dict[str, int] = {}
    lost = ""
    wanted = [plan.target for plan in survey.plans if plan.delta]
    if head is not None and wanted:
        try:
            sizes = running.changed_bytes(
                domain, head.checkpoint, repository.checkpoint_xml(head), wanted
            )
        except CheckpointError as err:
            lost = err.message
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
