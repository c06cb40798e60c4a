"""Connections to libvirt.

The embedded driver (``qemu:///embed?root=DIR``), measured with libvirt 9.0.0: it runs inside our
process; a process can open one root only, and other ``qemu:`` URIs no more; one process at a
time can hold a root, from its first open until it exits (``close`` does not let go of it); QEMU
and a running backup job survive us, and the next process that opens the root finds them. It
logs to stderr unless LIBVIRT_DEBUG=error was set before libvirt was imported.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from xml.etree import ElementTree as ET

import libvirt

from nbdbackupd import documents
from nbdbackupd.errors import BusyError, DomainError, DomainNotFoundError, NbdbackupError
from nbdbackupd.model.domain import parse_dac_label
from nbdbackupd.virt import fault, same_host
from nbdbackupd.where import HERE, Where

STOP_TIMEOUT_SECONDS: Final = 5.0
ERROR_PAUSE_SECONDS: Final = 0.1
DISABLED: Final = -1


class _Loop:
    """libvirt's event loop: a thread for as long as somebody needs it, and their number.

    The embedded driver (which refuses to open without a registered loop) and keepalive need it.
    Measured with libvirt 9.0.0: the implementation can be registered once per process, before
    the first open; the loop may be stopped and run again later.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._is_registered = False
        self._timer = DISABLED
        self._stop = threading.Event()
        self._thread = threading.Thread()

    def __enter__(self) -> None:
        with self._lock:
            if not self._is_registered:
                libvirt.virEventRegisterDefaultImpl()
                self._is_registered = True
            if self._users == 0:
                self._start()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._end()

    def _start(self) -> None:
        self._stop = threading.Event()
        # a timer that never fires by itself; changing it is what wakes the loop up
        self._timer = libvirt.virEventAddTimeout(DISABLED, _ignore, None)
        self._thread = threading.Thread(
            target=_run, args=(self._stop,), name="libvirt-events", daemon=True
        )
        self._thread.start()

    def _end(self) -> None:
        self._stop.set()
        libvirt.virEventUpdateTimeout(self._timer, 0)
        self._thread.join(STOP_TIMEOUT_SECONDS)
        libvirt.virEventRemoveTimeout(self._timer)


def _run(stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:
            stop.wait(ERROR_PAUSE_SECONDS)


def _ignore(_timer: int, _data: object) -> None:
    """Do nothing: the loop has been woken up, that is all."""


_LOOP: Final = _Loop()


# a peer that does not answer for 5 x 6 seconds is gone
KEEPALIVE_INTERVAL_SECONDS: Final = 5
KEEPALIVE_COUNT: Final = 6
REOPEN_TIMEOUT_SECONDS: Final = 30.0
REOPEN_PAUSE_SECONDS: Final = 0.5
ROOT_IS_HELD: Final = "Failed to acquire pid file"
USER_CREDENTIALS: Final = (libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_USERNAME)
SECRET_CREDENTIALS: Final = (libvirt.VIR_CRED_PASSPHRASE, libvirt.VIR_CRED_NOECHOPROMPT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where libvirt is and who we are there; an empty user means: what the URI says.

    ``via`` is what is opened in place of the URI, if that names a way that we have made.
    """

    uri: str
    via: str = ""
    user: str = ""
    password: str = field(default="", repr=False)


class Connection:
    """An open connection; made by ``open_connection``. All methods may be used from any thread.

    If libvirtd was restarted meanwhile, the next call opens the connection anew: a backup job
    and its NBD server live in QEMU and go on.
    """

    def __init__(
        self, address: Address, runtime_dir: Path | None = None, where: Where = HERE
    ) -> None:
        self.address = address
        self.where = where
        self._runtime_dir = runtime_dir
        self._lock = threading.Lock()
        self._generation = 0
        self._handle = self._proven(_open(address))

    @property
    def uri(self) -> str:
        """Return the URI as it was asked for."""
        return self.address.uri

    @property
    def is_embedded(self) -> bool:
        """Tell whether libvirt runs inside this process, and has only just found the guests."""
        return urlsplit(self.uri).path == "/embed"

    def current(self) -> tuple[int, libvirt.virConnect]:
        """Return a number that changes with each reopening, and the live handle.

        Raises DomainError if libvirt is gone and does not come back in time.
        """
        with self._lock:
            if not self._handle.isAlive():
                if self.where.is_lost():
                    raise DomainError(f"the connection to {self.uri} is lost", uri=self.uri)
                self._handle = self._proven(_reopen(self.address))
                self._generation += 1
            return self._generation, self._handle

    def _proven(self, handle: libvirt.virConnect) -> libvirt.virConnect:
        # the embedded libvirt is part of our own process
        if not self.is_embedded:
            try:
                if not self.where.is_here:
                    same_host.prove_there(handle, self.uri, self.where)
                elif self._runtime_dir is not None:
                    same_host.prove(handle, self.uri, self._runtime_dir)
            except NbdbackupError:
                handle.close()
                raise
        return handle

    def is_alive(self) -> bool:
        """Tell whether the connection stands, without waiting for anything."""
        return bool(self._handle.isAlive())

    def lookup(self, name: str) -> tuple[str, str]:
        """Find a domain by name, or else by UUID; return its name and UUID.

        Raises DomainNotFoundError.
        """
        _, handle = self.current()
        with fault.translate(f"can't look up domain {name}", domain=name):
            for find in (handle.lookupByName, handle.lookupByUUIDString):
                try:
                    found = find(name)
                except libvirt.libvirtError as err:
                    # a text that is no UUID is an invalid argument to the second one
                    unknown = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG)
                    if err.get_error_code() not in unknown:
                        raise
                else:
                    return found.name(), found.UUIDString()
        raise DomainNotFoundError(
            f"no domain {name} at {self.uri}; 'virsh list --all' shows them", domain=name
        )

    def domains(self) -> tuple[tuple[str, str], ...]:
        """Return name and UUID of each domain, running or not, in the order of names.

        Raises DomainError.
        """
        _, handle = self.current()
        with fault.translate("can't list the domains"):
            return tuple(
                sorted((each.name(), each.UUIDString()) for each in handle.listAllDomains())
            )

    def base_owner(self) -> tuple[int, int] | None:
        """Return the (uid, gid) that libvirt gives to QEMU by default, or None if unknown.

        From the capabilities' ``dac`` security model.
        """
        root = self._capabilities()
        for model in root.findall("./host/secmodel"):
            if model.findtext("model") == "dac":
                for label in model.findall("baselabel"):
                    owner = parse_dac_label(label.text or "")
                    if owner is not None:
                        return owner
        return None

    def host_uuid(self) -> str:
        """Return the UUID by which libvirt tells its host from others; empty if it has none."""
        return self._capabilities().findtext("./host/uuid") or ""

    def _capabilities(self) -> ET.Element:
        _, handle = self.current()
        with fault.translate("can't read libvirt's capabilities"):
            return documents.parse_xml(handle.getCapabilities(), "capabilities", DomainError)

    def close(self) -> None:
        """Close the connection; a libvirt that is gone already is fine."""
        with self._lock:
            try:
                self._handle.close()
            except libvirt.libvirtError:
                return


@contextmanager
def open_connection(
    uri: str,
    *,
    user: str = "",
    password: str = "",
    runtime_dir: Path | None = None,
    via: str = "",
    where: Where = HERE,
) -> Iterator[Connection]:
    """Open ``uri`` for the body.

    ``user`` and ``password`` answer libvirt's questions; ``?authfile=FILE`` in the URI works,
    too. With ``runtime_dir``, ours, libvirt has to be that of this host: needed by all who mean
    the guests' files. With ``where``, another host, it has to be that one's, and is reached by
    ``via``. Raises DomainError if libvirt can't be reached or refuses us,
    NotSupportedError if it is another host's, BusyError if another process holds an embedded
    libvirt's root.
    """
    # otherwise the library prints each error to stderr, on top of raising it
    libvirt.registerErrorHandler(_ignore_error, None)
    with _LOOP:
        address = Address(uri=uri, via=via, user=user, password=password)
        connection = Connection(address, runtime_dir, where)
        try:
            yield connection
        finally:
            connection.close()


def _ignore_error(_context: object, _error: object) -> None:
    """Do nothing: the error is raised as well."""


def _open(address: Address) -> libvirt.virConnect:
    def answer(credentials: list[list[Any]], _data: object) -> int:
        for credential in credentials:
            known = ""
            if credential[0] in USER_CREDENTIALS:
                known = address.user
            elif credential[0] in SECRET_CREDENTIALS:
                known = address.password
            if not known:
                return -1
            credential[4] = known
        return 0

    kinds = [*USER_CREDENTIALS, *SECRET_CREDENTIALS]
    try:
        handle = libvirt.openAuth(address.via or address.uri, [kinds, answer, None], 0)
    except libvirt.libvirtError as err:
        raise _open_error(address, err) from err
    _keep_alive(handle)
    return handle


def _open_error(address: Address, err: libvirt.libvirtError) -> DomainError | BusyError:
    text = fault.line(err)
    if ROOT_IS_HELD in text:
        return BusyError(
            f"another process holds the embedded libvirt {address.uri}: try again when it is done",
            uri=address.uri,
        )
    code = err.get_error_code()
    refused = (
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_CANCELLED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    )
    if code in refused:
        hint = "give --user and --password-file, or ?authfile= in the URI"
    elif code == libvirt.VIR_ERR_ACCESS_DENIED:
        hint = "run as root or as a member of the group libvirt"
    elif urlsplit(address.uri).netloc:
        hint = "check the host, the network and that libvirt runs there"
    else:
        hint = "check the URI and that libvirtd (or virtqemud) runs"
    return DomainError(f"can't connect to {address.uri}: {text}; {hint}", uri=address.uri)


def _keep_alive(handle: libvirt.virConnect) -> None:
    try:
        handle.setKeepAlive(KEEPALIVE_INTERVAL_SECONDS, KEEPALIVE_COUNT)
    except libvirt.libvirtError as err:
        # drivers inside our own process (embed, test) have nobody to ask
        if err.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise DomainError(f"can't watch the connection: {fault.line(err)}") from err


def _reopen(address: Address) -> libvirt.virConnect:
    deadline = time.monotonic() + REOPEN_TIMEOUT_SECONDS
    while True:
        try:
            return _open(address)
        except DomainError:
            if time.monotonic() > deadline:
                raise
        time.sleep(REOPEN_PAUSE_SECONDS)
