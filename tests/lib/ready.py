"""Command lines of ``nbdbackupctl`` without the third of a second that its modules take to load.

``python -m tests.lib.ready FD`` loads them all and then, for each request on that socket, forks a
process that runs one command line: with its own environment and standard streams, threads, signals
and end, as a program has them that was started.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pkgutil
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"
VARIABLES = {"PATH", "NBDBACKUP_STATE_DIR", "TZ"}
"""What command lines may have in their environment: others could change how modules are loaded."""
APART = {"nbdbackupd.__main__", "nbdbackupd.app.nbdkit_plugin"}
"""Programs of their own."""
REQUEST_BYTES = 1 << 17


class Ready:
    """The process that forks them."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sending = threading.Lock()
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [PYTHON, "-m", "tests.lib.ready", str(number)],
                cwd=ROOT,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                stdin=subprocess.DEVNULL,
                pass_fds=[number],
            )

    def close(self) -> None:
        """End it."""
        self._line.close()
        self._process.wait()

    def run(
        self, words: Sequence[str], environment: Mapping[str, str], seconds: float
    ) -> tuple[int, str, str]:
        """Run one to its end; returns what it ended with, as ``Popen.returncode``, and its outputs.

        The first word is the name of the module.  Raises ``TimeoutExpired`` after so many seconds,
        when it has been killed.
        """
        request = json.dumps([list(words), dict(environment)]).encode()
        pipes = [os.pipe() for _ in range(3)]
        ends = [end for _, end in pipes]
        texts = {begin: bytearray() for begin, _ in pipes}
        *_, news = texts
        try:
            try:
                with self._sending:
                    socket.send_fds(self._line, [request], ends)
            finally:
                for end in ends:
                    os.close(end)
            _read_all(texts, time.monotonic() + seconds)
        except TimeoutError:
            os.kill(int(texts[news]), signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(words), seconds) from None
        finally:
            for begin in texts:
                os.close(begin)
        out, err, told = (text.decode() for text in texts.values())
        return int(told.split()[1]), out, err


def _read_all(texts: Mapping[int, bytearray], deadline: float) -> None:
    """Read each to its end, as ``Popen.communicate``; raises TimeoutError."""
    with selectors.DefaultSelector() as reading:
        for fd in texts:
            reading.register(fd, selectors.EVENT_READ)
        while reading.get_map():
            found = reading.select(max(0, deadline - time.monotonic()))
            if not found:
                raise TimeoutError
            for key, _ in found:
                piece = os.read(key.fd, 1 << 16)
                texts[key.fd].extend(piece)
                if not piece:
                    reading.unregister(key.fd)


def ready() -> Ready:
    """The one of this process, which sees the same mounts; it ends with us."""
    return _ready(os.fspath(Path("/proc/self/ns/mnt").readlink()))


@functools.cache
def _ready(_mounts: str) -> Ready:
    found = Ready()
    atexit.register(found.close)
    return found


def main() -> int:
    """Load, fork at each request, end with the other end of the socket."""
    os.environ["LIBVIRT_DEBUG"] = "error"  # as the command does, before libvirt is loaded
    import nbdbackupd
    import tests.lib.rigged  # noqa: F401

    for module in pkgutil.walk_packages(nbdbackupd.__path__, "nbdbackupd."):
        if module.name not in APART:
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # else each process copies all pages when it collects
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    if words is None:
        return 0
    from nbdbackupd.app import ctl
    from tests.lib import rigged

    if words[0] == "tests.lib.rigged":
        sys.argv = [rigged.__file__, *words[1:]]
        return rigged.main()
    sys.argv = [str(ROOT / "nbdbackupd/__main__.py"), *words[1:]]
    return ctl.main()


def serve(line: socket.socket) -> list[str] | None:
    """The words of a command line, in the process that is to run it; None at the end."""
    waiting = selectors.DefaultSelector()
    waiting.register(line, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is not line:
                waiting.unregister(key.fd)
                os.close(key.fd)
                pid, tell = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.write(tell, f"{code}".encode())
                os.close(tell)
                continue
            request, fds, _, _ = socket.recv_fds(line, REQUEST_BYTES, 3)
            if not request:
                return None
            pid = os.fork()
            if pid == 0:
                os.dup2(fds[0], 1)
                os.dup2(fds[1], 2)
                waiting.close()
                line.detach()
                os.closerange(3, 1024)
                words: list[str]
                words, environment = json.loads(request)
                os.environ.clear()
                os.environ.update(environment)
                time.tzset()
                return words
            os.write(fds[2], f"{pid} ".encode())
            os.close(fds[0])
            os.close(fds[1])
            waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, fds[2]))


if __name__ == "__main__":
    sys.exit(main())
