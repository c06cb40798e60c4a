"""Log lines: to standard error or the journal, and to a file of the set.

Modules log through ``logging.getLogger(__name__)``; everything hangs on the logger of the
package. Fields for queries go into ``extra=fields(DISK=…)``, those of a whole run into
``context``; what is worth asking for is an event (``events.py``).
"""

import contextvars
import functools
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

from nbdbackupd import durable, plain

ROOT: Final = "nbdbackupd"

NOTICE: Final = 25
"""Level of what people are told unasked though nothing is wrong: that we wait, and for whom."""

PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (NOTICE, 5),
    (logging.INFO, 6),
    (logging.DEBUG, 7),
)
"""Python's levels as syslog(3) priorities, the most urgent first."""

RESERVED: Final = frozenset(
    {
        *("MESSAGE", "MESSAGE_ID", "PRIORITY", "CODE_FILE", "CODE_LINE", "CODE_FUNC", "ERRNO"),
        *("INVOCATION_ID", "LOGGER", "PROCESS_NAME", "THREAD_NAME", "TRACEBACK", "STACK_INFO"),
        *("EXCEPTION_TEXT", "EXCEPTION_INFO", "DOCUMENTATION", "TID", "SYSLOG_FACILITY"),
        *("SYSLOG_IDENTIFIER", "SYSLOG_PID", "SYSLOG_TIMESTAMP", "SYSLOG_RAW"),
    }
)
"""Journal fields (systemd.journal-fields(7)) and what journal handlers set of themselves."""

MESSAGE_ID: Final = "message_id"
PRIORITY: Final = "priority"
"""Attributes of a record that is an event: its id, and its priority if the level's is not meant."""

FIELD_PREFIX: Final = "NBDBACKUP_"
IDENTIFIER: Final = "nbdbackupctl"
"""``SYSLOG_IDENTIFIER``; systemd gives the same to what the command prints."""

Send = Callable[..., object]
"""As ``systemd.journal.send``: the message, and fields as keywords."""

_NAME: Final = re.compile(r"[A-Z][A-Z0-9_]{0,63}", re.ASCII)
_SECRET: Final = re.compile(r"PASS(WORD|PHRASE|WD)|SECRET|TOKEN|CREDENTIAL")

MAX_WARNED: Final = 1000
logging.addLevelName(NOTICE, "NOTICE")

_hidden: set[str] = set()
_warned: list[str] = []
_context: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar("fields")


def fields(**names: object) -> dict[str, object]:
    """Check fields for ``extra=``: upper-case names, none that the journal or its handlers own.

    Raises ValueError for a bad or reserved name (it would lose the whole record) and for one that
    speaks of a secret.
    """
    for name in names:
        if not _NAME.fullmatch(name) or name in RESERVED:
            raise ValueError(f"log field {name} is reserved or not upper case")
        if _SECRET.search(name):
            raise ValueError(f"log field {name} would carry a secret")
    return dict(names)


@contextmanager
def context(**names: object) -> Iterator[None]:
    """Add fields to every record while the block runs; threads get them by ``carried``.

    Raises ValueError as ``fields`` does.
    """
    token = _context.set({**present(), **fields(**names)})
    try:
        yield
    finally:
        _context.reset(token)


def present() -> Mapping[str, object]:
    """The fields of the context."""
    return _context.get({})


def carried(body: Callable[..., None]) -> Callable[..., None]:
    """``body`` for a thread that is to say what it says in the context of the present one."""
    return functools.partial(contextvars.copy_context().run, body)


@contextmanager
def hidden(*secrets: str) -> Iterator[None]:
    """Replace these texts by asterisks in every log line while the block runs."""
    added = {secret for secret in secrets if secret} - _hidden
    _hidden.update(added)
    try:
        yield
    finally:
        _hidden.difference_update(added)


def _redacted(text: str) -> str:
    for secret in sorted(_hidden, key=len, reverse=True):
        text = text.replace(secret, "********")
    return text


def _priority(record: logging.LogRecord) -> int:
    """Syslog's number for a record: an event's own, or that of its level."""
    own = record.__dict__.get(PRIORITY)
    if own is not None:
        return int(own)
    return next((n for level, n in PRIORITIES if record.levelno >= level), 7)


class _Formatter(logging.Formatter):
    """A message is a line, whatever names are in it; only a traceback has more."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's
        return plain.line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return _redacted(plain.lines(super().format(record)))


class _PriorityFormatter(_Formatter):
    """``<N>`` before each line, as sd-daemon(3) wants it: a traceback keeps its priority."""

    def format(self, record: logging.LogRecord) -> str:
        number = _priority(record)
        return "\n".join(f"<{number}>{line}" for line in super().format(record).split("\n"))


class _TerminalFormatter(_Formatter):
    """The message alone, the level in front of it only where it asks for attention."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return f"{record.levelname.lower()}: {text}"


class _FileFormatter(_Formatter):
    """``2026-01-31T23:59:59.123Z level text``: time in UTC, one line for each line of text."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = f"{moment.removesuffix('+00:00')}Z {record.levelname.lower():<8}"
        return "\n".join(f"{head} {line}" for line in super().format(record).split("\n"))


class _FileHandler(logging.StreamHandler[TextIO]):
    """Writes to a file; the first failure ends the writing, the run goes on."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - logging's
        self.failed = True


class _JournalHandler(logging.StreamHandler[TextIO]):
    """Sends records with their fields; one that can't be sent becomes a line on the stream."""

    def __init__(self, send: Send, stream: TextIO) -> None:
        super().__init__(stream)
        self.setFormatter(_PriorityFormatter())
        self._send = send
        self._text = _Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(_clean(self._text.format(record)), **_journal_fields(record))
        except (OSError, ValueError):
            super().emit(record)


def _journal_fields(record: logging.LogRecord) -> dict[str, Any]:
    """All but the message; texts as the journal takes them, without secrets."""
    found: dict[str, Any] = {
        "PRIORITY": str(_priority(record)),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "CODE_FUNC": record.funcName,
        "THREAD_NAME": _clean(record.threadName or ""),
    }
    if MESSAGE_ID in record.__dict__:
        found["MESSAGE_ID"] = record.__dict__[MESSAGE_ID]
    own = {name: value for name, value in record.__dict__.items() if _NAME.fullmatch(name)}
    for name, value in {**present(), **own}.items():
        if str(value):
            found[FIELD_PREFIX + name] = _clean(_redacted(str(value)))
    return found


def _clean(text: str) -> str:
    """Text that can be encoded: names of files may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class _WarnedHandler(logging.Handler):
    """Remembers what was warned of, whether or not anybody was shown it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(_Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        if len(_warned) < MAX_WARNED:
            _warned.append(self.format(record))


def warned() -> tuple[str, ...]:
    """What was logged as a warning or worse since ``setup``: nothing of it goes with status 0.

    The first thousand messages, oldest first.
    """
    return tuple(_warned)


def begin_anew() -> None:
    """Forget what was warned of: a run is tried again."""
    _warned.clear()


def setup(level: int, stream: TextIO, journal_stream: str = "", send: Send | None = None) -> None:
    """Send the package's log lines of ``level`` and above to a stream; replaces an earlier setup.

    ``journal_stream`` is the value of the environment's ``JOURNAL_STREAM``: if it names the
    stream's file (systemd.exec(5)), the stream is the journal. Then events come whatever the level
    is. If Python's systemd package is there, too, records are sent with their fields, from level
    INFO on; else each line begins with its priority, ``<N>``. ``send`` takes that package's place.
    """
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        if getattr(handler, "is_setup", False):
            logger.removeHandler(handler)
    _warned.clear()
    for handler in (_handler(level, stream, journal_stream, send), _WarnedHandler()):
        handler.__dict__["is_setup"] = True
        logger.addHandler(handler)
    # The run's log tells the run's story even where the terminal is to be quiet.
    logger.setLevel(min(level, logging.INFO))


def _handler(level: int, stream: TextIO, journal_stream: str, send: Send | None) -> logging.Handler:
    handler: logging.Handler = logging.StreamHandler(stream)
    if not is_journal(stream, journal_stream):
        handler.setLevel(level)
        handler.setFormatter(_TerminalFormatter())
        return handler
    # a file would not have the socket's other end, where fields go
    is_socket = stat.S_ISSOCK(os.fstat(stream.fileno()).st_mode)
    send = (send or _systemd_send()) if is_socket else None
    if send is not None:
        handler = _JournalHandler(send, stream)
        level = min(level, logging.INFO)
    else:
        handler.setFormatter(_PriorityFormatter())
    handler.addFilter(lambda record: record.levelno >= level or MESSAGE_ID in record.__dict__)
    return handler


def to_journal(stream: TextIO, send: Send | None = None) -> bool:
    """Send records of level INFO and above to the journal from now on, though the stream is not it.

    One that can't be sent becomes a line on the stream. Returns False, and changes nothing, without
    Python's systemd package.
    """
    found = send or _systemd_send()
    if found is None:
        return False
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        if getattr(handler, "is_setup", False) and not isinstance(handler, _WarnedHandler):
            logger.removeHandler(handler)
    handler = _JournalHandler(found, stream)
    handler.__dict__["is_setup"] = True
    handler.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return True


def _systemd_send() -> Send | None:
    try:
        from systemd import journal
    except ImportError:
        return None
    send: Send = journal.send
    return send


def is_journal(stream: TextIO, journal_stream: str) -> bool:
    """Whether a stream is the one that ``JOURNAL_STREAM`` names."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return journal_stream == f"{status.st_dev}:{status.st_ino}"


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Write the package's log lines to a file, too, while the block runs.

    The file is made with mode 0600, its directory if it is missing; an existing file is appended
    to. A disk that fills up cuts the log short, with a warning, and does not harm the run.

    Raises NoSpaceError or RepositoryError if the file can't be made.
    """
    with durable.translate_os_errors("write the run's log", path):
        durable.make_directory(path.parent.parent, 0o711)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        with durable.hold_directory(path.parent.parent, path.parent, make=True) as at:
            fd = os.open(path.name, flags, 0o600, dir_fd=at)
        stream = os.fdopen(fd, "a", encoding="utf-8", errors="backslashreplace")
    handler = _FileHandler(stream)
    handler.setFormatter(_FileFormatter())
    logger = logging.getLogger(ROOT)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        try:
            stream.close()
        except OSError:
            handler.failed = True
        if handler.failed:
            logger.warning("the run's log %s is incomplete, writing to it failed", path)
