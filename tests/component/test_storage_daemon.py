"""The storage daemon as a reader: real images, real locks, real deaths."""

import hashlib
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdbackupd import proc
from nbdbackupd.errors import (
    BusyError,
    ConfigError,
    NotSupportedError,
    ProcessError,
    SourceError,
)
from nbdbackupd.nbdio import client
from nbdbackupd.nbdio.client import Connection, Endpoint
from nbdbackupd.qemu import bitmaps, storage_daemon
from nbdbackupd.qemu.qmp import Monitor
from nbdbackupd.qemu.storage_daemon import Image, Server
from nbdbackupd.source import Export
from tests.lib import images
from tests.lib.images import MIB

pytestmark = pytest.mark.component
ODD = "a, b=c:d %41 \"ü\" 'x'"
SIZE = 4 * MIB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / ODD
    path.mkdir()
    return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with storage_daemon.serve(tmp_path / "s") as server:
        yield server


def export(tmp_path: Path, name: str, bitmap: str = "") -> Export:
    return Export(target=name, socket=tmp_path / "s", name=name, size=SIZE, bitmap=bitmap)


def digest(*paths: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def chain(folder: Path, rng: random.Random) -> tuple[Path, Path, Path, bytes]:
    """Three layers, each with its part of bitmap cp; the content when the first got it."""
    base = images.make(folder / "base,1.qcow2", SIZE)
    images.scribble(rng, base, SIZE)
    before = images.content(base, folder / "raw")
    images.add_bitmap(base, "cp")
    images.scribble(rng, base, SIZE)
    middle = images.overlay(folder / "middle:2.qcow2", base)
    images.add_bitmap(middle, "cp")
    images.scribble(rng, middle, SIZE)
    top = images.overlay(folder / "top=3.qcow2", middle)
    images.add_bitmap(top, "cp", "-g", "4096")
    images.scribble(rng, top, SIZE)
    return top, middle, base, before


@pytest.mark.parametrize("seed", range(4))
def test_three_layers(tmp_path: Path, folder: Path, server: Server, seed: int) -> None:
    top, middle, base, before = chain(folder, random.Random(seed))
    sums = digest(top, middle, base)
    after = images.content(top, folder / "raw")
    names = server.open_chain([Image(os.fspath(each), "qcow2") for each in (top, middle, base)])
    nodes = server.nodes()
    assert [nodes[name].path for name in names] == [os.fspath(p) for p in (top, middle, base)]
    assert {nodes[name].size for name in names} == {SIZE}
    server.merge(names[0], "changes", [(name, "cp") for name in names], 4096)
    server.export(names[0], "vda", "changes")
    server.export(names[0], "whole")
    delta = images.copied(export(tmp_path, "vda", "changes"))
    assert delta.onto(before, SIZE) == after
    assert delta.total < SIZE
    # without one of the three it is too little: the test sees what a layer brings
    for left_out in names:
        some = [(name, "cp") for name in names if name != left_out]
        server.merge(names[0], f"not-{left_out}", some, 4096)
        merged = server.nodes()[names[0]].bitmap(f"not-{left_out}")
        assert merged is not None
        assert merged.dirty < delta.total
    full = images.copied(export(tmp_path, "whole"))
    assert (full.onto(b"", SIZE), full.total) == (after, SIZE)
    assert digest(top, middle, base) == sums


class Sleeper:
    """A keeper that stands still, once, while a connection is negotiated."""

    is_holding = is_thrifty = False

    def __init__(self) -> None:
        self.met: list[str] = []

    def keep(self, descriptor: int) -> int:
        return descriptor

    def going(self, _number: int) -> None:
        self.met.append("going")
        if len(self.met) == 1:
            time.sleep(client.HANDSHAKE_SECONDS + 0.5)

    def ready(self, _number: int) -> None:
        self.met.append("ready")

    def take(self, _key: object) -> None:
        return None

    def give(self, _key: object, _idle: object) -> None:
        raise AssertionError

    abandon = going


def test_a_run_that_stood_still_while_it_connected(
    tmp_path: Path, folder: Path, server: Server
) -> None:
    """QEMU has dropped it meanwhile: seen as a run that was stopped and failed when it went on."""
    path = images.make(folder / "x", SIZE, format="raw")
    (name,) = server.open_chain([Image(os.fspath(path), "raw")])
    server.export(name, "vda")
    sleeper = Sleeper()
    endpoint = Endpoint(socket=tmp_path / "s", export="vda", keeper=sleeper)
    with Connection(endpoint) as connection:
        assert connection.size == SIZE
    assert sleeper.met == ["going", "going", "ready"]


@pytest.mark.parametrize("format_", ["raw", "vmdk", "vdi", "qcow2"])
def test_formats(tmp_path: Path, folder: Path, server: Server, format_: str) -> None:
    path = images.make(folder / "x", SIZE, format=format_)
    images.write(path, "write -P 7 1M 1M", format=format_)
    wanted = bytes(MIB) + b"\7" * MIB + bytes(2 * MIB)
    (name,) = server.open_chain([Image(os.fspath(path), format_)])
    server.export(name, "vda")
    assert images.copied(export(tmp_path, "vda")).onto(b"", SIZE) == wanted


def test_what_a_raw_image_says_of_itself_is_not_believed(
    tmp_path: Path, folder: Path, server: Server
) -> None:
    """A guest may write a qcow2 header to a raw disk; whoever probes follows it."""
    secret = images.make(folder / "secret", SIZE)
    trap = images.overlay(folder / "trap", secret)
    wanted = trap.read_bytes()
    # QEMU fills the last sector up
    wanted += bytes(-len(wanted) % 512)
    (name,) = server.open_chain([Image(os.fspath(trap), "raw")])
    server.export(name, "vda")
    assert images.copied(export(tmp_path, "vda")).onto(b"", len(wanted)) == wanted


def test_the_chain_is_the_one_that_was_given(tmp_path: Path, folder: Path, server: Server) -> None:
    """What an image says of its backing file counts for nothing."""
    base = images.make(folder / "base", SIZE)
    images.write(base, "write -P 1 0 4M")
    top = images.overlay(folder / "top", base)
    (name,) = server.open_chain([Image(os.fspath(top), "qcow2")])
    server.export(name, "alone")
    assert images.copied(export(tmp_path, "alone")).onto(b"", SIZE) == bytes(SIZE)


@pytest.mark.parametrize("raw", ["on", "off"])
def test_data_file(tmp_path: Path, folder: Path, server: Server, raw: str) -> None:
    data = tmp_path / "data"  # qemu-img's options know no other commas than their own
    path = images.make(folder / "x", SIZE, "-o", f"data_file={data},data_file_raw={raw}")
    images.add_bitmap(path, "cp")
    images.write(path, "write -P 7 1M 1M")
    (name,) = server.open_chain([Image(os.fspath(path), "qcow2", os.fspath(data))])
    server.merge(name, "changes", [(name, "cp")], 65536)
    server.export(name, "vda", "changes")
    delta = images.copied(export(tmp_path, "vda", "changes"))
    assert delta.total == MIB
    assert delta.onto(bytes(SIZE), SIZE) == bytes(MIB) + b"\7" * MIB + bytes(2 * MIB)


def test_block_device(tmp_path: Path, server: Server) -> None:
    file = images.make(tmp_path / "x", SIZE, format="raw")
    file.write_bytes(random.Random(1).randbytes(SIZE))
    with loop_device(file) as device:
        (name,) = server.open_chain([Image(device, "raw")])
        server.export(name, "vda")
        assert images.copied(export(tmp_path, "vda")).onto(b"", SIZE) == file.read_bytes()
        # ends the server's hold on the device
        server._process.stop()


@contextmanager
def loop_device(file: Path) -> Iterator[str]:
    done = subprocess.run(
        ["losetup", "--find", "--show", file], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no loop devices: {done.stderr.strip()}")
    try:
        yield done.stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def test_locked_image(folder: Path, server: Server) -> None:
    path = images.make(folder / "lock", SIZE)
    images.add_bitmap(path, "cp")
    with images.opened(path):
        with pytest.raises(BusyError, match="lock is in use by another program"):
            server.open_chain([Image(os.fspath(path), "qcow2")])
        with pytest.raises(BusyError, match="lock is in use by another program"):
            bitmaps.add(os.fspath(path), "new")
        with pytest.raises(BusyError, match="lock is in use by another program"):
            bitmaps.remove(os.fspath(path), "cp")
    server.open_chain([Image(os.fspath(path), "qcow2")])
    with pytest.raises(BusyError, match="lock is in use by another program"):
        bitmaps.add(os.fspath(path), "new")


def test_images_that_cannot_be_opened(tmp_path: Path, server: Server) -> None:
    locked = tmp_path / "locked"
    # not luks: to tune that, qemu-img measures the processor, and fails where clocks are coarse
    images.make(
        locked, SIZE, "--object", "secret,id=s,data=abc",
        "-o", "encrypt.format=aes,encrypt.key-secret=s",
    )  # fmt: skip
    for open_ in (
        lambda: server.open_chain([Image(os.fspath(locked), "qcow2")]),
        lambda: bitmaps.add(os.fspath(locked), "cp"),
    ):
        with pytest.raises(NotSupportedError, match=r"locked is encrypted .*--start-paused"):
            open_()
    with pytest.raises(NotSupportedError, match="pool/image is no local file"):
        server.open_chain([Image("pool/image", "raw")])
    with pytest.raises(SourceError, match="nothing can't be opened: No such file"):
        server.open_chain([Image(os.fspath(tmp_path / "nothing"), "raw")])
    broken = tmp_path / "broken"
    broken.write_bytes(b"no image" * 1000)
    with pytest.raises(SourceError, match=r"broken can't be opened: .*not in qcow2 format"):
        server.open_chain([Image(os.fspath(broken), "qcow2")])
    # and the server is as good as before
    server.open_chain([Image(os.fspath(images.make(tmp_path / "fine", SIZE)), "qcow2")])


def test_bitmaps_come_and_go(folder: Path, server: Server) -> None:
    path = images.make(folder / "x", SIZE)
    name = os.fspath(path)
    assert bitmaps.add(name, "b1")
    assert not bitmaps.add(name, "b1")
    images.write(path, "write 0 64k")
    assert bitmaps.add(name, "b2")
    assert bitmaps.remove(name, "b1")
    assert not bitmaps.remove(name, "b1")
    (node,) = server.open_chain([Image(name, "qcow2")])
    (bitmap,) = server.nodes()[node].bitmaps
    assert (bitmap.name, bitmap.dirty, bitmap.granularity) == ("b2", 0, 65536)
    assert bitmap.sound
    assert bitmap.recording


def test_images_that_hold_no_bitmap(tmp_path: Path) -> None:
    old = images.make(tmp_path / "old", SIZE, "-o", "compat=0.10")
    with pytest.raises(ProcessError, match="qcow2 v2"):
        bitmaps.add(os.fspath(old), "b")
    with pytest.raises(SourceError, match="nothing can't be opened"):
        bitmaps.add(os.fspath(tmp_path / "nothing"), "b")


def test_inconsistent_bitmap(tmp_path: Path, server: Server) -> None:
    path = images.make(tmp_path / "x", SIZE)
    images.add_bitmap(path, "cp")
    images.poison(path)
    (node,) = server.open_chain([Image(os.fspath(path), "qcow2")])
    bitmap = server.nodes()[node].bitmap("cp")
    assert bitmap is not None
    assert not bitmap.sound
    with pytest.raises(ProcessError, match="inconsistent"):
        server.merge(node, "m", [(node, "cp")], 65536)
    assert server.nodes()[node].bitmap("m") is None
    with pytest.raises(ProcessError, match="lost"):
        server.merge(node, "m", [(node, "lost")], 65536)


def test_killed_servers_leave_no_trace_in_images(tmp_path: Path, folder: Path) -> None:
    top, middle, base, before = chain(folder, random.Random(9))
    after = images.content(top, folder / "raw")
    sums = digest(top, middle, base)
    for number in range(3):
        with storage_daemon.serve(tmp_path / "s") as server:
            names = server.open_chain(
                [Image(os.fspath(each), "qcow2") for each in (top, middle, base)]
            )
            server.merge(names[0], "changes", [(name, "cp") for name in names], 65536)
            server.export(names[0], "vda", "changes")
            if number:
                assert images.copied(export(tmp_path, "vda", "changes")).onto(before, SIZE) == after
            os.kill(server.pid, signal.SIGKILL)
            images.wait_gone(server.pid)
            with pytest.raises(ProcessError, match="killed by SIGKILL"):
                server.check()
            with pytest.raises(ProcessError, match="killed by SIGKILL"):
                server.nodes()
        assert digest(top, middle, base) == sums


def test_the_server_dies_with_us(tmp_path: Path) -> None:
    path = images.make(tmp_path / "x", SIZE)
    images.add_bitmap(path, "cp")
    sums = digest(path)
    program = (
        f"import sys\n"
        f"from pathlib import Path\n"
        f"from nbdbackupd.qemu import storage_daemon as s\n"
        f"with s.serve(Path({os.fspath(tmp_path / 's')!r})) as server:\n"
        f"    server.open_chain([s.Image({os.fspath(path)!r}, 'qcow2')])\n"
        f"    print(server.pid, flush=True)\n"
        f"    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert images.is_running(pid)
        parent.kill()
    images.wait_gone(pid)
    assert digest(path) == sums
    # the dead one's socket is still there, and is replaced
    assert (tmp_path / "s").is_socket()
    with storage_daemon.serve(tmp_path / "s") as server:
        server.open_chain([Image(os.fspath(path), "qcow2")])


def test_socket(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with storage_daemon.serve(tmp_path / "s"):
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert not (tmp_path / "s").exists()
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        storage_daemon.serve(tmp_path / ("x" * 100)).__enter__()
    with pytest.raises(ConfigError, match="can't make the NBD socket"):
        storage_daemon.serve(tmp_path / "missing" / "s").__enter__()


def test_a_program_that_fails_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(ProcessError, match="qemu-storage-daemon was not found: install"):
        storage_daemon.serve(tmp_path / "s").__enter__()
    assert not (tmp_path / "s").exists()


def test_a_silent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_daemon, "COMMAND_SECONDS", 0.3)
    begun = time.monotonic()
    with storage_daemon.serve(tmp_path / "s") as server:
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(ProcessError, match=r"did not answer query-.* within 0\.3 s"):
            server.nodes()
        os.kill(server.pid, signal.SIGCONT)
    assert time.monotonic() - begun < 20


def test_descriptors_are_handed_on(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with storage_daemon.serve(tmp_path / "s", pass_fds=[writer]) as server:
        os.close(writer)
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        os.kill(server.pid, signal.SIGKILL)
        images.wait_gone(server.pid)
        assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b'{"QMP": {}}\r\n{"event": "X"}\n{"return": {}}\n{"event": "Y"}\n{"return": 5}\n', ""),
        (b'{"QMP": {}}\n{"return": {}}\n{"error": {"class": "GenericError", "desc": "no"}}\n',
         "p refused a: no$"),
        (b'{"QMP": {}}\n{"return": {}}\n{"error": {"class": "Other", "desc": "no"}}\n',
         "p refused a: Other: no$"),
        (b'{"QMP": {}}\n{"return": {}}\n{"error": 1}\n', "p gave no answer to a"),
        (b'{"QMP": {}}\n{"return": {}}\n[]\n', "p answered a with nonsense"),
        (b'{"QMP": {}}\n{"return": {}}\nwords\n', "p answered a with nonsense"),
        (b'{"QMP": {}}\n{"return": {}}\n{"retu', "p ended during a"),
        (b'{"hello": {}}\n', "p does not speak QMP"),
        (b"", "p ended during start"),
    ],
)  # fmt: skip
def test_what_a_monitor_may_say(said: bytes, message: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        if not message:
            assert Monitor(ours, "p", timeout=20).execute("a", {"b": None}) == 5
            assert theirs.recv(1000).endswith(b'{"execute": "a", "arguments": {"b": null}}\n')
            return
        with pytest.raises(ProcessError, match=message):
            Monitor(ours, "p", timeout=1).execute("a")


def test_a_wait_for_the_monitor_can_be_cancelled() -> None:
    ours, theirs = socket.socketpair()

    def cancelled() -> None:
        raise BusyError("enough")

    with ours, theirs, pytest.raises(BusyError, match="enough"):
        Monitor(ours, "p", timeout=60, cancelled=cancelled)


def test_stopping_takes_no_time(tmp_path: Path) -> None:
    begun = time.monotonic()
    with storage_daemon.serve(tmp_path / "s") as server:
        pid = server.pid
    assert time.monotonic() - begun < proc.GRACE_SECONDS / 5
    assert not images.is_running(pid)
