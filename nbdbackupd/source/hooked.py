"""Whether libvirt calls our hook when it starts a domain, so that a reader can let go in time.

A daemon looks for hooks when it starts: one that found none then looks for none later, and one
that found any calls those that come later, too (libvirt 9.0, measured). Our hook notes at each
call which process has called it. Before the first call the times of the files tell; an upgrade
leaves them alone, since what libvirt finds is a file that no version changes
(hooks/qemu.d/nbdbackup). That file stays, and does nothing, when the package is removed.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import rundir
from nbdbackupd.errors import DomainError
from nbdbackupd.source.lease import ProcessId
from nbdbackupd.virt import same_host
from nbdbackupd.virt.connection import Connection

HOOKS: Final = "etc/libvirt/hooks"
OURS: Final = "qemu.d/nbdbackup"
REMOVED: Final = "the package nbdbackupd was removed"
MARGIN_SECONDS: Final = 0.1
"""More than the two clocks' ticks; a daemon takes longer until it looks for hooks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hook:
    """What libvirt does with our hook: ``why`` it does not call it, empty if it does.

    ``is_installed``: it would after a restart of the daemon, which ``why`` names. ``is_removed``:
    it calls what does nothing any more. ``is_missing``: it finds none of ours.
    """

    why: str = ""
    is_installed: bool = False
    is_removed: bool = False
    is_missing: bool = False

    @property
    def is_silent(self) -> bool:
        """Whether it is known that no end of a guest is told to us."""
        return self.is_installed or self.is_removed or self.is_missing


def look(connection: Connection, runtime_dir: Path) -> Hook:
    """See whether the libvirt of a connection tells us of starts. Changes nothing."""
    if connection.is_embedded:
        # it is our own process, and nobody else can have its root: no start comes in between
        return Hook()
    try:
        found = same_host.daemon_of(connection.current()[1])
    except DomainError as err:
        return Hook(why=err.message)
    if found is None:
        return Hook(why="the process of libvirt's daemon is not found")
    pid, name = found
    this = ProcessId.of(pid)
    if this is None:
        return Hook(why=f"{name} has just ended")
    hooks = _hooks(pid)
    if not _has_program(hooks / OURS):
        return Hook(why=REMOVED, is_removed=True)
    if _called(runtime_dir) == f"{pid} {this.start}":
        return Hook()
    if runtime_dir != rundir.DEFAULT or not os.access(hooks / OURS, os.X_OK):
        why = f"{name} (process {pid}) has no hook of ours for this runtime directory"
        return Hook(why=why, is_missing=True)
    if _known_at(hooks, _started(this)):
        return Hook()
    return Hook(
        why=f"{name} (process {pid}) has not looked for hooks since ours was installed: "
        f"'systemctl start nbdbackup-load-hook' restarts it, guests run on",
        is_installed=True,
    )


def _hooks(pid: int) -> Path:
    """Where a daemon looks for hooks; without the right to see its root, where all do."""
    root = Path(f"/proc/{pid}/root")
    try:
        (root / "etc").stat()
    except OSError:
        # units of ours may not trace processes, and libvirtd has more capabilities than they
        root = Path("/")
    return root / HOOKS


def _has_program(hook: Path) -> bool:
    """Whether the program that our hook goes on with is there; of another hook's no word: yes."""
    try:
        found = re.search(r"^hook=(/\S+)$", hook.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return True
    if found is None:
        return True
    root = hook.parents[len(Path(HOOKS).parts) + 1]
    return (root / found[1].lstrip("/")).exists()


def _called(runtime_dir: Path) -> str:
    try:
        return (runtime_dir / rundir.CALLED).read_text(errors="replace").strip()
    except OSError:
        return ""


def _known_at(hooks: Path, moment: float) -> bool:
    """Whether there was a hook for QEMU at a time, in seconds since 1970."""
    for path in (hooks / "qemu", *sorted((hooks / "qemu.d").glob("*"))):
        try:
            found = path.stat()
        except OSError:
            continue
        # the time of the inode: that of the contents may be the package's
        if os.access(path, os.X_OK) and found.st_ctime < moment - MARGIN_SECONDS:
            return True
    return False


def _started(process: ProcessId) -> float:
    """When a process began, in seconds since 1970, to a clock tick."""
    # not btime of /proc/stat, which is of whole seconds
    boot = time.clock_gettime(time.CLOCK_REALTIME) - time.clock_gettime(time.CLOCK_BOOTTIME)
    return boot + process.start / os.sysconf("SC_CLK_TCK")
