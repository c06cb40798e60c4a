"""Sets that other programs wrote: which one it was, and what restore points it left.

The one seam between them and all that reads sets: a new kind is a module that tells its sets and
reads them, and a line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import RepositoryError
from nbdbackupd.model.chain import ForeignSet
from nbdbackupd.repo import generation, layout, qmpbackup
from nbdbackupd.repo.virtnbdbackup import peer, points
from nbdbackupd.repo.virtnbdbackup.storage import Archive, Folder, Storage, is_archive

VIRTNBDBACKUP: Final = "virtnbdbackup"
QMPBACKUP: Final = qmpbackup.PROGRAM


@dataclass(frozen=True, slots=True)
class Foreign:
    """A set of another program, the ``program``, and where its files are."""

    program: str
    storage: Storage
    _read: Callable[[Storage], ForeignSet]

    def read(self) -> ForeignSet:
        """Its points; contents are not read. Raises RepositoryError if they can't be read."""
        return self._read(self.storage)


_PROGRAMS: Final[tuple[tuple[str, Callable[[Storage], object], Callable[..., ForeignSet]], ...]] = (
    (VIRTNBDBACKUP, peer.stream_names, lambda storage: points.build(peer.read_files(storage))),
    (QMPBACKUP, qmpbackup.is_set, qmpbackup.read),
)
"""Name, whether a place holds its files, and how they are read."""


def find(path: Path) -> Foreign | None:
    """The set of another program at a path; None for one of ours, a draft, and anything else.

    A draft: streams of ours that have got their names are no point before the manifest has, and
    the next run removes them. Raises RepositoryError if it can't be read, or holds sets by months;
    FormatError, IntegrityError for a damaged archive.
    """
    storage: Storage
    if path.is_dir():
        with durable.translate_os_errors("read", path):
            if _is_ours(path):
                return None
        storage = Folder(path)
    elif is_archive(path):
        storage = Archive(path)
    else:
        return None
    for program, is_of, read in _PROGRAMS:
        if is_of(storage):
            return Foreign(program, storage, read)
    if path.is_dir() and (found := qmpbackup.months(path)):
        raise RepositoryError(
            f"{path} holds sets of qmpbackup, one for each month: name {path / found[-1]}, or "
            f"another of {len(found)}"
        )
    return None


def _is_ours(path: Path) -> bool:
    return (
        any(path.glob(f"{layout.DRAFT_PREFIX}*"))
        or (path / layout.GENERATION).exists()
        or bool(generation.manifests(path / layout.POINTS))
    )
