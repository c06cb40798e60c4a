"""What another account of the host could do with our files."""

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

NOBODY = 65534


def open_to_others(*tops: Path) -> list[str]:
    """What others may read, write or lock below directories, and which they may list.

    They may pass through a directory: QEMU's account has to.
    """
    found = ((path, mode) for top in tops for path, mode in _below(top))
    return [f"{mode:04o} {path}" for path, mode in found if _is_open(path, mode)]


def _below(top: Path) -> Iterator[tuple[Path, int]]:
    for folder, folders, files in os.walk(top):
        if folder != os.fspath(top) and not Path(folder).stat().st_mode & 0o001:
            folders.clear()  # nobody else gets there
            continue
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                # nbdkit has a umask of its own, and gives its pid file 0644: no secret
                if not name.endswith(".pid"):
                    yield Path(folder, name), Path(folder, name).lstat().st_mode


def _is_open(path: Path, mode: int) -> bool:
    if stat.S_ISLNK(mode):
        return False
    if "system.posix_acl_access" in os.listxattr(path):
        # the bits of the group are the list's mask; QEMU's account alone is in it
        mode &= ~0o070
    return bool(mode & (0o066 if stat.S_ISDIR(mode) else 0o077))


def flock_as_nobody(path: Path) -> int:
    """Try to lock a file as an account without rights; flock(1)'s exit status, 0 if it has it.

    Without root it is tried as what anybody is: the mode decides in both cases.
    """
    if os.geteuid() != 0:
        return 0 if path.stat().st_mode & 0o007 else 66
    return run_as(NOBODY, ["flock", "-n", "-x", path.name, "true"], path.parent)


def run_as(uid: int, argv: list[str], directory: Path) -> int:
    """The exit status of a program of another account, which is in a directory already."""
    done = subprocess.run(
        argv, cwd=directory, user=uid, group=uid, extra_groups=[], capture_output=True, check=False
    )
    return done.returncode
