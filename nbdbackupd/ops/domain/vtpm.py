"""Where libvirt keeps the state of a virtual TPM, and putting a saved state there.

Measured with libvirt 9.0.0 and 11.3.0: a directory of the domain's UUID that is there already is
taken as it is, no new TPM is made, and its files get swtpm's account when the domain starts.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import parse_qs, urlsplit

from nbdbackupd import durable
from nbdbackupd.errors import ConfigError, RepositoryError

PASS: Final = 0o711
"""Mode of libvirt's own directories there."""


def state_directories(uri: str) -> list[Path]:
    """Where libvirt keeps what belongs to its domains, the likeliest first; by its driver."""
    parts = urlsplit(uri)
    root = parse_qs(parts.query).get("root", [""])[0]
    if parts.path == "/embed" and root:
        return [Path(root, "lib")]
    if parts.path == "/session":
        base = Path.home() / ".config/libvirt"
        return [base / "qemu", base]
    return [Path("/var/lib/libvirt")]


def places(uri: str, uuid: str) -> list[Path]:
    """Where the state of this domain's TPM is or will be, the likeliest first."""
    return [each / "swtpm" / uuid for each in state_directories(uri)]


def check(place: Path) -> None:
    """See that a state can be put there.

    Raises RepositoryError if there is one already, ConfigError if we may not write there.
    """
    if os.path.lexists(place):
        raise RepositoryError(
            f"{place} exists: the TPM state of another domain, or one that was left behind; "
            f"move it away, or restore without --keep-identity"
        )
    parent = next(path for path in place.parents if path.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"the TPM's state has to go to {place}, which only root may: run as root")


def put(place: Path, files: Iterable[tuple[Path, PurePosixPath]]) -> None:
    """Copy files (path, path below ``place``), durably; what is half done is removed.

    Raises RepositoryError or NoSpaceError.
    """
    with durable.translate_os_errors("write", place):
        durable.make_directory(place, PASS)
        try:
            for source, inner in files:
                target = place / inner
                durable.make_directory(target.parent, 0o700)
                durable.write_atomic(target, source.read_bytes(), 0o600)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise


def take_back(place: Path) -> None:
    """Remove what ``put`` made."""
    shutil.rmtree(place, ignore_errors=True)
