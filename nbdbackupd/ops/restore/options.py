"""Which format and which creation options a restored image gets: the original's, if it can."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd.model.chain import DiskPoint, RestorePoint
from nbdbackupd.ops.sets import originals
from nbdbackupd.qemu.image import CreateOptions

PREALLOCATION: Final = "falloc"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageForm:
    """Format and options of one image, and what the user should know about them.

    ``data_file``: the original had its data in a file beside it, which a ``Site`` may bring back.
    """

    format: str
    options: CreateOptions
    warnings: tuple[str, ...] = ()
    data_file: bool = False

    def told(self, target: str, *, data_file: bool = False) -> tuple[str, ...]:
        """The warnings; ``data_file``: the disk gets such a file again."""
        if not self.data_file or data_file:
            return self.warnings
        return (
            *self.warnings,
            f"disk {target} had its data in a file beside the image (data_file): it comes back as "
            f"one image that holds all",
        )


def choose_format(original: str, wanted: str | None, disk: str) -> tuple[str, tuple[str, ...]]:
    """The format to write, with a warning where the original's can't be written."""
    if wanted is not None:
        return wanted, ()
    if original in ("qcow2", "raw"):
        return original, ()
    return "qcow2", (f"disk {disk} was of format {original or 'unknown'}, it comes back as qcow2",)


def plain(format_: str, *, preallocate: bool) -> CreateOptions:
    """Options without an example."""
    return CreateOptions(format=format_, preallocation=PREALLOCATION if preallocate else "")


def choose(
    directory: Path,
    point: RestorePoint,
    disk: DiskPoint,
    *,
    wanted: str | None,
    preallocate: bool,
) -> ImageForm:
    """What to make of one disk; ``wanted`` is a format, or None for the original's.

    ``directory`` is the set's. What it says of the image may be missing or damaged.
    """
    format_, warnings = choose_format(disk.format, wanted, disk.target)
    data_file = False
    options = plain(format_, preallocate=preallocate)
    if format_ == "qcow2" and disk.format == "qcow2":
        original, problem = originals.original(directory, point, disk)
        if original is None:
            warnings += (f"disk {disk.target}: {problem}: it gets qemu-img's own options",)
        else:
            options = CreateOptions.like(original, preallocation=options.preallocation)
            data_file = bool(original.data_file)
            if original.encrypted:
                warnings += (f"disk {disk.target} was encrypted, it comes back in plain",)
    return ImageForm(format=format_, options=options, warnings=warnings, data_file=data_file)
