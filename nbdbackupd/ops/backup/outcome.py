"""How a backup ends, told as an event: to the run's log while that is open, else without it."""

import logging

from nbdbackupd import events
from nbdbackupd.errors import BusyError, GaveWayError
from nbdbackupd.events import Event, emit, usec
from nbdbackupd.model.space import disk_bytes
from nbdbackupd.ops.backup.request import BackupReport


def event_of(err: BaseException) -> Event:
    """What a backup that ends this way is to be called."""
    if isinstance(err, GaveWayError):
        return events.BACKUP_GAVE_WAY
    return events.BACKUP_BUSY if isinstance(err, BusyError) else events.BACKUP_FAILED


def tell(log: logging.Logger, report: BackupReport) -> None:
    """Tell how a backup has succeeded."""
    point = report.point
    if point is None:
        emit(log, events.BACKUP_SKIPPED, reason=report.skipped)
        return
    told = {
        "point": point.id,
        "level": point.level,
        "checkpoint": point.checkpoint,
        "bytes": sum(disk_bytes(disk) for disk in point.disks),
        "duration_usec": usec(report.seconds),
    }
    if point.warnings:
        emit(log, events.BACKUP_WARNED, **told, reason="; ".join(point.warnings))
    else:
        emit(log, events.BACKUP_COMMITTED, **told)
