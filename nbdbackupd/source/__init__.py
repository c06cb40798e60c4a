"""Where blocks come from: a source is a context manager that yields a ``Snapshot``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nbdbackupd.model.chain import Consistency
from nbdbackupd.source.guard import Guard


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """One disk as an NBD export, all exports of a snapshot at one instant.

    ``bitmap`` names the export's dirty bitmap context (``qemu:dirty-bitmap:<bitmap>``), empty if
    the disk is to be read in full. ``size`` is the virtual size in bytes at that instant. With a
    ``keeper`` connections are the server's to close. ``proof`` names an export that fails once
    this one is no snapshot any more: it is to be asked when all has been read.
    """

    target: str
    socket: Path
    name: str
    size: int
    bitmap: str = ""
    keeper: Guard | None = None
    proof: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The exports of one instant, by disk target.

    ``demoted`` gives, for each disk that was to be read incrementally and can't be, the reason.
    ``checkpoint_xml`` is libvirt's XML of the checkpoint that was made, or empty.
    """

    exports: Mapping[str, Export]
    consistency: Consistency
    checkpoint_xml: str = ""
    demoted: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
