"""Which process is the libvirt that serves a connection."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nbdbackupd.virt import same_host
from nbdbackupd.virt.connection import Connection

DAEMONS: Final = frozenset({"libvirtd", "virtqemud"})
PROC: Final = Path("/proc")


def daemon_of(connection: Connection) -> tuple[int, str] | None:
    """Process id and name of the daemon; None if it is not found, or there is none (embedded).

    The peer of the socket may be systemd, which made it, or a proxy. So libvirt is asked which of
    the candidates is ``/proc/self`` to it, as ``same_host`` asks for a file.
    """
    if connection.is_embedded:
        return None
    _, handle = connection.current()
    for pid, name in _candidates():
        if same_host.sees(handle, PROC / "self/task" / str(pid)):
            return pid, name
    return None


def _candidates() -> Iterator[tuple[int, str]]:
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                name = (entry / "comm").read_text().strip()
            except OSError:
                continue
            if name in DAEMONS:
                yield int(entry.name), name
