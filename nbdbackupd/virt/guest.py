"""The guest agent: freeze and thaw with deadlines, and what the guest says about itself.

Measured with libvirt 9.0.0: without a connected agent each call fails at once (code 86); with
one that hangs, a call waits for ever unless a response timeout is set. The timeout stays with
the domain, so it is put back to libvirt's default (wait for ever) afterwards. A freeze that
reports no file system is a success to libvirt.

A thaw whose hook in the guest fails is an error, though nothing is frozen then. While something
is, the agent refuses to list the file systems, which libvirt asks it for without a taint.
"""

import math
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import libvirt

from nbdbackupd.errors import AgentAnswerError, FreezeError, NbdbackupError
from nbdbackupd.virt.domain import Domain

# on top of the agent's own deadline, for the way through libvirt
MARGIN_SECONDS: Final = 5.0
COMMAND_FAILED: Final = 113  # VIR_ERR_AGENT_COMMAND_FAILED; 112 is that of a timeout
ANSWERS: Final = (libvirt.VIR_ERR_INTERNAL_ERROR, COMMAND_FAILED)
"""libvirt's codes of an error that the agent has answered with; the second since 11.2."""

INFO_PREFIXES: Final = ("os.", "hostname", "timezone.", "fs.")
Result = TypeVar("Result")


def freeze(domain: Domain, mountpoints: Sequence[str], *, seconds: float) -> int:
    """Freeze the guest's file systems, or those at ``mountpoints``; return how many.

    The caller must thaw afterwards in every case: a guest whose answer came too late is frozen.
    Raises FreezeError.
    """
    wanted = list(mountpoints) or None
    return _ask(domain, "can't be frozen", lambda each: each.fsFreeze(wanted), seconds)


def thaw(domain: Domain, *, seconds: float) -> int:
    """Thaw all file systems; return how many were still frozen.

    Raises FreezeError, of which AgentAnswerError is the agent's own answer.
    """
    try:
        return _ask(domain, "can't be thawed", lambda each: each.fsThaw(), seconds)
    except FreezeError as err:
        if not _is_answer(err):
            raise
        is_thawed = _is_thawed(domain, seconds)
        raise AgentAnswerError(err.message, is_thawed=is_thawed, **err.fields) from err


def _is_answer(error: FreezeError) -> bool:
    """Whether it is what the agent said; that it said nothing has codes of its own."""
    found = error.__cause__
    cause = found.__cause__ if found is not None else None
    if not isinstance(cause, libvirt.libvirtError):
        return False
    is_of_qemu = cause.get_error_domain() == libvirt.VIR_FROM_QEMU
    return is_of_qemu and cause.get_error_code() in ANSWERS


def _is_thawed(domain: Domain, seconds: float) -> bool:
    try:
        _ask(domain, "can't be asked for its file systems", lambda each: each.fsInfo(), seconds)
    except FreezeError:
        return False
    return True


def guest_info(domain: Domain, *, seconds: float) -> dict[str, object]:
    """Return operating system, host name, time zone and file systems, as the agent tells them.

    The keys are libvirt's (virDomainGetGuestInfo). Raises FreezeError if the agent does not
    answer.
    """
    found: dict[str, Any] = _ask(
        domain, "can't be asked about its guest", lambda each: each.guestInfo(), seconds
    )
    return {name: value for name, value in found.items() if name.startswith(INFO_PREFIXES)}


def _ask(
    domain: Domain,
    what: str,
    function: Callable[[libvirt.virDomain], Result],
    seconds: float,
) -> Result:
    """Run an agent command in a thread, so that not even a hanging libvirtd holds us."""
    answer: queue.Queue[Result | NbdbackupError] = queue.Queue()

    def work() -> None:
        try:
            _set_timeout(domain, math.ceil(seconds))
            try:
                answer.put(domain.call(what, function))
            finally:
                _set_timeout(domain, libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK)
        except NbdbackupError as err:
            answer.put(err)

    threading.Thread(target=work, name="guest-agent", daemon=True).start()
    try:
        found = answer.get(timeout=seconds + MARGIN_SECONDS)
    except queue.Empty:
        raise FreezeError(
            f"domain {domain.name}: {what}: no answer within {seconds:g} s", domain=domain.name
        ) from None
    if isinstance(found, NbdbackupError):
        raise FreezeError(found.message, **found.fields) from found
    return found


def _set_timeout(domain: Domain, seconds: int) -> None:
    try:
        domain.call(
            "can't set the agent's timeout", lambda each: each.agentSetResponseTimeout(seconds)
        )
    except NbdbackupError:
        # then only our own deadline holds
        return
