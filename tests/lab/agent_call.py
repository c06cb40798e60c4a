"""Run as a program: one guest agent command over libvirt, ``agent_call URI DOMAIN JSON SECONDS``.

``virsh qemu-agent-command`` is not enough for the embedded driver: for some milliseconds after
each open, the driver has not yet connected to the agent and answers "not connected", and virsh
does not try again within one connection.
"""

import sys
import threading
import time

import libvirt
import libvirt_qemu

POLL_SECONDS = 0.02
AGENT_TIMEOUT_SECONDS = 20


def call(domain: libvirt.virDomain, request: str, connect_seconds: float) -> str:
    """Return the agent's reply, waiting at most so long for libvirt to be connected to it."""
    deadline = time.monotonic() + connect_seconds
    while True:
        try:
            return libvirt_qemu.qemuAgentCommand(domain, request, AGENT_TIMEOUT_SECONDS, 0)
        except libvirt.libvirtError as err:
            is_connecting = err.get_error_code() == libvirt.VIR_ERR_AGENT_UNRESPONSIVE
            if not is_connecting or time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def main(uri: str, name: str, request: str, seconds: str) -> int:
    """Print the reply; 1 with the message on stderr if there is none."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_events, daemon=True).start()
    try:
        connection = libvirt.open(uri)
        try:
            print(call(connection.lookupByName(name), request, float(seconds)))
        finally:
            connection.close()
    except libvirt.libvirtError as err:
        print(err, file=sys.stderr)
        return 1
    return 0


def _run_events() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
