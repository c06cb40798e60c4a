"""Proof that nobody wrote to a domain's images while they were read, where no lock gives it."""

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nbdbackupd import log as runlog
from nbdbackupd.errors import GaveWayError, NbdbackupError, SourceError
from nbdbackupd.virt.domain import Domain

LOG = logging.getLogger(__name__)
POLL_SECONDS: Final = 0.5
JOIN_TIMEOUT_SECONDS: Final = 5.0
START_SECONDS: Final = 5.0
"""A start that fails because we hold the images is over sooner; until then libvirt calls the
domain active (9.0, measured)."""

WRITES_DONE: Final = slice(4, 7)
"""Of /sys/block/*/stat: writes completed, merged, sectors written (kernel: block/stat.rst)."""

Fingerprint = tuple[int | str, ...]


def states(files: Iterable[str]) -> dict[str, Fingerprint]:
    """What changes with each write to these files and block devices, by path.

    What QEMU left in the host's cache is written back first: it would count as a write to a
    device later, and change times on network file systems. Raises SourceError.
    """
    found = {}
    for path in files:
        try:
            found[path] = _state(path, settle=True)
        except OSError as err:
            raise SourceError(f"image {path} can't be opened: {err.strerror}") from err
    return found


def check(domain: Domain, before: Mapping[str, Fingerprint]) -> None:
    """Raise SourceError if one of the files was written to since, GaveWayError if by a start."""
    for path, state in before.items():
        try:
            is_same = _state(path) == state
        except OSError:
            is_same = False
        if not is_same and domain.is_active():
            raise started(domain)
        if not is_same:
            raise SourceError(
                f"image {path} was written to or replaced while it was read: the copy is worth "
                f"nothing; see that no other program uses it and run again"
            )
    deadline = time.monotonic() + START_SECONDS
    while domain.is_active():
        if time.monotonic() > deadline:
            raise started(domain)
        time.sleep(POLL_SECONDS)


@contextmanager
def watch(
    domain: Domain, on_trouble: Callable[[NbdbackupError], None], *, wins: bool = False
) -> Iterator[None]:
    """Call ``on_trouble`` once, from another thread, if the domain is started during the body.

    ``wins``: nothing keeps its images from it, so it is not waited for that its start may fail.
    """
    stop = threading.Event()
    thread = threading.Thread(
        target=runlog.carried(_watch),
        args=(stop, domain, on_trouble, 0.0 if wins else START_SECONDS),
        name="domain-off",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(JOIN_TIMEOUT_SECONDS)


def _watch(
    stop: threading.Event,
    domain: Domain,
    on_trouble: Callable[[NbdbackupError], None],
    patience: float,
) -> None:
    since = 0.0
    while not stop.wait(POLL_SECONDS):
        # without libvirtd nobody starts a domain, and the check at the end comes anyway
        if not domain.connection.is_alive():
            continue
        try:
            is_active = domain.is_active()
        except NbdbackupError as err:
            LOG.debug("domain %s: %s", domain.name, err)
            continue
        if not is_active:
            since = 0.0
            continue
        since = since or time.monotonic()
        if time.monotonic() - since >= patience and not stop.is_set():
            on_trouble(started(domain))
            return


def started(domain: Domain) -> GaveWayError:
    """What ends a run whose domain was started meanwhile."""
    return GaveWayError(
        f"domain {domain.name} was started while its images were read: run again",
        domain=domain.name,
    )


def _state(path: str, *, settle: bool = False) -> Fingerprint:
    # opened, since a network file system asks its server for the times only then
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if settle:
            os.fsync(fd)
        found = os.fstat(fd)
    finally:
        os.close(fd)
    if not stat.S_ISBLK(found.st_mode):
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    counters = Path(f"/sys/dev/block/{number}/stat").read_text().split()
    return (number, *counters[WRITES_DONE])
