"""Proof that a libvirt is that of this host, whatever its URI is called; and which process it is.

Names prove nothing: addresses are forwarded, host UUIDs are copied with machines, containers
share those of their machine. What counts is that both sides mean the same file by the same path.
So libvirt is asked for the capabilities of an emulator that never is one: a file of ours with a
random name, first before it is there, then while it is. Measured with libvirt 9.0 and 11.3: it
looks for the file itself and answers with the errno of what it met, ENOENT or (no program)
EACCES; it keeps nothing and starts nothing, and takes less than a millisecond.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import libvirt

from nbdbackupd import durable, rundir
from nbdbackupd.errors import DomainError, NotSupportedError
from nbdbackupd.virt import fault
from nbdbackupd.where import HERE, Where

PREFIX: Final = ".same-host-"
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a name that nobody can guess
DAEMONS: Final = frozenset({"libvirtd", "virtqemud"})
PROC: Final = Path("/proc")
SAME: Final = (errno.ENOENT, errno.EACCES)


def prove(handle: libvirt.virConnect, uri: str, directory: Path) -> None:
    """Prove that libvirt sees the files of this host as we do.

    ``directory`` is our runtime directory, where QEMU has to find our sockets as well; who may
    not write there uses the host's shared memory. Raises NotSupportedError if it is another
    host, or another container of this one; DomainError if libvirt does not tell.
    """
    with _place(directory) as folder:
        before, after = _answers(handle, folder, HERE)
    if (before, after) == SAME:
        return
    if before == after == errno.ENOENT:
        raise NotSupportedError(
            f"{uri} is the libvirt of another host or container: it does not see {folder} of "
            f"this one; run nbdbackupctl where the guests run",
            uri=uri,
        )
    raise DomainError(
        f"can't prove that {uri} is the libvirt of this host: of a file in {folder} it says "
        f"{_said(before)} before it is there and {_said(after)} afterwards",
        uri=uri,
    )


def prove_there(handle: libvirt.virConnect, uri: str, where: Where) -> None:
    """Prove that libvirt sees the files of another host as we do, who look at them by ssh.

    Raises NotSupportedError if the two end at different hosts, or containers of one.
    """
    before, after = _answers(handle, rundir.DEFAULT, where)
    if (before, after) != SAME:
        raise NotSupportedError(
            f"{uri}: ssh and libvirt do not end at the same host: of a file that ssh made there, "
            f"in {rundir.DEFAULT}, libvirt says {_said(before)} before it is there and "
            f"{_said(after)} afterwards",
            uri=uri,
        )


def _answers(handle: libvirt.virConnect, folder: Path, where: Where) -> tuple[int, int]:
    """What libvirt meets at the path of a new file before that is there, and while it is."""
    path = folder / f"{PREFIX}{os.urandom(16).hex()}"
    before = _look(handle, path)
    try:
        where.touch(path)
        after = _look(handle, path)
    finally:
        where.remove(path)
    return before, after


def daemon_of(handle: libvirt.virConnect) -> tuple[int, str] | None:
    """Process id and name of the daemon that serves a connection; None if it is not found.

    The peer of the socket may be systemd, which made it, or a proxy. So libvirt is asked which of
    the candidates is ``/proc/self`` to it. Raises DomainError if it does not tell.
    """
    for pid, name in _candidates():
        if _look(handle, PROC / "self/task" / str(pid)) != errno.ENOENT:
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


@contextmanager
def _place(directory: Path) -> Iterator[Path]:
    """A directory of this host that we may write to."""
    try:
        durable.make_directory(directory, 0o755)
        usable = os.access(directory, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    folder = directory.absolute() if usable else SHARED_MEMORY
    with durable.translate_os_errors("write", folder):
        yield folder


def _look(handle: libvirt.virConnect, path: Path) -> int:
    """The errno that libvirt meets at a path; 0 if it meets none."""
    try:
        handle.getDomainCapabilities(os.fspath(path), None, None, None, 0)
    except libvirt.libvirtError as err:
        if err.get_error_code() != libvirt.VIR_ERR_SYSTEM_ERROR:
            raise DomainError(
                f"can't prove that libvirt is that of this host: {fault.line(err)}"
            ) from err
        return err.get_int1() or 0
    return 0


def _said(number: int) -> str:
    return f"'{os.strerror(number)}'" if number else "nothing"
