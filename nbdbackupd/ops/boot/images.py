"""The images that a live restore copies to: their names, their formats, and making them empty.

They have their final names from the start, since QEMU has them open. What tells that they are not
complete is a marker beside them, which goes when all of them are.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import RepositoryError
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.ops.restore import options as restore_options
from nbdbackupd.ops.restore import output_names
from nbdbackupd.ops.sets.opened import OpenedSet
from nbdbackupd.qemu import image
from nbdbackupd.qemu.image import CreateOptions

MARKER: Final = "live-restore.incomplete"
# QEMU runs as another user and must get through to its files
OPEN_MODE: Final = 0o711


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalImage:
    """One image to be; ``size`` in bytes."""

    target: str
    path: Path
    size: int
    format: str
    options: CreateOptions
    warnings: tuple[str, ...] = ()


def plan(
    given: OpenedSet, point: RestorePoint, output: Path, wanted: str | None
) -> tuple[FinalImage, ...]:
    """Decide for all disks of the point; ``wanted`` is a format, None: as the originals.

    Raises RepositoryError if a file is there already, IntegrityError.
    """
    made = [
        restore_options.choose(given.path, point, disk, wanted=wanted, preallocate=False)
        for disk in point.disks
    ]
    names = output_names.choose(
        [
            output_names.Wanted(
                target=disk.target, source=disk.source, original=disk.format, format=each.format
            )
            for disk, each in zip(point.disks, made, strict=True)
        ],
        point.domain,
    )
    found = tuple(
        FinalImage(
            target=disk.target,
            path=output / names[disk.target],
            size=disk.size,
            format=each.format,
            options=each.options,
            warnings=each.told(disk.target),
        )
        for disk, each in zip(point.disks, made, strict=True)
    )
    for path in (*(each.path for each in found), marker(output)):
        if os.path.lexists(path):
            raise RepositoryError(f"{path} exists: give another directory")
    return found


def marker(output: Path) -> Path:
    """The file that is there as long as the images in a directory are not complete."""
    return output / MARKER


def mark(output: Path, name: str) -> None:
    """Make the directory and its marker, durably. Raises RepositoryError, NoSpaceError."""
    with durable.translate_os_errors("create", output):
        durable.make_directory(output, OPEN_MODE)
        text = f"The images of {name} are not complete: nbdbackupctl boot --list\n"
        durable.write_atomic(marker(output), text.encode())


def make(each: FinalImage) -> None:
    """Make an image that reads as zeroes.

    Raises RepositoryError if it exists, NoSpaceError, ProcessError.
    """
    with durable.translate_os_errors("create", each.path):
        # qemu-img would overwrite what came in between
        os.close(durable.create_exclusive(each.path))
    image.create(each.path, each.size, each.options)
