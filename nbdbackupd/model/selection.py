"""Which disks of a domain a point holds, and how each of them can be read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from nbdbackupd.errors import NotSupportedError, UsageError
from nbdbackupd.model.chain import Level, SkippedDisk
from nbdbackupd.model.domain import Disk, Domain

DRIVES = {"cdrom": "a CD-ROM drive", "floppy": "a floppy drive"}
"""Devices whose media are saved only if the user names them."""

NO_WAY = {
    "lun": "a passed-through LUN, whose blocks QEMU does not see",
    "vhostuser": "a vhost-user disk, whose blocks QEMU does not see",
    "dir": "a directory that is shown as a disk: save the directory itself",
}
"""Devices and types of disks that hold data and can't be saved."""

OLD_QCOW2 = "0.10"
EXCLUDED = "excluded by request"
NOT_INCLUDED = "not among the requested disks"
UNREADABLE = "a disk whose image can't be read"
BY_REQUEST = (EXCLUDED, NOT_INCLUDED)
"""Reasons of disks that the user left out, as they stand in manifests."""


class How(StrEnum):
    """Whether a disk's changes can be tracked."""

    BITMAP = "bitmap"
    FULL_ONLY = "full-only"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFacts:
    """What was found in the image itself; ``compat`` is the qcow2 version (``0.10``, ``1.1``).

    ``size`` is the guest's disk in bytes, -1 if it is not known. Images that can't be looked at
    (network disks) are simply absent from the mapping.
    ``has_raw_data``: the guest's bytes lie in a raw file beside the qcow2 image (QEMU's
    ``data_file_raw``), to which other programs may write.
    """

    format: str = ""
    compat: str = ""
    size: int = -1
    has_raw_data: bool = False


@dataclass(frozen=True, slots=True)
class ChosenDisk:
    """A disk that the point holds.

    ``why`` its changes can't be tracked; empty where the user knows. ``is_fault``: it can be
    fixed, as ``why`` says.
    """

    target: str
    how: How
    why: str = ""
    is_fault: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """The result: both in the domain's order; together they are all disks of the domain.

    ``unsaved`` are the skipped ones that hold data, though nobody asked to leave them out.
    """

    chosen: tuple[ChosenDisk, ...]
    skipped: tuple[SkippedDisk, ...]
    unsaved: tuple[SkippedDisk, ...] = ()


def select_disks(
    domain: Domain,
    images: Mapping[str, ImageFacts],
    *,
    level: Level,
    include: Collection[str] = (),
    exclude: Collection[str] = (),
    raw: bool = False,
    is_tracked: bool = False,
    missing: Mapping[str, str] | None = None,
) -> Selection:
    """Apply the rule for disks; an empty ``include`` means all.

    ``is_tracked``: changes of raw images are known as well, as long as the guest runs.

    ``missing`` says why the images of disks can't be read: they are left out, and the others are
    saved (L-7). Raises UsageError for a name that the domain does not have, is given in both
    lists, or can't be saved as asked though named; NotSupportedError when nothing is left to save.
    """
    _check_names(domain, include, exclude)
    chosen: list[ChosenDisk] = []
    skipped: list[SkippedDisk] = []
    unsaved: list[SkippedDisk] = []
    for disk in domain.disks:
        reason = _left_out_by_request(disk, include, exclude)
        if reason:
            skipped.append(SkippedDisk(disk.target, reason))
            continue
        is_named = disk.target in include
        harmless, reason = _harmless(disk, is_named=is_named), _no_way(disk, raw=raw)
        if is_named and (harmless or reason):
            raise UsageError(
                f"disk {disk.target} of {domain.name} can't be saved: it is {harmless or reason}",
                domain=domain.name,
                disk=disk.target,
            )
        if not (harmless or reason) and missing and disk.target in missing:
            reason = f"{UNREADABLE}: {missing[disk.target]}"
        if harmless or reason:
            skipped.append(SkippedDisk(disk.target, harmless or reason))
            unsaved += skipped[-1:] if not harmless else []
        else:
            chosen.append(_chosen(disk, images, level, is_tracked=is_tracked))
    if not chosen:
        listed = "; ".join(f"{skip.target}: {skip.reason}" for skip in skipped) or "it has no disks"
        raise NotSupportedError(
            f"domain {domain.name} has no disk to save ({listed})", domain=domain.name
        )
    return Selection(tuple(chosen), tuple(skipped), tuple(unsaved))


def _check_names(domain: Domain, include: Collection[str], exclude: Collection[str]) -> None:
    known = [disk.target for disk in domain.disks]
    unknown = [name for name in (*include, *exclude) if name not in known]
    if unknown:
        raise UsageError(
            f"domain {domain.name} has no disk {', '.join(unknown)}, "
            f"only: {', '.join(known) or '(none)'}",
            domain=domain.name,
        )
    both = sorted(set(include) & set(exclude))
    if both:
        raise UsageError(f"disk {', '.join(both)} is both included and excluded")


def _left_out_by_request(disk: Disk, include: Collection[str], exclude: Collection[str]) -> str:
    if disk.target in exclude:
        return EXCLUDED
    if include and disk.target not in include:
        return NOT_INCLUDED
    return ""


def _harmless(disk: Disk, *, is_named: bool) -> str:
    """What the disk is, if nothing is missed when it is left out."""
    if not disk.source and disk.device in DRIVES:
        return "an empty drive"
    if disk.device in DRIVES and not is_named:
        return DRIVES[disk.device]
    if disk.transient:
        # libvirt refuses jobs on such a disk, and its changes are thrown away anyway
        return "a transient disk, whose changes end with the guest"
    return ""


def _no_way(disk: Disk, *, raw: bool) -> str:
    """What the disk is, if it holds data and can't be saved, or not as asked."""
    for kind in (disk.device, disk.type):
        if kind in NO_WAY:
            return NO_WAY[kind]
    if disk.device not in ("disk", *DRIVES):
        return f"a device of kind {disk.device}"
    if not disk.source:
        return "a disk without a source that is known here"
    if disk.format == "raw" and not raw and disk.device not in DRIVES:
        return (
            "a raw image, which can't be saved incrementally; --raw saves it in full each time, "
            "and so does disks.raw"
        )
    return ""


def _chosen(
    disk: Disk, images: Mapping[str, ImageFacts], level: Level, *, is_tracked: bool
) -> ChosenDisk:
    """How the disk is saved; nothing is said of one that is to be copied whole anyway."""
    why, is_fault = why_whole(disk, images.get(disk.target, ImageFacts()))
    is_volatile = is_tracked and disk.format == "raw" and not disk.readonly
    if not why and (disk.format == "qcow2" or is_volatile):
        return ChosenDisk(disk.target, How.BITMAP)
    if level is Level.COPY:
        return ChosenDisk(disk.target, How.FULL_ONLY)
    return ChosenDisk(disk.target, How.FULL_ONLY, why, is_fault)


def why_whole(disk: Disk, facts: ImageFacts) -> tuple[str, bool]:
    """Why changes of the disk can't be tracked, and whether that can be fixed."""
    if disk.format == "raw":
        return "", False
    if disk.format != "qcow2":
        return f"format {disk.format} holds no bitmaps: convert it to qcow2", True
    if facts.compat == OLD_QCOW2:
        amend = f"'qemu-img amend -f qcow2 -o compat=1.1 {disk.source}' while the domain is off"
        return f"qcow2 of version 2 holds no bitmaps: convert it with {amend}", True
    if disk.readonly:
        return "it is read-only, and changes of such a disk are not tracked", False
    if facts.has_raw_data:
        # what is written there while the domain is off is in no bitmap, as with a raw image
        return "its data lies in a raw file, which may change without a trace", False
    if facts.size == 0:
        # QEMU stores no bitmap in it (7.2: "Lost persistent bitmaps", with status 0)
        return "an image of no bytes holds no bitmaps", False
    return "", False
