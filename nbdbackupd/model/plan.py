"""How each disk of a new point is to be read: whole, or from its parent's bitmap on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbdbackupd.model.chain import DiskPoint, ImageLayer, Level, RestorePoint
from nbdbackupd.model.domain import bitmap_layers, same_image, unsound_bitmap
from nbdbackupd.model.selection import BY_REQUEST, ChosenDisk, How, Selection


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskState:
    """A disk as it is now: virtual size in bytes, serial, its images top first.

    ``bitmaps`` are those stored in each image, by path and name, and whether each is sound:
    recording, and not left open by a QEMU that was killed. ``is_live``: a QEMU has the disk
    open. Then the bitmaps of the top image live in its memory, and what is stored there says
    nothing; those below are not written to, so they are as they are stored.
    """

    size: int
    serial: str = ""
    layers: tuple[ImageLayer, ...] = ()
    bitmaps: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    is_live: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseDisk:
    """What a point recorded of a disk: where its next delta starts from. ``size`` in bytes."""

    target: str
    size: int
    layers: tuple[ImageLayer, ...]
    bitmap: str

    @classmethod
    def of(cls, disk: DiskPoint) -> "BaseDisk":
        """The part of a point's disk that matters here."""
        return cls(target=disk.target, size=disk.size, layers=disk.layers, bitmap=disk.bitmap)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskPlan:
    """One disk of the point; ``reason`` says why it is read in full though a delta was wanted.

    ``tracked`` disks get a bitmap with the point's checkpoint. ``is_expected``: the reason is the
    disk's nature, which nobody is to be warned of. ``bitmap_layers`` are the paths of the images,
    top first, whose bitmaps together are the delta of a ``delta`` disk.
    """

    target: str
    delta: bool
    tracked: bool
    reason: str = ""
    is_expected: bool = False
    bitmap_layers: tuple[str, ...] = ()


def plan_disks(
    selection: Selection,
    level: Level,
    parent: RestorePoint | None,
    states: Mapping[str, DiskState],
) -> tuple[DiskPlan, ...]:
    """Decide for each chosen disk; ``parent`` is the point that a delta would start from."""
    return tuple(_plan(chosen, level, parent, states) for chosen in selection.chosen)


def _plan(
    chosen: ChosenDisk,
    level: Level,
    parent: RestorePoint | None,
    states: Mapping[str, DiskState],
) -> DiskPlan:
    target, tracked = chosen.target, chosen.how is How.BITMAP
    if not tracked:
        return DiskPlan(
            target=target,
            delta=False,
            tracked=False,
            reason=chosen.why,
            is_expected=not chosen.is_fault,
        )
    if level not in (Level.INC, Level.DIFF):
        return DiskPlan(target=target, delta=False, tracked=True)
    known = _recorded(target, parent)
    state = states.get(target)
    if parent is None:
        reason = "there is no point to start from"
    elif known is None:
        reason = f"the disk is not part of restore point {parent.id}"
    elif not known.bitmap:
        reason = f"its changes have not been tracked since restore point {parent.id}"
    elif state is None:
        reason = "its image could not be examined"
    else:
        reason = why_full(BaseDisk.of(known), state)
        layers = bitmap_layers(known.layers, state.layers)
        if not reason:
            paths = tuple(layer.path for layer in layers)
            return DiskPlan(target=target, delta=True, tracked=True, bitmap_layers=paths)
    return DiskPlan(target=target, delta=False, tracked=True, reason=reason)


def _recorded(target: str, parent: RestorePoint | None) -> DiskPoint | None:
    disks = parent.disks if parent is not None else ()
    return next((disk for disk in disks if disk.target == target), None)


def why_full(known: BaseDisk, state: DiskState) -> str:
    """Why the changes since a recorded point are not known, or nothing.

    While QEMU has the disk open, only libvirt can tell of the bitmap in its top image.
    """
    if state.size != known.size:
        return f"its size changed from {known.size} to {state.size} bytes"
    if not same_image(known.layers, state.layers):
        was = known.layers[0].path if known.layers else "(none)"
        now = state.layers[0].path if state.layers else "(none)"
        if was == now:
            return f"its image was replaced since the last point: another file is {now} now"
        return f"it is another image than in the last point: was {was}, is {now}"
    layers = bitmap_layers(known.layers, state.layers)
    return unsound_bitmap(layers[state.is_live :], state.bitmaps, known.bitmap)


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
