"""Log lines: to standard error, and to a file of the set.

Modules log through ``logging.getLogger(__name__)``; everything hangs on the logger of the
package. Fields for queries go into ``extra=fields(DOMAIN=…)``.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TextIO

from nbdbackupd import durable

ROOT: Final = "nbdbackupd"

PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
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

_NAME: Final = re.compile(r"[A-Z][A-Z0-9_]{0,63}", re.ASCII)
_SECRET: Final = re.compile(r"PASS(WORD|PHRASE|WD)|SECRET|TOKEN|CREDENTIAL")

_hidden: set[str] = set()


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


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _redacted(super().format(record))


class _PriorityFormatter(_Formatter):
    """``<N>`` before each line, as sd-daemon(3) wants it: a traceback keeps its priority."""

    def format(self, record: logging.LogRecord) -> str:
        number = next((n for level, n in PRIORITIES if record.levelno >= level), 7)
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


def setup(level: int, stream: TextIO, journal_stream: str = "") -> None:
    """Send the package's log lines of ``level`` and above to a stream; replaces an earlier setup.

    ``journal_stream`` is the value of the environment's ``JOURNAL_STREAM``: if it names the
    stream's file (systemd.exec(5)), each line begins with its priority, ``<N>``.
    """
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        if getattr(handler, "is_setup", False):
            logger.removeHandler(handler)
    handler = logging.StreamHandler(stream)
    handler.__dict__["is_setup"] = True
    handler.setLevel(level)
    handler.setFormatter(
        _PriorityFormatter() if _is_journal(stream, journal_stream) else _TerminalFormatter()
    )
    logger.addHandler(handler)
    # The run's log tells the run's story even where the terminal is to be quiet.
    logger.setLevel(min(level, logging.INFO))


def _is_journal(stream: TextIO, journal_stream: str) -> bool:
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
        durable.make_directory(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        stream = open(  # noqa: PTH123, SIM115 - a descriptor, closed below
            os.open(path, flags, 0o600), "a", encoding="utf-8", errors="backslashreplace"
        )
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
