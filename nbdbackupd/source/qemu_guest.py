"""The guest of a QEMU without libvirt: halted by its monitor, frozen by its agent's socket."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ClassVar, Final

from nbdbackupd.errors import DomainNotFoundError, FreezeError, NbdbackupError
from nbdbackupd.model.domain import Agent
from nbdbackupd.qemu import agent, machine
from nbdbackupd.qemu.machine import Machine
from nbdbackupd.source.guard import Charge
from nbdbackupd.source.quiesce import Freezable
from nbdbackupd.virt.domain import GuestState

LOOK_SECONDS: Final = 5.0
"""An agent that does not answer a ping for so long is not asked to freeze."""


class QemuGuest(Freezable):
    """See Freezable. ``reach`` gives QEMU's monitor for a moment; ``socket`` None: no agent."""

    cures: ClassVar = {
        Agent.ABSENT: "name the socket of its agent (agent, --agent)",
        Agent.DISCONNECTED: "start the agent in the guest; its socket takes one program",
        Agent.CONNECTED: "resume the guest",
    }
    by_hand = ""

    def __init__(
        self,
        name: str,
        reach: Callable[[], AbstractContextManager[Machine]],
        socket: Path | None,
    ) -> None:
        self.name = name
        self._reach = reach
        self._socket = socket

    @classmethod
    def of(cls, name: str, found: Machine, socket: Path | None) -> "QemuGuest":
        """That of a QEMU whose monitor is held."""

        @contextmanager
        def reach() -> Iterator[Machine]:
            yield found

        return cls(name, reach, socket)

    @classmethod
    def charged(cls, charge: Charge) -> "QemuGuest":
        """That of a guard's QEMU, which nobody may hold."""
        socket = Path(charge.agent) if charge.agent else None
        monitor = Path(charge.monitor)
        return cls(charge.domain, lambda: machine.connect(monitor, charge.domain), socket)

    def state(self) -> GuestState:
        """What QEMU does with it."""
        with self._reach() as found:
            is_running = found.status() == "running"
        return GuestState.RUNNING if is_running else GuestState.PAUSED

    def suspend(self) -> None:
        """Halt it."""
        with self._reach() as found:
            found.execute("stop")

    def resume(self) -> None:
        """Let it go on."""
        with self._reach() as found:
            found.execute("cont")

    def is_active(self) -> bool:
        """Whether QEMU lives."""
        try:
            with self._reach():
                return True
        except DomainNotFoundError:
            return False
        except NbdbackupError:
            # another run may hold the monitor
            return True

    def agent(self) -> Agent:
        """Whether its agent answers."""
        if self._socket is None:
            return Agent.ABSENT
        if self.state() is not GuestState.RUNNING:
            # a halted guest can't answer
            return Agent.CONNECTED
        is_there = agent.is_there(self._socket, seconds=LOOK_SECONDS)
        return Agent.CONNECTED if is_there else Agent.DISCONNECTED

    def freeze(self, mountpoints: Sequence[str], *, seconds: float) -> int:
        """See ``agent.freeze``."""
        return agent.freeze(self._agent(), mountpoints, seconds=seconds)

    def thaw(self, *, seconds: float) -> int:
        """See ``agent.thaw``."""
        return agent.thaw(self._agent(), seconds=seconds)

    def _agent(self) -> Path:
        if self._socket is None:
            raise FreezeError(f"the socket of the agent of {self.name} is not known")
        return self._socket
