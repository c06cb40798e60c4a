"""Opening a set, whoever wrote it, for all that only reads: list, verify, restore, map, boot."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nbdbackupd.model.chain import BackupSet, RestorePoint
from nbdbackupd.ops import layers as layering
from nbdbackupd.ops.layers import Layer
from nbdbackupd.repo.repository import Repository


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedSet:
    """A set whose points and links are proven; ``known`` holds them.

    ``warnings`` tell what of the set is not sound or not vouched for, a line each. ``peer``:
    virtnbdbackup wrote it, and no manifest of ours vouches for it.
    """

    path: Path
    known: BackupSet
    warnings: tuple[str, ...] = ()
    peer: bool = False

    def layers(
        self, point: RestorePoint, target: str, stack: ExitStack, check: Callable[[], None]
    ) -> tuple[Layer, ...]:
        """What one disk of a point is made of, newest first; all but the blocks is proven.

        ``stack`` owns the open files, ``check`` is called now and then and may raise. Raises
        RepositoryError if the point does not hold the disk, ChainBrokenError, FormatError,
        IntegrityError.
        """
        return tuple(
            stack.enter_context(layering.open_proven(self.path, each, each.disk(target), check))
            for each in self.known.path(point, target)
        )


def open_set(path: Path, *, sound: bool = False) -> OpenedSet:
    """Read and prove what the set says of itself.

    With ``sound`` only what is sound, with a warning for the rest: which point is the newest, or
    the newest at a time, can't be told then. Raises RepositoryError if the path is no directory
    or can't be read, FormatError, IntegrityError or ChainBrokenError for a damaged set.
    """
    repository = Repository.open(path)
    if sound:
        known, problems = repository.load_sound()
        return OpenedSet(path=path, known=known, warnings=problems)
    return OpenedSet(path=path, known=repository.load())
