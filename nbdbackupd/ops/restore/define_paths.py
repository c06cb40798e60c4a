"""Whether a new domain would get at files of another one, or QEMU not at its own."""

import logging
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from nbdbackupd.errors import ConfigError, DomainError, NbdbackupError
from nbdbackupd.model import access, hostpaths
from nbdbackupd.model.hostpaths import Conflict, PathUse
from nbdbackupd.ops.domain import accounts
from nbdbackupd.qemu import image

log = logging.getLogger(__name__)
MOST_TOLD: Final = 3


def refuse_shared(uses: tuple[PathUse, ...], others: Mapping[str, tuple[PathUse, ...]]) -> None:
    """See that nobody else uses a path of the new definition, by any name.

    Raises DomainError that names the first of them.
    """
    found = shared(uses, others)
    if not found:
        return
    told = [
        f"{each.use.what} {each.use.path} is {each.what} of domain {each.domain}"
        for each in found[:MOST_TOLD]
    ]
    more = f" and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
    raise DomainError(
        f"the new domain would share files with another one: {'; '.join(told)}{more}; "
        f"give another -o, or leave out what keeps them"
    )


def shared(
    uses: tuple[PathUse, ...], others: Mapping[str, tuple[PathUse, ...]]
) -> tuple[Conflict, ...]:
    """The uses of these paths by others."""
    # backing files of images are only of interest where one of ours exists already
    if any(os.path.lexists(use.path) for use in uses if not use.readonly):
        others = {name: (*theirs, *_backing(theirs)) for name, theirs in others.items()}
    paths = [use.path for theirs in (uses, *others.values()) for use in theirs]
    same = {path: _identity(path) for path in paths}
    return tuple(hostpaths.clashes(uses, others, same))


def _identity(path: str) -> str:
    """A text that all names of one file or device have in common."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return os.path.realpath(path)
    if stat.S_ISBLK(found.st_mode):
        return f"device {found.st_rdev}"
    return f"file {found.st_dev} {found.st_ino}"


def _backing(uses: Iterable[PathUse]) -> list[PathUse]:
    """The files below the images of a domain, which its XML does not tell while it is off."""
    found = []
    for use in uses:
        # without a format, or raw: there is none below, whatever a guest has written there
        if use.format in ("", "raw") or not Path(use.path).exists():
            continue
        try:
            layers = image.info_chain(Path(use.path), format=use.format)[1:]
        except NbdbackupError as err:
            log.info("backing files of %s are not known: %s", use.path, err)
            continue
        found += [
            PathUse(path=layer.filename, what=f"{use.what}, backing file", readonly=True)
            for layer in layers
        ]
    return found


def check_way(owner: tuple[int, int] | None, paths: Iterable[Path]) -> None:
    """See that QEMU's account gets to each directory; what is missing will be passable.

    Raises ConfigError.
    """
    if owner is None:
        return
    who = accounts.account(*owner)
    seen: set[Path] = set()
    for path in paths:
        for directory in accounts.ancestors(path):
            if directory in seen:
                continue
            seen.add(directory)
            try:
                status = directory.stat()
            except OSError:
                break
            ids = (status.st_uid, status.st_gid)
            if access.allows(status.st_mode, ids, who, access.PASS) or accounts.has_acl(directory):
                continue
            raise ConfigError(
                f"QEMU ({accounts.name_of(who.uid)}) can't pass {directory} "
                f"(mode {stat.S_IMODE(status.st_mode):o}, "
                f"owner {accounts.name_of(status.st_uid)}, "
                f"group {accounts.group_of(status.st_gid)}): 'chmod o+x' it, or give another -o"
            )
