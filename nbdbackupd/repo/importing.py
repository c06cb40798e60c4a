"""Making a set ours: files and manifests are prepared aside and appear all at once.

Everything is made in ``.import`` within the set. Then ``names.json`` there, durable, says which
files are to be moved into the set, they are moved, and at last the directory of manifests: until
that rename the set is what it was, and what a kill leaves is removed by the next import.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdbackupd import documents, durable
from nbdbackupd.errors import FormatError, RepositoryError
from nbdbackupd.format import manifest
from nbdbackupd.model.chain import BackupSet, RestorePoint
from nbdbackupd.repo import layout
from nbdbackupd.repo.virtnbdbackup.storage import read_small

STAGE: Final = ".import"
NAMES: Final = "names.json"
MAX_LIST: Final = 64 << 20


class Stage:
    """The directory in which an import is prepared; made and removed by ``staged``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / STAGE

    def place(self, name: str) -> Path:
        """Where a file of that name within the set is to be made.

        Raises RepositoryError for a name that can't be.
        """
        base = name.removeprefix(f"{layout.CHECKPOINTS}/")
        if not base or "/" in base or base.startswith(".") or base == NAMES:
            raise RepositoryError(f"{name!r} is no name of a file of a set")
        path = self.path / name
        with durable.translate_os_errors("create", path.parent):
            path.parent.mkdir(mode=0o700, exist_ok=True)
        return path

    def commit(self, points: Sequence[RestorePoint]) -> BackupSet:
        """Make the set ours: all points exist on return, durably, or none.

        ``points`` are parents first, their links without digests. Raises RepositoryError (a file
        of that name is there already), FormatError, ChainBrokenError, NoSpaceError.
        """
        with durable.translate_os_errors("import into", self.root):
            names = self._names()
            known = self._write_manifests(points)
            durable.write_atomic(self.path / NAMES, json.dumps(names).encode(), mode=0o600)
            for name in names:
                durable.fsync_file(self.path / name)
            if any("/" in name for name in names):
                durable.make_directory(self.root / layout.CHECKPOINTS)
            for name in names:
                target = self.root / name
                if os.path.lexists(target):
                    raise RepositoryError(f"{target} exists and is of no restore point: move it")
                durable.rename(self.path / name, target)
            durable.fsync_directory(self.root)
            if (self.root / layout.CHECKPOINTS).is_dir():
                durable.fsync_directory(self.root / layout.CHECKPOINTS)
            # the point of no return
            durable.rename(self.path / layout.POINTS, self.root / layout.POINTS)
            durable.fsync_directory(self.root)
        return known

    def _names(self) -> list[str]:
        """What is to be moved into the set."""
        found = []
        for directory, below, files in os.walk(self.path):
            below[:] = [each for each in below if each != layout.POINTS]
            found += [str(Path(directory, each).relative_to(self.path)) for each in files]
        return sorted(found)

    def _write_manifests(self, points: Sequence[RestorePoint]) -> BackupSet:
        folder = self.path / layout.POINTS
        folder.mkdir(mode=0o700)
        digests: dict[str, str] = {}
        written = []
        for point in points:
            linked = replace(point, parent_digest=digests.get(point.parent, ""))
            data = manifest.pack(linked)
            parsed = manifest.parse(data)
            digests[point.id] = parsed.digest
            written.append(parsed)
            path = folder / layout.manifest(point.sequence, point.id)
            durable.write_atomic(path, data, mode=0o600)
        durable.fsync_directory(folder)
        return BackupSet.from_points(written)


@contextmanager
def staged(root: Path) -> Iterator[Stage]:
    """An empty stage in a set, gone at the end; what a dead import left is removed before.

    The caller holds the set's lock. Raises RepositoryError, NoSpaceError.
    """
    stage = Stage(root)
    with durable.translate_os_errors("write", root):
        _clear(stage)
        stage.path.mkdir(mode=0o700)
        durable.fsync_directory(root)
    try:
        yield stage
    finally:
        with durable.translate_os_errors("clean up", root):
            _clear(stage)


def _clear(stage: Stage) -> None:
    """Remove the stage, and unless the points exist what had been moved out of it."""
    if not stage.path.is_dir():
        return
    listed = stage.path / NAMES
    if listed.is_file() and (stage.path / layout.POINTS).is_dir():
        for name in _listed(listed):
            if not os.path.lexists(stage.path / name):
                (stage.root / name).unlink(missing_ok=True)
    shutil.rmtree(stage.path)


def _listed(path: Path) -> list[str]:
    try:
        names = documents.parse_json(read_small(path, MAX_LIST))
    except ValueError as err:
        raise FormatError("list of a dead import is damaged", file=path) from err
    safe = isinstance(names, list) and all(
        isinstance(name, str)
        and "/" not in name.removeprefix(f"{layout.CHECKPOINTS}/")
        and not name.startswith(".")
        for name in names
    )
    if not safe:
        raise FormatError("list of a dead import is damaged", file=path)
    found: list[str] = names
    return found
