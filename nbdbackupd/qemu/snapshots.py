"""Images that build on one another: overlays on a backing file, and internal snapshots."""

from pathlib import Path
from typing import Final

from nbdbackupd import proc
from nbdbackupd.errors import FormatError
from nbdbackupd.qemu.image import CreateOptions

SECONDS: Final = 600.0
QCOW2: Final = "qcow2"


def create_overlay(path: Path, size: int, options: CreateOptions, backing: Path) -> None:
    """Make a qcow2 image of ``size`` bytes on another one in its directory; overwrites.

    Raises ProcessError, FormatError for options that can't be.
    """
    argv = ["qemu-img", "create", "-q", "-f", QCOW2, "-u", "-F", QCOW2, "-b", _beside(backing)]
    for option in options.arguments():
        if "," in option:  # as in image.create
            raise FormatError(f"image option {option!r} can't be used")
        argv += ["-o", option]
    proc.output([*argv, "--", str(path.absolute()), str(size)], timeout=SECONDS)


def name_backing(path: Path, backing: Path) -> None:
    """Change the name of an overlay's backing file, which may not be there yet, and nothing else.

    Raises ProcessError.
    """
    proc.output(
        [
            "qemu-img",
            "rebase",
            "-q",
            "-u",
            "-f",
            QCOW2,
            "-F",
            QCOW2,
            "-b",
            _beside(backing),
            "--",
            str(path.absolute()),
        ],
        timeout=SECONDS,
    )


def take(path: Path, name: str) -> None:
    """Take an internal snapshot of an image that nobody has open.

    Raises ProcessError.
    """
    # it takes no -f, and must not guess
    filename = str(path.absolute()).replace(",", ",,")
    options = f"driver={QCOW2},file.driver=file,file.filename={filename}"
    proc.output(
        ["qemu-img", "snapshot", "-q", "-c", name, "--image-opts", options], timeout=SECONDS
    )


def resize(path: Path, size: int, *, shrink: bool) -> None:
    """Change an image's virtual size, in bytes; what it gains reads as zeroes.

    Raises ProcessError.
    """
    argv = ["qemu-img", "resize", "-q", "-f", QCOW2, *(["--shrink"] if shrink else [])]
    proc.output([*argv, "--", str(path.absolute()), str(size)], timeout=SECONDS)


def _beside(backing: Path) -> str:
    """A name relative to the overlay; a colon in it must not look like a protocol."""
    return f"./{backing.name}" if ":" in backing.name else backing.name
