"""Which format and which creation options a restored image gets: the original's, if it can."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd.model.chain import DiskPoint, RestorePoint
from nbdbackupd.ops.sets import originals
from nbdbackupd.qemu.image import CreateOptions

PREALLOCATION: Final = "falloc"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Format and options of one image, and what the user should know about them."""

    format: str
    options: CreateOptions
    warnings: tuple[str, ...] = ()


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
) -> Choice:
    """What to make of one disk; ``wanted`` is a format, or None for the original's.

    ``directory`` is the set's. What it says of the image may be missing or damaged.
    """
    format_, warnings = choose_format(disk.format, wanted, disk.target)
    options = plain(format_, preallocate=preallocate)
    if format_ == "qcow2" and disk.format == "qcow2":
        original, problem = originals.original(directory, point, disk)
        if original is None:
            warnings += (f"disk {disk.target}: {problem}: it gets qemu-img's own options",)
        else:
            options = CreateOptions.like(original, preallocation=options.preallocation)
            if original.data_file:
                warnings += (
                    f"disk {disk.target} had its data in a file beside the image (data_file): "
                    f"it comes back as one image",
                )
            if original.encrypted:
                warnings += (f"disk {disk.target} was encrypted, it comes back in plain",)
    return Choice(format=format_, options=options, warnings=warnings)
