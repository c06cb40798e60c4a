"""What another account of the host could do with our files."""

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
    return [f"{mode:04o} {path}" for top in tops for path, mode in _below(top) if _is_open(mode)]


def _below(top: Path) -> Iterator[tuple[Path, int]]:
    for path in top.rglob("*"):
        try:
            yield path, path.lstat().st_mode
        except FileNotFoundError:
            continue


def _is_open(mode: int) -> bool:
    if stat.S_ISLNK(mode):
        return False
    return bool(mode & (0o066 if stat.S_ISDIR(mode) else 0o077))


def flock_as_nobody(path: Path) -> int:
    """Try to lock a file as an account without rights; flock(1)'s exit status, 0 if it has it.

    Without root it is tried as what anybody is: the mode decides in both cases.
    """
    if os.geteuid() != 0:
        return 0 if path.stat().st_mode & 0o007 else 66
    return subprocess.run(
        ["flock", "-n", "-x", os.fspath(path), "true"],
        user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=False,
    ).returncode  # fmt: skip
