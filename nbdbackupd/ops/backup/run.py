"""What a backup run has decided before it makes its point."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from nbdbackupd.errors import NbdbackupError
from nbdbackupd.model.chain import BackupSet, Level, RestorePoint
from nbdbackupd.model.naming import checkpoint_prefix, named_chain
from nbdbackupd.ops.backup.metadata import Collected
from nbdbackupd.ops.backup.request import BackupRequest
from nbdbackupd.ops.domain.survey import Survey
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.source import Snapshot


class Subject(Protocol):
    """What is saved: a domain of libvirt (``sources.py``) or a QEMU without it (``standalone.py``).

    It opens the source, and owns what a run leaves in QEMU or the images until its point exists.
    """

    @property
    def name(self) -> str:
        """Its name, a label."""

    @property
    def uuid(self) -> str:
        """What tells it from others."""

    def open(
        self, run: "BackupRun", on_trouble: Callable[[NbdbackupError], None]
    ) -> AbstractContextManager[Snapshot]:
        """Its disks at one instant, as exports, for the body.

        ``on_trouble`` is told, from another thread, what ends the source in the middle. Raises the
        errors of the source when it is entered.
        """

    def prove(self, run: "BackupRun", parent: RestorePoint, snapshot: Snapshot) -> Snapshot:
        """The snapshot without changes whose base may not be the one that the set knows."""

    def collect(self, run: "BackupRun") -> Collected:
        """What belongs to it beside the disks. Raises DomainError."""

    def drop_failed(self, run: "BackupRun") -> bool:
        """Remove the checkpoint of a run that made no point; False if it stays for the next one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackupRun:
    """All that is decided before the point is made.

    ``warnings``: what the point is to warn of, as known so far.
    """

    request: BackupRequest
    subject: Subject
    set_dir: SetDirectory
    survey: Survey
    level: Level
    known: BackupSet
    parent: RestorePoint | None
    progress: Callable[[str, int, int, int], None]
    cancelled: Callable[[], None]
    warnings: tuple[str, ...] = ()

    @property
    def point_id(self) -> str:
        """One run makes one point: they share their id."""
        return self.request.run_id

    @property
    def chain(self) -> str:
        """The chain's id: that of the full that began it, or of a copy that stands alone."""
        full, request = self.known.full, self.request
        if full is not None:
            return full.chain
        return named_chain(request.run_id, request.chain_name)

    @property
    def checkpoint(self) -> str:
        """The name of the point's checkpoint, unlike any other; empty if it makes none."""
        tracked = any(plan.tracked for plan in self.survey.plans)
        if self.level not in (Level.FULL, Level.INC) or not tracked:
            return ""
        return checkpoint_prefix(self.chain) + self.point_id
