"""qemu-nbd as the writer of one image: it knows how qcow2 lies on disk, we don't.

qemu-nbd and not qemu-storage-daemon, since it comes in one package with qemu-img: a bare host that
can make an image can fill it. It listens before it says so to anybody, so we ask the socket until
it answers; being handed a listening socket would need the child's own process id in its
environment. It is not told to be persistent: when its last client is gone it ends, so a run that
was killed leaves no server behind. Our first connection stays open to keep it until we are done.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nbdbackupd import proc
from nbdbackupd.errors import ProcessError
from nbdbackupd.qemu import image as images

START_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.005
STOP_SECONDS: Final = 60.0
"""On SIGTERM qemu-nbd writes its caches back; on a slow disk that takes a while."""


@contextmanager
def serve(
    image: Path,
    *,
    format: str,
    endpoint: Path,
    clients: int,
    cancelled: Callable[[], None],
    compress: bool = False,
) -> Iterator[proc.Process]:
    """Export an image for writing on the Unix socket ``endpoint``, under the empty name.

    ``endpoint`` must not exist, its path must have less than 108 bytes; the server has gone and
    the socket with it when the context is left. ``clients`` is the number of connections that
    the caller needs at a time. ``compress``: clusters are compressed; each may be written once, and
    whole, and the image's size must be a multiple of theirs.

    Raises ProcessError if the server can't open the image, does not come up in time or has gone
    before the context was left, and what ``cancelled`` raises.
    """
    name = os.fspath(image.absolute())
    opened = [f"--format={format}"]
    if compress:
        opened = ["--image-opts"]
        lower = f"file.driver={format},file.file.driver=file"
        name = f"driver=compress,{lower},file.file.filename={images.escaped(name)}"
    argv = [
        "qemu-nbd",
        *opened,
        f"--socket={endpoint}",
        f"--shared={clients + 1}",
        "--discard=unmap",
        "--",
        name,
    ]
    with proc.spawn(argv, grace_seconds=STOP_SECONDS) as server:
        # Until it greets, a SIGTERM can get lost in it (seen with 7.2): nothing is open yet, so
        # there is nothing to wait for.
        grace = 0.0
        try:
            with _first_client(server, endpoint, cancelled):
                grace = STOP_SECONDS
                yield server
                # one that has gone by itself did not close the image for us
                server.check()
        finally:
            server.stop(grace)
            with contextlib.suppress(FileNotFoundError):
                endpoint.unlink()


@contextmanager
def _first_client(
    server: proc.Process, endpoint: Path, cancelled: Callable[[], None]
) -> Iterator[None]:
    """A connection that says nothing, made as soon as the server listens, and greeted."""
    deadline = time.monotonic() + START_SECONDS
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(POLL_SECONDS)
        while client.connect_ex(os.fspath(endpoint)) != 0:
            _check(server, deadline, cancelled)
            time.sleep(POLL_SECONDS)
        while not _is_greeted(client):
            _check(server, deadline, cancelled)
            time.sleep(POLL_SECONDS)
        yield


def _is_greeted(client: socket.socket) -> bool:
    """Whether the server's first bytes are there. If it died instead, its process tells why."""
    try:
        return bool(client.recv(1))
    except (TimeoutError, ConnectionError):
        return False


def _check(server: proc.Process, deadline: float, cancelled: Callable[[], None]) -> None:
    cancelled()
    server.check()
    if time.monotonic() > deadline:
        raise ProcessError(f"qemu-nbd was not ready within {START_SECONDS:g} s")
