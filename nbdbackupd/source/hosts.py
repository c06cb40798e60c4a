"""The hosts that share a state directory, and what they tell one another of a domain.

In ``<state directory>/<UUID>/hosts`` each host writes files of its own name, its machine id, alone:

    ID.json   where the domain last ran as far as this host knows (model/whereabouts.py)
    ID.start  it is about to start the domain: whoever reads its images lets them go
    ID.read   it reads the images of the domain, which is off; written anew at each beat

One of two hosts always sees the other: a start announces itself before it looks for a reader, and
a reader tells of itself before it looks for a start. Each beat makes a new file in the directory,
which has a network file system ask its server what else is there. No host's clock is asked.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents, durable
from nbdbackupd import log as runlog
from nbdbackupd.errors import BusyError, RepositoryError
from nbdbackupd.model.whereabouts import Note, Phase, next_number

log = logging.getLogger(__name__)
VERSION: Final = 1
DIRECTORY: Final = "hosts"
NOTE: Final = ".json"
START: Final = ".start"
READER: Final = ".read"
MACHINE_ID: Final = Path("/etc/machine-id")
MAX_FILE: Final = 16 << 10
MAX_HOSTS: Final = 256
MAX_TEXT: Final = 256
BEAT_SECONDS: Final = 0.4
POLL_SECONDS: Final = 0.05
DEAD_SECONDS: Final = 3.0
"""A reader that has written nothing for so long is dead, or cut off from the directory."""

JOIN_SECONDS: Final = 5.0
UNKNOWN: Final = "unknown"


@dataclass(frozen=True, slots=True)
class Host:
    """A host: its machine id, and its name for people; cloned machines differ in that alone."""

    id: str
    name: str

    @classmethod
    def this(cls) -> "Host":
        """The host that we run on."""
        name = os.uname().nodename
        try:
            found = MACHINE_ID.read_text().strip()
        except OSError:
            found = ""
        return cls(found if found.isalnum() else f"name-{name}", name)


@dataclass(frozen=True, slots=True)
class _Reader:
    """A run that reads images. ``settled``: it has looked for others and found none.

    ``sign`` is its file: as long as it lives it writes others.
    """

    host: Host
    run: str
    settled: bool
    sign: bytes = b""


class Hosts:
    """What the hosts tell one another of one domain."""

    def __init__(self, state_dir: Path, domain: str, uuid: str, host: Host | None = None) -> None:
        """The directory need not exist; nothing is made before something is written."""
        self.domain = domain
        self.here = host or Host.this()
        self.directory = state_dir / uuid / DIRECTORY

    @classmethod
    def all_of(cls, state_dir: Path, domain: str) -> "tuple[Hosts, ...]":
        """Those of each domain in a state directory, whatever its name. Raises RepositoryError."""
        with durable.translate_os_errors("read", state_dir):
            found = sorted(path.parent.name for path in state_dir.glob(f"*/{DIRECTORY}"))
        return tuple(cls(state_dir, domain, uuid) for uuid in found)

    def notes(self) -> tuple[Note, ...]:
        """What all hosts have noted, and the starts that they have announced.

        Raises RepositoryError if the directory, or what a host has written, can't be read.
        """
        return tuple(self._note(path) for path in self._files(NOTE, START))

    def own(self) -> Note | None:
        """What this host has noted. Raises as ``notes``."""
        path = self._own(NOTE)
        note = self._note(path) if path.exists() else None
        return note if note is not None and note.host == self.here.id else None

    def announce(self, *, arrived: bool) -> None:
        """Say that the domain is about to start here, or that a migration is to bring it.

        Of a migration libvirt tells its hook first that, and then that the domain is to start.
        Raises RepositoryError.
        """
        announced = self._own(START)
        if announced.exists():
            arrived = arrived or self._note(announced).arrived
        note = self._new(Phase.STARTING, arrived=arrived)
        self._write(announced, _pack(note))

    def started(self) -> None:
        """Note that it runs here, by the start that was announced or else found out now.

        What runs and nobody has announced may be known to other hosts under a higher number, so
        it counts as one that a migration has brought. Raises RepositoryError.
        """
        announced, own = self._own(START), self.own()
        if announced.exists():
            note = replace(self._note(announced), phase=Phase.RUNNING)
        elif own is not None and own.phase is Phase.RUNNING:
            return
        else:
            note = self._new(Phase.RUNNING, arrived=True)
        self._write(self._own(NOTE), _pack(note))
        announced.unlink(missing_ok=True)

    def ended(self, reason: str) -> None:
        """Note that it no longer runs here; ``reason`` is libvirt's word.

        A start that was announced and never came about is taken back. Raises RepositoryError.
        """
        announced, own = self._own(START), self.own()
        if not announced.exists():
            note = own or self._new(Phase.RUNNING, arrived=True)
            self._write(self._own(NOTE), _pack(replace(note, phase=Phase.ENDED, reason=reason)))
        with durable.translate_os_errors("remove", announced):
            announced.unlink(missing_ok=True)

    def saved(self, point: str, number: int) -> None:
        """Note that a point holds what the end ``number`` has left. Raises RepositoryError."""
        own = self.own() or Note(
            host=self.here.id, name=self.here.name, domain=self.domain, number=0, phase=Phase.ENDED
        )
        self._write(self._own(NOTE), _pack(replace(own, saved=point, saved_number=number)))

    def wait_for_readers(self) -> None:
        """Wait until no other host reads the images; a start has been announced.

        What a dead one has left is removed after DEAD_SECONDS. Raises BusyError if one lives and
        does not let go in the same time, RepositoryError.
        """
        first = {each.host.id: each for each in self._readers()}
        deadline = time.monotonic() + DEAD_SECONDS
        left = tuple(first.values())
        while left and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            left = self._readers()
        for each in left:
            if each == first.get(each.host.id):
                self._forget_dead(each)
                continue
            raise BusyError(
                f"a backup on host {each.host.name} (run {each.run}) still has images of domain "
                f"{self.domain} open after {DEAD_SECONDS:g} s",
                domain=self.domain,
            )

    def readers(self) -> tuple[str, ...]:
        """The names of other hosts on which runs read its images, or have died doing so.

        Raises RepositoryError.
        """
        return tuple(each.host.name for each in self._readers())

    @contextmanager
    def reading(self, run: str, wanted: Callable[[Note], None]) -> Iterator[None]:
        """Tell other hosts that the body reads the images; the domain's own lock is held.

        ``wanted`` is called once, from another thread, when one of them is about to start the
        domain. Raises BusyError while a run on another host reads them, RepositoryError.
        """
        reader = _Reader(self.here, run, False)
        try:
            self._wait_alone(reader)
            reader = replace(reader, settled=True)
            self._beat(reader)
            with self._watched(reader, wanted):
                yield
        finally:
            with suppress(OSError, RepositoryError):
                if not self._is_taken():
                    self._own(READER).unlink(missing_ok=True)

    def _wait_alone(self, reader: _Reader) -> None:
        """Of two that begin at the same time the one with the lower id comes first."""
        first = {each.host.id: each for each in self._readers()}
        deadline = time.monotonic() + DEAD_SECONDS
        if not self._is_taken():
            self._beat(reader)
        while others := self._readers():
            for each in others:
                lives = each.sign != first.setdefault(each.host.id, each).sign
                if lives and (each.settled or each.host.id < self.here.id):
                    raise BusyError(
                        f"domain {self.domain} is being backed up on host {each.host.name} "
                        f"(run {each.run}): try later",
                        domain=self.domain,
                    )
                if not lives and time.monotonic() > deadline:
                    self._forget_dead(each)
            time.sleep(POLL_SECONDS)
            if not self._is_taken():
                self._beat(reader)

    def _is_taken(self) -> bool:
        """Whether our sign is that of a machine that was cloned: it must not be written over."""
        return self.here.id in {each.host.id for each in self._readers()}

    def _forget_dead(self, reader: _Reader) -> None:
        log.info("run %s on host %s has died: its sign is removed", reader.run, reader.host.name)
        path = self.directory / f"{reader.host.id}{READER}"
        with durable.translate_os_errors("remove", path):
            path.unlink(missing_ok=True)

    @contextmanager
    def _watched(self, reader: _Reader, wanted: Callable[[Note], None]) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(
            target=runlog.carried(self._watch),
            args=(stop, reader, wanted),
            name="hosts",
            daemon=True,
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            # one that hangs in a directory that is gone is left behind
            thread.join(JOIN_SECONDS)

    def _watch(
        self, stop: threading.Event, reader: _Reader, wanted: Callable[[Note], None]
    ) -> None:
        while not stop.wait(BEAT_SECONDS):
            try:
                self._beat(reader)
                notes = [self._note(path) for path in self._files(START)]
            except RepositoryError as err:
                log.debug("other hosts can't be heard: %s", err)
                continue
            for note in notes:
                if note.host != self.here.id:
                    wanted(note)
                    return

    def _beat(self, reader: _Reader) -> None:
        document = {
            "version": VERSION,
            "host": reader.host.id,
            "name": reader.host.name,
            "run": reader.run,
            "settled": reader.settled,
            # no two are alike
            "beat": os.urandom(8).hex(),
        }
        path = self._own(READER)
        part = path.with_name(f".{path.name}.part")
        with durable.translate_os_errors("write", path):
            self._make()
            # no fsync: after a power cut nobody reads any more
            part.write_text(json.dumps(document))
            part.replace(path)

    def _readers(self) -> tuple[_Reader, ...]:
        """Runs on other hosts."""
        found = []
        for path in self._files(READER):
            name = path.name.removesuffix(READER)
            with durable.translate_os_errors("read", path), suppress(FileNotFoundError):
                sign = _bytes(path)
                found.append(replace(_reader(name, sign), sign=sign))
        return tuple(each for each in found if each.host != self.here)

    def _new(self, phase: Phase, *, arrived: bool) -> Note:
        return Note(
            host=self.here.id,
            name=self.here.name,
            domain=self.domain,
            number=next_number(self.notes()),
            phase=phase,
            arrived=arrived,
        )

    def _own(self, kind: str) -> Path:
        return self.directory / f"{self.here.id}{kind}"

    def _files(self, *kinds: str) -> list[Path]:
        with durable.translate_os_errors("read", self.directory):
            try:
                paths = sorted(self.directory.iterdir())
            except FileNotFoundError:
                return []
        found = [path for path in paths if path.suffix in kinds and not path.name.startswith(".")]
        return found[:MAX_HOSTS]

    def _note(self, path: Path) -> Note:
        try:
            document = _document(_bytes(path))
            host, name = path.name.rpartition(".")[0], _text(document, "name")
            note = Note(
                # a cloned machine has this one's id
                host=host if host != self.here.id or name == self.here.name else f"{host} {name}",
                name=name,
                domain=_text(document, "domain"),
                number=_number(document, "number"),
                phase=Phase(document["phase"]),
                arrived=document["arrived"] is True,
                reason=_text(document, "reason"),
                saved=_text(document, "saved"),
                saved_number=_number(document, "saved_number"),
            )
        except FileNotFoundError:
            # between the list and the look it became a note, or was taken back
            return Note(host="", name="", domain="", number=0, phase=Phase.ENDED)
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise RepositoryError(
                f"what a host has noted in {path} can't be read, so nobody knows where domain "
                f"{self.domain} is: {err}; remove it if that host does not run the domain"
            ) from err
        return note

    def _make(self) -> None:
        durable.make_directory(self.directory)

    def _write(self, path: Path, data: bytes) -> None:
        with durable.translate_os_errors("write", path):
            self._make()
            durable.write_atomic(path, data, 0o600)


def _pack(note: Note) -> bytes:
    document = {
        "version": VERSION,
        "host": note.host,
        "name": note.name,
        "domain": note.domain,
        "number": note.number,
        "phase": note.phase.value,
        "arrived": note.arrived,
        "reason": note.reason,
        "saved": note.saved,
        "saved_number": note.saved_number,
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def _bytes(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        return file.read(MAX_FILE) or b""


def _document(data: bytes) -> dict[str, Any]:
    document = documents.parse_json(data)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ValueError("it is of another version, or no note")
    return document


def _reader(host: str, sign: bytes) -> _Reader:
    """What a sign says; one that a power cut has cut short, or of another version, counts, too."""
    try:
        document = _document(sign)
        name, run = _text(document, "name"), _text(document, "run")
        return _Reader(Host(host, name), run, document.get("settled") is True)
    except (ValueError, KeyError):
        return _Reader(Host(host, host), UNKNOWN, True)


def _number(document: dict[str, Any], key: str) -> int:
    value = document[key]
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{key} is no number")
    return value


def _text(document: dict[str, Any], key: str) -> str:
    """A text of another host, for messages: short, on one line, printable."""
    value = str(document[key])[:MAX_TEXT]
    return "".join(char if char.isprintable() else "?" for char in value)
