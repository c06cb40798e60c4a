"""How points leave a set: a new generation of manifests, one switch, then their files go.

All is prepared in ``.removal-N``, N being the new generation. ``intent.json`` there, durable before
anything else, says which files are to come and which are to go. New files are moved into the set,
then the new directory of manifests, then the file ``generation`` is replaced. Before that a kill
leaves the set what it was, and the next removal or run takes the new files away; after it, that
goes on taking away the old ones.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from nbdbackupd import documents, durable
from nbdbackupd.errors import FormatError, IntegrityError, NbdbackupError, RepositoryError
from nbdbackupd.format import manifest
from nbdbackupd.model.chain import BackupSet, RestorePoint
from nbdbackupd.repo import generation, layout, reading
from nbdbackupd.repo.virtnbdbackup.storage import read_small

log = logging.getLogger(__name__)
MAX_INTENT: Final = 64 << 20
NUMBER: Final = re.compile("[1-9][0-9]{0,17}")
BLOCK: Final = 512
"""What ``st_blocks`` counts in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """What a removal is about to do.

    ``adds`` and ``removes`` are names of files of the set, ``gone`` the ids of the points that
    leave it.
    """

    adds: tuple[str, ...]
    removes: tuple[str, ...]
    gone: tuple[str, ...]

    def pack(self) -> bytes:
        """The JSON of ``intent.json``."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> "Intent":
        """Read ``intent.json``; no name leads out of the set. Raises FormatError."""
        try:
            found = documents.parse_json(data)
        except ValueError as err:
            raise FormatError(f"intent of a removal is damaged: {err}") from err
        sound = (
            isinstance(found, dict)
            and set(found) == {each.name for each in fields(cls)}
            and all(isinstance(names, list) for names in found.values())
            and all(isinstance(name, str) for names in found.values() for name in names)
            and all(found["gone"])
            and all(map(_is_file, (*found["adds"], *found["removes"])))
        )
        if not sound:
            raise FormatError("intent of a removal is damaged")
        return cls(**{name: tuple(names) for name, names in found.items()})


def _is_file(name: str) -> bool:
    base = name.removeprefix(f"{layout.CHECKPOINTS}/")
    return (
        base not in {"", layout.GENERATION}
        and "/" not in base
        and "\0" not in base
        and not base.startswith(".")
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaned:
    """What was done with old files: ``freed`` bytes; ``reason`` says why some are still there."""

    freed: int = 0
    reason: str = ""


class Removal:
    """One removal under way; made by ``begun``."""

    def __init__(
        self, root: Path, number: int, intent: Intent, read_back: Callable[[Path], BackupSet]
    ) -> None:
        self.number = number
        self.path = root / f"{layout.REMOVAL_PREFIX}{number}"
        self.is_done = False
        self._root = root
        self._intent = intent
        self._read_back = read_back

    def place(self, name: str) -> Path:
        """Where a new file of the set is to be made."""
        return self.path / name

    def commit(self, points: Sequence[RestorePoint]) -> None:
        """Let the set hold just these points: durably, all at once, and proven by reading back.

        Raises RepositoryError (a file of that name is there already, or the set does not give back
        what was written), FormatError, ChainBrokenError, NoSpaceError; ``is_done`` tells whether
        it happened all the same.
        """
        folder = self._root / layout.points(self.number)
        with durable.translate_os_errors("remove points from", self._root):
            self._write_manifests(points)
            for name in self._intent.adds:
                durable.fsync_file(self.path / name)
            for name in self._intent.adds:
                _move(self.path / name, self._root / name)
            _move(self.path / layout.POINTS, folder)
            durable.fsync_directory(self._root)
        known = self._read_back(folder)
        if [each.digest for each in known.points] != [each.digest for each in points]:
            raise RepositoryError(
                f"{self._root} does not give back the manifests that were just written there, so "
                f"nothing is removed: see to that storage"
            )
        with durable.translate_os_errors("remove points from", self._root):
            try:
                generation.switch(self._root, self.number)
            finally:
                self.is_done = generation.current(self._root) == self.number

    def _write_manifests(self, points: Sequence[RestorePoint]) -> None:
        folder = self.path / layout.POINTS
        with durable.hold_directory(self._root, self.path) as at:
            os.mkdir(folder.name, 0o700, dir_fd=at)
        with durable.hold_directory(self._root, folder) as at:
            for point in points:
                path = folder / layout.manifest(point.sequence, point.id)
                fd = durable.create_exclusive(path, at=at)
                try:
                    durable.write_all(fd, manifest.pack(point))
                    durable.fsync_file(fd)
                finally:
                    os.close(fd)
            durable.fsync_directory(at)


def _move(source: Path, target: Path) -> None:
    if os.path.lexists(target):
        raise RepositoryError(f"{target} exists and is of no restore point: move it away")
    durable.rename(source, target)


@contextmanager
def begun(root: Path, intent: Intent, read_back: Callable[[Path], BackupSet]) -> Iterator[Removal]:
    """Prepare a removal; unless it was committed, nothing of it is left at the end.

    The caller holds the set's lock, and has swept. ``read_back`` proves the points by the
    manifests in a directory. Raises RepositoryError, NoSpaceError, IntegrityError.
    """
    number = generation.current(root) + 1
    if not NUMBER.fullmatch(str(number)):
        raise IntegrityError("a number that no removals come to", file=root / layout.GENERATION)
    made = Removal(root, number, intent, read_back)
    for name in intent.adds:
        if os.path.lexists(root / name):
            raise RepositoryError(f"{root / name} exists and is of no restore point: move it away")
    with durable.translate_os_errors("remove points from", root):
        made.path.mkdir(mode=0o700)
        with durable.hold_directory(root, made.path) as at:
            durable.write_atomic(made.path / layout.INTENT, intent.pack(), at=at)
        durable.fsync_directory(root)
    try:
        yield made
    finally:
        if not made.is_done:
            _undo(root, number, intent)


def _undo(root: Path, number: int, intent: Intent) -> None:
    """Take away what a removal has made that did not come to its switch; else the next one does."""
    try:
        with durable.translate_os_errors("clean up", root):
            _take_back(root, number, intent)
    except NbdbackupError as err:
        log.warning("what was begun is removed by the next run: %s", err)


def _take_back(root: Path, number: int, intent: Intent, kept: Collection[str] = ()) -> None:
    if generation.current(root) >= number:
        return
    stage = root / f"{layout.REMOVAL_PREFIX}{number}"
    for name in intent.adds:
        # what still lies in the stage was never moved: the set's file of that name is another
        if name not in kept and not os.path.lexists(stage / name):
            _unlink(root, root / name)
    shutil.rmtree(root / layout.points(number), ignore_errors=True)
    durable.fsync_directory(root)
    durable.remove_staged(stage, layout.INTENT)


def _intent(stage: Path) -> Intent:
    """What a stage's intent says; one that has none has done nothing yet, or all of it.

    What a damaged one was about is not known; a warning says so.
    """
    path = stage / layout.INTENT
    try:
        if os.path.lexists(path):
            return Intent.parse(read_small(path, MAX_INTENT))
    except FormatError as err:
        log.warning("%s is damaged, some of its files may stay: %s", path, err)
    return Intent(adds=(), removes=(), gone=())


def unfinished(root: Path) -> dict[int, Intent]:
    """The removals of a set that are under way or were cut short, by generation; needs no lock.

    Raises RepositoryError.
    """
    found = {}
    with durable.translate_os_errors("read", root):
        for path in sorted(root.glob(f"{layout.REMOVAL_PREFIX}*")):
            number = path.name.removeprefix(layout.REMOVAL_PREFIX)
            if NUMBER.fullmatch(number) and path.is_dir() and not path.is_symlink():
                found[int(number)] = _intent(path)
    return found


def sweep(root: Path, kept: Collection[str]) -> Cleaned:
    """Undo removals that were cut short before their switch, finish the others.

    ``kept`` are the files of the set's points, which stay whatever an intent says. The caller
    holds the set's lock. Raises RepositoryError if that fails before the switch of one.
    """
    now = generation.current(root)
    left = unfinished(root)
    with durable.translate_os_errors("clean up", root):
        for number, intent in left.items():
            if number > now:
                log.info("removing what a removal left that was cut short")
                _take_back(root, number, intent, kept)
    done = {number: intent for number, intent in left.items() if number <= now}
    if not done:
        return Cleaned()
    try:
        held = reading.take(root)
        if held is None:
            return Cleaned(reason="still being read")
        try:
            freed = sum(_finish(root, now, number, intent, kept) for number, intent in done.items())
        finally:
            held.release()
    except OSError as err:
        return Cleaned(reason=err.strerror or type(err).__name__)
    return Cleaned(freed=freed)


def _finish(root: Path, now: int, number: int, intent: Intent, kept: Collection[str]) -> int:
    """Remove what a switch has left behind; the bytes that this frees. Raises OSError."""
    if now:
        # the one who switched may have died before it was durable
        durable.fsync_file(root / layout.GENERATION)
        durable.fsync_directory(root)
    freed = sum(_unlink(root, root / name) for name in intent.removes if name not in kept)
    for ident in intent.gone:
        freed += _unlink(root, root / layout.run_log(ident))
        for path in layout.notes(root, ident):
            freed += _unlink(root, path)
    for path in root.glob(f"{layout.POINTS}.*"):
        older = path.name.removeprefix(f"{layout.POINTS}.")
        if NUMBER.fullmatch(older) and int(older) < now and not path.is_symlink():
            shutil.rmtree(path)
    if now:
        # the directory itself stays: it tells a set
        for path in generation.manifests(root / layout.POINTS):
            freed += _unlink(root, path)
    for folder in (root, root / layout.CHECKPOINTS):
        if folder.is_dir():
            durable.fsync_directory(folder)
    durable.remove_staged(root / f"{layout.REMOVAL_PREFIX}{number}", layout.INTENT)
    return freed


def _unlink(root: Path, path: Path) -> int:
    """Remove a file that may be gone already; the bytes that this frees.

    Raises OSError, RepositoryError for a link on the way.
    """
    try:
        with durable.hold_directory(root, path.parent) as at:
            status = os.stat(path.name, dir_fd=at, follow_symlinks=False)
            os.unlink(path.name, dir_fd=at)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return status.st_blocks * BLOCK if status.st_nlink == 1 else 0


def remove_empty(root: Path, domain: str) -> bool:
    """Remove a domain's set that holds no points any more; False if something is left in it.

    The caller holds its lock, and all removals are finished. Raises OSError.
    """
    for name in (layout.LOGS, layout.CHECKPOINTS, *layout.NOTES):
        if (root / name).is_dir() and not (root / name).is_symlink():
            shutil.rmtree(root / name)
    _unlink(root, root / layout.checkpoint_list(domain))
    _unlink(root, root / layout.READING)
    if (root / layout.SPARE).is_dir() and not (root / layout.SPARE).is_symlink():
        durable.remove_staged(root / layout.SPARE, layout.INTENT)
    mine = {
        layout.GENERATION,
        layout.LOCK,
        layout.points(0),
        layout.points(generation.current(root)),
    }
    if any(each.name not in mine for each in root.iterdir()):
        return False
    for number in (generation.current(root), 0):
        if (root / layout.points(number)).is_dir():
            (root / layout.points(number)).rmdir()
    _unlink(root, root / layout.GENERATION)
    _unlink(root, root / layout.LOCK)
    # moved elsewhere, it may be behind a link
    real = root.resolve()
    real.rmdir()
    durable.fsync_directory(real.parent)
    return True
