"""Where blocks come from: a source is a context manager that yields a ``Snapshot``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nbdbackupd.model.chain import Consistency
from nbdbackupd.source.guard import Guard

Finish = Callable[[Callable[[int, int], None], Callable[[], None]], None]
"""Gets who is told of bytes done and in all, and who may raise to end it.

Raises NoSpaceError, RepositoryError if QEMU could not write, SourceError if the job is gone.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """One disk as an NBD export, all exports of a snapshot at one instant.

    ``bitmap`` names the export's dirty bitmap context (``qemu:dirty-bitmap:<bitmap>``), empty if
    the disk is to be read in full. ``size`` is the virtual size in bytes at that instant. With a
    ``keeper`` connections are the server's to close. ``proof`` names an export that fails once
    this one is no snapshot any more: it is to be asked when all has been read.
    With a ``file`` there is no server: QEMU writes the disk, or its changes, into that qcow2 image.
    """

    target: str
    socket: Path
    name: str
    size: int
    bitmap: str = ""
    keeper: Guard | None = None
    proof: str = ""
    file: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The exports of one instant, by disk target.

    ``demoted`` gives, for each disk that was to be read incrementally and can't be, the reason.
    ``checkpoint_xml`` is libvirt's XML of the checkpoint that was made, or empty. ``finish`` waits
    until QEMU has written the images of all exports: see ``Finish``.
    """

    exports: Mapping[str, Export]
    consistency: Consistency
    checkpoint_xml: str = ""
    demoted: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    finish: Finish | None = None
