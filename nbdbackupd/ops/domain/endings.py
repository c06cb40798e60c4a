"""How runs end, told as events: to the run's log while that is open, else without it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nbdbackupd import events
from nbdbackupd.errors import BusyError, GaveWayError
from nbdbackupd.events import Event, emit, usec
from nbdbackupd.ops.sets import catalog

if TYPE_CHECKING:
    import logging

    from nbdbackupd.ops.backup.request import BackupReport
    from nbdbackupd.ops.restore.request import RestoreReport
    from nbdbackupd.ops.verify.request import VerifyReport


class Ending:
    """Tells of a run's failure once, however many contexts are left because of it."""

    def __init__(self, log: "logging.Logger", event_of: Callable[[BaseException], Event]) -> None:
        self._log = log
        self._event_of = event_of
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run has lasted."""
        return time.monotonic() - self._begun

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell of what ends the block early, unless one within has done so; it is raised on."""
        try:
            yield
        except BaseException as err:
            if not events.is_told(err):
                events.mark_told(err)
                reason = " ".join(str(err).split()) or type(err).__name__
                event = self._event_of(err)
                emit(self._log, event, reason=reason, duration_usec=usec(self.seconds))
            raise


def backup_ending(err: BaseException) -> Event:
    """What a backup that ends this way is to be called."""
    if isinstance(err, GaveWayError):
        return events.BACKUP_GAVE_WAY
    return events.BACKUP_BUSY if isinstance(err, BusyError) else events.BACKUP_FAILED


def restore_ending(_err: BaseException) -> Event:
    """What a restore that ends this way is to be called."""
    return events.RESTORE_FAILED


def backup(log: "logging.Logger", report: "BackupReport") -> None:
    """Tell how a backup has succeeded."""
    point = report.point
    if point is None:
        emit(log, events.BACKUP_SKIPPED, reason=report.skipped)
        return
    told = {
        "point": point.id,
        "level": point.level,
        "checkpoint": point.checkpoint,
        "bytes": sum(catalog.disk_bytes(disk) for disk in point.disks),
        "duration_usec": usec(report.seconds),
    }
    if point.warnings:
        emit(log, events.BACKUP_WARNED, **told, reason="; ".join(point.warnings))
    else:
        emit(log, events.BACKUP_COMMITTED, **told)


def restored(log: "logging.Logger", report: "RestoreReport") -> None:
    """Tell of a restore that has succeeded."""
    emit(
        log, events.RESTORE_DONE, point=report.point, duration_usec=usec(report.seconds),
        bytes=sum(disk.data_bytes for disk in report.disks),
    )  # fmt: skip


def verified(log: "logging.Logger", report: "VerifyReport") -> None:
    """Tell what a verification has found."""
    size, duration = report.checked_bytes, usec(report.seconds)
    if not report.problems:
        emit(log, events.VERIFY_SOUND, bytes=size, duration_usec=duration)
        return
    first, more = report.problems[0].text, len(report.problems) - 1
    reason = " ".join(first.split()) + (f", and {more} more" if more else "")
    emit(log, events.VERIFY_DAMAGED, reason=reason, bytes=size, duration_usec=duration)
