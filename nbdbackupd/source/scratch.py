"""Scratch space: QEMU keeps there what the guest overwrites while a pull job runs.

A full scratch stops the guest with an I/O error (libvirt 9.0, QEMU 7.2: measured), so its free
space is checked before and watched during the job: the more often, the less is above the reserve.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import events
from nbdbackupd import log as runlog
from nbdbackupd.errors import (
    ConfigError,
    NbdbackupError,
    ScratchSpaceError,
    SourceError,
)
from nbdbackupd.virt import jobs
from nbdbackupd.virt.domain import Domain
from nbdbackupd.where import HERE, Where

LOG = logging.getLogger(__name__)
SPACE_POLL_SECONDS: Final = 0.1
NOTICE_SECONDS: Final = 2.0
NOTICE_POLL_SECONDS: Final = 0.1
SHORTEST_SECONDS: Final = 0.005
FASTEST: Final = 4 << 30
"""Bytes per second: no guest was seen to overwrite more."""

REACTION_SECONDS: Final = 0.5
"""From the look at the space to the end of the job; 0.1 s were measured."""

FADING: Final = 0.95
FAR_SECONDS: Final = 2.0
"""How often another host is asked what is free: others write there, too."""

ENOUGH: Final = 1 << 20
"""Bytes; with less, a cluster of a scratch file may not have found its place."""

JOB_POLL_SECONDS: Final = 0.5
JOIN_TIMEOUT_SECONDS: Final = 5.0
END_SECONDS: Final = 45.0
"""For the thread that may be ending the job, and has to say what came of it."""

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


def leftovers(directory: Path, uuid: str, where: Where = HERE) -> list[Path]:
    """Return the scratch files of the domain's earlier runs."""
    files = (directory / name for name in where.names(directory))
    return sorted(file for file in files if is_ours(file, uuid))


def prepare(directory: Path, reserve: int, where: Where = HERE) -> int:
    """Make the directory if missing and check that it has twice the reserve free.

    Returns what is free for unprivileged writers, as QEMU may be one. Raises ConfigError for
    an unusable directory, ScratchSpaceError, SourceError of another host.
    """
    if not directory.is_absolute():
        raise ConfigError(f"scratch directory {directory} must be an absolute path")
    try:
        # with modes that no umask changes, since QEMU must get through
        where.make_directory(directory, DIRECTORY_MODE)
        free = where.free_bytes(directory)
    except OSError as err:
        raise ConfigError(f"scratch directory {directory} can't be used: {err.strerror}") from err
    if free < 2 * reserve:
        raise ScratchSpaceError(
            f"scratch directory {directory} has {free} bytes free, {2 * reserve} are needed: "
            f"make room or give another one: scratch.directory, or 'backup --scratch-dir'",
            free=free,
            needed=2 * reserve,
        )
    return free


def looker(domain: Domain, directory: Path, free: int) -> Callable[[], int]:
    """What tells how many bytes are free; on another host there were ``free`` just now.

    There libvirt says what the job has taken, and only now and then the host what is left.
    """
    where = domain.connection.where
    if where.is_here:
        return functools.partial(where.free_bytes, directory)
    known, asked, before = free, time.monotonic(), 0

    def look() -> int:
        nonlocal known, asked, before
        # a way that is lost ends the copy, and libvirt's daemon may be away for a while
        with contextlib.suppress(NbdbackupError):
            used = jobs.stats(domain).temp_used
            if time.monotonic() - asked > FAR_SECONDS:
                # the less of the two: what is taken meanwhile counts twice
                known, before, asked = where.free_bytes(directory), used, time.monotonic()
            return known - max(0, used - before)
        return known

    return look


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """A running job; all of its functions are called from other threads.

    ``look`` tells how many bytes are free in ``directory``, or raises OSError.
    ``on_trouble`` gets an error whose message may yet say more, until the watch is over.
    ``seen_by_guest`` says, after the job's end, what the guest has seen of a lack of space, and
    lets one go that was held by that. ``watch_job`` looks on until the event is set.
    """

    directory: Path
    reserve: int
    on_trouble: Callable[[NbdbackupError], None]
    look: Callable[[], int]
    end_job: Callable[[], None]
    seen_by_guest: "Callable[[Space], str]"
    watch_job: Callable[[threading.Event], None]


@contextlib.contextmanager
def watch(job: Watched) -> Iterator[None]:
    """Watch the running job during the body.

    If free space is about to fall below the reserve, or the job ends (with the guest, or by
    somebody else), ``on_trouble`` is called once or twice, and the job is ended.
    """
    stop = threading.Event()
    # two threads, since a libvirt that hangs must not keep the other from looking
    bodies: tuple[tuple[str, Callable[[threading.Event], None]], ...] = (
        ("scratch-space", functools.partial(_watch_space, job)),
        ("backup-job", job.watch_job),
    )
    threads = [
        threading.Thread(target=runlog.carried(body), args=(stop,), name=name, daemon=True)
        for name, body in bodies
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread, seconds in zip(threads, (END_SECONDS, JOIN_TIMEOUT_SECONDS), strict=True):
            thread.join(seconds)


class Space:
    """Free space in a directory, and how fast it goes."""

    def __init__(self, directory: Path, reserve: int, look: Callable[[], int]) -> None:
        self._directory = directory
        self._ask = look
        self._reserve = reserve
        self._seen = time.monotonic()
        self._rate = 0.0
        self.free = self.lowest = self._look()

    def is_low(self) -> bool:
        """Look; whether less than the reserve is left by the time that a job has ended."""
        before, self.free = self.free, self._look()
        now = time.monotonic()
        self._rate = max(
            (before - self.free) / max(now - self._seen, SHORTEST_SECONDS), self._rate * FADING
        )
        self._seen = now
        self.lowest = min(self.lowest, self.free)
        return self.free - self._rate * REACTION_SECONDS < self._reserve

    def pause(self) -> float:
        """How long nobody can eat what is above the reserve, were it at a rate never seen yet."""
        above = self.free - self._reserve
        seconds = above / (2 * max(self._rate, FASTEST))
        return min(max(seconds, SHORTEST_SECONDS), SPACE_POLL_SECONDS)

    def _look(self) -> int:
        try:
            return self._ask()
        except OSError as err:
            LOG.warning("scratch directory %s: %s", self._directory, err)
            return 0


def _watch_space(job: Watched, stop: threading.Event) -> None:
    space = Space(job.directory, job.reserve, job.look)
    while not space.is_low():
        if stop.wait(space.pause()):
            return
    if stop.is_set():
        return
    what = f"scratch directory {job.directory} is filling up, {space.free} bytes are left"
    cure = "give more space: scratch.directory, or 'backup --scratch-dir'"
    error = ScratchSpaceError(
        f"{what}: the job is being ended; {cure}", free=space.free, reserve=job.reserve
    )
    job.on_trouble(error)
    try:
        job.end_job()
        seen = job.seen_by_guest(space)
        error.message = f"{what}: the job was ended; {seen}; {cure}"
    except NbdbackupError as err:
        error.message = f"{what}, and the job can't be ended: {err.message}; {cure}"
    # only now: the job's end must not wait for a log
    events.emit(LOG, events.SCRATCH_LOW, reason=error, bytes=space.free)


def seen_by_guest(domain: Domain, space: Space) -> str:
    """What is known of errors that the guest has seen; one that is held by them is let go.

    Without the job its writes need no scratch space: QEMU does again what had failed.
    """
    found = ", ".join(domain.disk_errors()) or "a disk"
    if domain.is_held_by_error():
        domain.resume()
        return f"the guest was held by an error of {found} meanwhile, and goes on"
    if domain.disk_errors():
        return f"the guest may have seen errors of {found}"
    return unseen(space)


def unseen(space: Space) -> str:
    """What can be said of a guest whose disks show no error."""
    space.is_low()
    if space.lowest < ENOUGH:
        return "the guest may have seen write errors"
    return "no disk of the guest shows an error"


def is_ending(domain: Domain) -> bool:
    """Tell whether the domain is off, or its guest has shut down and QEMU is not kept for us.

    libvirt needs 1.5 s to notice that QEMU was killed, and sees a job's end before the guest's.
    """
    deadline = time.monotonic() + NOTICE_SECONDS
    while domain.is_active():
        if domain.is_shut_down() and not domain.is_kept():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(NOTICE_POLL_SECONDS)
    return True


def why_gone(domain: Domain) -> SourceError:
    """Say why a job of ours is no longer there, as far as that can be seen."""
    what = f"domain {domain.name} ended during the backup"
    if not is_ending(domain):
        what = f"domain {domain.name}: its backup job was ended before the copy was complete"
    return SourceError(f"{what}; nothing was saved, run again", domain=domain.name)


def watch_job(
    domain: Domain, on_trouble: Callable[[NbdbackupError], None], stop: threading.Event
) -> None:
    """Tell ``on_trouble`` if the job ends before ``stop`` is set."""
    peak = 0
    is_told = False
    while not stop.wait(JOB_POLL_SECONDS):
        # without libvirtd the job goes on; who ends it opens the connection anew
        if not domain.connection.is_alive():
            continue
        try:
            found = jobs.stats(domain)
            peak = max(peak, found.temp_used)
            if not found.is_active and not stop.is_set():
                on_trouble(why_gone(domain))
                break
            if not is_told and domain.is_kept():
                is_told = True
                events.emit(LOG, events.GUEST_WAITS)
        except NbdbackupError as err:
            LOG.debug("domain %s: %s", domain.name, err)
    LOG.debug("domain %s: at most %d bytes of scratch space were seen in use", domain.name, peak)
