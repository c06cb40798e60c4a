"""``protect`` and ``unprotect``: a note that keeps retention away from a point."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nbdbackupd import durable, events
from nbdbackupd import log as runlog
from nbdbackupd.errors import RepositoryError, UsageError
from nbdbackupd.format import manifest
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.model.choice import Choice
from nbdbackupd.ops.sets import opened
from nbdbackupd.repo import protected
from nbdbackupd.repo.protected import MAX_NOTE, Protection
from nbdbackupd.repo.set_directory import SetDirectory

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtectRequest:
    """Which point of which set; ``until`` None: for good. ``wait`` is in seconds, for the lock."""

    path: Path
    choice: Choice
    now: datetime
    until: datetime | None = None
    note: str = ""
    wait: float = 0.0


def protect(request: ProtectRequest) -> Protection:
    """Keep a point, whatever the rules say, in place of an earlier protection of it.

    Raises UsageError for a time that is over or a note that is too long, RepositoryError for a set
    that is not ours or has no such point, BusyError, NoSpaceError, FormatError.
    """
    if request.until is not None and request.until <= request.now:
        raise UsageError("--until is over already: give a time that is yet to come")
    if request.until is not None and not manifest.is_time(_utc(request.until)):
        raise UsageError("--until is too far away: leave it out, for good")
    if len(request.note) > MAX_NOTE or not request.note.isprintable():
        raise UsageError(f"--note takes one line of {MAX_NOTE} characters at most")
    with _held(request) as point:
        made = Protection(
            point=point.id,
            since=_utc(request.now),
            until=_utc(request.until) if request.until is not None else "",
            note=request.note,
        )
        protected.write(request.path, made)
        events.emit(log, events.POINT_PROTECTED, point=point.id, reason=made.text)
    return made


def unprotect(request: ProtectRequest) -> str:
    """Leave a point to the rules; its id. Raises as ``protect``, also if it is not protected."""
    with _held(request) as point:
        if not protected.remove(request.path, point.id):
            raise RepositoryError(f"restore point {point.id} is not protected")
        events.emit(log, events.POINT_UNPROTECTED, point=point.id)
    return point.id


@contextmanager
def _held(request: ProtectRequest) -> Iterator[RestorePoint]:
    """The point, of a set that is locked: nothing removes it meanwhile."""
    _point(request)
    wait = durable.Wait(seconds=request.wait, option="--wait")
    with SetDirectory.open(request.path).lock(owner="protection of a point", wait=wait):
        # before the lock it may have gone
        point = _point(request)
        with runlog.context(DOMAIN=point.domain, UUID=point.uuid, SET=request.path):
            yield point


def _point(request: ProtectRequest) -> RestorePoint:
    given, point = opened.open_point(request.path, request.choice)
    given.close()
    if given.written_by:
        raise RepositoryError(
            f"{given.written_by} wrote {request.path}, and nothing is ever removed from it; "
            f"'nbdbackupctl import' makes it a set of ours"
        )
    return point


def _utc(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
