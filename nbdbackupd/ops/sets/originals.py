"""What a set says of how an image was made: good for a restore, which can do without it."""

from pathlib import Path
from typing import Final

from nbdbackupd.errors import FormatError
from nbdbackupd.model.chain import DiskPoint, RestorePoint, StoredFile
from nbdbackupd.ops.sets import layers
from nbdbackupd.qemu import image
from nbdbackupd.qemu.image import ImageInfo

INFO_ROLE: Final = "image-info"
MAX_INFO: Final = 16 << 20


def original(directory: Path, point: RestorePoint, disk: DiskPoint) -> tuple[ImageInfo | None, str]:
    """The qcow2 image that a disk was saved from, or None and why it is not known.

    ``directory`` is the set's.
    """
    stored = next(
        (each for each in point.files if each.role == INFO_ROLE and each.disk == disk.target), None
    )
    if stored is None:
        return None, "how the original was made is not known"
    try:
        found = _read(directory / stored.name, stored)
    except (FormatError, OSError) as err:
        reason = err.strerror if isinstance(err, OSError) else err.message
        return None, f"how the original was made can't be read ({stored.name}: {reason})"
    if found.format != "qcow2":
        return None, f"{stored.name} tells of an image of format {found.format}"
    return found, ""


def problems(directory: Path, point: RestorePoint) -> tuple[str, ...]:
    """What a point says of its images and is of no use, a line each."""
    found = []
    for disk in point.disks:
        has_info = any(each.role == INFO_ROLE and each.disk == disk.target for each in point.files)
        reason = original(directory, point, disk)[1] if has_info and disk.format == "qcow2" else ""
        if reason:
            found.append(f"disk {disk.target}, point {point.id}: {reason}")
    return tuple(found)


def _read(path: Path, stored: StoredFile) -> ImageInfo:
    return image.parse_chain(layers.read_file(path, stored, MAX_INFO))[0]
