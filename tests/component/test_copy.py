"""The copy pipeline and the extent queries against real NBD servers."""

import itertools
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nbdbackupd.errors import Interrupted, NbdError
from nbdbackupd.model.extents import Segment
from nbdbackupd.nbdio import copy, nbdinfo
from nbdbackupd.nbdio.arena import Arena
from nbdbackupd.nbdio.client import Connection, Endpoint, Patience
from nbdbackupd.nbdio.extents import ExtentReader
from nbdbackupd.nbdio.throttle import BURST_SECONDS, Throttle
from nbdbackupd.threads import side_by_side
from tests.lib.servers import is_listening

pytestmark = pytest.mark.component

MIB = 1 << 20
TUNING = copy.Tuning(workers=2, block=64 << 10)


@dataclass
class Memory:
    """A sink that keeps everything and checks who calls what."""

    blocks: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    written: int = 0
    writes: int = 0
    fail_at: int = -1
    placing: threading.Lock = field(default_factory=threading.Lock)
    writing: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, offset: int, view: memoryview) -> tuple[int, int, bytes | None]:
        return (offset, len(view), bytes(view))

    def zero(self, offset: int, length: int) -> tuple[int, int, bytes | None]:
        return (offset, length, None)

    def place(self, block: tuple[int, int, bytes | None]) -> None:
        assert self.placing.acquire(blocking=False), "two threads in place()"
        if len(self.blocks) == self.fail_at:
            raise OSError(28, "No space left on device")
        self.blocks.append(block)
        self.placing.release()

    def write(self, *blocks: tuple[int, int, bytes | None]) -> None:
        with self.writing:
            self.writes += 1
            self.written += sum(length for _, length, _ in blocks)

    def image(self, size: int) -> bytes:
        out = bytearray(size)
        end = 0
        for offset, length, data in self.blocks:
            assert offset >= end, "blocks out of order"
            end = offset + length
            if data is not None:
                out[offset:end] = data
        return bytes(out)


@contextmanager
def serve(tmp_path: Path, *argv: str) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Run an NBD server on a socket; ``{socket}`` in argv stands for its path."""
    socket = tmp_path / "nbd.sock"
    with subprocess.Popen([each.format(socket=socket) for each in argv]) as server:
        try:
            deadline = time.monotonic() + 10
            while not is_listening(socket):
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield socket, server
        finally:
            server.kill()


@contextmanager
def qemu_nbd(tmp_path: Path, image: Path, *options: str) -> Iterator[Path]:
    argv = ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "qcow2", "-x", "vda", "-k", "{socket}"]
    with serve(tmp_path, *argv, *options, str(image)) as (socket, _):
        yield socket


def qemu_io(image: Path, *commands: str) -> None:
    argv = ["qemu-io", "-f", "qcow2"]
    for command in commands:
        argv += ["-c", command]
    subprocess.run([*argv, str(image)], check=True, stdout=subprocess.DEVNULL)


def make_image(tmp_path: Path, size: int = 64 * MIB, options: str = "cluster_size=65536") -> Path:
    image = tmp_path / "disk.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(size)], check=True
    )
    return image


def run(endpoint: Endpoint, sink: Memory, **patience: object) -> None:
    copy.copy(
        endpoint, sink, tuning=TUNING, arena=TUNING.arena(),
        patience=Patience(**patience),  # type: ignore[arg-type]
        progress=lambda _: None,
    )  # fmt: skip


def reference(image: Path, tmp_path: Path) -> bytes:
    raw = tmp_path / "reference.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    return raw.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=65536,extended_l2=on",
        "cluster_size=2M",
    ],
)
def test_random_disks_are_copied_exactly(tmp_path: Path, options: str) -> None:
    """Fulls and deltas after random writes, zeroes and discards, on several cluster sizes."""
    rng = random.Random(options)
    size = 16 * MIB + 512 * 7
    image = make_image(tmp_path, size, options)

    def change() -> None:
        commands = []
        for _ in range(25):
            offset = rng.randrange(0, size - 256 * 1024) // 512 * 512
            length = rng.randrange(1, 400) * 512
            verb = rng.choice(
                [f"write -P {rng.randrange(256)}", "write -z", "write -z -u", "discard"]
            )
            commands.append(f"{verb} {offset} {length}")
        qemu_io(image, *commands)

    change()
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b0"], check=True)
    full = Memory()
    with qemu_nbd(tmp_path, image) as socket:
        run(Endpoint(socket=socket, export="vda"), full)
    before = reference(image, tmp_path)
    assert full.image(size) == before
    assert sum(length for _, length, _ in full.blocks) == size
    (tmp_path / "nbd.sock").unlink(missing_ok=True)

    change()
    delta = Memory()
    with qemu_nbd(tmp_path, image, "-B", "b0") as socket:
        endpoint = Endpoint(socket=socket, export="vda", bitmap="b0")
        run(endpoint, delta)
        with Connection(endpoint, contexts=endpoint.contexts) as connection:
            own = list(ExtentReader(connection, bitmap="b0").plan())
        assert own == list(nbdinfo.plan(endpoint, size))
    after = bytearray(before)
    for offset, length, data in delta.blocks:
        after[offset : offset + length] = bytes(length) if data is None else data
    assert bytes(after) == reference(image, tmp_path)


@pytest.mark.parametrize("arena", [TUNING.arena(), Arena(5, 64 << 10)])
def test_several_disks_share_buffers_and_workers(tmp_path: Path, arena: Arena) -> None:
    """Of different sizes, with one that is slow; with a buffer for each of them and one more."""
    sizes = [1 * MIB, 9 * MIB + 512, 16 * MIB, 64 << 10]
    bodies = [random.Random(size).randbytes(size) for size in sizes]
    most = [0]

    class Counted(Memory):
        def prepare(self, offset: int, view: memoryview) -> tuple[int, int, bytes | None]:
            most[0] = max(most[0], arena.working)
            assert arena.share <= arena.count
            return super().prepare(offset, view)

    with ExitStack() as stack:
        jobs = []
        for number, body in enumerate(bodies):
            place = tmp_path / str(number)
            place.mkdir()
            (place / "raw").write_bytes(body)
            slow = [] if number else ["--filter=delay"]
            argv = ["nbdkit", "-f", "-r", "-U", "{socket}", *slow, "file", f"{place}/raw"]
            argv += [] if number else ["delay-read=5ms"]
            jobs.append((stack.enter_context(serve(place, *argv))[0], Counted()))

        def one(job: tuple[Path, Memory], check: Callable[[], None]) -> None:
            copy.copy(
                Endpoint(socket=job[0], export=""), job[1], tuning=TUNING, arena=arena,
                patience=Patience(20, check), progress=lambda _: None,
            )  # fmt: skip

        side_by_side(jobs, len(jobs), one, lambda: None)
    assert [sink.image(size) for (_, sink), size in zip(jobs, sizes, strict=True)] == bodies
    assert 1 <= most[0] <= TUNING.workers
    assert sorted(arena.free) == list(range(arena.count))
    assert (arena.working, arena.share) == (0, arena.count)


def test_small_extents_are_written_together(tmp_path: Path) -> None:
    size, step = 16 * MIB, 16 << 10
    image = make_image(tmp_path, size, "cluster_size=4096")
    places = range(0, size, step)
    qemu_io(image, *(f"write -q -P {1 + place // step % 255} {place} 4096" for place in places))
    sink = Memory()
    with qemu_nbd(tmp_path, image) as socket:
        run(Endpoint(socket=socket, export="vda"), sink)
    assert sink.image(size) == reference(image, tmp_path)
    assert len(sink.blocks) == 2 * len(places)
    assert sink.writes <= len(places) // copy.CELLS


def test_a_block_is_asked_for_in_pieces(tmp_path: Path) -> None:
    """Of larger ones QEMU 7.2 takes each buffer from the kernel anew."""
    told = tmp_path / "log"
    argv = [
        "nbdkit", "-f", "-U", "{socket}", "--filter=log", "pattern", "4100K", f"logfile={told}",
    ]  # fmt: skip
    tuning, sink = copy.Tuning(), Memory()
    with serve(tmp_path, *argv) as (socket, _):
        copy.copy(
            Endpoint(socket=socket, export=""), sink, tuning=tuning, arena=tuning.arena(),
            patience=Patience(), progress=lambda _: None,
        )  # fmt: skip
    pattern = b"".join(offset.to_bytes(8, "big") for offset in range(0, 4100 << 10, 8))
    assert sink.image(4100 << 10) == pattern
    assert [length for _, length, _ in sink.blocks] == [MIB] * 4 + [4096]
    asked = re.findall(r"Read .*?offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", told.read_text())
    assert sorted((int(offset, 16), int(length, 16)) for offset, length in asked) == [
        (offset, min(copy.REQUEST, (4100 << 10) - offset))
        for offset in range(0, 4100 << 10, copy.REQUEST)
    ]


def test_a_missing_bitmap_is_refused(tmp_path: Path) -> None:
    with qemu_nbd(tmp_path, make_image(tmp_path)) as socket:
        endpoint = Endpoint(socket=socket, export="vda", bitmap="nope")
        with pytest.raises(NbdError, match="does not grant meta context"):
            run(endpoint, Memory())


def test_an_unknown_export_is_refused(tmp_path: Path) -> None:
    with qemu_nbd(tmp_path, make_image(tmp_path)) as socket, pytest.raises(NbdError, match="vdx"):
        run(Endpoint(socket=socket, export="vdx"), Memory())


def test_a_read_error_ends_the_copy_with_its_offset(tmp_path: Path) -> None:
    argv = [
        "nbdkit", "-f", "-U", "{socket}", "--filter=error", "pattern", "16M",
        "error-pread=EIO", "error-pread-rate=20%",
    ]  # fmt: skip
    failure = pytest.raises(NbdError, match=r"read failed: EIO .*offset=")
    with serve(tmp_path, *argv) as (socket, _), failure:
        run(Endpoint(socket=socket, export=""), Memory())
    assert threading.active_count() == 1


def test_slow_replies_in_any_order_are_put_in_order(tmp_path: Path) -> None:
    argv = [
        "nbdkit", "-f", "-U", "{socket}", "--filter=delay", "pattern", "4M", "rdelay=5ms",
    ]  # fmt: skip
    sink = Memory()
    with serve(tmp_path, *argv) as (socket, _):
        run(Endpoint(socket=socket, export=""), sink)
    pattern = b"".join(offset.to_bytes(8, "big") for offset in range(0, 4 * MIB, 8))
    assert sink.image(4 * MIB) == pattern


def test_a_dying_server_ends_the_copy(tmp_path: Path) -> None:
    argv = ["nbdkit", "-f", "-U", "{socket}", "--filter=rate", "pattern", "64M", "rate=80M"]
    with serve(tmp_path, *argv) as (socket, server):
        threading.Timer(0.4, server.kill).start()
        with pytest.raises(NbdError):
            run(Endpoint(socket=socket, export=""), Memory())


def test_a_silent_server_ends_the_copy(tmp_path: Path) -> None:
    argv = ["nbdkit", "-f", "-U", "{socket}", "--filter=rate", "pattern", "64M", "rate=80M"]
    with serve(tmp_path, *argv) as (socket, server):
        threading.Timer(0.3, os.kill, (server.pid, signal.SIGSTOP)).start()
        begun = time.monotonic()
        with pytest.raises(NbdError, match="for 1 s"):
            run(Endpoint(socket=socket, export=""), Memory(), seconds=1.0)
        assert time.monotonic() - begun < 20


def test_cancel_ends_the_copy_soon(tmp_path: Path) -> None:
    argv = ["nbdkit", "-f", "-U", "{socket}", "--filter=rate", "pattern", "1G", "rate=80M"]
    deadline = time.monotonic() + 0.5

    def cancelled() -> None:
        if time.monotonic() > deadline:
            raise Interrupted(15)

    with serve(tmp_path, *argv) as (socket, _), pytest.raises(Interrupted):
        run(Endpoint(socket=socket, export=""), Memory(), cancelled=cancelled)
    assert time.monotonic() - deadline < 8
    assert threading.active_count() == 1


def test_a_failing_sink_ends_the_copy(tmp_path: Path) -> None:
    sink = Memory(fail_at=5)
    argv = ["nbdkit", "-f", "-U", "{socket}", "pattern", "64M"]
    with serve(tmp_path, *argv) as (socket, _), pytest.raises(OSError, match="No space left"):
        run(Endpoint(socket=socket, export=""), sink)
    assert len(sink.blocks) == 5


def test_a_server_without_block_status_is_an_error_not_an_empty_disk(tmp_path: Path) -> None:
    argv = ["nbdkit", "-f", "--no-sr", "-U", "{socket}", "pattern", "1M"]
    with serve(tmp_path, *argv) as (socket, _), pytest.raises(NbdError, match="does not grant"):
        run(Endpoint(socket=socket, export=""), Memory())


def test_short_replies_are_asked_again(tmp_path: Path) -> None:
    """nbdkit's blocksize-policy can't shorten replies; a python plugin can."""
    plugin = tmp_path / "short.py"
    plugin.write_text(
        "API_VERSION = 2\n"
        "def open(readonly): return 1\n"
        "def get_size(h): return 1 << 20\n"
        "def can_extents(h): return True\n"
        "def pread(h, buf, offset, flags): buf[:] = bytes([offset >> 12 & 255]) * len(buf)\n"
        "def extents(h, count, offset, flags):\n"
        "    length = min(4096, (1 << 20) - offset)\n"
        "    return [(offset, length, 3 if offset >> 12 & 1 else 0)]\n"
    )
    with serve(tmp_path, "nbdkit", "-f", "-U", "{socket}", "python", str(plugin)) as (socket, _):
        endpoint = Endpoint(socket=socket, export="")
        with Connection(endpoint, contexts=endpoint.contexts) as connection:
            plan = list(ExtentReader(connection).plan())
    assert plan == [
        Segment(start, 4096, bool(start >> 12 & 1)) for start in range(0, 1 << 20, 4096)
    ]


def test_a_throttle_counts_each_byte_that_is_read(tmp_path: Path) -> None:
    image = make_image(tmp_path, 8 * MIB)
    qemu_io(image, "write -P 7 0 3M", "write -P 8 5M 1M", "write -z 4M 1M")
    moments = itertools.count()

    def clock() -> float:
        # a hundredth of a second with each look: nothing here depends on real time
        return next(moments) / 100

    rate = 4 * MIB
    throttle = Throttle(rate, clock)
    sink = Memory()
    with qemu_nbd(tmp_path, image) as socket:
        copy.copy(
            Endpoint(socket=socket, export="vda"), sink, tuning=TUNING, arena=TUNING.arena(),
            patience=Patience(), progress=lambda _: None, throttle=throttle,
        )  # fmt: skip
    assert sink.image(8 * MIB) == reference(image, tmp_path)
    # 4 MiB of data: the clock has moved by what they take, less the burst and two requests
    least = (4 * MIB - 2 * TUNING.block) / rate - BURST_SECONDS
    assert least > 0
    assert next(moments) / 100 >= least
    # and what was taken is exactly what was read, zeroes and holes left out
    spent = throttle.taken
    assert spent == 4 * MIB
