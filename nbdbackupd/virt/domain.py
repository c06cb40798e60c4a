"""A domain of an open connection: what it is, what state it is in, its XML."""

import threading
from collections.abc import Callable
from enum import StrEnum
from typing import Self, TypeVar

import libvirt

from nbdbackupd.errors import DomainError, DomainNotFoundError
from nbdbackupd.model import domain as domain_model
from nbdbackupd.virt import fault
from nbdbackupd.virt.connection import Connection

Result = TypeVar("Result")


class GuestState(StrEnum):
    """What QEMU does: ``running`` also covers states in between, such as shutting down."""

    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"


class Ending(StrEnum):
    """How the guest of a domain that is off has ended; libvirt forgets it when it restarts."""

    UNKNOWN = "unknown"
    SHUTDOWN = "shut down"
    DESTROYED = "destroyed"
    CRASHED = "crashed"
    MIGRATED = "migrated"
    SAVED = "saved"
    FAILED = "failed to start"
    SNAPSHOT = "put back to a snapshot"
    DAEMON = "lost by libvirtd"


ENDINGS = {
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: Ending.SHUTDOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: Ending.DESTROYED,
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: Ending.CRASHED,
    libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED: Ending.MIGRATED,
    libvirt.VIR_DOMAIN_SHUTOFF_SAVED: Ending.SAVED,
    libvirt.VIR_DOMAIN_SHUTOFF_FAILED: Ending.FAILED,
    libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT: Ending.SNAPSHOT,
    libvirt.VIR_DOMAIN_SHUTOFF_DAEMON: Ending.DAEMON,
}


class Domain:
    """A domain by UUID; survives a rename, and a restart of libvirtd."""

    def __init__(self, connection: Connection, name: str, uuid: str) -> None:
        self.connection = connection
        self.name = name
        self.uuid = uuid
        self._lock = threading.Lock()
        self._generation = -1
        self._handle: libvirt.virDomain | None = None

    @classmethod
    def find(cls, connection: Connection, name: str) -> Self:
        """Find a domain by name or UUID. Raises DomainNotFoundError."""
        return cls(connection, *connection.lookup(name))

    def handle(self) -> libvirt.virDomain:
        """Return libvirt's object, found anew after the connection was opened anew.

        For the modules of this package only. Raises DomainError or DomainNotFoundError.
        """
        with self._lock:
            generation, connection = self.connection.current()
            if self._handle is None or generation != self._generation:
                with fault.translate(f"can't look up domain {self.name}", domain=self.name):
                    self._handle = connection.lookupByUUIDString(self.uuid)
                self._generation = generation
            return self._handle

    def call(self, what: str, function: Callable[[libvirt.virDomain], Result]) -> Result:
        """Run ``function`` on libvirt's object; ``what`` begins the message of a failure.

        Raises the class of errors.py that libvirt's code stands for.
        """
        handle = self.handle()
        with fault.translate(f"domain {self.name}: {what}", domain=self.name):
            return function(handle)

    def is_gone(self) -> bool:
        """Tell whether libvirt no longer knows the domain; this one it found."""
        return False

    def state(self) -> GuestState:
        """Return what the domain does now."""
        number = self.call("can't read its state", lambda handle: handle.state())[0]
        if not self.is_active():
            return GuestState.OFF
        return GuestState.PAUSED if number == libvirt.VIR_DOMAIN_PAUSED else GuestState.RUNNING

    def is_active(self) -> bool:
        """Tell whether there is a QEMU process (also when paused)."""
        return bool(self.call("can't read its state", lambda handle: handle.isActive()))

    def is_shut_down(self) -> bool:
        """Tell whether the guest has shut down, and libvirt has not yet seen QEMU end, or keeps it.

        libvirt 11.3 takes 30 s to see it if a backup job ran.
        """
        state, _ = self.call("can't read its state", lambda handle: handle.state())
        return state == libvirt.VIR_DOMAIN_SHUTDOWN or self.is_kept()

    def is_kept(self) -> bool:
        """Tell whether the guest has shut down and QEMU is kept until a backup job ends.

        libvirt 11.10 and later, for a job that asked for it.
        """
        found = self.call("can't read its state", lambda handle: handle.state())
        return found == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SHUTTING_DOWN]

    def is_held_by_error(self) -> bool:
        """Tell whether QEMU has stopped the guest because of an I/O error."""
        state, reason = self.call("can't read its state", lambda handle: handle.state())
        return (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)

    def disk_errors(self) -> tuple[str, ...]:
        """Return the targets of disks that QEMU has seen an error of since the guest ran on."""
        return tuple(
            sorted(self.call("can't read errors of disks", lambda each: each.diskErrors()))
        )

    def ending(self) -> Ending:
        """Return how the guest of an inactive domain ended; a managed save counts as SAVED."""
        state, reason = self.call("can't read its state", lambda handle: handle.state())
        if self.call("can't look for a saved state", lambda each: each.hasManagedSaveImage()):
            return Ending.SAVED
        if state != libvirt.VIR_DOMAIN_SHUTOFF:
            return Ending.UNKNOWN
        return ENDINGS.get(reason, Ending.UNKNOWN)

    def is_persistent(self) -> bool:
        """Tell whether the definition outlives the guest's end."""
        return bool(self.call("can't read its kind", lambda handle: handle.isPersistent()))

    def has_autostart(self) -> bool:
        """Tell whether libvirt starts the domain with the host; a transient one never."""
        if not self.is_persistent():
            return False
        return bool(self.call("can't read its autostart", lambda handle: handle.autostart()))

    def xml(self, *, inactive: bool = False, secure: bool = False) -> str:
        """Return the domain XML: live (of an inactive domain: its definition), or ``inactive``.

        ``secure`` includes passwords.
        """
        flags = inactive * libvirt.VIR_DOMAIN_XML_INACTIVE + secure * libvirt.VIR_DOMAIN_XML_SECURE
        return self.call("can't read its XML", lambda handle: handle.XMLDesc(flags))

    def definition(self) -> domain_model.Domain:
        """Return the parsed live XML."""
        return domain_model.parse_domain(self.xml())

    def snapshot_names(self) -> tuple[str, ...]:
        """Return the names of libvirt's snapshots of the domain; none where it has no such thing.

        Raises DomainError.
        """
        try:
            found = self.handle().listAllSnapshots()
            return tuple(sorted(each.getName() for each in found))
        except libvirt.libvirtError as err:
            if err.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
                return ()
            raise DomainError(
                f"domain {self.name}: can't list snapshots: {fault.line(err)}"
            ) from err

    def disk_size(self, target: str) -> int:
        """Return the virtual size of a disk in bytes, as the running guest sees it."""
        info = self.call(f"can't read the size of {target}", lambda each: each.blockInfo(target))
        return info[0]

    def volume_path(self, pool: str, volume: str) -> str:
        """Return where a volume of a storage pool lies on libvirt's host.

        Raises DomainError, also where libvirt has no storage driver (the embedded one).
        """
        _, connection = self.connection.current()
        with fault.translate(f"can't find volume {volume} of pool {pool}", domain=self.name):
            return connection.storagePoolLookupByName(pool).storageVolLookupByName(volume).path()

    def owner(self) -> tuple[int, int] | None:
        """Return (uid, gid) of the QEMU process: its own label, or libvirt's default."""
        return self.definition().owner or self.connection.base_owner()

    def suspend(self) -> None:
        """Stop the guest's CPUs; QEMU flushes its disks."""
        self.call("can't be paused", lambda handle: handle.suspend())

    def resume(self) -> None:
        """Let the guest's CPUs run on."""
        self.call("can't be resumed", lambda handle: handle.resume())


class EndedDomain(Domain):
    """A transient domain that has ended: libvirt no longer knows it, its XML was kept.

    libvirt forgets such a domain, and the metadata of its checkpoints, with its QEMU (9.0,
    measured); the bitmaps stay in the images. This one answers as a domain that is off; as soon as
    it is started again, as libvirt says.

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

    def state(self) -> GuestState:
        """Return what it does now."""
        return self._unless_gone(super().state, GuestState.OFF)

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
