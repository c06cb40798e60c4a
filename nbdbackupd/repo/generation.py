"""Which directory of a set holds its manifests: ``points``, or ``points.N`` in generation N.

Points leave a set by a new directory of manifests, and one switch: the file ``generation``, which
is replaced atomically, names it. Who reads sees all manifests of one generation or of the next.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from nbdbackupd import durable
from nbdbackupd.errors import BusyError, FormatError, IntegrityError, RepositoryError
from nbdbackupd.files import open_untrusted
from nbdbackupd.repo import layout

MAX_SIZE: Final = 20
TRIES: Final = 10

T = TypeVar("T")


def current(root: Path) -> int:
    """The number of a set's generation; 0 without the file.

    Raises IntegrityError if that is damaged, RepositoryError if it can't be read.
    """
    path = root / layout.GENERATION
    with durable.translate_os_errors("read", path):
        try:
            with os.fdopen(open_untrusted(path), "rb") as file:
                data = file.read(MAX_SIZE)
        except (FileNotFoundError, NotADirectoryError):
            return 0
    digits = data[:-1]
    if not digits.isdigit() or digits.startswith(b"0") or data[-1:] != b"\n":
        raise IntegrityError(
            "it does not tell which directory holds the manifests: write the N of points.N there",
            file=path,
        )
    return int(digits)


def switched(root: Path) -> float:
    """When points last left a set, in seconds since 1970; 0.0 if none ever did."""
    try:
        return (root / layout.GENERATION).lstat().st_mtime
    except OSError:
        return 0.0


def directory(root: Path) -> Path:
    """The directory of the manifests, which may be missing. Raises as ``current``."""
    return root / layout.points(current(root))


def stable(root: Path, read: Callable[[Path], T]) -> T:
    """What ``read`` makes of the directory of the manifests; again if it was replaced meanwhile.

    Raises what that raises, and as ``current``; BusyError if it is replaced all the time.
    """
    for _ in range(TRIES):
        number = current(root)
        try:
            found = read(root / layout.points(number))
        except (RepositoryError, FormatError):
            if current(root) == number:
                raise
        else:
            if current(root) == number:
                return found
    raise BusyError(f"points leave {root} all the time: try later")


def switch(root: Path, number: int) -> None:
    """Make a generation the current one, durably. Raises OSError."""
    durable.write_atomic(root / layout.GENERATION, b"%d\n" % number, mode=0o600)


def manifests(folder: Path) -> list[Path]:
    """The manifests in a directory, in the order of their names. Raises as ``names``."""
    return [folder / each for each in names(folder)]


def names(folder: Path) -> list[str]:
    """The names of the manifests in a directory, in order; none if it is missing.

    Raises RepositoryError; IntegrityError if points have left the set and it holds files, but not
    that directory: it must not seem to be empty.
    """
    durable.refuse_links(folder.parent, folder)
    with durable.translate_os_errors("read", folder):
        if not os.path.lexists(folder):
            _refuse_loss(folder)
            return []
        found = sorted(each.name for each in os.scandir(folder))
    suffix = layout.MANIFEST_SUFFIX
    return [each for each in found if each.endswith(suffix) and each[0] != "."]


def _refuse_loss(folder: Path) -> None:
    mine = {layout.GENERATION, *layout.DIRECTORIES}
    if folder.name == layout.POINTS or not folder.parent.is_dir():
        return
    if any(not each.name.startswith(".") and each.name not in mine
           for each in folder.parent.iterdir()):  # fmt: skip
        raise IntegrityError("the directory of the set's manifests is missing", file=folder)
