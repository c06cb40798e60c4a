"""Which manifests this host has written: their SHA-256, beside the state of the chains.

``<state>/manifests`` holds a line for each: the point's id and the digest. A set lies where others
can write, this file does not. So a point of a known id and another digest is not what was saved
here, however sound it is in itself. A point that is not noted at all tells nothing: another host
wrote it, or it is older than the newest 40,000 or so that are kept.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import IntegrityError, NbdbackupError, RepositoryError
from nbdbackupd.files import open_untrusted
from nbdbackupd.model.chain import RestorePoint

log = logging.getLogger(__name__)
NAME: Final = "manifests"
OLDER: Final = "manifests.old"
MAX_SIZE: Final = 4 << 20
"""Bytes of a file; then it takes the place of the older one."""


class Verdict(StrEnum):
    """Whose a manifest is, as far as this host knows."""

    OURS = "ours"
    CHANGED = "changed"
    UNKNOWN = "unknown"


def note(directory: Path, *points: RestorePoint) -> bool:
    """Note points that were just written; what can't be noted (False) is unknown later, no more."""
    path = directory / NAME
    lines = b"".join(b"%s %s\n" % (_key(each), each.digest.encode()) for each in points)
    try:
        with durable.translate_os_errors("write", path):
            durable.make_directory(directory)
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_size > MAX_SIZE:
                    _make_room(path)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o600)
            try:
                # a line that was cut by a power cut must not swallow this one
                durable.write_all(fd, b"\n" + lines)
                durable.fsync_file(fd)
            finally:
                os.close(fd)
            durable.fsync_directory(directory)
    except NbdbackupError as err:
        log.info("points are not noted as written here: %s", err)
        return False
    return True


def _make_room(path: Path) -> None:
    """Forget digests of manifests that were written anew since; or begin another file.

    Each merge writes those of a whole set. Raises OSError.
    """
    newest = dict(line.split(b" ", 1) for line in _read(path).split(b"\n") if b" " in line)
    data = b"".join(b"%s %s\n" % each for each in newest.items())
    if len(data) < MAX_SIZE // 2:
        durable.write_atomic(path, data)
    else:
        path.replace(path.with_name(OLDER))


def verdict(directories: Iterable[Path], point: RestorePoint) -> Verdict:
    """Whose a point is; ``directories`` are the state directories of this host."""
    return verdicts(directories, [point])[point.id]


def verdicts(directories: Iterable[Path], points: Sequence[RestorePoint]) -> dict[str, Verdict]:
    """Whose some points are, by id."""
    wanted: dict[bytes, set[bytes]] = {_key(each): set() for each in points}
    for directory in directories:
        for name in (OLDER, NAME):
            for line in _read(directory / name).split(b"\n"):
                ident, _, digest = line.partition(b" ")
                if ident in wanted:
                    wanted[ident].add(digest)
    found = {}
    for each in points:
        noted = wanted[_key(each)]
        # a peer's point has no manifest
        if not noted or not each.digest:
            found[each.id] = Verdict.UNKNOWN
        else:
            found[each.id] = Verdict.OURS if each.digest.encode() in noted else Verdict.CHANGED
    return found


def warnings(directories: Sequence[Path], points: Sequence[RestorePoint]) -> tuple[str, ...]:
    """A line for each point that is not what this host wrote."""
    found = verdicts(directories, points)
    return tuple(
        f"point {each.id} is not what this host wrote: its manifest was changed or replaced since "
        f"(SHA-256 {each.digest}, noted is another); if a host with other notes has merged or "
        f"pruned there, 'nbdbackupctl verify --accept' notes it anew"
        for each in points
        if found[each.id] is Verdict.CHANGED
    )


def accept(directories: Iterable[Path], points: Sequence[RestorePoint]) -> tuple[str, ...]:
    """Note points as they are now wherever they are noted otherwise; their ids.

    Raises RepositoryError if they can't be noted.
    """
    accepted = dict[str, None]()
    for directory in directories:
        found = verdicts([directory], points)
        changed = [each for each in points if found[each.id] is Verdict.CHANGED]
        if changed and not note(directory, *changed):
            raise RepositoryError(f"manifests can't be noted in {directory}: see to that directory")
        accepted |= dict.fromkeys(each.id for each in changed)
    return tuple(accepted)


def _key(point: RestorePoint) -> bytes:
    return point.id.encode(errors="surrogateescape")


def _read(path: Path) -> bytes:
    try:
        fd = open_untrusted(path)
    except (OSError, IntegrityError) as err:
        if not isinstance(err, FileNotFoundError | NotADirectoryError):
            log.info("the manifests of this host can't be read: %s", err)
        return b""
    with os.fdopen(fd, "rb") as file:
        return file.read(2 * MAX_SIZE)
