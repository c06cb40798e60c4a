"""Who has images of a domain open that is off, and how to make him let go at once.

QEMU can't lock an image that our storage daemon reads: the start of the domain would fail. So a
run that may touch such images tells of itself, in a lease, and what it starts on them holds a
shared lock of the kernel on a file beside it. ``give_way`` ends those readers. It needs no libvirt,
which waits for its own hook at that moment, and it does not rely on the run: that one may be dead,
stopped, or waiting for libvirt itself.

One of the two always sees the other. ``give_way`` leaves its marker before it looks for a lease;
a run writes its lease before it looks for a marker, and looks again whenever it has taken the
lock for a child.
"""

import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents, durable, rundir
from nbdbackupd import log as runlog
from nbdbackupd.errors import BusyError, ElsewhereError, GaveWayError, SourceError

log = logging.getLogger(__name__)

VERSION: Final = 1
MARKER_SECONDS: Final = 15.0
"""So long after ``give_way`` a domain may still be on its way to open its images."""

LET_GO_SECONDS: Final = 2.0
POLL_SECONDS: Final = 0.01
START_POLL_SECONDS: Final = 0.2
MAX_LEASE: Final = 64 << 10
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
ENDED: Final = frozenset("ZX")
START_FIELD: Final = 19
"""Of /proc/PID/stat, counted after the command's closing parenthesis: proc(5), starttime."""


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that is not mistaken for a later one: ids come again, start times don't.

    ``start`` is in clock ticks since the boot ``boot``.
    """

    pid: int
    start: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> "ProcessId | None":
        """The process that has this id now, or None; one that only waits to be reaped is none."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            fields = text.rpartition(")")[2].split()
            if fields[0] in ENDED:
                return None
            return cls(pid, int(fields[START_FIELD]), BOOT_ID.read_text().strip())
        except (OSError, IndexError, ValueError):
            return None

    def is_alive(self) -> bool:
        """Whether that very process is still there."""
        return self.of(self.pid) == self

    def send(self, signum: signal.Signals) -> bool:
        """Send a signal to that very process; False if it is gone or is not ours to signal."""
        try:
            fd = os.pidfd_open(self.pid)
        except (OSError, OverflowError):
            return False
        try:
            # what the descriptor means can't be replaced any more
            if not self.is_alive():
                return False
            signal.pidfd_send_signal(fd, signum)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """What a lease says. ``server`` is the storage daemon, while there is one."""

    domain: str
    uuid: str
    run_id: str
    run: ProcessId
    server: ProcessId | None = None


class Lease:
    """A lease that is held, by ``hold``; the domain's lock keeps it to one run at a time."""

    def __init__(self, runtime_dir: Path, holder: Holder) -> None:
        """For ``hold`` only."""
        self._runtime = runtime_dir
        self._directory = rundir.domain_dir(runtime_dir, holder.uuid)
        self._holder = holder
        self._seen = -1
        self.doubt: Callable[[str], str] = lambda _path: ""
        """Why an image, by its path, may be open on another host: then nothing is written to it."""
        self.unhooked = ""
        """Why libvirt does not tell us of a start: then nothing that we do may stop one."""
        self.is_read_only = False
        """Whether for that reason nothing is written either."""

    def check(self) -> None:
        """Raise GaveWayError if somebody has asked for the images since the lease was taken."""
        if self._newest_marker() > self._seen:
            raise self._gave_way()

    @contextmanager
    def images(self) -> Iterator[int]:
        """A descriptor to pass to a child that opens images: the child holds the lock with it.

        Leave the context as soon as the child runs. Raises GaveWayError.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with durable.translate_os_errors("open", self._directory / rundir.IMAGES):
            fd = os.open(self._directory / rundir.IMAGES, flags, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._gave_way() from None
            self.check()
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def writing(self, path: str) -> Iterator[int]:
        """As ``images``, for a child that writes to an image.

        Raises ElsewhereError on a doubt, SourceError if a start would not be seen.
        """
        why = self.doubt(path)
        if why:
            raise ElsewhereError(f"image {path} is not written to: {why}")
        if self.is_read_only:
            raise SourceError(
                f"image {path} is not written to, since a start might be refused: {self.unhooked}"
            )
        with self.images() as fd:
            yield fd

    def name_server(self, pid: int) -> None:
        """Note the child that ``give_way`` is to kill; it must only read. 0: there is none."""
        holder = self._holder
        self._holder = Holder(
            domain=holder.domain,
            uuid=holder.uuid,
            run_id=holder.run_id,
            run=holder.run,
            server=ProcessId.of(pid) if pid else None,
        )
        self.announce()

    def announce(self) -> None:
        """Write the lease; for ``hold`` only."""
        path = self._directory / rundir.LEASE
        with durable.translate_os_errors("write", path):
            durable.write_atomic(path, json.dumps(_document(self._holder)).encode(), 0o600)

    def wait_for_start(self, is_active: Callable[[], bool], cancelled: Callable[[], None]) -> None:
        """Wait while a marker is fresh, at most as long as one stays so; for ``hold`` only."""
        now = (self._directory / rundir.LEASE).stat().st_mtime_ns
        self._seen = self._newest_marker()
        # a marker from the future: the clock was put back, so nobody knows how old it is
        age = max(0.0, (now - self._seen) / 1e9)
        deadline = time.monotonic() + MARKER_SECONDS - age
        if self._seen >= 0 and time.monotonic() < deadline:
            name, left = self._holder.domain, MARKER_SECONDS - age
            text = "a start of domain %s was announced %.0f s ago: waiting for it, at most %.0f s"
            log.log(runlog.NOTICE, text, name, age, left)
        while self._seen >= 0 and time.monotonic() < deadline and not is_active():
            cancelled()
            time.sleep(START_POLL_SECONDS)

    def _gave_way(self) -> GaveWayError:
        domain = self._holder.domain
        return GaveWayError(
            f"domain {domain} is being started: the run let go of its images", domain=domain
        )

    def _newest_marker(self) -> int:
        """When a start was announced last, in nanoseconds; -1 if never."""
        names = {self._holder.domain, self._holder.uuid}
        return max(_mtime(marker(self._runtime, name)) for name in names)


@contextmanager
def hold(
    runtime_dir: Path,
    *,
    domain: str,
    uuid: str,
    run_id: str,
    is_active: Callable[[], bool],
    cancelled: Callable[[], None],
) -> Iterator[Lease]:
    """Announce that this process may touch images of the domain; the domain's lock is held.

    ``<runtime_dir>/<uuid>`` must exist. If a start was announced in the last seconds, wait until
    the domain runs or the announcement is old; so ask libvirt for the domain's state afterwards.

    Raises RepositoryError if the lease can't be written, what ``is_active`` and ``cancelled``
    raise.
    """
    this = ProcessId.of(os.getpid())
    if this is None:
        raise SourceError("/proc does not tell when this process started: is it mounted?")
    lease = Lease(runtime_dir, Holder(domain=domain, uuid=uuid, run_id=run_id, run=this))
    try:
        lease.announce()
        lease.wait_for_start(is_active, cancelled)
        yield lease
    finally:
        forget(rundir.domain_dir(runtime_dir, uuid))


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenWay:
    """What ``give_way`` found: the runs that were told, whether a reader was killed, seconds."""

    holders: tuple[Holder, ...]
    killed: bool
    seconds: float


def give_way(runtime_dir: Path, domain: str) -> GivenWay:
    """Make everybody let go of the images of a domain, given by name or UUID, that is to start.

    A run that is told takes SIGUSR1 for it. Raises BusyError if an image is still open after two
    seconds, OSError if the runtime directory can't be read.
    """
    begun = time.monotonic()
    try:
        _announce(runtime_dir, domain)
    except OSError as err:
        # a full disk is no reason to keep a guest from starting
        log.warning("can't announce the start of domain %s: %s", domain, err)
    found: dict[ProcessId, Holder] = {}
    killed = False
    directories = _directories(runtime_dir, domain, found)
    for holder in found.values():
        holder.run.send(signal.SIGUSR1)
    while True:
        for directory in directories:
            # each time anew: the run may have been just about to start its server
            lease = _current(directory)
            if lease is not None and lease.server is not None:
                killed |= lease.server.send(signal.SIGKILL)
        directories = [each for each in directories if not _is_free(each)]
        waited = time.monotonic() - begun
        if not directories:
            return GivenWay(holders=tuple(found.values()), killed=killed, seconds=waited)
        if waited > LET_GO_SECONDS:
            raise BusyError(
                f"images of domain {domain} are still open after {waited:.1f} s: "
                f"see who holds {directories[0] / rundir.IMAGES}",
                domain=domain,
            )
        time.sleep(POLL_SECONDS)


def read(directory: Path) -> Holder | None:
    """The lease in a domain's directory, also one of a dead process; None if there is none."""
    try:
        with (directory / rundir.LEASE).open("rb") as file:
            return _holder(documents.parse_json(file.read(MAX_LEASE)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(directory: Path) -> None:
    """Remove the lease of a dead process; the domain's lock is held, so there is no other."""
    with suppress(OSError):
        (directory / rundir.LEASE).unlink(missing_ok=True)


def marker(runtime_dir: Path, domain: str) -> Path:
    """The file whose time of modification tells when a start of the domain was announced."""
    return runtime_dir / rundir.STARTING / f"{rundir.file_name(domain)}.starting"


def _announce(runtime_dir: Path, domain: str) -> None:
    rundir.make(runtime_dir, rundir.STARTING)
    path = marker(runtime_dir, domain)
    path.touch(mode=0o600)
    os.utime(path)


def _directories(runtime_dir: Path, domain: str, found: dict[ProcessId, Holder]) -> list[Path]:
    """Where leases of the domain lie; the living runs among their holders go into ``found``.

    A server can outlive its run only for the blink in which the kernel ends both, yet its
    directory counts, too: the lock tells.
    """
    directories = []
    for directory in sorted(runtime_dir.iterdir()) if runtime_dir.is_dir() else ():
        holder = _current(directory)
        if holder is None or domain not in (holder.domain, holder.uuid):
            continue
        directories.append(directory)
        if holder.run.is_alive():
            found[holder.run] = holder
    return directories


def _current(directory: Path) -> Holder | None:
    """The lease; one of this boot if images are open, whatever boot id it names.

    In a container a unit of systemd may see the kernel's boot id, and libvirt's hook the one that
    systemd-nspawn made (systemd 252, measured). A lock has not outlived a boot, though, and whoever
    takes it has written the lease.
    """
    holder = read(directory)
    this = ProcessId.of(os.getpid())
    if holder is None or this is None or holder.run.boot == this.boot or _is_free(directory):
        return holder
    run = replace(holder.run, boot=this.boot)
    server = replace(holder.server, boot=this.boot) if holder.server else None
    return replace(holder, run=run, server=server)


def _is_free(directory: Path) -> bool:
    """Whether no child has images open: then the exclusive lock can be had."""
    return not durable.is_locked(directory / rundir.IMAGES, shared=False)


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def _document(holder: Holder) -> dict[str, Any]:
    return {
        "version": VERSION,
        "domain": holder.domain,
        "uuid": holder.uuid,
        "run_id": holder.run_id,
        "boot": holder.run.boot,
        "pid": holder.run.pid,
        "start": holder.run.start,
        "server_pid": holder.server.pid if holder.server else 0,
        "server_start": holder.server.start if holder.server else 0,
    }


def _holder(document: Any) -> Holder:
    boot = str(document["boot"])
    server = int(document["server_pid"])
    return Holder(
        domain=str(document["domain"]),
        uuid=str(document["uuid"]),
        run_id=str(document["run_id"]),
        run=ProcessId(int(document["pid"]), int(document["start"]), boot),
        server=ProcessId(server, int(document["server_start"]), boot) if server else None,
    )
