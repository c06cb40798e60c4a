"""A question to the person at the terminal, for what can't be taken back."""

import select
import sys
from collections.abc import Callable, Sequence

from nbdbackupd import plain
from nbdbackupd.errors import UsageError

POLL_SECONDS = 0.2
YES = "yes"


def has_person() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


def ask(what: str, lines: Sequence[str], refused: str, cancelled: Callable[[], None]) -> None:
    """Show ``what`` with its lines and wait for a yes; raises UsageError(``refused``) without.

    ``cancelled`` is polled and raises to end the run.
    """
    told = "".join(f"  {plain.line(each)}\n" for each in lines)
    sys.stderr.write(f"{what}:\n{told}Type '{YES}' to go on: ")
    sys.stderr.flush()
    # a signal is only noted, so a plain read would wait on
    while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        cancelled()
    if sys.stdin.readline().strip().lower() != YES:
        raise UsageError(refused)
