"""How points leave a set: which go as they are, which are merged into a newer one, which stay.

A point on which nothing that stays hangs is dropped. One on which a single increment hangs is
merged into that: what it holds and the increment does not is kept there. All else stays, with the
reason.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from nbdbackupd.errors import RepositoryError
from nbdbackupd.model.chain import BackupSet, DiskMode, Layout, RestorePoint


@dataclass(frozen=True, slots=True)
class Merge:
    """The points of ids ``absorbed``, oldest first, become a part of their descendant ``into``."""

    into: str
    absorbed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Removal:
    """What removing some points of a set means; every doomed id is in one of the three.

    ``dropped`` go as they are, ``merges`` are oldest first, ``needed`` says why a point stays.
    """

    dropped: tuple[str, ...]
    merges: tuple[Merge, ...]
    needed: Mapping[str, str]

    @property
    def gone(self) -> frozenset[str]:
        """The ids that the set does not hold afterwards."""
        return frozenset(self.dropped).union(*(each.absorbed for each in self.merges))


def plan_removal(
    known: BackupSet,
    doomed: Collection[str],
    *,
    live: bool = True,
    damaged: Collection[str] = (),
) -> Removal:
    """What becomes of the points with the ids ``doomed``.

    ``live``: runs go on with the set, so the base of its next increment stays. ``damaged``: files
    of these are known to be, so nothing is merged with them. Raises RepositoryError if the set
    holds no such point.
    """
    by_id = {point.id: point for point in known.points}
    doomed = frozenset(doomed)
    if unknown := sorted(doomed - set(by_id)):
        raise RepositoryError(f"the set holds no restore point {unknown[0]}")
    children: dict[str, list[RestorePoint]] = {}
    dropped, needed = [], {}
    absorbed: dict[str, list[str]] = {}
    into: dict[str, str] = {}
    head = known.head if live else None
    # children come before their parents: what becomes of them decides
    for point in reversed(known.points):
        hanging = children.get(point.id, [])
        if point.id in doomed:
            if reason := _reason(point, hanging, head, damaged):
                needed[point.id] = reason
            elif not hanging:
                dropped.append(point.id)
                continue
            else:
                end = into[point.id] = into.get(hanging[0].id, hanging[0].id)
                absorbed.setdefault(end, []).append(point.id)
        if point.parent:
            children.setdefault(point.parent, []).append(point)
    merges = tuple(
        Merge(each.id, tuple(reversed(absorbed[each.id])))
        for each in known.points
        if each.id in absorbed
    )
    return Removal(tuple(reversed(dropped)), merges, needed)


def _reason(
    point: RestorePoint,
    hanging: list[RestorePoint],
    head: RestorePoint | None,
    damaged: Collection[str],
) -> str:
    """Why a point can't leave, or nothing; ``head`` is the base of what is to come."""
    if head is not None and head.id == point.id:
        return "the next increment starts from it"
    if len(hanging) > 1 or any(not child.makes_base for child in hanging):
        return f"needed by {', '.join(sorted(child.id for child in hanging))}"
    if hanging and point.id in damaged:
        return f"damaged, and needed by {hanging[0].id}"
    if hanging and hanging[0].id in damaged:
        return f"needed by {hanging[0].id}, which is damaged"
    if hanging and any(disk.layout is Layout.QCOW2 for disk in point.disks):
        return f"needed by {hanging[0].id}: images that QEMU wrote are not merged"
    return ""


@dataclass(frozen=True, slots=True)
class DiskMerge:
    """How one disk of the point that stays is made: from ``sources``, newest first.

    ``mode`` is what it is then: whole, if the oldest source is.
    """

    target: str
    sources: tuple[RestorePoint, ...]
    mode: DiskMode


def disk_merges(known: BackupSet, merge: Merge) -> tuple[DiskMerge, ...]:
    """The disks for which a merge makes a new stream; one that was read in full needs none.

    Raises ChainBrokenError if a point lacks a disk of which a newer one holds changes.
    """
    points = {each.id: each for each in known.points}
    newest, found = points[merge.into], []
    for disk in newest.disks:
        if disk.mode is DiskMode.FULL:
            continue
        path = known.path(newest, disk.target)
        sources = tuple(each for each in path if each.id in {merge.into, *merge.absorbed})
        found.append(DiskMerge(disk.target, sources, sources[-1].disk(disk.target).mode))
    return tuple(found)
