"""``merge`` and ``remove``: points leave a set because somebody says so, by the same rules."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nbdbackupd import durable
from nbdbackupd.errors import RepositoryError
from nbdbackupd.model.chain import BackupSet, RestorePoint
from nbdbackupd.model.choice import Choice
from nbdbackupd.model.removal import Removal, plan_removal
from nbdbackupd.ops.removal import apply, streams
from nbdbackupd.ops.removal.apply import Progress, RemovalReport, RemovalRequest
from nbdbackupd.ops.removal.live import live_sets
from nbdbackupd.ops.sets.sets import DomainSet, sets_of
from nbdbackupd.repo import protected
from nbdbackupd.units import human_size


@dataclass(frozen=True, kw_only=True, slots=True)
class HandRequest:
    """Which points of which set; ``wait`` is in seconds, for the locks."""

    path: Path
    points: tuple[str, ...]
    runtime_dir: Path
    now: datetime
    removal: RemovalRequest
    wait: float = 0.0


def merge(
    request: HandRequest, *, progress: Progress, cancelled: Callable[[], None]
) -> RemovalReport:
    """Make one full of the point and all that it hangs on.

    Raises RepositoryError if it hangs on nothing, no increment follows from it, or one of these
    must stay; and as ``apply.apply_removal``.
    """
    with apply.opened(
        request.path,
        request.runtime_dir,
        owner="merge of points of ",
        wait=_wait(request, cancelled),
    ) as (set_dir, known):
        point = Choice(point=request.points[0]).find(known)
        older = _ancestors(known, point)
        if not older:
            raise RepositoryError(
                f"restore point {point.id} hangs on no other, so there is nothing to merge into it"
            )
        if not point.makes_base:
            raise RepositoryError(
                f"restore point {point.id} is a {point.level} on which nothing hangs: merge into "
                f"an increment that made a checkpoint"
            )
        removal = plan_removal(known, older)
        _check_stays(request, removal)
        return apply.apply_removal(
            set_dir, known, removal, request.removal, progress=progress, cancelled=cancelled
        )


def remove(
    request: HandRequest, *, progress: Progress, cancelled: Callable[[], None]
) -> RemovalReport:
    """Remove points on which nothing hangs that stays.

    Raises RepositoryError for others, and says what they hold for whom; and as
    ``apply.apply_removal``.
    """
    with apply.opened(
        request.path, request.runtime_dir, owner="removal of points of ",
        wait=_wait(request, cancelled),
    ) as (set_dir, known):  # fmt: skip
        doomed = [Choice(point=each).find(known).id for each in request.points]
        removal = plan_removal(known, doomed, live=is_live(known, request.path, request.removal))
        _check_stays(request, removal)
        for each in removal.merges:
            size = human_size(streams.room(request.path, known, removal, cancelled))
            raise RepositoryError(
                f"restore point {each.absorbed[-1]} is needed by {each.into}: 'nbdbackupctl merge "
                f"--point {each.into}' makes one full of that and all before it; to keep what it "
                f"needs takes up to {size}"
            )
        return apply.apply_removal(
            set_dir, known, removal, request.removal, progress=progress, cancelled=cancelled
        )


def is_live(known: BackupSet, path: Path, request: RemovalRequest) -> bool:
    """Whether runs go on with a set: no other of its domain beside it has begun later.

    Or this host has noted that they do. Raises RepositoryError if the directory can't be read.
    """
    uuid = known.newest.uuid
    beside = [each for each in sets_of(path.parent) if each.uuid == uuid]
    if all(each.path.name != path.name for each in beside):
        beside = [DomainSet(path=path, known=known)]
    return path.name in {each.name for each in live_sets(beside, request.state_dirs)}


def _wait(request: HandRequest, cancelled: Callable[[], None]) -> durable.Wait:
    return durable.Wait(seconds=request.wait, cancelled=cancelled, option="--wait")


def _ancestors(known: BackupSet, point: RestorePoint) -> Collection[str]:
    by_id, found = {each.id: each for each in known.points}, []
    while point.parent:
        point = by_id[point.parent]
        found.append(point.id)
    return found


def _check_stays(request: HandRequest, removal: Removal) -> None:
    """Refuse what must stay. Raises RepositoryError."""
    for ident, reason in removal.needed.items():
        raise RepositoryError(f"restore point {ident} can't leave: {reason}")
    for ident, protection in protected.read(request.path, removal.gone).items():
        if protection.holds(request.now):
            raise RepositoryError(
                f"restore point {ident} is protected {protection.text}; 'nbdbackupctl unprotect' "
                f"comes first"
            )
