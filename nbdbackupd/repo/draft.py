"""A restore point that is being made, and the steps by which it becomes one.

A draft is the directory ``.draft-<run id>`` within the set. Its ``intent.json`` is durable before
anything else happens, so that after a kill the next run knows which checkpoint the dead one may
have made. Publishing goes: every file fsynced, ``manifest.json`` durable in the draft, files
renamed into the set, directories fsynced, manifest renamed into ``points/``, fsynced. Before the
last rename the point does not exist, after it it does; ``manifest.json`` left in a draft tells a
later sweep which files of the set nobody vouches for.
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Final

from nbdbackupd import documents, durable
from nbdbackupd.errors import FormatError, IntegrityError, RepositoryError, SourceError
from nbdbackupd.files import open_sized
from nbdbackupd.format import manifest
from nbdbackupd.model.chain import BackupSet, Layout, RestorePoint, StoredFile
from nbdbackupd.repo import generation, layout

log = logging.getLogger(__name__)

CHUNK: Final = 1 << 20
MAX_INTENT: Final = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """What a run is about to do: enough to undo it after its death.

    ``checkpoint`` is the name that the run's libvirt checkpoint will have, empty if it makes none.
    """

    uuid: str
    domain: str
    chain: str
    checkpoint: str
    run_id: str
    point_id: str

    def pack(self) -> bytes:
        """The JSON of ``intent.json``."""
        return json.dumps(asdict(self), sort_keys=True, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> "Intent":
        """Read ``intent.json``. Raises FormatError."""
        try:
            found = documents.parse_json(data)
        except ValueError as err:
            raise FormatError(f"intent of a dead run is damaged: {err}") from err
        names = {each.name for each in fields(cls)}
        if (
            not isinstance(found, dict)
            or set(found) != names
            or not all(isinstance(value, str) for value in found.values())
        ):
            raise FormatError("intent of a dead run is damaged")
        return cls(**found)


class Draft:
    """The files of a point to be; made and removed by ``SetDirectory.draft``.

    Files get mode 0600: a domain's XML holds secrets, and so may every block of its disks.
    """

    def __init__(
        self,
        root: Path,
        intent: Intent,
        load: Callable[[], BackupSet],
        read_back: Callable[[RestorePoint], None],
    ) -> None:
        self.intent = intent
        self.path = root / layout.draft(intent.run_id)
        self.published = False
        self.is_stuck = False
        self._root = root
        self._load = load
        self._read_back = read_back
        self._names: set[str] = set()
        self._shared: dict[str, StoredFile] = {}

    def create(self, name: str) -> Path:
        """The path for a file that the caller writes; it does not exist yet.

        Every such file must be in the manifest in the end, or be given up with ``discard``.
        """
        path = self._place(name)
        self._names.add(name)
        return path

    def discard(self, name: str) -> None:
        """Give up a file of the draft."""
        self._names.discard(name)
        with durable.translate_os_errors("remove", self.path / name):
            self._place(name).unlink(missing_ok=True)

    def adopt(self, name: str, role: str, *, disk: str = "") -> StoredFile:
        """Describe a file of the draft that the caller has written (an index): size, SHA-256.

        Raises RepositoryError if it can't be read.
        """
        path = self._place(name)
        self._names.add(name)
        with durable.translate_os_errors("read", path), path.open("rb") as file:
            durable.set_mode(path, 0o600, file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return StoredFile(name, role, os.fstat(file.fileno()).st_size, digest, "", disk)

    def add_bytes(
        self,
        name: str,
        data: bytes,
        role: str,
        *,
        mode: int = 0o600,
        origin: str = "",
        disk: str = "",
    ) -> StoredFile:
        """Write a small file. Raises NoSpaceError or RepositoryError."""
        path = self.create(name)
        with durable.translate_os_errors("write", path):
            fd = durable.create_exclusive(path, mode)
            try:
                durable.write_all(fd, data)
            finally:
                os.close(fd)
        digest = hashlib.sha256(data).hexdigest()
        return StoredFile(name, role, len(data), digest, origin, disk)

    def copy_file(
        self, name: str, source: Path, role: str, *, mode: int = 0o600, disk: str = ""
    ) -> StoredFile:
        """Copy a regular file of the host in one pass; ``origin`` becomes its absolute path.

        Raises SourceError if it can't be read, NoSpaceError or RepositoryError if not written.
        """
        path = self.create(name)
        reading = _open_regular(source)
        try:
            with durable.translate_os_errors("write", path):
                fd = durable.create_exclusive(path, mode)
                try:
                    size, digest = _copy(reading, fd, source)
                finally:
                    os.close(fd)
        finally:
            os.close(reading)
        return StoredFile(name, role, size, digest, os.fspath(source.absolute()), disk)

    def share(self, source: Path, role: str, held: Iterable[StoredFile]) -> StoredFile | None:
        """The file of ``held``, of earlier points of this set, that is a copy of ``source`` by now.

        Both are read, so a damaged one is not shared. None: it is to be copied. Raises SourceError
        if ``source`` can't be read.
        """
        reading = _open_regular(source)
        try:
            size = os.fstat(reading).st_size
            like = {each for each in held if (each.role, each.size) == (role, size)}
            digest = _digest(reading, source) if like else ""
        finally:
            os.close(reading)
        for each in sorted(like, key=lambda one: one.name):
            if each.sha256 == digest and self._is_sound(each):
                self._shared[each.name] = each
                return replace(each, origin=os.fspath(source.absolute()))
        return None

    def _is_sound(self, stored: StoredFile) -> bool:
        path = self._root / stored.name
        try:
            reading = open_sized(path, stored.size)
            try:
                digest = _digest(reading, path)
            finally:
                os.close(reading)
        except (IntegrityError, SourceError, OSError) as err:
            log.warning("a file of earlier points can't be used again: %s", err)
            return False
        if digest != stored.sha256:
            log.warning("a file of earlier points is damaged: %s", path)
        return digest == stored.sha256

    def publish(self, point: RestorePoint) -> RestorePoint:
        """Make the point exist, durably and proven by reading it back; return it with its digest.

        After any exception ``published`` tells whether the point exists; if not, the set is as it
        was before. Raises RepositoryError (a file is missing, not of its size or would be
        overwritten), ChainBrokenError (the point does not fit the set), FormatError, NoSpaceError.
        """
        data = manifest.pack(point)
        parsed = manifest.parse(data)
        known = self._load().points
        names = self._complete(parsed, known)
        BackupSet.from_points([*known, parsed])
        target = generation.directory(self._root) / layout.manifest(point.sequence, point.id)
        with durable.translate_os_errors("publish the restore point in", self._root):
            self._prepare(names, data, target)
            try:
                self._rename(names, target)
                self._read_back(parsed)
                self.published = True
            finally:
                if not self.published:
                    self._take_back(names, target)
        log.debug("restore point %s published as %s", point.id, target.name)
        return parsed

    def _place(self, name: str) -> Path:
        base = name.removeprefix(f"{layout.CHECKPOINTS}/")
        if not base or "/" in base or base.startswith("."):
            raise RepositoryError(f"{name!r} is no name of a file of the set")
        if base != name:
            with durable.translate_os_errors("create", self.path / layout.CHECKPOINTS):
                (self.path / layout.CHECKPOINTS).mkdir(mode=0o700, exist_ok=True)
        return self.path / name

    def _complete(self, point: RestorePoint, known: Iterable[RestorePoint]) -> list[str]:
        """The names to publish, after proof that the draft holds just what the manifest says.

        What is shared with points of the set lies there already, and is not of the draft.

        The peer's checksum files are made here: decimal Adler-32 of each stream.
        """
        mine = (self.intent.uuid, self.intent.chain, self.intent.point_id)
        if (point.uuid, point.chain, point.id) != mine:
            raise RepositoryError(f"restore point {point.id} is not what this draft was made for")
        if point.checkpoint not in ("", self.intent.checkpoint):
            raise RepositoryError(f"checkpoint {point.checkpoint} is not the one of the intent")
        sizes = manifest.file_names(point)
        forgotten = self._names - set(sizes)
        if forgotten:
            raise RepositoryError(f"the manifest forgets {', '.join(sorted(forgotten))}")
        for disk in point.disks:
            if disk.layout is Layout.STREAM:
                name = layout.checksum(disk.file)
                text = str(disk.adler32).encode()
                self._names.discard(name)
                with durable.translate_os_errors("write", self.path / name):
                    durable.write_atomic(self.path / name, text, mode=0o600)
                sizes[name] = len(text)
        self._check_shared(sizes, known)
        for name in self._shared:
            sizes.pop(name, None)
        for name, size in sizes.items():
            _check_size(self.path / name, size)
            if os.path.lexists(self._root / name):
                raise RepositoryError(
                    f"{self._root / name} exists and is of no restore point: move it away"
                )
        return sorted(sizes)

    def _check_shared(self, sizes: dict[str, int], known: Iterable[RestorePoint]) -> None:
        """Raises RepositoryError if a shared file is not of a point any more, or not there."""
        held = {(each.name, each.sha256) for point in known for each in point.files}
        for name, stored in self._shared.items():
            if name in sizes and (name, stored.sha256) not in held:
                raise RepositoryError(f"{self._root / name} is of no restore point any more")
            if name in sizes:
                _check_size(self._root / name, stored.size)

    def _prepare(self, names: list[str], data: bytes, target: Path) -> None:
        for name in names:
            durable.fsync_file(self.path / name)
        durable.make_directory(target.parent)
        if any("/" in name for name in names):
            durable.make_directory(self._root / layout.CHECKPOINTS)
            durable.fsync_directory(self.path / layout.CHECKPOINTS)
        # Durable before the first rename: from here on a sweep knows whose files these are.
        durable.write_atomic(self.path / layout.DRAFT_MANIFEST, data, mode=0o600)

    def _rename(self, names: list[str], target: Path) -> None:
        for name in names:
            _move(self.path / name, self._root / name)
        durable.fsync_directory(self._root)
        if any("/" in name for name in names):
            durable.fsync_directory(self._root / layout.CHECKPOINTS)
        _move(self.path / layout.DRAFT_MANIFEST, target)
        durable.fsync_directory(target.parent)

    def _take_back(self, names: list[str], target: Path) -> None:
        """Undo the renames, the manifest first; what can't be undone is left to the next sweep."""
        try:
            _move_back(target, self.path / layout.DRAFT_MANIFEST)
            durable.fsync_directory(target.parent)
            for name in names:
                _move_back(self._root / name, self.path / name)
        except OSError as err:
            self.is_stuck = True
            log.warning("unpublished files stay in %s until the next run: %s", self._root, err)


def _move(source: Path, target: Path) -> None:
    # Under the set's lock nobody of us makes files here; this guards against strangers.
    if os.path.lexists(target):
        raise RepositoryError(f"{target} exists and is of no restore point: move it away")
    durable.rename(source, target)


def _move_back(target: Path, source: Path) -> None:
    if os.path.lexists(target) and not os.path.lexists(source):
        durable.rename(target, source)


def _check_size(path: Path, size: int) -> None:
    try:
        status = path.lstat()
    except OSError as err:
        raise RepositoryError(f"the new point lacks {path.name}: {err.strerror}") from err
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise IntegrityError(
            "file of the point is not what was written", file=path, size=status.st_size, told=size
        )


def _open_regular(source: Path) -> int:
    try:
        # O_NONBLOCK: opening a pipe must not wait for somebody to write to it.
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise SourceError(f"can't read {source}: {err.strerror}") from err
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SourceError(f"can't save {source}: it is no regular file")
    return fd


def _copy(reading: int, writing: int, source: Path) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    for part in _parts(reading, source):
        digest.update(part)
        durable.write_all(writing, part)
        size += len(part)
    return size, digest.hexdigest()


def _digest(reading: int, source: Path) -> str:
    digest = hashlib.sha256()
    for part in _parts(reading, source):
        digest.update(part)
    return digest.hexdigest()


def _parts(reading: int, source: Path) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(reading, CHUNK)
        except OSError as err:
            raise SourceError(f"can't read {source}: {err.strerror}") from err
        if not part:
            return
        yield part


def remove(path: Path) -> None:
    """Remove a draft's directory, its intent last: a kill on the way loses no knowledge.

    Raises OSError.
    """
    if not path.is_dir():
        return
    durable.remove_staged(path, layout.INTENT)


def is_used_up(path: Path) -> bool:
    """Whether nothing of the point is in a draft's directory any more, but its intent."""
    return all(
        each.name == layout.INTENT or (each.name == layout.CHECKPOINTS and not any(each.iterdir()))
        for each in path.iterdir()
    )
