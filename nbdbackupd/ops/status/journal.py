"""What was logged: records of systemd's journal, or lines of a set's own logs."""

import contextlib
import os
import re
import selectors
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final, TextIO

from nbdbackupd import documents, durable, events, log, proc
from nbdbackupd.errors import NotSupportedError, ProcessError, RepositoryError, UsageError
from nbdbackupd.model import unitname
from nbdbackupd.plain import versioned
from nbdbackupd.repo import layout

JOURNALS: Final = (Path("/run/log/journal"), Path("/var/log/journal"))
"""Where journald keeps its files, systemd-journald.service(8)."""

HOOK: Final = "nbdbackup-hook"
"""What libvirt's hook calls itself in the log."""

UNITS: Final = (
    "nbdbackup",
    "nbdbackup-offline",
    "nbdbackup-checkpoints",
    "nbdbackup-verify",
    "nbdbackup-boot-test",
    "nbdbackup-prune",
)
SILENCE_SECONDS: Final = 120.0
POLL_SECONDS: Final = 0.2
CHUNK: Final = 64 << 10
MAX_RECORD: Final = 16 << 20
LEVELS: Final = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
LINE: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (\w+) *(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """Which records: of a domain (name or UUID) or all, the newest ``count`` of them.

    ``since`` is text that journalctl understands. ``follow``: wait for new ones, for ever.
    """

    domain: str = ""
    run: str = ""
    since: str = ""
    count: int = 1000
    follow: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One record. ``fields`` are ours, in lower case; ``event`` is empty for a plain line."""

    time: datetime
    priority: int
    message: str
    event: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The entry as a JSON document, schema version 1."""
        return versioned(
            time=self.time.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            priority=self.priority,
            event=self.event,
            message=self.message,
            fields=dict(self.fields),
        )


def to_json(entries: list[Entry]) -> dict[str, Any]:
    """All entries as one JSON document, schema version 1."""
    return versioned(entries=[entry.describe() for entry in entries])


def read(query: Query, cancelled: Callable[[], None]) -> Iterator[Entry]:
    """Records of the journal, oldest first; ``cancelled`` is polled and raises to end the wait.

    Raises NotSupportedError where there is no journal, UsageError for a time that journalctl
    does not understand, ProcessError if journalctl fails or says nothing for too long.
    """
    if not any(place.is_dir() for place in JOURNALS):
        raise NotSupportedError(
            "this host has no systemd journal: read a set's own logs with "
            "'nbdbackupctl log -o DIR', or what the command wrote to standard error"
        )
    with proc.spawn(argv(query), pipe_stdout=True) as child:
        if child.stdout is None:
            raise ProcessError("journalctl has no output")
        for line in _lines(child.stdout, cancelled, endless=query.follow):
            entry = parse(line, query.domain)
            if entry is not None:
                yield entry
        try:
            child.wait(SILENCE_SECONDS)
        except ProcessError as err:
            if "parse timestamp" in err.message:
                raise UsageError(f"journalctl does not understand --since {query.since}") from err
            raise


def argv(query: Query) -> list[str]:
    """The command line of journalctl."""
    wanted = ["MESSAGE", "PRIORITY", "MESSAGE_ID", "SYSLOG_IDENTIFIER", "_SYSTEMD_UNIT"]
    wanted += [f"{log.FIELD_PREFIX}{name}" for name in events.FIELDS]
    words = [
        "journalctl",
        "--quiet",
        "--no-pager",
        "--all",
        "--output=json",
        f"--output-fields={','.join(wanted)}",
        f"--lines={query.count}",
    ]
    if query.since:
        words.append(f"--since={query.since}")
    if query.follow:
        words.append("--follow")
    return [*words, "--", *_matches(query)]


def _matches(query: Query) -> list[str]:
    """Alternatives with ``+`` between them; what stands together must all be true."""
    run = [f"{log.FIELD_PREFIX}RUN={query.run}"] if query.run else []
    if not query.domain:
        # matches of one field are alternatives already
        return run or [f"SYSLOG_IDENTIFIER={name}" for name in (log.IDENTIFIER, HOOK)]
    found = [
        *(f"{log.FIELD_PREFIX}DOMAIN={query.domain}", *run, "+"),
        *(f"{log.FIELD_PREFIX}UUID={query.domain}", *run),
    ]
    if run:
        return found
    # plain lines, and all of them where Python's systemd package is missing
    instance = unitname.escape(query.domain)
    found += ["+", *(f"_SYSTEMD_UNIT={unit}@{instance}.service" for unit in UNITS)]
    return [*found, "+", f"SYSLOG_IDENTIFIER={HOOK}"]


def parse(line: bytes, wanted: str = "") -> Entry | None:
    """One line of ``journalctl --output=json``, or None for what is no record.

    None also for a line of the hook about another domain than ``wanted``: the hook has no fields.
    """
    try:
        record = documents.parse_json(line)
        microseconds = int(record["__REALTIME_TIMESTAMP"])
        moment = datetime.fromtimestamp(microseconds / 1_000_000, UTC)
        priority = int(_text(record.get("PRIORITY", "6")))
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    names = {event.id: event.name for event in events.ALL}
    found = {}
    for name in events.FIELDS:
        value = record.get(log.FIELD_PREFIX + name)
        if value is not None:
            found[name.lower()] = _text(value)
    message = _text(record.get("MESSAGE", ""))
    domain = unitname.domain_of(_text(record.get("_SYSTEMD_UNIT", "")))
    if wanted and record.get("SYSLOG_IDENTIFIER") == HOOK:
        if not message.startswith(f"domain {wanted}: "):
            return None
        domain = wanted
    if domain:
        found.setdefault("domain", domain)
    return Entry(
        time=moment,
        priority=priority,
        message=message,
        event=names.get(_text(record.get("MESSAGE_ID", "")), ""),
        fields=found,
    )


def _text(value: Any) -> str:
    """A field: a text, a list of bytes where it is no UTF-8, or a list of either."""
    if isinstance(value, list):
        if all(isinstance(each, int) and 0 <= each < 256 for each in value):
            return bytes(value).decode(errors="backslashreplace")
        return _text(value[0])
    return "" if value is None else str(value)


def _lines(pipe: IO[bytes], cancelled: Callable[[], None], *, endless: bool) -> Iterator[bytes]:
    """The lines of a program's output; it may be silent for ever only if that is wanted."""
    rest = bytearray()
    heard = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            cancelled()
            if not selector.select(POLL_SECONDS):
                if not endless and time.monotonic() - heard > SILENCE_SECONDS:
                    raise ProcessError(f"journalctl said nothing for {SILENCE_SECONDS:g} s")
                continue
            data = os.read(pipe.fileno(), CHUNK)
            if not data:
                return
            heard = time.monotonic()
            rest += data
            *whole, last = rest.split(b"\n")
            yield from map(bytes, whole)
            rest = last
            if len(rest) > MAX_RECORD:
                raise ProcessError(f"a record of the journal has more than {MAX_RECORD} bytes")


def read_set(path: Path, query: Query, since: datetime | None) -> list[Entry]:
    """The lines of a set's own logs, oldest first; ``query`` chooses run and count.

    Raises RepositoryError if there are no logs or they can't be read.
    """
    folder = path / layout.LOGS
    with durable.translate_os_errors("read", folder):
        durable.refuse_links(path, folder)
        files = sorted(each for each in folder.iterdir() if each.suffix == ".log")
    if query.run:
        files = [each for each in files if each == path / layout.run_log(query.run)]
        if not files:
            raise RepositoryError(f"{path} has no log of run {query.run}")
    found: deque[Entry] = deque(maxlen=query.count)
    for file in files:
        with durable.translate_os_errors("read", file), _opened(file) as lines:
            while line := lines.readline(MAX_RECORD):
                entry = _line(line, file.stem)
                if entry is not None and (since is None or entry.time >= since):
                    found.append(entry)
    return list(found)


def _opened(path: Path) -> TextIO:
    """A log of a set; a link or a pipe in its place is refused."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise RepositoryError(f"{path} is no regular file")
    return os.fdopen(fd, encoding="utf-8", errors="backslashreplace")


def _line(line: str, run: str) -> Entry | None:
    matched = LINE.fullmatch(line.rstrip("\n"))
    if matched is None:
        return None
    with contextlib.suppress(ValueError):
        return Entry(
            time=datetime.fromisoformat(matched[1]),
            priority=LEVELS.get(matched[2], 6),
            message=matched[3],
            fields={"run": run},
        )
    return None
