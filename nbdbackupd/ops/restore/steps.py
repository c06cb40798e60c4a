"""The points of one disk that a restore builds one on the other, oldest first."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nbdbackupd.errors import RepositoryError
from nbdbackupd.model.chain import BackupSet, RestorePoint
from nbdbackupd.model.choice import Choice
from nbdbackupd.ops.restore import output_names, sites
from nbdbackupd.ops.restore.request import Style
from nbdbackupd.ops.restore.sites import Site
from nbdbackupd.ops.sets.layers import Layer
from nbdbackupd.ops.sets.opened import OpenedSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A disk at one point: its layers, newest first.

    ``is_whole``: the point read it in full, or nothing older is restored; else ``layers[0]`` holds
    what changed since the step before. ``site``: the older image of a chain goes there.
    """

    point: str
    layers: tuple[Layer, ...]
    is_whole: bool
    site: Site | None = None


def steps_of(
    source: OpenedSet,
    point: RestorePoint,
    target: str,
    site: Site,
    *,
    style: Style,
    since: str,
    stack: ExitStack,
    check: Callable[[], None],
) -> tuple[Step, ...]:
    """The wanted point, and with other styles than plain those before it.

    ``stack`` owns the open files. Raises RepositoryError if ``since`` is not among them, and as
    ``OpenedSet.layers``.
    """
    if style is Style.PLAIN:
        layers = source.layers(point, target, stack, check, deep=True)
        return (Step(point=point.id, layers=layers, is_whole=True),)
    wanted = _line(source.known, point, target, since)
    steps: list[Step] = []
    while wanted:
        # a disk that was read in full within the chain starts anew there
        path = source.known.path(wanted[-1], target)
        layers = source.layers(wanted[-1], target, stack, check, deep=True)
        part = [
            Step(
                point=each.id,
                layers=layers[number:],
                is_whole=each is path[-1],
                site=_older(site, each) if style is Style.CHAIN and each is not point else None,
            )
            for number, each in enumerate(path)
            if each in wanted
        ]
        steps = [*reversed(part), *steps]
        wanted = wanted[: len(wanted) - len(part)]
    first = steps[0]
    return (
        Step(point=first.point, layers=first.layers, is_whole=True, site=first.site),
        *steps[1:],
    )


def _line(
    known: BackupSet, point: RestorePoint, target: str, since: str
) -> tuple[RestorePoint, ...]:
    """The points from ``since``, or the first one with the disk, to ``point``, by their links."""
    by_id = {each.id: each for each in known.points}
    line = [point]
    oldest = Choice(point=since).find(known) if since else None
    while line[-1] is not oldest:
        parent = by_id.get(line[-1].parent)
        if parent is None or all(disk.target != target for disk in parent.disks):
            break
        line.append(parent)
    if oldest is not None and line[-1] is not oldest:
        lacks = all(disk.target != target for disk in oldest.disks)
        why = f"does not hold disk {target}" if lacks else "is not one that it hangs on"
        raise RepositoryError(f"restore point {point.id} can't begin with {oldest.id}, which {why}")
    return tuple(reversed(line))


def _older(site: Site, point: RestorePoint) -> Site:
    """The image of an older point, beside that of the wanted one and named after both."""
    path: Path = site.final
    name = output_names.clean(f"{path.stem}.{point.id}{path.suffix}", path.suffix)
    return sites.ChainFile(path.with_name(name))
