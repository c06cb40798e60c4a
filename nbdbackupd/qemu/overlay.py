"""Writable images on top of what an NBD server gives."""

import errno
import json
import os
from pathlib import Path
from typing import Final

from nbdbackupd import proc
from nbdbackupd.errors import NoSpaceError, ProcessError

CREATE_SECONDS: Final = 60.0


def create(path: Path, size: int, *, socket: Path) -> None:
    """Make a qcow2 image of ``size`` bytes on the raw export of a Unix socket's NBD server.

    The server need not be there yet. Raises NoSpaceError, ProcessError.
    """
    # a URI would have to quote the path
    server = {"type": "unix", "path": os.fspath(socket)}
    node = {"driver": "raw", "file": {"driver": "nbd", "server": server}}
    below = f"json:{json.dumps(node)}"
    argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", below]
    try:
        proc.output([*argv, "--", os.fspath(path), str(size)], timeout=CREATE_SECONDS)
    except ProcessError as err:
        if os.strerror(errno.ENOSPC) in err.message:
            raise NoSpaceError(f"no space for the overlay {path}: {err.message}") from err
        raise
