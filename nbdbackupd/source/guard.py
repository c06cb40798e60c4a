"""The guard of a run: a small process that outlives it and undoes what it may have left.

It reads a socket whose other end only the run holds. When that end is closed, by whatever end of
the run, the guard ends the run's job, lets the guest go that was frozen, and removes the scratch
files (source/guarding.py): nothing of it waits for the next run. A run that lives says so twice a
second; what is done about one that does not is in source/silence.py.

It also holds a duplicate of each connection to the job's NBD server where QEMU must not see it
closed (source/kept_connections.py).

A client in its handshake must be gone before the job is ended, or QEMU hangs. So each guard has a
share in a lock of the domain's, from before its run connects until no connection can be in
that phase; whoever ends the job of a dead run waits for that (``wait_for_guards``).

What the run sends is queued with the guard's socket: a descriptor is safe once it is sent, also
if the guard has not even started to read. One that is killed is replaced, as long as the run lives.
"""

import fcntl
import json
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents, durable, proc, rundir
from nbdbackupd import log as runlog
from nbdbackupd.errors import BusyError, ProcessError, SourceError
from nbdbackupd.source.kept_connections import KeptConnections, Stage

LOG = logging.getLogger(__name__)
MODULE: Final = "nbdbackupd.app.guard"
ROOT: Final = Path(__file__).parents[2]
MAX_MESSAGE: Final = 64 << 10
SEND_SECONDS: Final = 5.0
WATCH_SECONDS: Final = 0.5
REPLACEMENTS: Final = 5
MANY_DISKS: Final = 24
"""With four connections each, or fewer; QEMU's server takes 100 (7.2.22, measured)."""

MOST_DISKS: Final = 48
"""With two each."""

LAST_WAIT_SECONDS: Final = 30.0
TURN_SECONDS: Final = 60.0
"""More than ending a job and thawing a guest take at most."""

TURN_POLL_SECONDS: Final = 0.05

DISCARD_SECONDS: Final = 0.2

KEEP: Final = b"keep"
"""Comes with a descriptor."""

STAGE: Final = b"stage"
"""Number of a connection and its stage."""

BEGUN: Final = b"begun"
"""The job has begun: if it can't be seen, it has ended."""

BEAT: Final = b"beat"
"""The run lives, and is neither stopped nor stuck as a whole."""

THAW: Final = b"thaw"
"""The guest may be frozen, or freeze late: thaw it until its agent has answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """Whose end is waited for, and what is his: the first message to a guard.

    ``pid`` is the run's process, our parent. ``scratch`` are its scratch files; by them its job is
    told from that of another run. The run itself keeps ``scratch_reserve`` bytes free beside them.
    ``is_reachable``: libvirt, or QEMU, can be asked by another process than the run. ``monitor``
    is the path of QEMU's own where there is no libvirt, and ``agent`` that of its guest's agent.
    ``host`` is the id of another host, whose are scratch files and directory; with what leads
    there, see source/ssh.py.
    """

    uri: str
    user: str
    password: str
    domain: str
    uuid: str
    run_id: str
    pid: int
    runtime_dir: str
    scratch_dir: str
    scratch_reserve: int
    scratch: tuple[str, ...]
    is_reachable: bool
    monitor: str = ""
    agent: str = ""
    host: str = ""
    ssh_config: str = ""
    ssh_dir: str = ""

    def pack(self) -> bytes:
        """The message."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, data: bytes) -> "Charge":
        """Read the message."""
        document: dict[str, Any] = documents.parse_json(data)
        return cls(**{**document, "scratch": tuple(document["scratch"])})


@contextmanager
def turn(runtime_dir: Path) -> Iterator[None]:
    """A lock for whoever clears up after a run: a guard, or the sweep of the next run.

    It is on the domain's directory; where that is gone, nobody else is there. Raises BusyError if
    the other one takes longer than anything that is to be done.
    """
    why = f"somebody has been clearing up after an earlier run for {TURN_SECONDS:g} s"
    with _alone_in(rundir.beside(runtime_dir), why):
        yield


def wait_for_guards(runtime_dir: Path) -> None:
    """Wait until no connection of a dead run can be in its handshake. Raises BusyError."""
    why = (
        f"a connection of an earlier run to QEMU can't be closed, since QEMU has not answered for "
        f"{TURN_SECONDS:g} s"
    )
    with _alone_in(_guards(runtime_dir), why):
        pass


def _guards(runtime_dir: Path) -> Path:
    """The file that all guards hold; QEMU's account can open, and lock, the socket's directory."""
    return rundir.beside(runtime_dir) / rundir.GUARDS


@contextmanager
def _alone_in(path: Path, why: str) -> Iterator[None]:
    """Hold the lock of a file or directory; where that is gone, nobody else is there."""
    deadline = time.monotonic() + TURN_SECONDS
    with ExitStack() as stack:
        with suppress(FileNotFoundError):
            descriptor = _open(path)
            stack.callback(os.close, descriptor)
            while not _lock(descriptor):
                if time.monotonic() > deadline:
                    raise BusyError(f"{path.parent}: {why}: try later")
                time.sleep(TURN_POLL_SECONDS)
        yield


def _open(path: Path, more: int = 0) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | more, durable.LOCK_MODE)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Guard:
    """A run's side of its guard; made by ``guarded``. May be used from any thread.

    It is a keeper of connections as well (``nbdio.client.Keeper``).
    """

    def __init__(self, charge: Charge, *, is_holding: bool) -> None:
        """Start the process. ``is_holding``: connections are the server's to close.

        Raises ProcessError, OSError if ``charge.runtime_dir`` is not there.
        """
        self.is_holding = is_holding
        self.is_thrifty = is_holding and len(charge.scratch) > MANY_DISKS
        self._charge = charge
        self._is_ending = False
        self._lock = threading.Lock()
        self._settling = threading.Lock()
        self.kept = KeptConnections()
        self._idle: dict[object, list[tuple[int, Any]]] = {}
        self._notes: list[bytes] = []
        self._abandoned: set[int] = set()
        self._reader: threading.Thread | None = None
        self._is_left = threading.Event()
        self._left = REPLACEMENTS
        self._share = _open(_guards(Path(charge.runtime_dir)), os.O_CREAT)
        try:
            fcntl.flock(self._share, fcntl.LOCK_SH)
            self._line, self._program = self._begin()
        except BaseException:
            os.close(self._share)
            raise
        self.is_settled = False
        """Nothing is left to do: to be set by the one who has done it."""

    def keep(self, descriptor: int) -> int:
        """Duplicate a connected socket before anything is said on it; returns its number.

        Raises SourceError if the job is about to end.
        """
        with self._lock:
            self._check_ending()
            number = self.kept.duplicate(descriptor)
            self._tell(KEEP, descriptor)
        return number

    def going(self, number: int) -> None:
        """Note that a connection is about to enter its transmission phase.

        Raises SourceError if the job is about to end.
        """
        self._advance(number, Stage.GOING)

    def ready(self, number: int) -> None:
        """Note that it has entered it."""
        self._advance(number, Stage.READY)

    def refused(self, number: int) -> None:
        """Note that it has not entered it, and is in its handshake as before."""
        self._advance(number, Stage.CONNECTED)

    def settle(self) -> bool:
        """Leave no connection in its handshake and let none begin, so that the job may be ended.

        False if QEMU does not answer: then it must not be ended now.
        """
        with self._lock:
            self._is_ending = True
        with self._settling:
            return self.kept.settle()

    def take(self, key: object) -> tuple[int, Any] | None:
        """Number and handle of a connection that was given back under this key, or None."""
        with self._lock:
            found = self._idle.get(key)
            return found.pop() if found else None

    def give(self, key: object, idle: tuple[int, Any]) -> None:
        """Store an idle connection for the next one who wants such a one."""
        with self._lock:
            self._idle.setdefault(key, []).append(idle)

    def abandon(self, number: int) -> None:
        """Read what still comes on a connection of which a user left with requests in flight.

        QEMU can neither end the job nor pause the guest before that has been sent, and hangs.
        """
        with self._lock:
            self._abandoned.add(number)
            if self._reader is None:
                self._reader = threading.Thread(
                    target=runlog.carried(self._discard), name="discard", daemon=True
                )
                self._reader.start()

    def note(self, word: bytes) -> None:
        """Tell the guard how far the run is: ``BEGUN`` or ``THAW``."""
        with self._lock:
            self._notes.append(word)
            self._tell(word)

    def check(self) -> None:
        """Replace the process if it has died; tell it that we live."""
        with self._lock:
            if not self._program.is_running():
                self._replace()
            poller = select.poll()
            poller.register(self._line, select.POLLOUT)
            # one that does not read may be stopped; what it must know will wait for it
            if any(event & select.POLLOUT for _, event in poller.poll(0)):
                with suppress(OSError):  # it has died: seen the next time
                    self._send(BEAT)

    def leave(self) -> None:
        """Our end: end the process, or let it do what is left, and let go of everything."""
        if self.is_settled:
            self._program.kill()
        elif not self._program.is_running() and not self.kept.wait_closed(LAST_WAIT_SECONDS):
            LOG.warning(
                "domain %s: this run has no guard, and its job has not ended: "
                "'nbdbackupctl abort %s' ends it",
                self._charge.domain,
                self._charge.domain,
            )
        self._is_left.set()
        if self._reader is not None:
            self._reader.join()
        # from here on the process reads them
        self._line.close()
        self._idle.clear()
        self.kept.close()
        os.close(self._share)

    def _discard(self) -> None:
        while not self._is_left.is_set():
            self.kept.discard(DISCARD_SECONDS, tuple(self._abandoned))

    def _advance(self, number: int, stage: Stage) -> None:
        with self._lock:
            if stage is Stage.GOING:
                self._check_ending()
            self.kept.stages[number] = stage
            self._tell(_stage(number, stage))
            if stage is Stage.READY and not self.is_holding:
                self.kept.forget(number)

    def _check_ending(self) -> None:
        if self._is_ending:
            raise SourceError("the backup job is being ended", domain=self._charge.domain)

    def _begin(self) -> tuple[socket.socket, proc.Detached]:
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            passed = [number, self._share]
            argv = [sys.executable, "-P", "-m", MODULE, *map(str, passed)]
            program = proc.detach(argv, pass_fds=passed, env={"PYTHONPATH": os.fspath(ROOT)})
        line.settimeout(SEND_SECONDS)
        with suppress(OSError):  # one that has died already is replaced
            line.send(self._charge.pack())
        return line, program

    def _tell(self, word: bytes, descriptor: int = -1) -> None:
        """Send one message; a guard that does not take it is replaced by one that knows all.

        Connections that anybody may close are no concern of the process.
        """
        if not self.is_holding and word.startswith((KEEP, STAGE)):
            return
        try:
            self._send(word, descriptor)
        except OSError:
            self._replace()

    def _send(self, word: bytes, descriptor: int = -1) -> None:
        socket.send_fds(self._line, [word], [descriptor] if descriptor >= 0 else [])

    def _replace(self) -> None:
        if not self._left:
            return
        self._left -= 1
        LOG.info(
            "domain %s: the guard of this run has died, another one takes over", self._charge.domain
        )
        try:
            line, program = self._begin()
            # the new one first: what the old one held must not be let go in between
            self._line, before = line, self._line
            self._program.kill()
            before.close()
            self._program = program
            for number, each in enumerate(self.kept.all if self.is_holding else ()):
                self._send(KEEP, each.fileno())
                self._send(_stage(number, self.kept.stages[number]))
            for word in self._notes:
                self._send(word)
        except (ProcessError, OSError) as err:
            LOG.warning("domain %s: no guard for this run: %s", self._charge.domain, err)


def _stage(number: int, stage: Stage) -> bytes:
    return b"%s %d %d" % (STAGE, number, stage)


@contextmanager
def guarded(charge: Charge, *, is_holding: bool) -> Iterator[Guard]:
    """Have a run guarded while the body runs, and after it unless ``is_settled`` was set.

    Raises ProcessError if the process can't be started.
    """
    guard = Guard(charge, is_holding=is_holding)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(WATCH_SECONDS):
            guard.check()

    thread = threading.Thread(target=runlog.carried(watch), name="guard", daemon=True)
    thread.start()
    try:
        yield guard
    finally:
        stop.set()
        thread.join()
        guard.leave()


class Post:
    """The guard's side of the line: what the run has said so far."""

    def __init__(self, line: socket.socket, share: int) -> None:
        self._line = line
        self._share = share
        self.charge: Charge | None = None
        self.kept = KeptConnections()
        self.words: set[bytes] = set()
        self.heard = time.monotonic()
        """When the run has last said anything."""

    def read(self, idle: Callable[[], float | None]) -> None:
        """Read until the run's end.

        ``idle`` is called when no message waits, and again when its time is over: it says in how
        many seconds that is; less than 0 is never. None: the run is as good as dead.
        """
        poller = select.poll()
        poller.register(self._line, select.POLLIN)
        while True:
            if not poller.poll(0):
                seconds = idle()
                if seconds is None:
                    return
                if not poller.poll(seconds * 1000):
                    continue
            try:
                data, numbers, _, _ = socket.recv_fds(self._line, MAX_MESSAGE, 1)
            except OSError:
                return
            for number in numbers:
                self.kept.add(number)
            if not data:
                return
            self._note(data)

    def settle(self) -> bool:
        """Once the run is dead: see that no connection is in its handshake, and say so.

        False if QEMU has not answered in time: to be called again.
        """
        if self._share >= 0:
            if not self.kept.settle():
                return False
            os.close(self._share)
            self._share = -1
        return True

    def _note(self, data: bytes) -> None:
        self.heard = time.monotonic()
        word, *rest = data.split(b" ")
        if self.charge is None:
            self.charge = Charge.parse(data)
        elif word == STAGE:
            number, stage = (int(each) for each in rest)
            self.kept.stages[number] = Stage(stage)
        else:
            self.words.add(word)
