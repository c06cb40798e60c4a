"""The three standard streams, which a caller may have closed, and which may break."""

import os
import sys
from collections.abc import Iterable
from typing import Final

from nbdbackupd import log, plain

STREAMS: Final = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def reserve() -> None:
    """Put ``/dev/null`` in the place of each standard stream that is closed.

    Otherwise the next file that is opened gets its number, and what any library prints to
    standard error ends up in the middle of a backup.
    """
    for fd, (name, mode) in enumerate(STREAMS):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
        if getattr(sys, name) is None:
            # not to be closed: it stays open as long as the process
            stream = os.fdopen(fd, mode, encoding="utf-8", closefd=False)
            setattr(sys, name, stream)


def give_up_stdout() -> None:
    """Let what is still to be written to standard output go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def complain(text: str, *, is_told: bool = False, priority: int = 3) -> None:
    """Say on standard error what went wrong, in one line.

    Where that is the journal the line has ``priority``, and what ``is_told`` already, as an event,
    is not said again.
    """
    is_journal = log.is_journal(sys.stderr, os.environ.get("JOURNAL_STREAM", ""))
    if not (is_journal and is_told):
        mark = f"<{priority}>" if is_journal else ""
        print(f"{mark}nbdbackupctl: {plain.line(text)}", file=sys.stderr)


def warn(warnings: Iterable[str]) -> None:
    """Say on standard error what is no failure, a line each."""
    for warning in warnings:
        print(f"nbdbackupctl: warning: {plain.line(warning)}", file=sys.stderr)


def let_go() -> None:
    """Let all that is said from now on go nowhere: whoever started us may stop listening."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
