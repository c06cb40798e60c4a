"""A backup set on disk: its points, its lock, its drafts.

A point exists if and only if its manifest lies in the directory of manifests (``generation``).
Reading needs no lock: published files never change. Writing (drafts, sweep) needs it.
"""

import errno
import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import durable, events
from nbdbackupd.errors import (
    ChainBrokenError,
    FormatError,
    IntegrityError,
    RepositoryError,
)
from nbdbackupd.format import manifest
from nbdbackupd.model.chain import BackupSet, Layout, RestorePoint
from nbdbackupd.repo import draft, generation, layout, reading, removing
from nbdbackupd.repo.draft import Draft, Intent
from nbdbackupd.repo.virtnbdbackup.storage import read_small

log = logging.getLogger(__name__)

OURS: Final = frozenset({*layout.DIRECTORIES, layout.GENERATION, "lost+found"})
"""What a directory may hold that has no point yet; hidden names are let be, too."""

SHOWN: Final = 5
CHECKPOINT_XML: Final = "checkpoint-xml"
"""The role of the file that holds the XML of a point's checkpoint."""


@dataclass(frozen=True, slots=True)
class _Leftover:
    """A draft's directory and what it tells; ``is_committed``: its point exists."""

    path: Path
    intent: Intent | None
    is_committed: bool
    names: frozenset[str]


_Identity = tuple[int, ...]


class SetDirectory:
    """One backup set: a directory that may not exist yet.

    While it is locked, a manifest is read once, unless it was changed since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: durable.Lock | None = None
        self._since = 0
        self._read: dict[str, tuple[_Identity, RestorePoint]] = {}

    @classmethod
    def open(cls, path: Path) -> "SetDirectory":
        """A set at a path, which may be missing or empty.

        Raises RepositoryError if the path is something else than a directory.
        """
        with durable.translate_os_errors("open", path):
            if os.path.lexists(path) and not path.is_dir():
                raise RepositoryError(f"{path} is no directory: a backup set is one")
            refuse_links(path)
        return cls(path)

    @property
    def exists(self) -> bool:
        """Whether the directory is there."""
        return self.path.is_dir()

    @property
    def is_empty(self) -> bool:
        """Whether the set holds no restore point. Raises RepositoryError if it can't be read."""
        return not self._manifests()

    def file(self, name: str) -> Path:
        """The path of a file of the set."""
        return self.path / name

    def checkpoint_xml(self, point: RestorePoint | None) -> str:
        """The XML of a point's checkpoint as the set keeps it, or nothing.

        Raises RepositoryError or FormatError if the file can't be read.
        """
        for file in point.files if point is not None else ():
            if file.role == CHECKPOINT_XML:
                data = read_small(self.file(file.name), manifest.MAX_SIZE)
                # damaged, it is no XML either; whoever needs it has other ways
                return data.decode(errors="replace")
        return ""

    def log_path(self, run_id: str) -> Path:
        """Where a run's log goes."""
        return self.path / layout.run_log(run_id)

    @contextmanager
    def lock(
        self,
        *,
        owner: str,
        wait: durable.Wait = durable.NO_WAIT,
    ) -> Iterator[None]:
        """Hold the set's lock; makes the directory if it is missing.

        ``owner`` is what others are told, "backup of vm1".
        Raises BusyError that names the holder, RepositoryError or NoSpaceError if the directory
        can't be written.
        """
        with durable.translate_os_errors("create", self.path):
            durable.make_directory(self.path)
            refuse_links(self.path)
        lock = durable.Lock(self.file(layout.LOCK), owner=owner, wait=wait)
        with durable.translate_os_errors("lock", lock.path):
            lock.__enter__()
        self._lock, self._since = lock, _changed(lock.path)
        try:
            yield
        finally:
            self._lock, self._since = None, 0
            self._read.clear()
            lock.__exit__(None, None, None)

    def load(self) -> BackupSet:
        """All points of the set, digests and links proven.

        Raises IntegrityError or FormatError (a manifest is damaged or not of its name),
        ChainBrokenError (points do not hang together), RepositoryError (can't be read).
        """
        return generation.stable(self.path, self.load_from)

    def load_from(self, folder: Path) -> BackupSet:
        """As ``load``, by the manifests in that directory."""
        points = [self._load_point(folder, name) for name in generation.names(folder)]
        try:
            return BackupSet.from_points(points)
        except ChainBrokenError as err:
            err.fields.setdefault("set", self.path)
            raise

    def load_sound(self) -> tuple[BackupSet, tuple[str, ...]]:
        """The points whose manifests and links are sound, and a line for each that is not.

        For showing and restoring what is left of a damaged set, never for adding to it. It holds
        none if nothing tells where its manifests are. Raises RepositoryError if the set can't be
        read.
        """
        try:
            return generation.stable(self.path, self._load_sound)
        except IntegrityError as err:
            return BackupSet(()), (str(err),)

    def _load_sound(self, folder: Path) -> tuple[BackupSet, tuple[str, ...]]:
        found, problems = [], []
        for name in generation.names(folder):
            try:
                found.append(self._load_point(folder, name))
            except FormatError as err:
                problems.append(str(err))
        known, broken = BackupSet.from_sound(found)
        return known, (*problems, *broken)

    def foreign_files(self) -> list[str]:
        """Names of what a directory without points holds that is not of this program, sorted.

        Raises RepositoryError if it can't be read.
        """
        with durable.translate_os_errors("read", self.path):
            names = sorted(entry.name for entry in self.path.iterdir())
        # The next sweep removes what a killed first run has published in part.
        swept = {name for each in self._read_leftovers() for name in each.names}
        swept.add(generation.directory(self.path).name)
        return [
            name
            for name in names
            if name not in OURS and name not in swept and not name.startswith(".")
        ]

    def check_can_begin(self) -> None:
        """Refuse a directory without points that holds files of others: no mixtures.

        Raises RepositoryError.
        """
        if not self.exists or not self.is_empty:
            return
        foreign = self.foreign_files()
        if not foreign:
            return
        advice = "give an empty or new directory with -o"
        if any(name.endswith((".data", ".data.partial")) for name in foreign):
            raise RepositoryError(
                f"{self.path} holds backup files without manifests ({_some(foreign)}), as "
                f"virtnbdbackup makes them: {advice}, or go on with them after "
                f"'nbdbackupctl import {self.path}'"
            )
        raise RepositoryError(f"{self.path} holds files of others ({_some(foreign)}): {advice}")

    def check_present(self, points: Iterable[RestorePoint]) -> None:
        """Prove cheaply that all files of these points are there.

        Manifests are checked by their digests, other files by their sizes; ``verify`` is what
        reads contents. Raises ChainBrokenError if files are missing, IntegrityError if sizes or
        manifests are wrong; both name them.
        """
        self.check_files(points, generation.directory(self.path))

    def check_all(self) -> None:
        """``check_present`` for all points as they are now; also while points leave the set."""
        generation.stable(
            self.path, lambda folder: self.check_files(self.load_from(folder).points, folder)
        )

    def check_files(self, points: Iterable[RestorePoint], folder: Path) -> None:
        """As ``check_present``, by the manifests in that directory."""
        missing, damaged = [], []
        root = os.fspath(self.path)
        for point in points:
            name = layout.manifest(point.sequence, point.id)
            if _regular_size(f"{folder}/{name}") is None:
                missing.append(f"{folder.name}/{name}")
            elif self._load_point(folder, name).digest != point.digest:
                damaged.append(f"{folder.name}/{name}")
            for name, size in manifest.file_names(point).items():
                found = _regular_size(f"{root}/{name}")
                if found is None:
                    missing.append(name)
                elif found != size:
                    damaged.append(f"{name} ({found} bytes instead of {size})")
        if missing:
            raise ChainBrokenError(f"{self.path} lacks files of its points: {_some(missing)}")
        if damaged:
            raise IntegrityError(f"{self.path} holds damaged files: {_some(damaged)}")

    @contextmanager
    def draft(self, intent: Intent) -> Iterator[Draft]:
        """A new draft, its intent durable; removed on every way out, published or not.

        Needs the lock. Raises RepositoryError (a directory with foreign files, a run of that id)
        or NoSpaceError.
        """
        self._require_lock()
        self.check_can_begin()
        made = Draft(self.path, intent, self.load, self._read_back)
        with durable.translate_os_errors("create", made.path):
            self._begin(made)
        try:
            yield made
            if made.published:
                self._write_derived()
        finally:
            # A draft whose files could not be taken back is what the next sweep needs.
            if not made.is_stuck:
                self._remove_draft(made.path)

    def _begin(self, made: Draft) -> None:
        """Make a draft's directory and its intent, durably; what is left of one is used again.

        Raises OSError.
        """
        reading.make(self.path)
        spare, intent = self.path / layout.SPARE, made.path / layout.INTENT
        if spare.is_dir():
            durable.rename(spare, made.path)
            try:
                durable.write_atomic(intent, made.intent.pack(), mode=0o600)
            except OSError:
                # it can't be replaced, so it stays for good
                durable.rename(made.path, spare)
        if not made.path.is_dir():
            made.path.mkdir(mode=0o700)
            try:
                durable.write_atomic(intent, made.intent.pack(), mode=0o600)
            except BaseException:
                self._remove_draft(made.path)
                raise
        durable.fsync_directory(self.path)

    def _read_back(self, point: RestorePoint) -> None:
        """See that the set holds a point, as all who read the set will find it.

        Raises RepositoryError.
        """
        try:
            known = self.load()
            if point.digest not in {each.digest for each in known.points}:
                raise IntegrityError("it is not among the points of the set", point=point.id)
            self.check_present([point])
        except (FormatError, RepositoryError) as err:
            raise RepositoryError(
                f"{self.path} does not give back the restore point that was just written there, "
                f"so it is not kept: {err.message}; see to that storage, or give another -o"
            ) from err

    @contextmanager
    def removal(self, intent: removing.Intent) -> Iterator[removing.Removal]:
        """Let points leave the set; needs the lock, and that ``sweep_removals`` came before.

        Raises RepositoryError or NoSpaceError; then, as after any error before the switch, the set
        is what it was.
        """
        self._require_lock()
        with removing.begun(self.path, intent, self._proven) as made:
            yield made
        self._write_derived()

    def _proven(self, folder: Path) -> BackupSet:
        known = self.load_from(folder)
        self.check_files(known.points, folder)
        return known

    def sweep_removals(self) -> removing.Cleaned:
        """Undo or finish what removals of points have left; needs the lock.

        Raises IntegrityError, ChainBrokenError if a point's manifest is damaged (then nothing is
        removed), RepositoryError.
        """
        self._require_lock()
        if not removing.unfinished(self.path):
            return removing.Cleaned()
        self._remove_temporary()
        kept = {name for point in self.load().points for name in all_names(point)}
        return removing.sweep(self.path, kept)

    def remove_empty(self, domain: str) -> bool:
        """Remove the set after its last point has left; needs the lock.

        What dead runs left goes, too: no run goes on with it. False if it holds what is of others.
        Raises as ``sweep``, and RepositoryError.
        """
        self.sweep()
        with durable.translate_os_errors("remove", self.path):
            return removing.remove_empty(self.path, domain)

    def begun_for(self) -> list[str]:
        """The UUIDs of domains for which somebody has begun a point, alive or dead; no lock."""
        return [each.intent.uuid for each in self._read_leftovers() if each.intent is not None]

    def dead_runs(self) -> list[Intent]:
        """The intents of runs that died before their point existed; needs the lock.

        Undo what they did outside of the set (checkpoints, jobs) before ``sweep`` forgets them.
        """
        return [
            found.intent
            for found in self._leftovers()
            if found.intent is not None and not found.is_committed
        ]

    def sweep(self) -> list[Intent]:
        """Remove what dead runs left in the set and return their intents; needs the lock.

        Removed are drafts, the files that a draft's manifest names and no point does, and
        temporary files; nothing else. Files derived from the points are written anew.

        What can't be removed stays: an append-only target has to do without. Raises
        IntegrityError if a point's manifest is damaged (then nothing is removed).
        """
        found = self._leftovers()
        # Also loaded without leftovers: the derived files come from it.
        points = self.load().points
        kept = {name for point in points for name in all_names(point)}
        for leftover in found:
            try:
                for name in sorted(leftover.names - kept):
                    self._remove_leftover(name, leftover.path)
                durable.fsync_directory(self.path)
                draft.remove(leftover.path)
            except OSError as err:
                self._tell_stuck(leftover, err)
            else:
                events.emit(log, events.DEAD_RUN_SWEPT, reason=leftover.path)
        self._remove_temporary()
        try:
            left = self.sweep_removals()
            if left.reason:
                log.info("old files of %s are removed later: %s", self.path, left.reason)
        except RepositoryError as err:
            # no run fails for it: what can't be removed is of no point
            log.warning("what a removal left stays: %s", err.message)
        if points:
            self._write_derived()
        return [each.intent for each in found if each.intent and not each.is_committed]

    def _require_lock(self) -> None:
        if self._lock is None or not self._lock.is_held:
            raise RuntimeError("the set is to be changed without its lock")

    def _manifests(self) -> list[str]:
        return generation.stable(self.path, generation.names) if self.exists else []

    def _load_point(self, folder: Path, name: str) -> RestorePoint:
        if not self._since:
            return self._read_point(folder / name)
        path = f"{folder}/{name}"
        identity = _identity(path)
        known = self._read.get(path)
        if known is not None and known[0] == identity:
            return known[1]
        point = self._read_point(folder / name)
        # only then is each later change of another tick of the clock
        if identity and identity[-1] < self._since:
            self._read[path] = identity, point
        return point

    def _read_point(self, path: Path) -> RestorePoint:
        point = manifest.parse(read_small(path, manifest.MAX_SIZE), path)
        if not layout.is_same(path.name, layout.manifest(point.sequence, point.id)):
            raise IntegrityError(
                "manifest has the name of another point", file=path, point=point.id
            )
        return point

    def _leftovers(self) -> list[_Leftover]:
        self._require_lock()
        return self._read_leftovers()

    def _read_leftovers(self) -> list[_Leftover]:
        committed = self._manifests()
        with durable.translate_os_errors("read", self.path):
            return [
                _read_leftover(path, committed)
                for path in sorted(self.path.glob(f"{layout.DRAFT_PREFIX}*"))
                if path.is_dir() and not path.is_symlink()
            ]

    def _remove_leftover(self, name: str, folder: Path) -> None:
        # What still lies in the draft was never renamed: the set's file of that name is another.
        if _regular_size(folder / name) is None and _regular_size(self.file(name)) is not None:
            log.info("removing %s, which no restore point names", self.file(name))
            self.file(name).unlink()

    def _remove_draft(self, path: Path) -> None:
        """Remove a draft; where nothing can be removed, an empty one is kept for the next run."""
        try:
            draft.remove(path)
        except OSError as err:
            spare = self.path / layout.SPARE
            try:
                if draft.is_used_up(path) and not os.path.lexists(spare):
                    durable.rename(path, spare)
                    return
            except OSError as again:
                log.debug("%s can't be kept as a spare: %s", path, again.strerror)
            log.warning("%s can't be removed (%s), the next run tries it", path, err.strerror)

    def _tell_stuck(self, leftover: _Leftover, err: OSError) -> None:
        where = f"{leftover.path} of an earlier run can't be removed: {err.strerror}"
        if leftover.is_committed and draft.is_used_up(leftover.path):
            log.info("%s; nothing is in it", where)
        else:
            log.warning("%s; remove it by hand", where)

    def _remove_temporary(self) -> None:
        below = (generation.directory(self.path).name, layout.CHECKPOINTS, layout.VERIFIED)
        for folder in (self.path, *(self.path / name for name in below)):
            for path in folder.glob(f"{durable.TEMPORARY_PREFIX}*"):
                try:
                    path.unlink(missing_ok=True)
                except OSError as err:
                    log.info("%s can't be removed: %s", path, err.strerror)

    def _write_derived(self) -> None:
        """Write what others read and we don't need: a failure costs a warning, not the point."""
        try:
            known = self.load()
            if known.full is None:
                return
            names = [point.checkpoint for point in known.points if point.checkpoint]
            data = json.dumps(names).encode()
            path = self.file(layout.checkpoint_list(known.full.domain))
            with durable.translate_os_errors("write", path):
                if not path.is_file() or read_small(path, manifest.MAX_SIZE) != data:
                    _replace(path, data)
        except (RepositoryError, FormatError) as err:
            log.warning("the list of checkpoints is not written: %s", err)


def _replace(path: Path, data: bytes) -> None:
    """Write a file that can be made again, also where no file can be renamed onto another."""
    try:
        durable.write_atomic(path, data, mode=0o600)
    except OSError as err:
        if err.errno not in (errno.EPERM, errno.EACCES, errno.EEXIST, errno.ENOTSUP):
            raise
        path.unlink(missing_ok=True)
        durable.write_atomic(path, data, mode=0o600)


def refuse_links(path: Path) -> None:
    """Refuse a set whose own directories are symbolic links. Raises RepositoryError."""
    durable.refuse_links(path, *(path / name for name in layout.DIRECTORIES))


def all_names(point: RestorePoint) -> list[str]:
    """Every file of a point but its manifest."""
    sums = [layout.checksum(disk.file) for disk in point.disks if disk.layout is Layout.STREAM]
    return [*manifest.file_names(point), *sums]


def _read_leftover(path: Path, committed: list[str]) -> _Leftover:
    intent, names = None, frozenset[str]()
    try:
        if (path / layout.INTENT).exists():
            intent = Intent.parse(read_small(path / layout.INTENT, draft.MAX_INTENT))
        if (path / layout.DRAFT_MANIFEST).exists():
            data = read_small(path / layout.DRAFT_MANIFEST, manifest.MAX_SIZE)
            names = frozenset(all_names(manifest.parse(data)))
    except FormatError as err:
        log.warning("%s is damaged, some of its traces may stay: %s", path, err)
    done = intent is not None and any(
        layout.names_point(name, intent.point_id) for name in committed
    )
    return _Leftover(path, intent, done, names)


def _identity(path: Path | str) -> _Identity:
    """What another file of that name, or other bytes of the same one, differ in; empty for none."""
    try:
        found = os.lstat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _changed(path: Path) -> int:
    """When a file was changed last, by the clock of its file system; 0 if that is not known."""
    found = _identity(path)
    return found[-1] if found else 0


def _regular_size(path: Path | str) -> int | None:
    with durable.translate_os_errors("read", path):
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
