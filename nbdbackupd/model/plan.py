"""How each disk of a new point is to be read: whole, or from its parent's bitmap on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbdbackupd.model.chain import DiskPoint, ImageLayer, Level, RestorePoint
from nbdbackupd.model.domain import lost_bitmap_layer, same_image
from nbdbackupd.model.selection import BY_REQUEST, How, Selection


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskState:
    """A disk as it is now: virtual size in bytes, serial, its images top first.

    ``bitmaps`` are the names of the bitmaps stored in each image, by path; those of the top image
    live in QEMU's memory while the domain runs and are not looked at.
    """

    size: int
    serial: str = ""
    layers: tuple[ImageLayer, ...] = ()
    bitmaps: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskPlan:
    """One disk of the point; ``reason`` says why it is read in full though a delta was wanted.

    ``tracked`` disks get a bitmap with the point's checkpoint. A disk that can't be tracked is
    always read in full, which is no demotion and has no reason.
    """

    target: str
    delta: bool
    tracked: bool
    reason: str = ""


def plan_disks(
    selection: Selection,
    level: Level,
    parent: RestorePoint | None,
    states: Mapping[str, DiskState],
) -> tuple[DiskPlan, ...]:
    """Decide for each chosen disk; ``parent`` is the point that a delta would start from."""
    plans = []
    for chosen in selection.chosen:
        tracked = chosen.how is How.BITMAP
        reason = ""
        delta = tracked and level in (Level.INC, Level.DIFF)
        if delta:
            reason = _why_full(chosen.target, parent, states.get(chosen.target))
        plans.append(
            DiskPlan(
                target=chosen.target, delta=delta and not reason, tracked=tracked, reason=reason
            )
        )
    return tuple(plans)


def _why_full(target: str, parent: RestorePoint | None, state: DiskState | None) -> str:
    """Why the parent's bitmap can't be used for this disk, or nothing."""
    if parent is None:
        return "there is no point to start from"
    known = next((disk for disk in parent.disks if disk.target == target), None)
    if known is None:
        return f"the disk is not part of restore point {parent.id}"
    if not known.bitmap:
        return f"its changes have not been tracked since restore point {parent.id}"
    if state is None:
        return "its image could not be examined"
    return _why_other(known, state)


def _why_other(known: DiskPoint, state: DiskState) -> str:
    if state.size != known.size:
        return f"its size changed from {known.size} to {state.size} bytes"
    if not same_image(known.layers, state.layers):
        now = state.layers[0].path if state.layers else "(none)"
        return f"it is another image than in the last point: was {known.source}, is {now}"
    broken = lost_bitmap_layer(known.layers, state.layers, state.bitmaps, known.bitmap)
    if broken:
        return f"image {broken} of its backing chain has lost bitmap {known.bitmap}"
    return ""


def lost_disks(parent: RestorePoint | None, selection: Selection) -> tuple[str, ...]:
    """Disks that the parent holds, nobody excluded, and the new point will not hold (F-11)."""
    if parent is None:
        return ()
    listed = {chosen.target for chosen in selection.chosen}
    by_request = {skipped.target for skipped in selection.skipped if skipped.reason in BY_REQUEST}
    return tuple(
        disk.target
        for disk in parent.disks
        if disk.target not in listed and disk.target not in by_request
    )
