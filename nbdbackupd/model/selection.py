"""Which disks of a domain a point holds, and how each of them can be read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from nbdbackupd.errors import NotSupportedError, UsageError
from nbdbackupd.model.chain import Level, SkippedDisk
from nbdbackupd.model.domain import Disk, Domain

NO_DISK_DEVICES = {
    "cdrom": "a CD-ROM drive",
    "floppy": "a floppy drive",
    "lun": "a passed-through LUN, whose blocks QEMU does not see",
}
OLD_QCOW2 = "0.10"
EXCLUDED = "excluded by request"
NOT_INCLUDED = "not among the requested disks"
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
    """A disk that the point holds."""

    target: str
    how: How


@dataclass(frozen=True, slots=True)
class Selection:
    """The result: both in the domain's order; together they are all disks of the domain."""

    chosen: tuple[ChosenDisk, ...]
    skipped: tuple[SkippedDisk, ...]


def select_disks(
    domain: Domain,
    images: Mapping[str, ImageFacts],
    *,
    level: Level,
    include: Collection[str] = (),
    exclude: Collection[str] = (),
    raw: bool = False,
) -> Selection:
    """Apply the rule for disks; an empty ``include`` means all.

    Raises UsageError for a name that the domain does not have, is given in both lists, or can't
    be saved as asked though named; NotSupportedError for a disk that needs another level, and
    when nothing is left to save.
    """
    _check_names(domain, include, exclude)
    chosen: list[ChosenDisk] = []
    skipped: list[SkippedDisk] = []
    for disk in domain.disks:
        reason = _left_out_by_request(disk, include, exclude)
        if not reason:
            reason = _left_out_by_kind(disk, raw=raw)
            if reason and disk.target in include:
                raise UsageError(
                    f"disk {disk.target} of {domain.name} can't be saved: it is {reason}",
                    domain=domain.name,
                    disk=disk.target,
                )
        if reason:
            skipped.append(SkippedDisk(disk.target, reason))
        else:
            chosen.append(ChosenDisk(disk.target, _how(disk, images, level)))
    if not chosen:
        listed = "; ".join(f"{skip.target}: {skip.reason}" for skip in skipped) or "it has no disks"
        raise NotSupportedError(
            f"domain {domain.name} has no disk to save ({listed})", domain=domain.name
        )
    return Selection(tuple(chosen), tuple(skipped))


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


def _left_out_by_kind(disk: Disk, *, raw: bool) -> str:
    if disk.device != "disk":
        return NO_DISK_DEVICES.get(disk.device, f"a device of kind {disk.device}")
    if not disk.source:
        return "an empty drive"
    if disk.type == "vhostuser":
        return "a vhost-user disk, whose blocks QEMU does not see"
    if disk.transient:
        # libvirt refuses jobs on such a disk, and its changes are thrown away anyway
        return "a transient disk, whose changes end with the guest"
    if disk.format == "raw" and not raw:
        return "a raw image, which can't be saved incrementally; --raw saves it in full each time"
    return ""


def _how(disk: Disk, images: Mapping[str, ImageFacts], level: Level) -> How:
    facts = images.get(disk.target, ImageFacts())
    if disk.format == "qcow2" and facts.compat != OLD_QCOW2:
        # libvirt tracks no changes of a disk that can't change; and writes to a raw data file
        # while the domain is off are in no bitmap, as with a raw image; nor does QEMU store a
        # bitmap in an image of no bytes (7.2: "Lost persistent bitmaps", with status 0)
        untracked = disk.readonly or facts.has_raw_data or facts.size == 0
        return How.FULL_ONLY if untracked else How.BITMAP
    if disk.format == "raw" or level is Level.COPY:
        return How.FULL_ONLY
    if disk.format == "qcow2":
        raise NotSupportedError(
            f"disk {disk.target} is a qcow2 image of version 2, which can't hold bitmaps: "
            f"convert it with 'qemu-img amend -o compat=1.1', leave it out with "
            f"'-x {disk.target}', or use '-l copy'",
            disk=disk.target,
        )
    raise NotSupportedError(
        f"disk {disk.target} is of format {disk.format}, which can't hold bitmaps: "
        f"convert it to qcow2, leave it out with '-x {disk.target}', or use '-l copy'",
        disk=disk.target,
    )
