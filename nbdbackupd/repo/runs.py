"""How runs ended: what this host remembers of the runs of each domain, whoever began them.

Below the host's state directory ``runs/<domain>.json`` holds the newest end of a run of that
domain, and the newest failure that no good end has followed. ``begun/<id>`` is there while a run
lives, locked by it: the kernel drops that lock when the process goes, whatever ends it. So a file
that nobody holds is a run whose end nobody saw, and a boot id that is not the present one says
that the host went down meanwhile. Losing all of it costs nothing but these words.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Self

from nbdbackupd import documents, durable
from nbdbackupd.errors import FormatError, NbdbackupError, UnsupportedVersionError
from nbdbackupd.repo import layout

log = logging.getLogger(__name__)

VERSION: Final = 1
ENDS: Final = "runs"
BEGUN: Final = "begun"
LOCK: Final = ".lock"
LOCK_SECONDS: Final = 5.0
MAX_SIZE: Final = 64 << 10
MAX_REASON: Final = 2000
MAX_TRIES: Final = 3
"""So often a run that the host's end cut short is begun again at a boot; also in hooks/catch-up."""

MODE: Final = 0o600
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

SAVED: Final = "saved"
CURRENT: Final = "current"
"""Nothing was saved, since the newest point holds it already."""

SKIPPED: Final = "skipped"
"""Nothing was to be done, which says nothing of how well the domain is protected."""

FAILED: Final = "failed"
BUSY: Final = "busy"
"""Given up for now: another run, or the start of the guest, came first."""

GOOD: Final = (SAVED, CURRENT)
KILLED: Final = "it was killed: its end was not seen"
HOST_ENDED: Final = "the host went down or lost its power while it ran"


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """A run that began. Times are RFC 3339 in UTC.

    ``ident`` is systemd's unit, or another name for a run by hand. ``domain`` is the name, or the
    UUID that was given in its place. ``tries`` counts those before, each cut short by the host's
    end.
    """

    ident: str
    domain: str
    host: str
    boot: str
    begun: str
    tries: int = 0

    @property
    def unit(self) -> str:
        """The unit that ran it; empty for a run by hand."""
        return self.ident if self.ident.endswith(".service") else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How a run ended; ``reason`` in words, ``unit`` that ran it (empty: by hand).

    ``status`` is the exit status, None if nobody saw it, and ``ended`` is empty then. ``result`` is
    one of this module's words. ``point``, ``level`` and ``set`` are those of the point that was
    made. ``again`` is when it will be tried again by itself, or empty.
    """

    domain: str
    unit: str
    host: str
    begun: str
    ended: str
    result: str
    status: int | None
    reason: str = ""
    level: str = ""
    point: str = ""
    set: str = ""
    again: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def parse(cls, document: object) -> Self:
        """Read what ``to_json`` made. Raises FormatError."""
        return cls(**_values(cls, document))


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What is known of a domain's runs: the newest end, the failure to tell of, those that live."""

    end: End | None = None
    failure: End | None = None
    alive: tuple[Begun, ...] = ()


class Runs:
    """The runs of a host by its state directory, which need not exist."""

    def __init__(self, directory: Path) -> None:
        self._top = directory
        self._ends = directory / ENDS
        self._begun = directory / BEGUN

    @contextlib.contextmanager
    def living(self, run: Begun) -> Iterator["Living"]:
        """Note that a run lives while the block does.

        Runs of the same domain whose end was not seen are settled first. Raises RepositoryError
        or NoSpaceError.
        """
        path = self._begun / run.ident
        before = self._read_begun(path)
        if before is not None and run.unit and before.boot != run.boot:
            run = replace(run, tries=before.tries + 1)
        self.settle(run.domain, boot=run.boot)
        with durable.translate_os_errors("write", path):
            durable.make_private_directory(self._begun, self._top)
            fd = _locked_file(path, _pack(asdict(run)))
        living = Living(self, run)
        try:
            yield living
        finally:
            if not living.is_unfinished:
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(fd)

    def record(self, end: End) -> None:
        """Remember an end. Raises RepositoryError, NoSpaceError, BusyError."""
        path = self._path(end.domain)
        wait = durable.Wait(seconds=LOCK_SECONDS)
        lock = durable.Lock(self._ends / LOCK, owner="end of a run", wait=wait)
        with durable.translate_os_errors("write", path):
            durable.make_private_directory(self._ends, self._top)
            with lock:
                seen = _with(self._read_ends(path), end)
                document = {
                    "end": seen.end.to_json() if seen.end else None,
                    "failure": seen.failure.to_json() if seen.failure else None,
                }
                durable.write_atomic(path, _pack(document), MODE)

    def settle(self, domain: str, *, boot: str, reason: str = KILLED) -> tuple[End, ...]:
        """Remember the ends of a domain's runs that nobody saw, and return them.

        ``reason`` is for those of this boot. What the host's end has cut short stays noted to be
        tried again, until a run of the same unit takes its place, or all tries are used up. Raises
        RepositoryError, NoSpaceError, BusyError.
        """
        found = []
        for begun in self._dead(domain):
            end = _unseen(begun, boot, reason)
            if not _is_known(end, self._read_ends(self._path(domain))):
                self.record(end)
                found.append(end)
            if not begun.unit or begun.boot == boot or begun.tries >= MAX_TRIES:
                with contextlib.suppress(OSError):
                    (self._begun / begun.ident).unlink()
        return tuple(found)

    def look(self, *names: str, boot: str) -> Seen:
        """What is known of a domain that has these names, its UUID among them; nothing changes."""
        seen = Seen()
        alive: list[Begun] = []
        for name in filter(None, names):
            # before the ends are read: a run that ends meanwhile has written its own
            dead = self._dead(name)
            alive += [
                each
                for each in self._all_begun()
                if each.domain == name and self.is_alive(each.ident)
            ]
            known = self._read_ends(self._path(name))
            unseen = (_unseen(each, boot, KILLED) for each in dead)
            ends = [known.failure, known.end, *(e for e in unseen if not _is_known(e, known))]
            for end in filter(None, ends):
                seen = _with(seen, end)
        return replace(seen, alive=tuple(alive))

    def is_alive(self, ident: str) -> bool:
        """Whether a run lives. Raises OSError."""
        return durable.is_locked(self._begun / ident)

    def _dead(self, domain: str) -> list[Begun]:
        return [
            begun
            for begun in self._all_begun()
            if begun.domain == domain and not self.is_alive(begun.ident)
        ]

    def _all_begun(self) -> list[Begun]:
        try:
            paths = sorted(each for each in self._begun.iterdir() if each.name[0] != ".")
        except OSError:
            return []
        found = (self._read_begun(path) for path in paths)
        return [begun for begun in found if begun is not None]

    def _path(self, domain: str) -> Path:
        return self._ends / f"{layout.escape(domain, layout.MAX_DOMAIN)}.json"

    def _read_begun(self, path: Path) -> Begun | None:
        try:
            document = _read(path)
            begun = Begun(**_values(Begun, document)) if document is not None else None
        except NbdbackupError as err:
            log.info("%s is ignored: %s", path, err)
            return None
        return begun if begun is not None and begun.ident == path.name else None

    def _read_ends(self, path: Path) -> Seen:
        try:
            document = _read(path)
            if document is None:
                return Seen()
            end, failure = document.get("end"), document.get("failure")
            return Seen(
                end=End.parse(end) if end is not None else None,
                failure=End.parse(failure) if failure is not None else None,
            )
        except NbdbackupError as err:
            log.info("%s is ignored: %s", path, err)
            return Seen()


class Living:
    """A run that lives; ``is_unfinished``: let the next boot try it again."""

    def __init__(self, runs: Runs, run: Begun) -> None:
        self._runs = runs
        self.run = run
        self.is_unfinished = False

    def end(self, *, ended: str, result: str, status: int, reason: str, **facts: str) -> End:
        """Remember how it ended. Raises RepositoryError, NoSpaceError."""
        run = self.run
        end = End(
            domain=run.domain,
            unit=run.unit,
            host=run.host,
            begun=run.begun,
            ended=ended,
            result=result,
            status=status,
            reason=" ".join(reason.split())[:MAX_REASON],
            **facts,
        )
        self._runs.record(end)
        return end


def boot_id() -> str:
    """What tells this boot of the host from all others; empty if the kernel does not say it."""
    try:
        return BOOT_ID.read_text("ascii").strip()
    except (OSError, ValueError):
        return ""


def _unseen(begun: Begun, boot: str, reason: str) -> End:
    return End(
        domain=begun.domain,
        unit=begun.unit,
        host=begun.host,
        begun=begun.begun,
        ended="",
        result=FAILED,
        status=None,
        reason=reason if begun.boot == boot else HOST_ENDED,
    )


def _is_known(end: End, known: Seen) -> bool:
    return any(each and each.begun == end.begun for each in (known.end, known.failure))


def _with(seen: Seen, end: End) -> Seen:
    """What is known with one end more. The order is that of the beginnings."""
    newest = end if seen.end is None or end.begun >= seen.end.begun else seen.end
    failure = seen.failure
    if end.result == FAILED:
        later = seen.end is not None and seen.end.result in GOOD and seen.end.begun >= end.begun
        older = failure is not None and failure.begun > end.begun
        failure = failure if later or older else end
    elif end.result in GOOD and failure is not None and failure.begun <= end.begun:
        failure = None
    return Seen(end=newest, failure=failure)


def _locked_file(path: Path, data: bytes) -> int:
    """Write a file that is locked from the moment it has its name; its descriptor."""
    temporary = path.with_name(f"{durable.TEMPORARY_PREFIX}{os.getpid()}")
    temporary.unlink(missing_ok=True)
    fd = durable.create_exclusive(temporary, MODE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        durable.write_all(fd, data)
        os.fsync(fd)
        temporary.replace(path)
        durable.fsync_directory(path.parent)
    except BaseException:
        os.close(fd)
        temporary.unlink(missing_ok=True)
        raise
    return fd


def _pack(document: Mapping[str, Any]) -> bytes:
    return json.dumps({"version": VERSION, **document}, indent=1).encode() + b"\n"


def _read(path: Path) -> dict[str, Any] | None:
    """A document of ours; None if it is not there. Raises FormatError, RepositoryError."""
    with durable.translate_os_errors("read", path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            data = file.read(MAX_SIZE)
    try:
        document = documents.parse_json(data)
    except ValueError as err:
        raise FormatError(f"no JSON: {err}") from err
    if not isinstance(document, dict):
        raise FormatError("no JSON object")
    if document.get("version") != VERSION:
        raise UnsupportedVersionError(f"it is of version {document.get('version')}, not {VERSION}")
    return document


def _values(kind: type[Any], document: object) -> dict[str, Any]:
    """The members of a document that are fields of a class, each of the type that it has there."""
    if not isinstance(document, dict):
        raise FormatError("no JSON object")
    found = {}
    for each in fields(kind):
        if each.name not in document:
            continue
        value = document[each.name]
        is_number = each.name in ("status", "tries")
        right = isinstance(value, int if is_number else str) and not isinstance(value, bool)
        if not right and not (each.name == "status" and value is None):
            raise FormatError(f"{each.name!r} is of the wrong type")
        found[each.name] = value
    try:
        kind(**found)
    except TypeError as err:
        raise FormatError(f"a member is missing: {err}") from err
    return found
