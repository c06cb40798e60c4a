"""A small QMP client for the lab's own monitor of a guest.

It is independent of the product's client on purpose: what checks must not share its faults.
"""

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.lab.command import LabError

TIMEOUT_SECONDS = 60.0


class Monitor:
    """One connection to a QMP socket; commands are answered in order, events are dropped."""

    def __init__(self, path: Path, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Connect and negotiate; raises ``LabError`` when nobody answers in time."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_seconds)
        try:
            self._socket.connect(str(path))
            self._lines = self._socket.makefile("rb")
            self._read()
            self.execute("qmp_capabilities")
        except OSError as err:
            self._socket.close()
            raise LabError(f"monitor {path}: {err}") from err
        except LabError:
            self._socket.close()
            raise

    def close(self) -> None:
        """Disconnect; the guest goes on."""
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run one QMP command and return its ``return`` value; raises ``LabError``."""
        request = {"execute": command, "arguments": dict(arguments or {})}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            while True:
                reply = self._read()
                if "error" in reply:
                    raise LabError(f"{command}: {reply['error']['desc']}")
                if "return" in reply:
                    return reply["return"]
        except OSError as err:
            raise LabError(f"monitor {self._path}: {command}: {err}") from err

    def human(self, line: str) -> str:
        """Run a line of the human monitor and return what it printed."""
        text = self.execute("human-monitor-command", {"command-line": line})
        return str(text)

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise LabError(f"monitor {self._path}: closed by QEMU")
        message: dict[str, Any] = json.loads(line)
        return message
