"""Finding D-0: whatever moment a server dies at, a reader or writer raises, or all is right.

libnbd answers a request whose server is gone when it is *sent* from within the call that sends it,
and that call returns as if all were well. So the server is killed before each single call of the
library that a copy makes, one run after the other: every state of every reader is met, and none by
luck.
"""

import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbd
import pytest

from nbdbackupd.errors import NbdError
from nbdbackupd.nbdio import copy, target
from nbdbackupd.nbdio.arena import Arena
from nbdbackupd.nbdio.client import Endpoint, Patience
from nbdbackupd.nbdio.probe import Probe
from tests.lib.servers import is_listening

pytestmark = pytest.mark.component

CONNECTING = ("aio_connect_socket", "aio_opt_go")
TALKING = (*CONNECTING, "aio_block_status", "aio_pread", "poll", "aio_disconnect")
"""What of libnbd talks to the server while a disk is copied."""
WRITING = (*CONNECTING, "aio_pwrite", "aio_zero", "aio_flush", "poll", "aio_disconnect")
"""The same while an image is filled."""

BLOCK = 64 << 10
SIZE = 12 * BLOCK
DATA = (0, 1, 2, 5, 6, 8)
"""The blocks that hold data; the last three are a trailing hole."""
CHANGED = (1, 3, 8, 10)
"""Those that changed after the bitmap was made: 3 and 10 became zero."""


@dataclass
class Server:
    """A server that ``kill`` ends: when it returns, our next byte to it meets nobody."""

    endpoint: Endpoint
    process: "subprocess.Popen[bytes]"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def make_image(path: Path) -> None:
    """A fresh image: full of other bytes, so that each zero has to be written."""
    run = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)]
    subprocess.run(run, check=True)
    qemu_io(path, f"write -P 255 0 {SIZE}")


def qemu_io(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    run = ["qemu-io", "-f", "qcow2", *words, str(image)]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)


def qcow2(tmp_path: Path) -> Path:
    """The disk: data, a bitmap, changes after it."""
    image = tmp_path / "disk.qcow2"
    run = ["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(SIZE)]
    subprocess.run(run, check=True)
    qemu_io(image, *(f"write -P {number + 1} {number * BLOCK} {BLOCK}" for number in DATA))
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b0"], check=True)
    changes = {
        number: f"write -P {number + 101}" if number in DATA else "write -z" for number in CHANGED
    }
    qemu_io(image, *(f"{verb} {number * BLOCK} {BLOCK}" for number, verb in changes.items()))
    return image


def content(number: int) -> bytes:
    """What a block of the disk holds."""
    if number not in DATA:
        return bytes(BLOCK)
    return bytes([number + 101 if number in CHANGED else number + 1]) * BLOCK


def argv(kind: str, socket: Path, image: Path, bitmap: str) -> list[str]:
    """The command line of a server of one kind."""
    if kind == "nbdkit":
        raw = image.with_suffix(".raw")
        if not raw.exists():
            subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
        return ["nbdkit", "-f", "-r", "-U", str(socket), "file", str(raw)]
    bitmaps = ["-B", bitmap] if bitmap else []
    if kind.startswith("qemu-nbd"):
        access = [] if kind.endswith("-w") else ["-r"]
        return [
            "qemu-nbd", *access, "-t", "-e", "8", "-f", "qcow2", "-k", str(socket), *bitmaps,
            str(image),
        ]  # fmt: skip
    export = "type=nbd,id=e,node-name=top,name=,writable=off"
    return [
        "qemu-storage-daemon",
        *("--blockdev", f"driver=file,filename={image},node-name=low,read-only=on"),
        *("--blockdev", "driver=qcow2,file=low,node-name=top,read-only=on"),
        *("--nbd-server", f"addr.type=unix,addr.path={socket},max-connections=0"),
        *("--export", export + (f",bitmaps.0={bitmap}" if bitmap else "")),
    ]


@contextmanager
def served(kind: str, tmp_path: Path, image: Path, bitmap: str = "") -> Iterator[Server]:
    """A fresh server of the disk."""
    socket = tmp_path / "nbd.sock"
    socket.unlink(missing_ok=True)
    with subprocess.Popen(argv(kind, socket, image, bitmap)) as process:
        try:
            deadline = time.monotonic() + 60
            while not is_listening(socket):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.002)
            yield Server(Endpoint(socket=socket, export="", bitmap=bitmap), process)
        finally:
            process.kill()


class Fuse:
    """Strikes right before the ``at``-th call of one function of libnbd, whatever connection."""

    def __init__(self) -> None:
        self.name, self.at = "", 0
        self.calls: list[str] = []
        self.strike: Callable[[], None] = lambda: None

    def arm(self, name: str, at: int, strike: Callable[[], None]) -> None:
        self.name, self.at, self.strike, self.calls = name, at, strike, []

    def burn(self, name: str) -> None:
        if name == self.name and self.calls.count(name) == self.at:
            self.strike()
        self.calls.append(name)

    @property
    def struck(self) -> bool:
        return self.calls.count(self.name) > self.at


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> Fuse:
    """A fuse before each call of libnbd that could talk to the server."""
    made = Fuse()

    def fused(name: str) -> Callable[..., Any]:
        real = getattr(nbd.NBD, name)

        def called(*arguments: Any) -> Any:
            made.burn(name)
            return real(*arguments)

        return called

    for name in {*TALKING, *WRITING}:
        monkeypatch.setattr(nbd.NBD, name, fused(name))
    return made


@dataclass
class Memory:
    """A sink that keeps what was placed and written."""

    blocks: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    written: int = 0

    def prepare(self, offset: int, view: memoryview) -> tuple[int, int, bytes | None]:
        return (offset, len(view), bytes(view))

    def zero(self, offset: int, length: int) -> tuple[int, int, bytes | None]:
        return (offset, length, None)

    def place(self, block: tuple[int, int, bytes | None]) -> None:
        self.blocks.append(block)

    def write(self, *blocks: tuple[int, int, bytes | None]) -> None:
        self.written += sum(length for _, length, _ in blocks)

    def is_right(self, numbers: range | tuple[int, ...]) -> bool:
        """Whether these blocks of the disk, all of them and no others, are here as they are."""
        wanted = b"".join(content(number) for number in numbers)
        found = b"".join(bytes(length) if data is None else data for _, length, data in self.blocks)
        places = [
            at // BLOCK
            for offset, length, _ in self.blocks
            for at in range(offset, offset + length, BLOCK)
        ]
        return places == list(numbers) and found == wanted and self.written == len(wanted)


def run(endpoint: Endpoint, depth: int) -> Memory:
    """One copy; one connection and one worker make the calls come in one order."""
    sink = Memory()
    tuning = copy.Tuning(workers=1, connections=1, depth=depth, block=BLOCK)
    copy.copy(
        endpoint, sink, tuning=tuning, arena=tuning.arena(), patience=Patience(30.0),
        progress=lambda _: None,
    )  # fmt: skip
    return sink


KINDS = ("nbdkit", "qemu-nbd", "qemu-storage-daemon")


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize(("kind", "bitmap"), [*((each, "") for each in KINDS), (KINDS[1], "b0")])
def test_a_server_that_dies_before_any_call_is_noticed(
    tmp_path: Path, fuse: Fuse, kind: str, bitmap: str, depth: int
) -> None:
    """D-0: before the first read, between send and flight, in flight, and behind the last read."""
    image = qcow2(tmp_path)
    wanted = CHANGED if bitmap else range(SIZE // BLOCK)
    met = dict.fromkeys(TALKING, 0)
    for name in TALKING:
        for at in itertools.count():
            with served(kind, tmp_path, image, bitmap) as server:
                fuse.arm(name, at, server.kill)
                try:
                    sink = run(server.endpoint, depth)
                except NbdError:
                    assert fuse.struck
                    met[name] += 1
                    continue
                assert sink.is_right(wanted), f"short: {name} {at} of {fuse.calls}"
                if not fuse.struck:
                    break
                # the server's last answer was under way to us already
                assert name in ("poll", "aio_disconnect")
    assert all(count for name, count in met.items() if name != "aio_disconnect")


def test_a_server_that_dies_before_any_look_is_noticed(tmp_path: Path, fuse: Fuse) -> None:
    """D-0: what changed, and single ranges, as the proof of an image's origin asks for them."""
    image = qcow2(tmp_path)
    met = dict.fromkeys(TALKING, 0)
    for name in TALKING:
        for at in itertools.count():
            with served("qemu-nbd", tmp_path, image, "b0") as server:
                fuse.arm(name, at, server.kill)
                try:
                    with Probe(server.endpoint, Patience(30.0)) as probe:
                        changed = [(each.offset, each.length) for each in probe.changes()]
                        found = [probe.read(number * BLOCK, BLOCK) for number in DATA]
                except NbdError:
                    assert fuse.struck
                    met[name] += 1
                    continue
                assert changed == [(number * BLOCK, BLOCK) for number in CHANGED]
                assert found == [content(number) for number in DATA]
                if not fuse.struck:
                    break
    assert all(count for name, count in met.items() if name != "aio_disconnect")


@pytest.mark.parametrize("depth", [1, 3])
def test_a_writing_server_that_dies_before_any_call_is_noticed(
    tmp_path: Path, fuse: Fuse, depth: int
) -> None:
    """D-0: an image that is filled through a server is right, or an error tells."""
    image = tmp_path / "out.qcow2"
    met = dict.fromkeys(WRITING, 0)
    for name in WRITING:
        for at in itertools.count():
            make_image(image)
            with served("qemu-nbd -w", tmp_path, image) as server:
                fuse.arm(name, at, server.kill)
                try:
                    fill(server.endpoint, Arena(depth, BLOCK))
                except NbdError:
                    assert fuse.struck
                    met[name] += 1
                    continue
                finally:
                    server.kill()
            assert raw(image) == b"".join(content(number) for number in range(SIZE // BLOCK))
            if not fuse.struck:
                break
    assert all(count for name, count in met.items() if name != "aio_disconnect")


def fill(endpoint: Endpoint, arena: Arena) -> None:
    """Write the disk, as a restore does: the zeroes, too."""
    patience = Patience(30.0)
    with target.open_target(endpoint, arena, known_zero=False, patience=patience) as into:
        for number in range(SIZE // BLOCK):
            if number not in DATA:
                into.zero(number * BLOCK, BLOCK)
                continue
            slot = into.take()
            into.view(slot, BLOCK)[:] = content(number)
            into.write(slot, BLOCK, number * BLOCK)
        into.flush()


def raw(image: Path) -> bytes:
    """What an image holds."""
    out = image.with_suffix(".content")
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, out], check=True)
    return out.read_bytes()
