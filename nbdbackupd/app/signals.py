"""Signals ask; the run ends itself.

A handler only notes the first signal. The copy loop and all waits look at it between requests
and raise ``Interrupted``, so that every owner on the way out cleans up. SIGUSR1 is for
``nbdbackupctl yield``: the domain is being started, so the run gives way.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nbdbackupd.errors import GaveWayError, Interrupted

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Cancel:
    """Remembers the signal that came; call ``check`` wherever the run may end."""

    def __init__(self) -> None:
        self.signum = 0

    def check(self) -> None:
        """Raise Interrupted if a signal came, GaveWayError if it was SIGUSR1."""
        if self.signum == signal.SIGUSR1:
            raise GaveWayError("the domain is being started: the run let go of its images")
        if self.signum:
            raise Interrupted(self.signum)

    def note(self, signum: int, _frame: FrameType | None) -> None:
        """The handler: later signals change nothing, cleaning up is already under way."""
        if self.signum in (0, signal.SIGUSR1):
            self.signum = signum

    def try_again(self) -> None:
        """The run gave way, and begins anew: that it was asked to is over."""
        if self.signum == signal.SIGUSR1:
            self.signum = 0


@contextmanager
def listen() -> Iterator[Cancel]:
    """Catch SIGTERM, SIGINT, SIGHUP and SIGUSR1 while the block runs. Main thread only.

    A SIGHUP that was ignored from the start (nohup) stays ignored. SIGUSR1 is ignored afterwards:
    it may come late from somebody who has read a lease that was about to end.
    """
    cancel = Cancel()
    before = {}
    for signum in ASKING:
        if signum == signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
            continue
        before[signum] = signal.signal(signum, cancel.note)
    signal.signal(signal.SIGUSR1, cancel.note)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        for signum, handler in before.items():
            signal.signal(signum, handler)
