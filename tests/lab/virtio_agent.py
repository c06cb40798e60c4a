"""A guest agent without a guest: it answers libvirt by the agent's own virtio port.

A real one needs a system that takes seconds to boot; this one is there at once, and it is slow,
hung or gone whenever a test wants it.  A freeze only sets a flag: no write is held back.

Sources: Virtual I/O Device (VIRTIO) 1.1, 5.3 (console device); QEMU Guest Agent Protocol Reference.
"""

import contextlib
import json
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

from tests.lab.command import LabError
from tests.lab.virtio import DEVICE_WRITES, Hardware, VirtioDevice

SERIAL: Final = "virtio-serial0"
"""libvirt's name of the device; the agent's channel is its first port."""
PORT: Final = 1
MULTIPORT: Final = 1 << 1
DEVICE_READY, PORT_READY, PORT_OPEN = 0, 3, 6
CONTROL_IN, CONTROL_OUT, DATA_IN, DATA_OUT = 2, 3, 4, 5
ROOM: Final = 1024
SLOTS: Final = 8
LOOK_SECONDS: Final = 0.02


@dataclass
class Agent:
    """How the agent is, and what it did; outlives its guest's QEMU."""

    is_hung: bool = False
    """It takes no request; when it does again, it finds all that came meanwhile."""
    is_gone: bool = False
    """Nobody has the port open."""
    freeze_seconds: float = 0.0
    """How long a freeze takes before it is done and answered."""
    is_frozen: bool = False
    history: list[str] = field(default_factory=list)
    """Freeze and thaw, as they were done."""

    @property
    def is_prompt(self) -> bool:
        """Say whether it is as it should be."""
        return not (self.is_hung or self.is_gone or self.freeze_seconds)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry a request out."""
        arguments = request.get("arguments", {})
        match request.get("execute"):
            case "guest-sync" | "guest-sync-delimited":
                return {"return": arguments["id"]}
            case "guest-ping":
                return {"return": {}}
            case "guest-fsfreeze-status":
                return {"return": "frozen" if self.is_frozen else "thawed"}
            case "guest-fsfreeze-freeze" | "guest-fsfreeze-freeze-list":
                time.sleep(self.freeze_seconds)
                self.is_frozen = True
                self.history.append("freeze")
                return {"return": 1}
            case "guest-fsfreeze-thaw":
                was_frozen, self.is_frozen = self.is_frozen, False
                self.history.append("thaw")
                return {"return": int(was_frozen)}
            case name:
                return {"error": {"class": "CommandNotFound", "desc": f"no command {name}"}}


class AgentThread(threading.Thread):
    """The agent of one QEMU; ends with it, or by ``close``."""

    def __init__(self, agent: Agent, hardware: Hardware, device: VirtioDevice) -> None:
        """Make the port ready; the caller holds the hardware meanwhile."""
        super().__init__(name="guest-agent", daemon=True)
        self._agent = agent
        self._hardware = hardware
        self._device = device
        self._end = threading.Event()
        self._is_open = False
        self._taken = 0
        self._text = b""
        device.make_ready(MULTIPORT, [CONTROL_IN, CONTROL_OUT, DATA_IN, DATA_OUT])
        for queue in (CONTROL_IN, DATA_IN):
            for head in range(SLOTS):
                self._offer(queue, head)
        self._tell(0xFFFFFFFF, DEVICE_READY, 1)
        self._tell(PORT, PORT_READY, 1)

    def close(self) -> None:
        """End it; QEMU goes on."""
        self._end.set()
        self.join()

    def run(self) -> None:
        """Serve until the end of QEMU."""
        with contextlib.suppress(LabError):
            while not self._end.wait(LOOK_SECONDS):
                self._look()

    def _look(self) -> None:
        with self._hardware.lock:
            if self._is_open == self._agent.is_gone:
                self._is_open = not self._agent.is_gone
                self._tell(PORT, PORT_OPEN, int(self._is_open))
            if not self._agent.is_hung and self._is_open:
                self._read()
        while b"\n" in self._text:
            line, _, self._text = self._text.partition(b"\n")
            with contextlib.suppress(ValueError):
                request = json.loads(line.lstrip(b"\xff"))
                mark = b"\xff" * (request.get("execute") == "guest-sync-delimited")
                reply = mark + json.dumps(self._agent.answer(request)).encode() + b"\n"
                with self._hardware.lock:
                    self._send(DATA_OUT, reply)

    def _read(self) -> None:
        ring = self._device.ring(DATA_IN)
        used = ring.used()
        while self._taken != used:
            head, length = ring.came_back(self._taken)
            self._taken = (self._taken + 1) % (1 << 16)
            self._text += self._device.qtest.read(ring.buffers + head * ROOM, length)
            self._offer(DATA_IN, head)

    def _offer(self, queue: int, head: int) -> None:
        ring = self._device.ring(queue)
        ring.offer([(ring.buffers + head * ROOM, ROOM, DEVICE_WRITES)], head)
        self._device.notify(queue)

    def _tell(self, port: int, event: int, value: int) -> None:
        self._send(CONTROL_OUT, struct.pack("<IHH", port, event, value))

    def _send(self, queue: int, data: bytes) -> None:
        ring = self._device.ring(queue)
        self._device.qtest.write(ring.buffers, data)
        made = ring.offer([(ring.buffers, len(data), 0)])
        self._device.notify(queue)
        ring.wait(made)
