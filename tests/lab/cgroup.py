"""A control group of its own for each host, so that two systemds do not share one tree.

Where systemd manages the machine, a scope asked of it is the group.  Elsewhere (containers, a
process 1 of another kind) it is a directory of ours below the group that we are in ourselves.
Without the group, systemd-nspawn would put every host into the same "payload".
"""

import contextlib
import os
from pathlib import Path

from tests.lab.command import LabError, run

SYSTEMD_RUNS = Path("/run/systemd/system")


def enter_words(name: str) -> list[str]:
    """Return the words before a command that start it in the group ``name``."""
    if SYSTEMD_RUNS.exists():
        unit = f"--unit={name}.scope"
        return ["systemd-run", "--scope", "--quiet", "--collect", "--property=Delegate=yes", unit]
    group = _own_group() / name
    group.mkdir(exist_ok=True)
    return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', os.fspath(group)]


def remove(name: str) -> None:
    """Remove the group ``name`` whose processes have ended; one that is not there is fine."""
    if SYSTEMD_RUNS.exists():
        # it goes by itself, unless its processes end within the last moment
        with contextlib.suppress(LabError):
            run(["systemctl", "stop", f"{name}.scope"])
        return
    for directory, _, _ in os.walk(_own_group() / name, topdown=False):
        Path(directory).rmdir()


def groups(prefix: str) -> list[str]:
    """Return the names of our groups that begin so; those of systemd go by themselves."""
    if SYSTEMD_RUNS.exists():
        return []
    return sorted(path.name for path in _own_group().glob(f"{prefix}*") if path.is_dir())


def _own_group() -> Path:
    """Return the directory of the version 2 group that we are in; raises ``LabError``."""
    lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines():
        before, _, after = line.partition(" - ")
        if own is not None and after.startswith("cgroup2 "):
            return Path(f"{before.split()[4]}{own}")
    raise LabError("no cgroup version 2 is mounted: hosts need one")
