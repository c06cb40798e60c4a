"""What all verbs share: the host as the options have it, output and progress."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from nbdbackupd import log, plain, rundir
from nbdbackupd.app.arguments import Arguments
from nbdbackupd.model.host import DEFAULT_URI, Host
from nbdbackupd.units import human_size, human_time

if TYPE_CHECKING:
    from nbdbackupd.virt.connection import Connection

EVERY_SECONDS = 0.2
PLAIN_SECONDS = 10.0


class Progress:
    """One line that tells how far a run is: ``disk  45 %  1.2 GiB  812 MiB/s  0:03 left``.

    ``style``: ``line`` redraws one line, ``plain`` prints a line every ten seconds, ``none``
    prints nothing. A context manager; leaving it wipes the line. Callable from any thread.
    """

    def __init__(self, stream: TextIO, style: str) -> None:
        self._stream = stream
        self._style = style
        self._lock = threading.Lock()
        self._disk = ""
        self._begun = 0.0
        self._shown = 0.0
        self._width = 0
        self._parts: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wipe()

    def disk(self, disk: str, position: int, size: int, data: int) -> None:
        """Disk ``disk`` is done up to guest byte ``position`` of ``size``; ``data`` bytes moved."""
        if self._style == "none":
            return
        now = time.monotonic()
        with self._lock:
            if disk != self._disk:
                self._disk, self._begun, self._shown = disk, now, now
            wait = EVERY_SECONDS if self._style == "line" else PLAIN_SECONDS
            if now - self._shown < wait:
                return
            self._shown = now
            self._show(self._text(position, size, data, now - self._begun))

    def part(self, disk: str, done: int, size: int) -> None:
        """One of several disks that are written at a time: ``done`` bytes of ``size``.

        All are shown as one. Tell of each at the beginning, with nothing done.
        """
        with self._lock:
            self._parts[disk] = (done, size)
            parts = tuple(self._parts.values())
            label = disk if len(parts) == 1 else f"{len(parts)} disks"
            if not done:
                # not yet begun; the clock starts with the first byte
                self._disk = ""
                return
        position = sum(each for each, _ in parts)
        self.disk(label, position, sum(each for _, each in parts), position)

    def _text(self, position: int, size: int, data: int, seconds: float) -> str:
        share = position / size if size else 1.0
        parts = [plain.line(self._disk), f"{share:4.0%}", human_size(data)]
        if seconds > 0:
            parts.append(f"{human_size(int(data / seconds))}/s")
        if 0 < share < 1 and seconds > 1:
            parts.append(f"{human_time(seconds / share - seconds)} left")
        return "  ".join(parts)

    def _show(self, text: str) -> None:
        if self._style == "plain":
            self._stream.write(text + "\n")
        else:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        self._stream.flush()

    def _wipe(self) -> None:
        with self._lock:
            if self._width:
                self._stream.write("\r" + " " * self._width + "\r")
                self._stream.flush()
                self._width = 0


def choose_style(wanted: str, stream: TextIO) -> str:
    """``auto`` means a line on a terminal and nothing elsewhere (a journal, a file)."""
    if wanted != "auto":
        return wanted
    return "line" if stream.isatty() else "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What talks to the person or program that called us; and the host, as the options have it."""

    host: Host
    json: bool
    progress_style: str

    @classmethod
    def from_args(cls, args: Arguments) -> "Context":
        """Read the global options, set the log up."""
        _setup_log(args)
        return cls(
            host=_host(args),
            json=getattr(args, "json", False),
            progress_style=getattr(args, "progress", "auto"),
        )

    def connection(self) -> "AbstractContextManager[Connection]":
        """The libvirt connection of the global options, see ``domains.connect``."""
        from nbdbackupd.ops.domain import domains

        return domains.connect(self.host)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A progress display on stderr; quiet where nobody watches."""
        with ExitStack() as stack:
            style = choose_style(self.progress_style, sys.stderr)
            yield stack.enter_context(Progress(sys.stderr, style))

    def show(
        self,
        document: Mapping[str, Any],
        text: str,
        *,
        painted: bool = False,
        is_logged: bool = False,
    ) -> None:
        """Print a report: JSON if that was asked for, else text.

        ``painted``: it has colours, and its parts are fit for a terminal already. ``is_logged``:
        the log tells the same, so that of a unit, whose output the journal has, says it once.
        """
        if self.json:
            print(json.dumps(document, indent=2))
        elif is_logged and log.is_journal(sys.stdout, os.environ.get("JOURNAL_STREAM", "")):
            return
        elif text:
            print(text if painted else plain.lines(text))


def now() -> datetime:
    """The time, UTC."""
    return datetime.now(UTC)


def _host(args: Arguments) -> Host:
    own = default_state_dir(os.environ)
    given = getattr(args, "checkpoint_dir", None)
    runtime = getattr(args, "runtime_dir", None) or default_runtime_dir(os.environ)
    scratch = getattr(args, "scratch_dir", None) or default_scratch_dir(os.environ)
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    config = getattr(args, "ssh_config", None)
    return Host(
        uri=getattr(args, "connect", "") or DEFAULT_URI,
        user=getattr(args, "user", "") or "",
        password_file=getattr(args, "password_file", None),
        runtime_dir=runtime.absolute(),
        scratch_dir=scratch.absolute(),
        state_dir=(given or own).absolute(),
        own_state_dir=own.absolute(),
        clock=now,
        is_state_given=given is not None,
        config_dir=getattr(args, "config_dir", None),
        credentials=Path(credentials) if credentials else None,
        ssh_config=os.fspath(config.absolute()) if config else "",
    )


def default_runtime_dir(environ: Mapping[str, str]) -> Path:
    """``/run/nbdbackup`` for root, below the user's runtime directory for others."""
    if os.geteuid() == 0:
        return rundir.DEFAULT
    base = environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return Path(base, "nbdbackup")


def default_scratch_dir(environ: Mapping[str, str]) -> Path:
    """``/var/lib/nbdbackup/scratch`` for root, below the user's state directory for others."""
    return _own_dir(environ) / "scratch"


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """``/var/lib/nbdbackup/state`` for root, below the user's state directory for others.

    ``NBDBACKUP_STATE_DIR`` overrules both, as it does for libvirt's hook.
    """
    given = environ.get("NBDBACKUP_STATE_DIR")
    return Path(given) if given else _own_dir(environ) / "state"


def _own_dir(environ: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/nbdbackup")
    base = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME", "/"), ".local/state")
    return Path(base, "nbdbackup")


def _setup_log(args: Arguments) -> None:
    level = log.NOTICE
    if getattr(args, "verbose", 0):
        level = logging.DEBUG if args.verbose > 1 else logging.INFO
    elif getattr(args, "quiet", False):
        level = logging.ERROR
    log.setup(level, sys.stderr, os.environ.get("JOURNAL_STREAM", ""))
