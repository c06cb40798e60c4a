"""Run as a program: one libvirt call that takes more than one look within one connection.

``client URI DOMAIN SECONDS agent JSON``: one guest agent command.  For 30 to 110 ms after each
open, the embedded driver is not yet connected to the agent and answers "not connected".

``client URI DOMAIN SECONDS abort-job``: end the domain's job and see it gone.  The call returns
before that; an embedded driver whose client leaves in between never learns of the end and keeps
the job in its books, and with it the lock that everything else needs.

``virsh`` does neither.
"""

import sys
import threading
import time
from collections.abc import Callable

import libvirt
import libvirt_qemu

POLL_SECONDS = 0.01
AGENT_TIMEOUT_SECONDS = 20


def call_agent(domain: libvirt.virDomain, request: str, deadline: float) -> None:
    """Print the agent's reply, waiting for libvirt to be connected to it."""
    while True:
        try:
            print(libvirt_qemu.qemuAgentCommand(domain, request, AGENT_TIMEOUT_SECONDS, 0))
        except libvirt.libvirtError as err:
            is_connecting = err.get_error_code() == libvirt.VIR_ERR_AGENT_UNRESPONSIVE
            if not is_connecting or time.monotonic() > deadline:
                raise
        else:
            return
        time.sleep(POLL_SECONDS)


def abort_job(domain: libvirt.virDomain, deadline: float) -> None:
    """End the domain's job and wait until libvirt has forgotten it."""
    domain.abortJob()
    while domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
        if time.monotonic() > deadline:
            raise TimeoutError("the job is still there")
        time.sleep(POLL_SECONDS)


def main(uri: str, name: str, seconds: str, verb: str, *rest: str) -> int:
    """Carry one call out; 1 with the message on stderr if it fails."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_events, daemon=True).start()
    deadline = time.monotonic() + float(seconds)
    verbs: dict[str, Callable[[libvirt.virDomain], None]] = {
        "agent": lambda domain: call_agent(domain, rest[0], deadline),
        "abort-job": lambda domain: abort_job(domain, deadline),
    }
    try:
        connection = libvirt.open(uri)
        try:
            verbs[verb](connection.lookupByName(name))
        finally:
            connection.close()
    except (libvirt.libvirtError, TimeoutError) as err:
        print(err, file=sys.stderr)
        return 1
    return 0


def _run_events() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
