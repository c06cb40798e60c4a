"""What a restore is asked for, what it hands to who defines a domain, what it tells afterwards."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from nbdbackupd.model.choice import NEWEST, Choice
from nbdbackupd.ops.restore.side_files import FileCopy
from nbdbackupd.plain import versioned

Progress = Callable[[str, int, int], None]
"""Gets a disk's target, its guest bytes done, and its size; from any thread."""


class Style(StrEnum):
    """How the points come back: the chosen one alone, or it and those that it hangs on.

    ``CHAIN``: an image for each point, on that of the point before. ``SNAPSHOTS``: one image with
    an internal snapshot for each point.
    """

    PLAIN = "plain"
    CHAIN = "chain"
    SNAPSHOTS = "snapshots"


@dataclass(frozen=True, slots=True)
class OutputPlace:
    """Where one disk is to go: a block device, or an image's path."""

    target: str
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreRequest:
    """What to restore and where to.

    Either ``source`` is the directory of a set, or ``sequence`` names stream files of one disk,
    oldest first. ``disks`` empty means all. ``choice`` is that of the point. ``format`` None keeps
    the original's. ``compress`` makes qcow2 images of compressed clusters.

    ``output`` is the directory of the images, and of the domain's XML and files, which are left
    out without it; disks with ``places`` need none. ``since`` (id) is the oldest point of a style
    other than plain, which else begins with the full.

    ``jobs`` disks are written at a time, each by ``workers`` threads of 6 MiB; ``bandwidth`` is
    the most bytes per second that all write together, 0 for no limit. ``state_dirs`` are where
    this host has noted which manifests it wrote.
    """

    output: Path | None = None
    source: Path | None = None
    disks: tuple[str, ...] = ()
    places: tuple[OutputPlace, ...] = ()
    choice: Choice = NEWEST
    sequence: tuple[Path, ...] = ()
    format: str | None = None
    style: Style = Style.PLAIN
    since: str = ""
    preallocate: bool = False
    compress: bool = False
    force: bool = False
    workers: int = 2
    jobs: int = 1
    bandwidth: int = 0
    state_dirs: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedDisk:
    """An image to come: its final ``path``, which is a ``file`` or a ``block`` device."""

    target: str
    path: Path
    format: str
    type: str = "file"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedDomain:
    """A restore that is about to begin; ``files`` are the XML and firmware of the same point.

    ``point`` is that of the set, empty where stream files were given by hand. ``live`` is the XML
    of the domain as it ran, if it did; it goes nowhere.
    """

    point: str
    domain: str
    output: Path
    disks: tuple[PlannedDisk, ...]
    files: tuple[FileCopy, ...]
    live: FileCopy | None = None
    force: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """The domain of the restored images; ``config`` is its XML, ``changes`` what differs there."""

    name: str
    uuid: str
    config: Path
    defined: bool
    started: bool
    changes: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The member ``definition`` of the report."""
        return {
            "name": self.name,
            "uuid": self.uuid,
            "config": str(self.config),
            "defined": self.defined,
            "started": self.started,
            "changes": list(self.changes),
        }


class Definer(Protocol):
    """Makes a domain of restored images, in two steps.

    A restore of images needs no libvirt. So that is done by somebody else, who looks at everything
    before the first byte is written, and acts only when all images are complete and have their
    names.
    """

    def prepare(self, planned: PlannedDomain) -> None:
        """Look at everything; called before the first byte is written.

        Raises NbdbackupError if the domain could not be defined in the end.
        """

    def finish(self) -> Definition:
        """Act; called when all images and files are complete.

        Raises NbdbackupError, whose message says what stands.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoredDisk:
    """One disk: its size and ``data_bytes`` that were written, in bytes.

    ``path`` is the image or device that holds it; ``images`` are those of older points on which
    it is built, oldest first. ``points`` are the ids of the points that can be read from them.
    """

    target: str
    path: Path
    format: str
    size: int
    data_bytes: int
    seconds: float
    images: tuple[Path, ...] = ()
    points: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreReport:
    """What was restored; ``config`` is the domain's XML, ``files`` what else lies beside it."""

    point: str
    domain: str
    created: str
    disks: tuple[RestoredDisk, ...]
    config: Path | None
    files: tuple[Path, ...]
    warnings: tuple[str, ...]
    seconds: float
    definition: Definition | None = None

    @property
    def data_bytes(self) -> int:
        """Bytes that were written as data, of all disks."""
        return sum(disk.data_bytes for disk in self.disks)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        return versioned(
            point=self.point,
            domain=self.domain,
            created=self.created,
            disks=[
                {
                    "target": disk.target,
                    "path": str(disk.path),
                    "format": disk.format,
                    "size": disk.size,
                    "data_bytes": disk.data_bytes,
                    "seconds": round(disk.seconds, 3),
                    "images": [str(path) for path in disk.images],
                    "points": list(disk.points),
                }
                for disk in self.disks
            ],
            config=str(self.config) if self.config else None,
            files=[str(path) for path in self.files],
            definition=self.definition.to_json() if self.definition else None,
            warnings=list(self.warnings),
            data_bytes=self.data_bytes,
            seconds=round(self.seconds, 3),
        )
