"""Writing to real NBD servers: what arrives, and what happens when it does not."""

import itertools
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdbackupd.errors import Interrupted, NbdError, NoSpaceError, ProcessError
from nbdbackupd.nbdio import target
from nbdbackupd.nbdio.arena import Arena
from nbdbackupd.nbdio.client import Endpoint, Patience
from nbdbackupd.nbdio.target import Target
from nbdbackupd.qemu import image, nbd_server
from nbdbackupd.qemu.image import CreateOptions
from tests.lib.servers import is_listening

pytestmark = pytest.mark.component

KIB = 1 << 10
MIB = 1 << 20
BLOCK = 64 * KIB


def never() -> None:
    """Nothing cancels."""


@contextmanager
def nbdkit(tmp_path: Path, *argv: str) -> Iterator[tuple[Endpoint, "subprocess.Popen[bytes]"]]:
    socket = tmp_path / "nbd.sock"
    command = ["nbdkit", "--exit-with-parent", "-f", "-U", os.fspath(socket), *argv]
    with subprocess.Popen(command) as server:
        try:
            deadline = time.monotonic() + 10
            while not is_listening(socket):
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield Endpoint(socket=socket, export=""), server
        finally:
            server.kill()
            server.send_signal(signal.SIGCONT)


def fill(into: Target, count: int, byte: int = 0x55, length: int = BLOCK) -> None:
    for number in range(count):
        slot = into.take()
        into.view(slot, length)[:] = bytes([byte]) * length
        into.write(slot, length, number * length)


def fill_all(endpoint: Endpoint, patience: Patience) -> None:
    """A target's whole life."""
    arena = Arena(4, BLOCK)
    with target.open_target(endpoint, arena, known_zero=True, patience=patience) as into:
        fill(into, 8)
        into.flush()


def test_several_connections_write_one_image(tmp_path: Path) -> None:
    path, socket = tmp_path / "x.qcow2", tmp_path / "s"
    rng = random.Random(1)
    wanted = bytearray(rng.randbytes(8 * MIB))
    image.create(path, len(wanted), CreateOptions(format="qcow2"))
    borders = [0, *sorted(rng.sample(range(len(wanted) // 512), 300)), len(wanted) // 512]
    pieces = [
        (start * 512 + at, min(BLOCK, (end - start) * 512 - at))
        for start, end in itertools.pairwise(borders)
        for at in range(0, (end - start) * 512, BLOCK)
    ]
    rng.shuffle(pieces)
    endpoint = Endpoint(socket=socket, export="")

    def work(mine: list[tuple[int, int]]) -> None:
        arena = Arena(4, BLOCK)
        with target.open_target(endpoint, arena, known_zero=True, patience=Patience()) as into:
            assert into.size == len(wanted)
            for offset, length in mine:
                slot = into.take()
                into.view(slot, length)[:] = wanted[offset : offset + length]
                into.write(slot, length, offset)
            into.flush()

    with (
        nbd_server.serve(path, format="qcow2", endpoint=socket, clients=4, cancelled=never),
        target.control(endpoint, Patience()) as several,
    ):
        assert several
        threads = [threading.Thread(target=work, args=(pieces[n::3],)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not socket.exists()
    raw = tmp_path / "x.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
    assert raw.read_bytes() == wanted


def test_zeroes_reach_what_is_not_known_to_be_zero(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    for known in (True, False):
        disk.write_bytes(b"x" * MIB)
        with (
            nbdkit(tmp_path, "file", os.fspath(disk)) as (endpoint, _),
            target.open_target(
                endpoint, Arena(2, BLOCK), known_zero=known, patience=Patience()
            ) as into,
        ):
            into.zero(4096, 512 * KIB)
            into.flush()
        (tmp_path / "nbd.sock").unlink()
        zeroed = b"x" * 4096 + bytes(512 * KIB)
        assert disk.read_bytes() == (b"" if known else zeroed).ljust(MIB, b"x")


@pytest.mark.parametrize(
    ("error", "kind"), [("ENOSPC", NoSpaceError), ("EIO", NbdError)], ids=["enospc", "eio"]
)
def test_failed_write(tmp_path: Path, error: str, kind: type[Exception]) -> None:
    argv = ["--filter=error", "memory", "1M", f"error-pwrite={error}", "error-pwrite-rate=100%"]
    with nbdkit(tmp_path, *argv) as (endpoint, _):
        with pytest.raises(kind) as found:
            fill_all(endpoint, Patience())
        assert "offset" in found.value.fields  # type: ignore[attr-defined]


def fill_blindly(endpoint: Endpoint, *, flush: bool) -> None:
    """Submit one write at which nothing looks before the flush, if there is one."""
    arena = Arena(4, BLOCK)
    with target.open_target(endpoint, arena, known_zero=True, patience=Patience()) as into:
        slot = into.take()
        into._requests.begin(
            "write",
            lambda done: into._connection.handle.aio_pwrite(arena.buffer(slot, BLOCK), 0, done),
            {"offset": 0},
        )
        if flush:
            into.flush()


def test_failed_flush(tmp_path: Path) -> None:
    """The last of all requests counts, too."""
    argv = ["--filter=error", "memory", "1M", "error-pwrite=EIO", "error-pwrite-rate=100%"]
    with nbdkit(tmp_path, *argv) as (endpoint, _), pytest.raises(NbdError, match="write failed"):
        fill_blindly(endpoint, flush=True)


def fill_without_flush(endpoint: Endpoint) -> None:
    arena = Arena(4, BLOCK)
    with target.open_target(endpoint, arena, known_zero=True, patience=Patience()) as into:
        fill(into, 1)


def test_what_was_not_looked_at_is_no_success(tmp_path: Path) -> None:
    """D-0: leaving without an answer to each request, or without a flush, is an error."""
    with nbdkit(tmp_path, "memory", "1M") as (endpoint, _):
        with pytest.raises(NbdError, match="1 requests were not answered"):
            fill_blindly(endpoint, flush=False)
        with pytest.raises(NbdError, match=r"not flushed|not answered"):
            fill_without_flush(endpoint)


def test_read_only_export(tmp_path: Path) -> None:
    with (
        nbdkit(tmp_path, "-r", "memory", "1M") as (endpoint, _),
        pytest.raises(NbdError, match="read-only"),
        target.open_target(endpoint, Arena(2, BLOCK), known_zero=True, patience=Patience()),
    ):
        pass


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_server_that_dies_or_stops(tmp_path: Path, how: signal.Signals) -> None:
    with nbdkit(tmp_path, "memory", "64M") as (endpoint, server):

        def fill_and_strike() -> None:
            arena = Arena(4, MIB)
            patience = Patience(1.0)
            with target.open_target(endpoint, arena, known_zero=True, patience=patience) as into:
                fill(into, 8, length=MIB)
                server.send_signal(how)
                fill(into, 64, length=MIB)

        begun = time.monotonic()
        with pytest.raises(NbdError):
            fill_and_strike()
        assert time.monotonic() - begun < 10


def test_cancel_while_the_server_sleeps(tmp_path: Path) -> None:
    argv = ["--filter=delay", "memory", "1M", "wdelay=60"]
    deadline = time.monotonic() + 0.5

    def cancelled() -> None:
        if time.monotonic() > deadline:
            raise Interrupted(signal.SIGTERM)

    with nbdkit(tmp_path, *argv) as (endpoint, _):
        begun = time.monotonic()
        with pytest.raises(Interrupted):
            fill_all(endpoint, Patience(30, cancelled))
        assert time.monotonic() - begun < 20


def test_memory_stays_flat(tmp_path: Path) -> None:
    """libnbd's binding keeps what it is given: buffers must be used again."""
    with nbdkit(tmp_path, "null", "1G") as (endpoint, _):
        arena = Arena(4, BLOCK)
        with target.open_target(endpoint, arena, known_zero=True, patience=Patience()) as into:
            fill(into, 1000)
            before = resident()
            fill(into, 12000)
            assert resident() - before < 4 * MIB
            into.flush()


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_server_of_no_image(tmp_path: Path) -> None:
    path = tmp_path / "bad.qcow2"
    path.write_bytes(b"no image")
    with (
        pytest.raises(ProcessError, match="qemu-nbd"),
        nbd_server.serve(path, format="qcow2", endpoint=tmp_path / "s", clients=1, cancelled=never),
    ):
        pass


def test_server_goes_with_its_clients(tmp_path: Path) -> None:
    """What a killed run leaves behind ends by itself."""
    path = tmp_path / "x.qcow2"
    image.create(path, MIB, CreateOptions(format="qcow2"))
    with nbd_server.serve(
        path, format="qcow2", endpoint=tmp_path / "s", clients=1, cancelled=never
    ) as server:
        with target.control(Endpoint(socket=tmp_path / "s", export=""), Patience()):
            assert server.poll() is None
        assert server.poll() is None, "our first client should keep it"
    begun = time.monotonic()
    with (
        pytest.raises(RuntimeError),
        nbd_server.serve(path, format="qcow2", endpoint=tmp_path / "s", clients=1, cancelled=never),
    ):
        raise RuntimeError
    assert time.monotonic() - begun < 20
