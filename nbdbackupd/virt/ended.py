"""A transient domain that has ended: libvirt no longer knows it, its XML was kept.

libvirt forgets such a domain, and the metadata of its checkpoints, with its QEMU (9.0, measured);
the bitmaps stay in the images.
"""

from collections.abc import Callable
from typing import TypeVar

import libvirt

from nbdbackupd.errors import DomainNotFoundError
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain, Ending, State

Result = TypeVar("Result")


class EndedDomain(Domain):
    """Answers as a domain that is off; as soon as it is started again, as libvirt says.

    ``kept`` is its XML, without passwords. What only libvirt can tell raises DomainNotFoundError.
    """

    def __init__(
        self, connection: Connection, name: str, uuid: str, *, kept: str, ending: Ending
    ) -> None:
        super().__init__(connection, name, uuid)
        self._kept = kept
        self._ending = ending

    def handle(self) -> libvirt.virDomain:
        """Return libvirt's object, looked up each time: it comes and goes."""
        with self._lock:
            self._handle = None
        return super().handle()

    def is_gone(self) -> bool:
        """Tell whether libvirt does not know it. Raises DomainError if it can't be asked."""
        try:
            self.handle()
        except DomainNotFoundError:
            return True
        return False

    def is_active(self) -> bool:
        """Tell whether it runs again."""
        return self._unless_gone(super().is_active, False)

    def state(self) -> State:
        """Return what it does now."""
        return self._unless_gone(super().state, State.OFF)

    def ending(self) -> Ending:
        """Return how it ended, as libvirt told its hook."""
        return self._unless_gone(super().ending, self._ending)

    def is_persistent(self) -> bool:
        """Tell whether it was defined meanwhile."""
        return self._unless_gone(super().is_persistent, False)

    def xml(self, *, inactive: bool = False, secure: bool = False) -> str:
        """Return the XML that it had when it ended."""
        return self._unless_gone(
            lambda: super(EndedDomain, self).xml(inactive=inactive, secure=secure), self._kept
        )

    def _unless_gone(self, ask: Callable[[], Result], otherwise: Result) -> Result:
        try:
            return ask()
        except DomainNotFoundError:
            return otherwise
