"""Which manifests this host has proven: their SHA-256, in its own state directory.

A manifest is read and hashed each time. That its bytes are canonical, each member in its range, no
name one that leads out of the set: all of that is so again if the bytes are the same, and need not
be looked at. Nothing in a set, nor who may write there, has a say in this; a file that is lost,
old or damaged costs time, and no more.

The first line of ``<state>/proven`` is the version of the program whose checks they passed; behind
it is a line for each digest.
"""

import logging
from pathlib import Path
from typing import Final

from nbdbackupd import __version__, durable
from nbdbackupd.errors import NbdbackupError
from nbdbackupd.files import read_own

log = logging.getLogger(__name__)
NAME: Final = "proven"
MAX_SIZE: Final = 8 << 20
"""Bytes of the file, 130,000 digests; then the older half is forgotten."""
FEWEST: Final = 50
"""New ones that are worth a write: to prove so many again takes 20 ms."""
_HEAD: Final = f"nbdbackupd {__version__}".encode()


class Proven:
    """The digests, hexadecimal; read when the first one is asked for, which may be never."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._held: dict[bytes, None] | None = {}
        self._new: dict[bytes, None] = {}

    def keep_in(self, directory: Path) -> None:
        """From now on know what the file in a directory says, which only we can write."""
        self._path, self._held = directory / NAME, None

    def holds(self, digest: str) -> bool:
        """Whether a manifest of that digest was proven before."""
        if self._held is None:
            self._held = dict.fromkeys(_read(self._path)) if self._path is not None else {}
        key = digest.encode()
        return key in self._held or key in self._new

    def add(self, digest: str) -> None:
        """One more."""
        self._new[digest.encode()] = None

    def save(self) -> None:
        """Write down the new ones, if they are worth it; what can't be written is proven again."""
        path, new = self._path, list(self._new)
        if path is None or len(new) < FEWEST:
            return
        try:
            durable.make_directory(path.parent)
            # another process may have added some meanwhile
            every = list(dict.fromkeys((*_read(path), *new)))
            if sum(map(len, every)) + len(every) > MAX_SIZE:
                every = every[-len(every) // 2 :]
            durable.write_atomic(path, b"\n".join((_HEAD, *every, b"")))
            self._new.clear()
        except (NbdbackupError, OSError) as err:
            log.debug("which manifests are proven is not noted in %s: %s", path, err)


def _read(path: Path) -> list[bytes]:
    """The digests in a file; none if it is of another version, or others may write it."""
    try:
        head, *lines = read_own(path, 2 * MAX_SIZE).split(b"\n")
    except (NbdbackupError, OSError) as err:
        log.debug("which manifests are proven is not known: %s", err)
        return []
    return [each for each in lines if each] if head == _HEAD else []


PROVEN: Final = Proven()
"""Those of this process."""
