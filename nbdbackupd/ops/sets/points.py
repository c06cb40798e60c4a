"""Which restore point a request means."""

from datetime import datetime

from nbdbackupd.errors import RepositoryError, UsageError
from nbdbackupd.model.chain import BackupSet, RestorePoint
from nbdbackupd.model.units import local_time


def choose(
    known: BackupSet, *, point: str = "", until: str = "", at: datetime | None = None
) -> RestorePoint:
    """Choose by id, by checkpoint or by time; without any of them, the newest point.

    ``point`` is an id or the beginning of one, ``until`` the checkpoint that the point made.
    ``at`` means the newest point that is not younger; a time without a zone is local.

    Raises UsageError if several are given, RepositoryError if there is no such point.
    """
    if sum((bool(point), bool(until), at is not None)) > 1:
        raise UsageError("only one of point, checkpoint and time can choose the restore point")
    if point:
        return known.by_id(point)
    if until:
        return _by_checkpoint(known, until)
    if at is not None:
        return _by_time(known, at)
    return known.newest


def _by_checkpoint(known: BackupSet, name: str) -> RestorePoint:
    for point in known.points:
        if point.checkpoint == name:
            return point
    made = ", ".join(point.checkpoint for point in known.points if point.checkpoint)
    raise RepositoryError(f"no restore point made checkpoint {name!r}, only: {made or 'none'}")


def _by_time(known: BackupSet, at: datetime) -> RestorePoint:
    """Times decide only among what the links have proven; they never order a chain."""
    moment = at.astimezone()
    born = [(datetime.fromisoformat(point.created), point) for point in known.points]
    due = [(created, point.sequence, point) for created, point in born if created <= moment]
    if not due:
        first = min((created for created, _ in born), default=None)
        oldest = local_time(first) if first is not None else "none"
        raise RepositoryError(
            f"no restore point is as old as {local_time(at)}; the oldest: {oldest}"
        )
    return max(due, key=lambda each: each[:2])[2]
