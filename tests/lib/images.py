"""Images without a guest: made and changed by QEMU's own programs, read back as raw bytes."""

import os
import random
import select
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nbdbackupd.nbdio import copy
from nbdbackupd.nbdio.client import Endpoint, Patience
from nbdbackupd.source import Export

MIB = 1 << 20
TUNING = copy.Tuning(workers=2, block=64 << 10)
Path_ = str | os.PathLike[str]


@dataclass
class Pieces:
    """A sink that keeps what was copied."""

    blocks: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, offset: int, view: memoryview) -> tuple[int, int, bytes | None]:
        """Keep guest bytes."""
        return (offset, len(view), bytes(view))

    def zero(self, offset: int, length: int) -> tuple[int, int, bytes | None]:
        """Keep a run of zeroes."""
        return (offset, length, None)

    def place(self, block: tuple[int, int, bytes | None]) -> None:
        """Take a block in guest order."""
        with self.lock:
            self.blocks.append(block)

    def write(self, *blocks: tuple[int, int, bytes | None]) -> None:
        """Nothing more to do."""

    def onto(self, before: bytes, size: int) -> bytes:
        """The disk of ``size`` bytes that the pieces make of an older one."""
        out = bytearray(before[:size].ljust(size, b"\0"))
        for offset, length, data in self.blocks:
            out[offset : offset + length] = bytes(length) if data is None else data
        return bytes(out)

    @property
    def total(self) -> int:
        """Guest bytes that were copied, zeroes too."""
        return sum(length for _, length, _ in self.blocks)


def copied(export: Export, seconds: float = 30.0) -> Pieces:
    """Copy an export as a backup does."""
    sink = Pieces()
    copy.copy(
        Endpoint(socket=export.socket, export=export.name, bitmap=export.bitmap),
        sink, tuning=TUNING, arena=TUNING.arena(), patience=Patience(seconds=seconds),
        progress=lambda _: None,
    )  # fmt: skip
    return sink


def qemu_img(*argv: Path_) -> str:
    """Run qemu-img."""
    return subprocess.run(["qemu-img", *argv], check=True, text=True, capture_output=True).stdout


def make(path: Path, size: int = 4 * MIB, *options: Path_, format: str = "qcow2") -> Path:
    """Make an image."""
    qemu_img("create", "-q", "-f", format, *options, path, str(size))
    return path


def overlay(path: Path, below: Path, *options: Path_, format: str = "qcow2") -> Path:
    """Make a qcow2 image on top of another one."""
    qemu_img("create", "-q", "-f", "qcow2", "-F", format, "-b", below, *options, path)
    return path


def add_bitmap(path: Path, name: str, *options: str) -> None:
    """Add a bitmap."""
    qemu_img("bitmap", "--add", *options, path, name)


def write(path: Path, *commands: str, format: str = "qcow2") -> None:
    """Run qemu-io commands on an image that nobody has open."""
    argv: list[Path_] = ["qemu-io", "-f", format]
    for command in commands:
        argv += ["-c", command]
    subprocess.run([*argv, path], check=True, stdout=subprocess.DEVNULL)


def scribble(rng: random.Random, path: Path, size: int, count: int = 12) -> None:
    """Random writes, zeroes and discards."""
    commands = []
    for _ in range(count):
        length = rng.randrange(1, 200) * 512
        offset = rng.randrange(0, (size - length) // 512) * 512
        verb = rng.choice(
            [f"write -P {rng.randrange(1, 256)}", "write -P 0", "write -z -u", "discard"]
        )
        commands.append(f"{verb} {offset} {length}")
    write(path, *commands)


def content(path: Path, into: Path, format: str = "qcow2") -> bytes:
    """What the guest would read, by qemu-img."""
    qemu_img("convert", "-f", format, "-O", "raw", path, into)
    data = into.read_bytes()
    into.unlink()
    return data


@contextmanager
def opened(path: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """An image that another program has open, for writing unless ``-r`` is given."""
    argv = ["qemu-io", *options, "-f", "qcow2", os.fspath(path)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "MiB" in process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def poison(path: Path) -> None:
    """Leave all bitmaps of an image inconsistent, as a host's crash does."""
    argv = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", "-c", "flush", "-c", "abort"]
    subprocess.run([*argv, path], check=False, capture_output=True)
    assert "in-use" in qemu_img("info", path)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        return not select.select([fd], [], [], 0)[0]
    finally:
        os.close(fd)


def wait_gone(pid: int, seconds: float = 5.0) -> None:
    """Wait for a process to end."""
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.005)
