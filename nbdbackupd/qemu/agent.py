"""A guest's agent by a socket of its own, where no libvirt speaks to it: freeze and thaw.

Source: QEMU's ``docs/interop/qemu-ga-ref``. The agent says nothing by itself, and QEMU takes a
connection though nobody in the guest has the port open. So each session begins with a sync: whoever
answers it is there, and what came before it were answers to others. The guest is not trusted: it
may be silent, slow or lie, and never holds us longer than the deadline.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from nbdbackupd.errors import AgentAnswerError, FreezeError, ProcessError
from nbdbackupd.qemu.qmp import Line

MOST_FILE_SYSTEMS: Final = 10000
MAX_TEXT: Final = 200
DELIMITER: Final = b"\xff"
"""Before a request it has the agent forget half of one that another has left."""


def is_there(path: Path, *, seconds: float) -> bool:
    """Whether an agent answers within so long."""
    with contextlib.suppress(FreezeError), _session(path, seconds):
        return True
    return False


def freeze(path: Path, mountpoints: Sequence[str], *, seconds: float) -> int:
    """Freeze the guest's file systems, or those at ``mountpoints``; return how many.

    The caller must thaw afterwards in every case: a guest whose answer came too late is frozen.
    Raises FreezeError.
    """
    with _session(path, seconds) as session:
        if mountpoints:
            arguments = {"mountpoints": list(mountpoints)}
            return _count(session.run("guest-fsfreeze-freeze-list", arguments))
        return _count(session.run("guest-fsfreeze-freeze"))


def thaw(path: Path, *, seconds: float) -> int:
    """Thaw all file systems; return how many were still frozen.

    Raises FreezeError, of which AgentAnswerError is the agent's own answer.
    """
    with _session(path, seconds) as session:
        try:
            return _count(session.run("guest-fsfreeze-thaw"))
        except AgentAnswerError as err:
            with contextlib.suppress(FreezeError):
                if session.run("guest-fsfreeze-status") == "thawed":
                    raise AgentAnswerError(err.message, is_thawed=True) from err
            raise


class _Session:
    """A connection on which the agent has answered."""

    def __init__(self, line: Line, deadline: float) -> None:
        self._line = line
        self._deadline = deadline
        mark = int.from_bytes(os.urandom(4), "big") >> 1
        self._send("guest-sync-delimited", {"id": mark})
        while self._line.receive(self._deadline, "guest-sync").get("return") != mark:
            pass

    def _send(self, command: str, arguments: Mapping[str, Any] | None) -> None:
        self._line.send(command, arguments, self._deadline, before=DELIMITER)

    def run(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run a command. Raises FreezeError; AgentAnswerError if that is the answer."""
        try:
            self._send(command, arguments)
            reply = self._line.receive(self._deadline, command)
        except ProcessError as err:
            raise FreezeError(err.message) from err
        if "return" in reply:
            return reply["return"]
        error = reply.get("error")
        said = error.get("desc", "") if isinstance(error, dict) else ""
        text = " ".join(str(said)[:MAX_TEXT].split())
        raise AgentAnswerError(f"the agent refused {command}: {text}", is_thawed=False)


@contextmanager
def _session(path: Path, seconds: float) -> Iterator[_Session]:
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        try:
            connection.connect(os.fspath(path))
            session = _Session(Line(connection, "the guest's agent", timeout=seconds), deadline)
        except BlockingIOError as err:
            raise FreezeError(f"another program holds the agent's socket {path}") from err
        except OSError as err:
            reason = err.strerror or str(err)
            raise FreezeError(f"the agent's socket {path} can't be reached: {reason}") from err
        except ProcessError as err:
            raise FreezeError(err.message) from err
        yield session


def _count(answer: object) -> int:
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise FreezeError("the guest's agent did not answer with a number")
    return min(max(answer, 0), MOST_FILE_SYSTEMS)
