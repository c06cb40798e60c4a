"""Other programs: the only place that starts processes.

Arguments are lists, never a shell's text. Standard input is /dev/null, the locale is C, and every
child leads a session of its own: Ctrl-C in a terminal reaches us alone, and we end the children
when their work is undone. If we are killed, the kernel kills them; only a program that must never
be stopped half-way is left to end by itself (``output`` with ``must_finish``), and one that is to
outlive us (``detach``). What a child makes (images, sockets, logs) is its account's alone,
whatever our own umask is.
"""

import contextlib
import logging
import os
import select
import selectors
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from nbdbackupd import plain
from nbdbackupd.errors import ProcessError

log = logging.getLogger(__name__)

MAX_OUTPUT: Final = 256 << 20
"""Standard output beyond this many bytes is an error: memory stays bounded."""

STDERR_TAIL: Final = 16 << 10
"""This many of the last bytes of standard error are kept."""

MAX_WORDS: Final = 300
PRIVATE: Final = 0o077
"""The umask of children."""

INHERITED: Final = -1
"""Our own umask: for the administrator's programs."""

GRACE_SECONDS: Final = 10.0
REAP_SECONDS: Final = 30.0
CHUNK: Final = 64 << 10

PACKAGES: Final = {
    "blkid": "util-linux",
    "e2fsck": "e2fsprogs",
    "fuse2fs": "fuse2fs",
    "fusermount3": "fuse3",
    "grub-mount": "grub-common (Debian) or grub2-tools-extra (Fedora, EL)",
    "guestmount": "libguestfs-tools (Debian) or libguestfs (Fedora, EL)",
    "nbd-client": "nbd-client (Debian) or nbd (Fedora, EL)",
    "nbdcopy": "libnbd-bin (Debian) or libnbd (Fedora, EL)",
    "nbdfuse": "libnbd-bin (Debian) or nbdfuse (Fedora, EL)",
    "nbdinfo": "libnbd-bin (Debian) or libnbd (Fedora, EL)",
    "nbdkit": "nbdkit",
    "partx": "util-linux",
    "journalctl": "systemd",
    "qemu-img": "qemu-utils (Debian) or qemu-img (Fedora, EL)",
    "qemu-io": "qemu-utils (Debian) or qemu-img (Fedora, EL)",
    "qemu-nbd": "qemu-utils (Debian) or qemu-img (Fedora, EL)",
    "qemu-storage-daemon": "qemu-system-common (Debian) or qemu-img (Fedora, EL)",
    "sendmail": "postfix, exim4 or msmtp-mta (Debian)",
    "ssh": "openssh-client (Debian) or openssh-clients (Fedora, EL)",
    "systemctl": "systemd",
    "tar": "tar",
}
"""Which distribution package brings a program."""

DIE_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")
"""util-linux's way to prctl(2), PR_SET_PDEATHSIG: code of ours between fork and exec would have to
run beside other threads' locks. The signal comes when the thread that started the child ends."""

ASKING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a program to end."""

_LEFT: list["subprocess.Popen[bytes]"] = []
"""Programs that ran on when we stopped waiting; Popen objects of such must not be dropped."""


class _Tail:
    """The last bytes of a program's standard error."""

    def __init__(self) -> None:
        self._kept = b""

    def add(self, data: bytes) -> None:
        self._kept = (self._kept + data)[-STDERR_TAIL:]

    def text(self) -> str:
        return self._kept.decode(errors="replace")

    def last_line(self) -> str:
        lines = self.text().split("\n")
        words = next((plain.line(each) for each in map(str.strip, reversed(lines)) if each), "")
        return words if len(words) <= MAX_WORDS else f"{words[:MAX_WORDS]}…"


def output(
    argv: Sequence[str | os.PathLike[str]],
    *,
    timeout: float,
    input: str | bytes | None = None,
    ok: Collection[int] = (0,),
    env: Mapping[str, str] | None = None,
    max_output: int = MAX_OUTPUT,
    pass_fds: Collection[int] = (),
    must_finish: bool = False,
) -> str:
    """Run a program to its end and return its standard output, decoded as UTF-8.

    ``timeout`` is in seconds; the program and its children are killed when it is over and on
    every other exception. ``env`` is added to our environment. ``pass_fds`` stay open in the
    child under their numbers. Bytes that are not UTF-8 become surrogate escapes.

    ``must_finish``: nothing kills the program, neither our own end nor the deadline; we only stop
    waiting for it. It must be one that ends by itself and survives closed pipes.

    Raises ProcessError: not found, killed, exit status not in ``ok``, deadline over, or more than
    ``max_output`` bytes; the message carries the last line of standard error.
    """
    name = program(argv)
    tail = _Tail()
    deadline = time.monotonic() + timeout
    fate = "goes on" if must_finish else "was killed"
    with contextlib.ExitStack() as stack:
        with _stdin(input) as stdin:
            child = _start(
                argv,
                stdin=stdin,
                stdout=subprocess.PIPE,
                pass_fds=pass_fds,
                env=env,
                die_with_us=not must_finish,
            )
        stack.callback(_close, child)
        stack.callback(_leave if must_finish else _kill, child)
        data = _collect(child, tail, deadline, max_output)
        if data is not None and len(data) > max_output:
            raise ProcessError(f"{name} wrote more than {max_output} bytes and {fate}")
        status = _await(child, deadline - time.monotonic()) if data is not None else None
    if data is None or status is None:
        raise ProcessError(f"{name} did not end within {timeout:g} s and {fate}")
    if status not in ok:
        raise _failure(name, status, tail)
    return data.decode(errors="surrogateescape")


def program(argv: Sequence[str | os.PathLike[str]]) -> str:
    """The program's name without its directory, for messages."""
    return Path(argv[0]).name


def hint(name: str) -> str:
    """What to do about a program that is not there, for messages."""
    package = PACKAGES.get(name)
    return f"install the package {package}" if package else "is it installed?"


class Process:
    """A running program, owned by ``spawn``."""

    def __init__(self, child: subprocess.Popen[bytes], name: str) -> None:
        self._child = child
        self._tail = _Tail()
        self.name = name
        self._reader = threading.Thread(target=self._drain, name=f"stderr of {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id; valid until ``spawn`` is left."""
        return self._child.pid

    @property
    def stdout(self) -> IO[bytes] | None:
        """The reading end of standard output if ``spawn`` was asked for a pipe."""
        return self._child.stdout

    @property
    def complaints(self) -> str:
        """The end of what the program has said on standard error so far."""
        return self._tail.text()

    def poll(self) -> int | None:
        """The exit status, negative for a signal, or None while the program runs."""
        return _await(self._child, 0)

    def check(self) -> None:
        """Raise ProcessError if the program has ended, whatever its status: it should run."""
        status = self.poll()
        if status is not None:
            raise self.failure(status)

    def wait(self, timeout: float, ok: Collection[int] = (0,)) -> int:
        """Wait for the end, at most ``timeout`` seconds, and return the status.

        Raises ProcessError when time is over (the program goes on) or the status not in ``ok``.
        """
        status = _await(self._child, timeout)
        if status is None:
            raise ProcessError(f"{self.name} did not end within {timeout:g} s")
        if status not in ok:
            raise self.failure(status)
        return status

    def failure(self, status: int) -> ProcessError:
        """An error that tells how the program ended, with its last line of standard error."""
        # The last words may still be on their way through the pipe.
        self._reader.join(1.0)
        return _failure(self.name, status, self._tail)

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """End the program and its children: SIGTERM, SIGKILL after the grace, reap.

        What the program said last is still told by ``failure``; ``poll`` is over.
        """
        try:
            if self.poll() is None:
                _signal_group(self._child, signal.SIGTERM)
                _await(self._child, grace_seconds)
        finally:
            _kill(self._child)
            self._reader.join(1.0)
            _close(self._child)

    def _drain(self) -> None:
        pipe = self._child.stderr
        with contextlib.suppress(OSError, ValueError):
            while pipe is not None and (data := os.read(pipe.fileno(), CHUNK)):
                self._tail.add(data)


@contextmanager
def spawn(
    argv: Sequence[str | os.PathLike[str]],
    *,
    pass_fds: Collection[int] = (),
    stdin: int | None = None,
    stdout: int | None = None,
    pipe_stdout: bool = False,
    env: Mapping[str, str] | None = None,
    grace_seconds: float = GRACE_SECONDS,
    umask: int = PRIVATE,
) -> Iterator[Process]:
    """Start a program and own it: on every way out it is terminated, or killed, and reaped.

    ``pass_fds`` stay open in the child under their numbers. ``stdin`` and ``stdout`` are
    descriptors, by default /dev/null; ``pipe_stdout`` gives ``Process.stdout`` instead. Standard
    error is read all the time and its end kept for messages.

    Raises ProcessError if the program can't be started.
    """
    wanted = subprocess.PIPE if pipe_stdout else stdout
    child = _start(
        argv,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=subprocess.DEVNULL if wanted is None else wanted,
        pass_fds=pass_fds,
        env=env,
        umask=umask,
    )
    try:
        process = Process(child, program(argv))
    except BaseException:
        _kill(child)
        _close(child)
        raise
    try:
        yield process
    finally:
        process.stop(grace_seconds)


class Detached:
    """A program that outlives us, whatever ends us; made by ``detach``."""

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        self._child = child
        _LEFT.append(child)

    @property
    def pid(self) -> int:
        """The process id; ours to signal while ``is_running``."""
        return self._child.pid

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._child.poll() is None

    def kill(self) -> None:
        """Kill it and its children, and reap it; fine if it has ended."""
        _kill(self._child)
        if self._child in _LEFT:
            _LEFT.remove(self._child)


def detach(
    argv: Sequence[str | os.PathLike[str]],
    *,
    pass_fds: Collection[int] = (),
    env: Mapping[str, str] | None = None,
) -> Detached:
    """Start a program that nothing ends but itself and ``Detached.kill``.

    It has no terminal and no output, and is born with the signals blocked that ask to end: it
    can't be asked before it has decided what it does of them.

    Raises ProcessError if the program can't be started.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        return Detached(
            _start(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=pass_fds,
                env=env,
                die_with_us=False,
            )
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _stdin(data: str | bytes | None) -> Iterator[int]:
    """A descriptor that holds the input: a file in memory can't block the program or us."""
    if data is None:
        yield subprocess.DEVNULL
        return
    with os.fdopen(os.memfd_create("stdin"), "w+b") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.seek(0)
        yield file.fileno()


def _start(
    argv: Sequence[str | os.PathLike[str]],
    *,
    stdin: int,
    stdout: int,
    pass_fds: Collection[int],
    env: Mapping[str, str] | None,
    die_with_us: bool = True,
    umask: int = PRIVATE,
    stderr: int = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    name = program(argv)
    words = [os.fspath(each) for each in argv]
    log.debug("run: %s", shlex.join(words))
    if die_with_us and shutil.which(words[0]) and shutil.which(DIE_WITH_US[0]):
        words = [*DIE_WITH_US, *words]
    try:
        return subprocess.Popen(
            words,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            env={**os.environ, **(env or {}), "LC_ALL": "C"},
            start_new_session=True,
            umask=umask,
        )
    except OSError as err:
        # A directory of PATH that we may not search makes "not found" look like EACCES.
        if isinstance(err, FileNotFoundError) or shutil.which(argv[0]) is None:
            raise ProcessError(f"program {name} was not found: {hint(name)}") from err
        raise ProcessError(f"program {name} can't be run: {err.strerror}") from err


def _collect(
    child: subprocess.Popen[bytes], tail: _Tail, deadline: float, max_output: int
) -> bytes | None:
    """Read standard output until the pipes close or there is too much of it.

    Returns None when the deadline is over.
    """
    data = bytearray()
    with selectors.DefaultSelector() as selector:
        for pipe in (child.stdout, child.stderr):
            if pipe is not None:
                selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            for key, _ in selector.select(left):
                part = os.read(key.fd, CHUNK)
                if not part:
                    selector.unregister(key.fileobj)
                elif key.fileobj is child.stderr:
                    tail.add(part)
                else:
                    data += part
            if len(data) > max_output:
                break
    return bytes(data)


def _await(child: subprocess.Popen[bytes], timeout: float) -> int | None:
    """The status of a child that ended, without reaping it, or None after ``timeout`` seconds.

    An ended child that is not reaped keeps its id, and with it the group's, from being given to
    strangers: the group can be signalled safely until ``_kill`` reaps.
    """
    if child.returncode is not None:
        return child.returncode
    fd = os.pidfd_open(child.pid)
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if not poller.poll(max(0.0, timeout) * 1000):
            return None
    finally:
        os.close(fd)
    info = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the whole group, also after its leader has ended, and reap the leader."""
    if child.returncode is None:
        _signal_group(child, signal.SIGKILL)
        try:
            child.wait(REAP_SECONDS)
        except subprocess.TimeoutExpired:
            # Stuck in the kernel (dead NFS server): nothing in user space can end it.
            log.warning("process %d can't be killed, it hangs in the kernel", child.pid)


def _leave(child: subprocess.Popen[bytes]) -> None:
    """Reap a child that has ended; one that has not is left alone, and reaped when we end."""
    if child.poll() is None:
        _LEFT.append(child)


def _close(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _signal_group(child: subprocess.Popen[bytes], signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signum)


def _failure(name: str, status: int, tail: _Tail) -> ProcessError:
    words = tail.last_line()
    said = f": {words}" if words else ""
    if status < 0:
        try:
            signal_name = signal.Signals(-status).name
        except ValueError:
            signal_name = f"signal {-status}"
        return ProcessError(f"{name} was killed by {signal_name}{said}")
    return ProcessError(f"{name} failed with exit status {status}{said}")
