"""This host as one call of the program sees it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

DEFAULT_URI: Final = "qemu:///system"


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Where libvirt is, where things lie, and what time it is.

    ``state_dir`` is where the bases of chains are noted, which other hosts may share, and
    ``is_state_given`` whether the command line says so; ``own_state_dir`` is where this host keeps
    what is about itself. ``config_dir`` None means the usual one; ``credentials`` is where systemd
    has put secrets of the unit, if it has. ``clock`` tells the time in UTC. ``ssh_config`` is a
    file for ssh in place of the usual ones.
    """

    uri: str
    user: str
    password_file: Path | None
    runtime_dir: Path
    scratch_dir: Path
    state_dir: Path
    own_state_dir: Path
    clock: Callable[[], datetime]
    is_state_given: bool = False
    config_dir: Path | None = None
    credentials: Path | None = None
    ssh_config: str = ""

    def now(self) -> datetime:
        """The time, UTC."""
        return self.clock()


def new_run_id(moment: datetime) -> str:
    """``20260131t235959-1a2b3c4d``: sorts by time, never the same twice.

    It becomes part of names of files, and some file systems know no capitals.
    """
    return f"{moment:%Y%m%dt%H%M%S}-{os.urandom(4).hex()}"


def moment_of(run_id: str) -> datetime | None:
    """When a run began that has such an id, in UTC; None for an id of another form."""
    try:
        found = datetime.strptime(f"{run_id.partition('-')[0].lower()}Z", "%Y%m%dt%H%M%S%z")
    except ValueError:
        return None
    # at both ends of the calendar some zones have no such time
    return found if 1970 <= found.year < 9999 else None
