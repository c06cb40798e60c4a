"""Domains that live only as long as they run: start, watch, take a picture of, end.

Measured with libvirt 9.0.0: ``screenshot`` gives PNG with QEMU 7.2; ``destroy`` takes one to two
seconds; a transient domain is unknown as soon as it has ended. With autodestroy libvirt ends the
domain when our connection closes, also when we are killed.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import libvirt
import libvirt_qemu

from nbdbackupd.errors import DomainError, DomainNotFoundError, NbdbackupError
from nbdbackupd.model import throwaway
from nbdbackupd.virt import fault
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain, GuestState

END_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.1
PICTURE_SECONDS: Final = 20.0
MAX_PICTURE: Final = 64 << 20
PING: Final = '{"execute": "guest-ping"}'
SUFFIXES: Final = {"image/png": "png", "image/x-portable-pixmap": "ppm"}


def start(connection: Connection, xml: str, *, with_us: bool = False) -> Domain:
    """Start a transient domain.

    ``with_us``: libvirt ends it when this connection closes, for whatever reason. Raises
    DomainError, NotSupportedError.
    """
    _, handle = connection.current()
    flags = libvirt.VIR_DOMAIN_START_AUTODESTROY if with_us else 0
    with fault.translate("can't start the domain"):
        made = handle.createXML(xml, flags)
        return Domain(connection, made.name(), made.UUIDString())


def find(connection: Connection, uuid: str) -> Domain | None:
    """Return the domain of a UUID, or None if there is none (any more). Raises DomainError."""
    try:
        return Domain(connection, *connection.lookup(uuid))
    except DomainNotFoundError:
        return None


def is_running(domain: Domain) -> bool:
    """Tell whether its QEMU is there, also when paused. Raises DomainError."""
    try:
        return domain.is_active()
    except DomainNotFoundError:
        return False


def state(domain: Domain) -> GuestState:
    """Return its state; one that is gone is OFF. Raises DomainError."""
    try:
        return domain.state()
    except DomainNotFoundError:
        return GuestState.OFF


def is_held_by_error(domain: Domain) -> bool:
    """Tell whether QEMU has paused the guest because a disk reported an error."""
    try:
        found = domain.call("can't read its state", lambda handle: handle.state())
    except DomainNotFoundError:
        return False
    return found == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]


def end(domain: Domain) -> None:
    """Power it off and wait until it is gone; one that has ended is fine.

    Raises DomainError if it stays.
    """
    try:
        domain.call("can't be ended", lambda each: each.destroy())
    except DomainNotFoundError:
        return
    except DomainError:
        if is_running(domain):
            raise
    deadline = time.monotonic() + END_SECONDS
    while is_running(domain):
        if time.monotonic() > deadline:
            raise DomainError(
                f"domain {domain.name} does not end: try 'virsh destroy'", domain=domain.name
            )
        time.sleep(POLL_SECONDS)


def unmark(domain: Domain) -> None:
    """Take the mark off a running domain that is to stay. Raises DomainError."""
    domain.call(
        "can't be made one that stays",
        lambda handle: handle.setMetadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT,
            None,
            None,
            throwaway.URI,
            libvirt.VIR_DOMAIN_AFFECT_LIVE,
        ),
    )


def ping(domain: Domain, *, seconds: int) -> bool:
    """Tell whether the guest's agent answers within so many seconds.

    Raises DomainNotFoundError if the domain is gone.
    """

    def ask() -> bool:
        handle = domain.handle()
        try:
            libvirt_qemu.qemuAgentCommand(handle, PING, seconds, 0)
        except libvirt.libvirtError as err:
            if err.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise DomainNotFoundError(f"domain {domain.name} has ended") from err
            return False
        return True

    return bool(_in_time(ask, f"domain {domain.name}: its agent is not asked", seconds + 5.0))


def screenshot(domain: Domain) -> tuple[str, bytes]:
    """Return the first screen: a suffix (``png`` or ``ppm``) and the picture.

    Raises DomainError, also for a guest without a screen.
    """

    def take() -> tuple[str, bytes]:
        picture = bytearray()

        def more(_stream: Any, data: bytes, _opaque: Any) -> None:
            if len(picture) + len(data) > MAX_PICTURE:
                raise DomainError(f"domain {domain.name}: its picture is too large")
            picture.extend(data)

        handle = domain.handle()
        with fault.translate(f"domain {domain.name}: can't take a picture", domain=domain.name):
            stream = handle.connect().newStream()
            kind = handle.screenshot(stream, 0, 0)
            stream.recvAll(more, None)
            stream.finish()
        return SUFFIXES.get(kind, "img"), bytes(picture)

    what = f"domain {domain.name}: can't take a picture"
    found: tuple[str, bytes] = _in_time(take, what, PICTURE_SECONDS)
    return found


def _in_time(function: Callable[[], Any], what: str, seconds: float) -> Any:
    """Run a call in a thread: a libvirtd or an agent that hangs does not hold us.

    Raises DomainError if there is no answer in time.
    """
    answer: queue.Queue[tuple[Any, NbdbackupError | None]] = queue.Queue()

    def work() -> None:
        try:
            answer.put((function(), None))
        except NbdbackupError as err:
            answer.put((None, err))
        except Exception as err:  # noqa: BLE001 - must not die unseen in a thread
            answer.put((None, DomainError(f"{what}: {err}")))

    threading.Thread(target=work, name="libvirt-call", daemon=True).start()
    try:
        found, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise DomainError(f"{what}: no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return found
