"""What a backup run has decided before it makes its point."""

from collections.abc import Callable
from dataclasses import dataclass

from nbdbackupd.model.chain import BackupSet, Consistency, Level, RestorePoint
from nbdbackupd.model.naming import checkpoint_prefix
from nbdbackupd.ops.backup.request import BackupRequest
from nbdbackupd.ops.domain.survey import Survey
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.source.lease import Lease
from nbdbackupd.virt.domain import Domain


@dataclass(frozen=True, kw_only=True, slots=True)
class BackupRun:
    """All that is decided before the point is made.

    ``lease``: the domain is off, and its images are ours to read until somebody starts it.
    ``at_rest``: it was started paused for this run; what its disks are while nobody resumes it.
    ``warnings``: what the point is to warn of, as known so far.
    """

    request: BackupRequest
    domain: Domain
    set_dir: SetDirectory
    survey: Survey
    level: Level
    known: BackupSet
    parent: RestorePoint | None
    progress: Callable[[str, int, int, int], None]
    cancelled: Callable[[], None]
    lease: Lease | None = None
    at_rest: Consistency | None = None
    warnings: tuple[str, ...] = ()

    @property
    def point_id(self) -> str:
        """One run makes one point: they share their id."""
        return self.request.run_id

    @property
    def chain(self) -> str:
        """The chain's id: that of the full that began it, or of a copy that stands alone."""
        full = self.known.full
        return full.chain if full is not None else self.request.run_id

    @property
    def checkpoint(self) -> str:
        """The name of the point's checkpoint, unlike any other; empty if it makes none."""
        tracked = any(plan.tracked for plan in self.survey.plans)
        if self.level not in (Level.FULL, Level.INC) or not tracked:
            return ""
        return checkpoint_prefix(self.chain) + self.point_id
