"""Whether the repository is what it should be: mounted, and the host's own."""

import logging
import os
from pathlib import Path
from typing import Final

from nbdbackupd import events
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.errors import RepositoryError

log = logging.getLogger(__name__)

MOUNTS: Final = Path("/proc/self/mountinfo")
PRIVATE: Final = "/systemd-private-"
"""In the root of a mount that is a unit's own (PrivateTmp=)."""


def check(settings: DomainSettings) -> None:
    """Prove by the marker or mount point that the repository is what it should be.

    Raises RepositoryError if it is not, or can't be looked at; that is an event, too.
    """
    try:
        check_shared(settings.repository_path, MOUNTS.read_text(errors="replace"))
        prove(settings)
    except RepositoryError as err:
        events.emit(log, events.REPOSITORY_NOT_MOUNTED, reason=err)
        raise


def why_absent(settings: DomainSettings) -> str:
    """Why the repository is not what it should be; empty if it is, as far as can be seen."""
    try:
        prove(settings)
    except RepositoryError as err:
        return err.message
    path = settings.repository_path
    return "" if path.is_dir() else f"there is no repository {path}"


def check_shared(path: Path, mounts: str) -> None:
    """Prove that what is written to a path stays there when the unit has ended.

    ``mounts`` is the text of /proc/self/mountinfo, proc(5). Raises RepositoryError.
    """
    real = os.path.realpath(path)
    for line in mounts.splitlines():
        words = line.split()
        if len(words) > 4 and PRIVATE in words[3] and f"{real}/".startswith(f"{words[4]}/"):
            raise RepositoryError(
                f"{path} lies in {words[4]}, of which this unit has one of its own that ends with "
                f"it: choose another repository.path"
            )


def prove(settings: DomainSettings) -> None:
    """Prove that the repository is mounted, as far as the settings tell how to see that.

    Raises RepositoryError.
    """
    mount_point, marker = settings.repository_mount_point, settings.repository_marker
    if mount_point is not None and not os.path.ismount(mount_point):
        raise RepositoryError(
            f"nothing is mounted on {mount_point}, which holds the repository "
            f"{settings.repository_path}; mount it, or fix repository.mount_point "
            f"({settings.origins['repository.mount_point']})"
        )
    if marker is None:
        return
    path = settings.repository_path / marker
    try:
        path.stat()
    except FileNotFoundError as err:
        raise RepositoryError(
            f"the repository's marker {path} is missing: mount the repository, or, if it is new, "
            f"make the file ({settings.origins['repository.marker']})"
        ) from err
    except OSError as err:
        raise RepositoryError(f"can't look at the marker {path}: {err.strerror}") from err
