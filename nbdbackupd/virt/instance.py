"""A domain started paused for a run alone: begin it, see whether it is untouched, end it.

Measured with libvirt 9.0.0: the state of a domain that was started paused is "paused, user",
the same as after resume and suspend, also after a restart of libvirtd ("starting up" is only
seen while the call lasts). QEMU itself can tell: its run state is ``prelaunch`` until the guest
runs for the first time, and ``paused`` after a resume and a suspend. A reset of a guest that
stands still brings ``prelaunch`` back: a machine at reset has nothing in memory to lose.
"""

import json
from typing import Final

import libvirt
import libvirt_qemu

from nbdbackupd import documents
from nbdbackupd.errors import DomainError, NotSupportedError
from nbdbackupd.virt import fault
from nbdbackupd.virt.domain import Domain, GuestState

NEVER_RAN: Final = "prelaunch"


def start_paused(domain: Domain) -> int | None:
    """Start a domain without letting its guest run; return libvirt's number of the instance.

    None: somebody else has started it meanwhile. Raises NotSupportedError if a saved state
    would be restored instead, DomainError if the domain can't be started.
    """
    saved = domain.call("can't look for a saved state", lambda each: each.hasManagedSaveImage())
    if saved:
        raise NotSupportedError(
            f"domain {domain.name} has a saved state, which a start would restore and use up: "
            f"start it yourself, or drop the state with 'virsh managedsave-remove'",
            domain=domain.name,
        )
    try:
        domain.call(
            "can't be started", lambda each: each.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        )
    except DomainError as err:
        cause = err.__cause__
        code = cause.get_error_code() if isinstance(cause, libvirt.libvirtError) else None
        if code == libvirt.VIR_ERR_OPERATION_INVALID and domain.is_active():
            return None
        raise
    return number(domain)


def number(domain: Domain) -> int:
    """Return libvirt's number of the running instance; each start brings another one.

    -1 if the domain is off. Numbers begin anew with the host.
    """
    # the handle keeps the number that it was found with
    _, connection = domain.connection.current()
    with fault.translate(f"can't look up domain {domain.name}", domain=domain.name):
        return connection.lookupByUUIDString(domain.uuid).ID()


def never_ran(domain: Domain) -> bool:
    """Tell whether there is a QEMU whose guest has not run since start or reset.

    Asks QEMU, for which libvirt marks the instance as tainted (custom-monitor).
    Raises DomainError if QEMU can't be asked.
    """
    if domain.state() is not GuestState.PAUSED:
        return False
    answer = domain.call(
        "can't ask QEMU for its state",
        lambda each: libvirt_qemu.qemuMonitorCommand(each, QUERY, 0),
    )
    status: object = documents.parse_json(answer).get("return", {}).get("status")
    return status == NEVER_RAN


def qemu_version(domain: Domain) -> tuple[int, int]:
    """The version of the QEMU that runs a domain, which may have been replaced on disk since.

    Raises DomainError if QEMU can't be asked.
    """
    answer = domain.call(
        "can't ask QEMU for its version",
        lambda each: libvirt_qemu.qemuMonitorCommand(each, VERSION, 0),
    )
    try:
        found = documents.parse_json(answer)["return"]["qemu"]
        return int(found["major"]), int(found["minor"])
    except (ValueError, KeyError, TypeError) as err:
        raise DomainError(f"domain {domain.name}: QEMU does not tell its version") from err


def end(domain: Domain) -> None:
    """End an instance in order (SIGTERM): QEMU closes its images and stores their bitmaps.

    Raises DomainError, also if QEMU does not end within libvirt's time (15 s).
    """
    domain.call(
        "can't be ended", lambda each: each.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)
    )


QUERY: Final = json.dumps({"execute": "query-status"})
VERSION: Final = json.dumps({"execute": "query-version"})
