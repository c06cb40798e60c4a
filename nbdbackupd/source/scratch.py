"""Scratch space: QEMU keeps there what the guest overwrites while a pull job runs.

A full scratch stops the guest with an I/O error (libvirt 9.0, QEMU 7.2: measured), so its free
space is checked before and watched during the job.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from nbdbackupd import durable, events
from nbdbackupd import log as runlog
from nbdbackupd.errors import (
    ConfigError,
    NbdbackupError,
    ScratchSpaceError,
    SourceError,
)
from nbdbackupd.virt import jobs
from nbdbackupd.virt.domain import Domain

LOG = logging.getLogger(__name__)
SPACE_POLL_SECONDS: Final = 0.1
JOB_POLL_SECONDS: Final = 0.5
JOIN_TIMEOUT_SECONDS: Final = 5.0
PREFIX: Final = "nbdbackup-"
SUFFIX: Final = ".scratch"
# QEMU runs as another user and must get through to its file
DIRECTORY_MODE: Final = 0o711


def path(directory: Path, uuid: str, run_id: str, target: str) -> Path:
    """Return the scratch file of one disk in one run."""
    return directory / f"{PREFIX}{uuid}-{run_id}-{target}{SUFFIX}"


def is_ours(file: Path, uuid: str) -> bool:
    """Tell whether a file is a scratch file of ours for the domain ``uuid``."""
    return file.name.startswith(f"{PREFIX}{uuid}-") and file.name.endswith(SUFFIX)


def leftovers(directory: Path, uuid: str) -> list[Path]:
    """Return the scratch files of the domain's earlier runs."""
    if not directory.is_dir():
        return []
    return sorted(file for file in directory.iterdir() if is_ours(file, uuid))


def free_bytes(directory: Path) -> int:
    """Return what is free for unprivileged writers, as QEMU may be one.

    Raises OSError.
    """
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def prepare(directory: Path, reserve: int) -> None:
    """Make the directory if missing and check that it has twice the reserve free.

    Raises ConfigError for an unusable directory, ScratchSpaceError.
    """
    if not directory.is_absolute():
        raise ConfigError(f"scratch directory {directory} must be an absolute path")
    try:
        # with modes that no umask changes, since QEMU must get through
        durable.make_directory(directory, DIRECTORY_MODE)
        free = free_bytes(directory)
    except OSError as err:
        raise ConfigError(f"scratch directory {directory} can't be used: {err.strerror}") from err
    if free < 2 * reserve:
        raise ScratchSpaceError(
            f"scratch directory {directory} has {free} bytes free, {2 * reserve} are needed: "
            f"make room or give another one with --scratch-dir",
            free=free,
            needed=2 * reserve,
        )


@contextlib.contextmanager
def watch(
    domain: Domain, directory: Path, reserve: int, on_trouble: Callable[[NbdbackupError], None]
) -> Iterator[None]:
    """Watch the running job during the body.

    If free space falls below ``reserve`` bytes, or the job ends (with the guest, or by somebody
    else), ``on_trouble`` is called once or twice, from another thread, and the job is ended.
    """
    stop = threading.Event()
    # two threads, since a libvirt that hangs must not keep the other from looking
    threads = [
        threading.Thread(
            target=runlog.carried(_watch_space),
            args=(stop, domain, directory, reserve, on_trouble),
            name="scratch-space",
            daemon=True,
        ),
        threading.Thread(
            target=runlog.carried(_watch_job),
            args=(stop, domain, on_trouble),
            name="backup-job",
            daemon=True,
        ),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(JOIN_TIMEOUT_SECONDS)


def _watch_space(
    stop: threading.Event,
    domain: Domain,
    directory: Path,
    reserve: int,
    on_trouble: Callable[[NbdbackupError], None],
) -> None:
    while not stop.wait(SPACE_POLL_SECONDS):
        try:
            free = free_bytes(directory)
        except OSError as err:
            free = 0
            LOG.warning("scratch directory %s: %s", directory, err)
        if free >= reserve:
            continue
        error = ScratchSpaceError(
            f"scratch directory {directory} is filling up: the job was ended before the "
            f"guest could see an error; give more space with --scratch-dir",
            free=free,
            reserve=reserve,
        )
        on_trouble(error)
        try:
            jobs.abort(domain)
        except NbdbackupError as err:
            LOG.warning("domain %s: %s", domain.name, err)
        # only now: the job's end must not wait for a log
        events.emit(LOG, events.SCRATCH_LOW, reason=error, bytes=free)
        return


def _watch_job(
    stop: threading.Event, domain: Domain, on_trouble: Callable[[NbdbackupError], None]
) -> None:
    peak = 0
    while not stop.wait(JOB_POLL_SECONDS):
        # without libvirtd the job goes on; who ends it opens the connection anew
        if not domain.connection.is_alive():
            continue
        try:
            found = jobs.stats(domain)
        except NbdbackupError as err:
            LOG.debug("domain %s: %s", domain.name, err)
            continue
        peak = max(peak, found.temp_used)
        if not found.is_active and not stop.is_set():
            on_trouble(
                SourceError(
                    f"domain {domain.name}: the backup job ended in the middle: "
                    f"the guest was shut down, or somebody aborted the job",
                    domain=domain.name,
                )
            )
            break
    LOG.debug("domain %s: at most %d bytes of scratch space were seen in use", domain.name, peak)
