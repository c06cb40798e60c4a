"""qemu-storage-daemon as a reader of images: whole backing chains, bitmaps of each layer, NBD.

Everything is opened read-only: a server that is killed leaves each file as it was, bit for bit,
while one that had an image open for writing leaves all of its bitmaps inconsistent (QEMU 7.2,
measured). Names of files travel as JSON, so no character in them means anything.

The NBD socket is bound by us and handed over, already listening: nobody has to wait for it, and
its mode is ours from the first moment. QEMU 5.2 or newer.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdbackupd import proc, rundir
from nbdbackupd.errors import (
    BusyError,
    ConfigError,
    NotSupportedError,
    ProcessError,
    SourceError,
)
from nbdbackupd.qemu.image import LOCKED
from nbdbackupd.qemu.qmp import Monitor

PROGRAM: Final = "qemu-storage-daemon"
COMMAND_SECONDS: Final = 60.0
STOP_SECONDS: Final = 2.0
"""It only reads: there is nothing that it must bring to an end."""

BACKLOG: Final = 64
SOCKET_MODE: Final = 0o600
RAW: Final = "raw"
WITH_BACKING: Final = frozenset({"qcow", "qcow2", "qed", "vmdk"})
"""Formats that look for a backing file by themselves unless they are told which."""

ENCRYPTED: Final = ("key-secret", "is encrypted")


@dataclass(frozen=True, slots=True)
class Image:
    """An image to open: absolute path, driver, and the external data file of a qcow2 image."""

    path: str
    format: str
    data_file: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bitmap:
    """A bitmap of a node; ``dirty`` and ``granularity`` in bytes.

    ``sound`` is False for one that was not stored when its image was last in use.
    """

    name: str
    dirty: int
    granularity: int
    sound: bool
    recording: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One open image; ``size`` is its virtual size in bytes."""

    name: str
    path: str
    size: int
    bitmaps: tuple[Bitmap, ...]

    def bitmap(self, name: str) -> Bitmap | None:
        """The bitmap of that name, or None."""
        return next((each for each in self.bitmaps if each.name == name), None)


class Server:
    """A running storage daemon; made by ``serve``."""

    def __init__(self, process: proc.Process, monitor: Monitor, *, locking: bool = True) -> None:
        self._process = process
        self._locking = "auto" if locking else "off"
        self._monitor = monitor
        self._count = 0

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def open_chain(self, images: Sequence[Image]) -> tuple[str, ...]:
        """Open a backing chain, given top first, and return the names of its nodes, top first.

        No image is looked for by what another one says: the chain is the one that was given.

        Raises BusyError if somebody writes to one of the images, NotSupportedError for an
        encrypted image or one that is no file or block device, SourceError if one can't be opened.
        """
        below: str | None = None
        names: list[str] = []
        for image in reversed(images):
            below = self._open(image, below)
            names.insert(0, below)
        return tuple(names)

    def nodes(self) -> dict[str, Node]:
        """All open images by node name, with their bitmaps. Raises ProcessError."""
        found = self._execute("query-named-block-nodes", {"flat": True})
        nodes = (_node(each) for each in found)
        return {node.name: node for node in nodes}

    def merge(
        self, node: str, name: str, sources: Sequence[tuple[str, str]], granularity: int
    ) -> None:
        """Make a bitmap in memory: all that is dirty in one of ``sources``, each (node, bitmap).

        It records nothing. ``granularity`` in bytes. Raises ProcessError if the sizes differ, or
        a source is missing or inconsistent.
        """
        self._execute(
            "block-dirty-bitmap-add",
            {"node": node, "name": name, "granularity": granularity, "disabled": True},
        )
        wanted = [{"node": each, "name": bitmap} for each, bitmap in sources]
        try:
            self._execute(
                "block-dirty-bitmap-merge", {"node": node, "target": name, "bitmaps": wanted}
            )
        except ProcessError:
            self._execute("block-dirty-bitmap-remove", {"node": node, "name": name})
            raise

    def export(self, node: str, name: str, bitmap: str = "") -> None:
        """Offer a node under an export name, with the context of one bitmap if it is given.

        Raises ProcessError.
        """
        self._count += 1
        arguments: dict[str, Any] = {
            "type": "nbd",
            "id": f"export-{self._count}",
            "node-name": node,
            "name": name,
            "writable": False,
        }
        if bitmap:
            arguments["bitmaps"] = [bitmap]
        self._execute("block-export-add", arguments)

    def check(self) -> None:
        """Raise ProcessError if the server has ended."""
        self._process.check()

    def _open(self, image: Image, below: str | None) -> str:
        self._count += 1
        number = self._count
        arguments: dict[str, Any] = {
            "driver": image.format,
            "node-name": f"image-{number}",
            "read-only": True,
            "file": self._open_file(image.path, f"file-{number}"),
        }
        if image.data_file:
            arguments["data-file"] = self._open_file(image.data_file, f"data-{number}")
        if below is not None or image.format in WITH_BACKING:
            arguments["backing"] = below
        self._add(arguments, image.path)
        return f"image-{number}"

    def _open_file(self, path: str, name: str) -> str:
        if not path.startswith("/"):
            raise NotSupportedError(
                f"image {path} is no local file or block device with an absolute path: "
                f"its domain can be backed up while it runs, or with start_paused (--start-paused)"
            )
        try:
            mode = Path(path).stat().st_mode
        except OSError as err:
            raise SourceError(f"image {path} can't be opened: {err.strerror}") from err
        driver = "host_device" if stat.S_ISBLK(mode) else "file"
        arguments = {"driver": driver, "node-name": name, "filename": path, "read-only": True}
        self._add({**arguments, "locking": self._locking}, path)
        return name

    def _add(self, arguments: dict[str, Any], path: str) -> None:
        try:
            self._execute("blockdev-add", arguments)
        except ProcessError as err:
            raise translate(err, path) from err

    def _execute(self, command: str, arguments: dict[str, Any]) -> Any:
        try:
            return self._monitor.execute(command, arguments)
        except ProcessError:
            # its own last words tell more than a closed monitor
            self._process.check()
            raise


@contextmanager
def serve(
    endpoint: Path,
    *,
    pass_fds: Collection[int] = (),
    started: Callable[[int], None] = lambda _pid: None,
    cancelled: Callable[[], None] = lambda: None,
    locking: bool = True,
) -> Iterator[Server]:
    """Run a storage daemon whose exports are offered on the Unix socket ``endpoint``.

    The socket is for our user only; a stale one is replaced. Server and socket are gone when the
    context is left. ``pass_fds`` stay open in the server for as long as it lives; ``started`` is
    called with its process id before anything is asked of it. Without ``locking`` it takes none of
    QEMU's locks, so that it stands in nobody's way: whoever reads has to prove that nobody wrote.

    Raises ConfigError if the socket can't be made, ProcessError if the server does not come up in
    time, and what ``cancelled`` raises.
    """
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        with theirs, listening(endpoint) as listener:
            stack.callback(_unlink, endpoint)
            descriptors = (theirs.fileno(), listener.fileno(), *pass_fds)
            argv = [
                PROGRAM,
                *("--chardev", f"socket,id=monitor,fd={theirs.fileno()}"),
                *("--monitor", "chardev=monitor"),
                "--nbd-server",
                f"addr.type=fd,addr.str={listener.fileno()},max-connections=0",
            ]
            process = stack.enter_context(
                proc.spawn(argv, pass_fds=descriptors, grace_seconds=STOP_SECONDS)
            )
        started(process.pid)
        try:
            monitor = Monitor(ours, PROGRAM, timeout=COMMAND_SECONDS, cancelled=cancelled)
        except ProcessError:
            process.check()
            raise
        yield Server(process, monitor, locking=locking)


def translate(err: ProcessError, path: str) -> BusyError | NotSupportedError | SourceError:
    """What a program's refusal to open an image means."""
    if any(words in err.message for words in LOCKED):
        return BusyError(
            f"image {path} is in use by another program: is its domain running, here or on "
            f"another host?"
        )
    if any(words in err.message for words in ENCRYPTED):
        return NotSupportedError(
            f"image {path} is encrypted and libvirt holds the key: back its domain up while it "
            f"runs, or with start_paused (--start-paused)"
        )
    return SourceError(f"image {path} can't be opened: {err.message}")


@contextmanager
def listening(endpoint: Path) -> Iterator[socket.socket]:
    """A socket for our user only that listens on the path ``endpoint``; a stale one is replaced.

    Raises ConfigError.
    """
    path = os.fspath(endpoint)
    if fault := rundir.socket_fault(endpoint):
        raise ConfigError(f"{fault}: give a shorter --runtime-dir")
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            endpoint.unlink(missing_ok=True)
            # Linux takes the socket's mode for the file's: it is never open to others
            os.fchmod(listener.fileno(), SOCKET_MODE)
            listener.bind(path)
            listener.listen(BACKLOG)
        except OSError as err:
            raise ConfigError(f"can't make the NBD socket {path}: {err.strerror}") from err
        yield listener


def _unlink(endpoint: Path) -> None:
    with contextlib.suppress(OSError):
        endpoint.unlink()


def _node(document: dict[str, Any]) -> Node:
    try:
        return Node(
            name=document["node-name"],
            path=document.get("file", ""),
            size=document["image"]["virtual-size"],
            bitmaps=bitmaps_of(document),
        )
    except (KeyError, TypeError) as err:
        raise ProcessError(f"{PROGRAM} describes a node without {err}") from err


def bitmaps_of(document: dict[str, Any]) -> tuple[Bitmap, ...]:
    """The bitmaps of a node, as ``query-named-block-nodes`` tells of it. Raises KeyError."""
    return tuple(
        Bitmap(
            name=each["name"],
            dirty=each["count"],
            granularity=each["granularity"],
            sound=not each.get("inconsistent", False),
            recording=each["recording"],
        )
        for each in document.get("dirty-bitmaps", [])
        if "name" in each
    )
