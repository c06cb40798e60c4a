"""What a restore hands to the one who defines a domain on the restored images.

A restore of images needs no libvirt. So that is done by somebody else, who looks at everything
before the first byte is written, and acts only when all images are complete and have their names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nbdbackupd.ops.restore.side_files import FileCopy


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
    """Makes a domain of restored images, in two steps."""

    def prepare(self, planned: PlannedDomain) -> None:
        """Look at everything; called before the first byte is written.

        Raises NbdbackupError if the domain could not be defined in the end.
        """

    def finish(self) -> Definition:
        """Act; called when all images and files are complete.

        Raises NbdbackupError, whose message says what stands.
        """
