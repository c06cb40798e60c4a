"""Wait for and end processes by identity, never by name.

QEMU daemonizes, so it is not our child: a pid file names it and a pidfd holds on to it, which
rules out that a recycled pid is hit.
"""

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab.command import LabError

POLL_SECONDS = 0.02
KILL_TIMEOUT_SECONDS = 20.0
NOTICE_TIMEOUT_SECONDS = 60.0  # until libvirt sees an end: it waits 30 s for a call in its way


class ProcessHandle:
    """One running process; stays valid (and harmless) after the process is gone."""

    def __init__(self, pid: int) -> None:
        """Hold on to process ``pid``; raises ``ProcessLookupError`` when there is none."""
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def is_running(self) -> bool:
        """Say whether the process has not ended yet (a zombie has)."""
        return not self.wait(0)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the end of the process; return whether it came in time."""
        if self._fd < 0:
            return True
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        return bool(poller.poll(timeout_seconds * 1000))

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a process that is already gone is fine."""
        if self._fd < 0:
            return
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            return

    def kill(self) -> None:
        """Kill at once (SIGKILL) and wait until it is gone; raises ``LabError`` otherwise."""
        self.send(signal.SIGKILL)
        if not self.wait(KILL_TIMEOUT_SECONDS):
            raise LabError(f"process {self.pid} survived SIGKILL")

    def close(self) -> None:
        """Let go of the process without touching it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_pid_file(path: Path) -> ProcessHandle | None:
    """Return the process that a pid file names, or None when there is none any more."""
    try:
        return ProcessHandle(int(path.read_text("ascii").strip()))
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None


def command_line(pid: int) -> list[str]:
    """Return a process's arguments; empty when it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [os.fsdecode(word) for word in raw.split(b"\0")[:-1]]


def wait_until(condition: Callable[[], bool], what: str, timeout_seconds: float) -> None:
    """Poll ``condition`` until it holds; raises ``LabError`` naming ``what`` after the deadline."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"no {what} within {timeout_seconds} s")
        time.sleep(POLL_SECONDS)
