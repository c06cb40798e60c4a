"""Which restore point is meant: by id, by checkpoint, by time, or the newest."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from nbdbackupd.errors import RepositoryError, UsageError
from nbdbackupd.model.chain import BackupSet, RestorePoint
from nbdbackupd.units import local_time

LATEST: Final = "latest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A wish for one point; without any, the newest is meant.

    ``point`` is an id, the beginning of one, or ``latest``; ``until`` the checkpoint that the
    point made. ``at`` means the newest point that is not younger; a time without a zone is local.
    """

    point: str = ""
    until: str = ""
    at: datetime | None = None

    @property
    def is_named(self) -> bool:
        """Whether the point has a name by which it can be told in a damaged set, too."""
        return self.point not in ("", LATEST) or bool(self.until)

    def find(self, *sets: BackupSet) -> RestorePoint:
        """The point, of several sets in the one that was given last of those that have it.

        Raises UsageError if the wishes are several, RepositoryError if there is no such point, or
        more than one whose id begins so.
        """
        if sum((bool(self.point), bool(self.until), self.at is not None)) > 1:
            raise UsageError("only one of point, checkpoint and time can choose the restore point")
        found, why = [point for known in sets for point in known.points], "no restore point"
        if self.point not in ("", LATEST):
            why = f"no restore point with id {self.point!r}"
            found = self._by_id(found)
        elif self.until:
            why = f"no restore point made checkpoint {self.until!r}"
            found = [point for point in found if point.checkpoint == self.until]
        elif self.at is not None:
            why = f"no restore point is as old as {local_time(self.at)}"
            found = _due(self.at.astimezone(), sets)
        if not found:
            raise RepositoryError(f"{why}; 'nbdbackupctl list' shows what there is")
        return found[-1]

    def _by_id(self, points: list[RestorePoint]) -> list[RestorePoint]:
        exact = [point for point in points if point.id == self.point]
        found = exact or [point for point in points if point.id.startswith(self.point)]
        if not exact and len(found) > 1:
            raise RepositoryError(
                f"more than one restore point with id {self.point!r}; "
                f"'nbdbackupctl list' shows them"
            )
        return found


NEWEST: Final = Choice()


def _due(moment: datetime, sets: tuple[BackupSet, ...]) -> list[RestorePoint]:
    """Times decide only among what the links have proven; they never order a chain."""
    for known in reversed(sets):
        born = [(datetime.fromisoformat(point.created), point) for point in known.points]
        if due := [each for each in born if each[0] <= moment]:
            return [point for _, point in sorted(due, key=lambda each: each[0])]
    return []
