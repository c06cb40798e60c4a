"""What ``status`` has found in sets, kept for as long as the same bytes lie there.

All that says something of a domain's sets is read each time: manifests, and the notes beside them.
What follows from these bytes is kept under their SHA-256 in ``<state>/summaries`` of this host. So
no summary can be stale, a set has no say in it, and one that is damaged anywhere has none. Only
``status`` looks here: what changes, restores or proves a set takes the manifests themselves.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from nbdbackupd import __version__, documents, durable
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.errors import IntegrityError, NbdbackupError
from nbdbackupd.files import open_untrusted, read_own
from nbdbackupd.format import manifest
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.model.host import Host
from nbdbackupd.ops.removal.live import noted_chains
from nbdbackupd.ops.retention import history
from nbdbackupd.ops.retention.history import Unwanted
from nbdbackupd.ops.sets import homes
from nbdbackupd.ops.sets.holdings import Holdings
from nbdbackupd.ops.sets.sets import DomainSet, sets_of
from nbdbackupd.ops.status import status
from nbdbackupd.ops.status.status import Stored
from nbdbackupd.repo import generation, layout, protected
from nbdbackupd.repo.boot_tests import BootTest
from nbdbackupd.repo.virtnbdbackup.storage import read_small

log = logging.getLogger(__name__)
NAME: Final = "summaries"
MAX_SIZE: Final = 16 << 20
MAX_KEPT: Final = 10_000
"""Two or three for each domain."""
TROUBLE: Final = (NbdbackupError, OSError)


class Summaries:
    """Those of this host; ``save`` writes what is new."""

    def __init__(self, directory: Path) -> None:
        """``directory`` is the host's own state directory."""
        self._path = directory / NAME
        self._held = _read(self._path)
        self._used: dict[str, Any] = {}
        self._seen: dict[Path, str] = {}

    def save(self, *, is_all: bool) -> None:
        """Write all that were used; others stay, too, unless these are of all domains.

        What can't be written, or has no directory yet, is found out again the next time.
        """
        if self._used.keys() <= self._held.keys() or not self._path.parent.is_dir():
            return
        kept = self._used if is_all else {**self._held, **self._used}
        kept = dict(list(kept.items())[-MAX_KEPT:])
        body = json.dumps({"program": __version__, "found": kept}).encode()
        try:
            durable.write_atomic(self._path, b"%s\n%s" % (_digest(body), body))
        except TROUBLE as err:
            log.debug("what status has found is not kept in %s: %s", self._path, err)

    def owner(self, home: Path) -> str:
        """As ``homes.owner``, of the sets in a directory. Raises RepositoryError."""
        known = self._get(key := self._key([home], "owner"))
        if known is not None:
            return str(known)
        sets = sets_of(home)
        found = homes.owner(sets)
        if found and not any(each.problems for each in sets):
            self._add(key, found, [home], "owner")
        return found

    def stored(self, directory: Path, uuid: str, more: Sequence[Path]) -> Stored:
        """As ``status.stored``, which tells what fails; ``sets`` is empty of what was known."""
        places = [*more, directory]
        known = self._get(key := self._key(places, "stored", uuid))
        if known is not None:
            with suppress(*TROUBLE, ValueError, TypeError, KeyError):
                return _stored(known)
        found = status.stored(directory, uuid, *more)
        if found.newest is not None and not found.problem and not found.damage:
            self._add(key, _pack(found, found.newest), places, "stored", uuid)
        return found

    def look(
        self,
        directory: Path,
        uuid: str,
        more: Sequence[Path],
        settings: DomainSettings,
        host: Host,
    ) -> tuple[Stored, Unwanted]:
        """What a domain's sets hold, and what a prune would remove of them."""
        found = self.stored(directory, uuid, more)
        rules = history.rules_of(settings)
        if found.newest is None or not rules.are_set:
            return found, Unwanted()
        places = [*more, directory]
        chains = noted_chains(found.uuids, history.state_dirs_of(settings, host))
        # points are of days and weeks of the host's zone
        zone = repr((time.tzname, time.timezone))
        words = ("unwanted", uuid, repr(rules), repr(sorted(chains)), zone)
        is_timeless = found.instant is not None and found.instant <= host.now()
        known = self._get(self._key(places, *words)) if is_timeless else None
        if known is not None:
            return found, Unwanted(points=known[0], size=known[1])
        whole = found if found.sets else status.stored(directory, uuid, *more)
        result = history.unwanted(whole.sets, settings, host)
        if not whole.damage and _is_timeless(whole.sets, host):
            self._add(self._key(places, *words), [result.points, result.size], places, *words)
        return found, result

    def _get(self, key: str) -> Any:
        if key in self._held:
            self._used[key] = self._held[key]
        return self._used.get(key)

    def _key(self, places: Sequence[Path], *words: str) -> str:
        """What a summary is kept under; empty if something can't be read as it should."""
        for each in places:
            if each not in self._seen:
                self._seen[each] = _fingerprint(each)
        return _key([self._seen[each] for each in places], words)

    def _add(self, key: str, value: Any, places: Sequence[Path], *words: str) -> None:
        # a set that was changed while it was read may have been found otherwise
        if key and key == _key([_fingerprint(each) for each in places], words):
            self._used[key] = value


def _key(prints: Sequence[str], words: Sequence[str]) -> str:
    if not all(prints):
        return ""
    return hashlib.sha256(json.dumps([prints, words]).encode()).hexdigest()


def _is_timeless(sets: Sequence[DomainSet], host: Host) -> bool:
    """Whether what the rules want stays so until a set changes.

    Not if a protection may run out, nor with points of the future.
    """
    now = host.now()
    points = [(each, point) for each in sets for point in each.known.points]
    return all(datetime.fromisoformat(point.created) <= now for _, point in points) and not any(
        protected.read(each.path, [point.id for point in each.known.points]) for each in sets
    )


def _fingerprint(directory: Path) -> str:
    """A digest of all bytes that say something of the sets in a directory; empty without."""
    found = hashlib.sha256(os.fsencode(directory))
    with suppress(FileNotFoundError):
        try:
            for entry in sorted(os.scandir(directory), key=lambda each: each.name):
                if entry.name.startswith("."):
                    continue
                kind = "link" if entry.is_symlink() else "set" if entry.is_dir() else "file"
                _feed(found.update, f"{kind} {entry.name}", b"")
                if kind != "file":
                    _add_set(found.update, Path(entry.path))
        except FileNotFoundError:
            raise
        except TROUBLE as err:
            log.debug("no summary of %s: %s", directory, err)
            return ""
    return found.hexdigest()


def _add_set(update: Callable[[bytes], None], root: Path) -> None:
    points = layout.points(generation.current(root))
    for folder in (points, *layout.NOTES):
        try:
            at = os.open(root / folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            _feed(update, folder, b"")
            for name in sorted(entry.name for entry in os.scandir(at)):
                is_read = name.endswith(layout.MANIFEST_SUFFIX) and name[0] != "."
                _feed(update, name, _content(name, at) if is_read else b"")
        finally:
            os.close(at)


def _content(name: str, at: int) -> bytes:
    fd = open_untrusted(name, at=at)
    try:
        data = os.read(fd, os.fstat(fd).st_size + 1)
        # what is larger is nothing of ours, and what grows is not done
        if len(data) != os.fstat(fd).st_size or len(data) > manifest.MAX_SIZE:
            raise IntegrityError("it was changed while it was read, or is too large", file=name)
        return data
    finally:
        os.close(fd)


def _feed(update: Callable[[bytes], None], name: str, data: bytes) -> None:
    raw = os.fsencode(name)
    update(b"%d %d\n%s%s" % (len(raw), len(data), raw, data))


def _pack(found: Stored, newest: RestorePoint) -> dict[str, Any]:
    return {
        "directory": str(found.directory),
        "set": found.set,
        "manifest": layout.manifest(newest.sequence, newest.id),
        "digest": newest.digest,
        "size": found.size,
        "points": found.points,
        "all": asdict(found.all),
        "uuids": found.uuids,
        "test": found.test.to_json() if found.test is not None else None,
    }


def _stored(known: dict[str, Any]) -> Stored:
    """Raises IntegrityError if the newest point is not there any more."""
    root = Path(known["directory"], known["set"])
    path = generation.directory(root) / known["manifest"]
    newest = manifest.parse(read_small(path, manifest.MAX_SIZE), path)
    if newest.digest != known["digest"]:
        raise IntegrityError("it was replaced meanwhile", file=path)
    return Stored(
        directory=root.parent,
        set=root.name,
        newest=newest,
        size=known["size"],
        points=known["points"],
        all=Holdings(**{**known["all"], "damage": ()}),
        uuids=tuple(known["uuids"]),
        test=BootTest(**known["test"]) if known["test"] is not None else None,
    )


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def _read(path: Path) -> dict[str, Any]:
    """What is kept; nothing if it is damaged, of another version, or others may write it."""
    try:
        digest, _, body = read_own(path, MAX_SIZE).partition(b"\n")
        if digest == _digest(body):
            document = documents.parse_json(body)
            if document["program"] == __version__:
                return dict(document["found"])
    except (*TROUBLE, ValueError) as err:
        log.debug("what status has found before is not known: %s", err)
    return {}
