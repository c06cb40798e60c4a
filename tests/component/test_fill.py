"""The threads that fill an image, with an output whose faults come when no server's would."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nbdbackupd.errors import NbdError
from nbdbackupd.format.index import MAX_BLOCK
from nbdbackupd.ops.restore.outputs import DEPTH, Output, Writer
from nbdbackupd.ops.restore.work import fill
from nbdbackupd.ops.sets import layers
from nbdbackupd.threads import Threads
from tests.lib import sets
from tests.lib.sets import SetBuilder

pytestmark = pytest.mark.component

KIB = 1 << 10


@dataclass
class Lazy:
    """A writer that does nothing before it must: its slots are full until ``flush``."""

    image: bytearray
    fail_at_flush: bool = False
    slots: list[bytearray] = field(
        default_factory=lambda: [bytearray(MAX_BLOCK) for _ in range(DEPTH)]
    )
    free: list[int] = field(default_factory=lambda: list(range(DEPTH)))
    waiting: list[tuple[int, int, int]] = field(default_factory=list)

    def take(self) -> int:
        if not self.free:
            self._finish(self.waiting.pop(0))
        return self.free.pop()

    def view(self, slot: int, length: int) -> memoryview:
        return memoryview(self.slots[slot])[:length]

    def write(self, slot: int, length: int, offset: int) -> None:
        assert slot not in self.free
        self.waiting.append((slot, length, offset))

    def release(self, slot: int) -> None:
        self.free.append(slot)

    def zero(self, offset: int, length: int) -> None:  # noqa: ARG002
        raise AssertionError("an image that is new reads as zeroes")

    def flush(self) -> None:
        if self.fail_at_flush:
            raise NbdError("flush failed")
        while self.waiting:
            self._finish(self.waiting.pop(0))

    def _finish(self, item: tuple[int, int, int]) -> None:
        slot, length, offset = item
        self.image[offset : offset + length] = self.slots[slot][:length]
        self.free.append(slot)


def filled(tmp_path: Path, *, fail_at_flush: bool) -> tuple[bytes, bytes]:
    """What arrived, and what should have."""
    rng = random.Random(7)
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": sets.random_disk(rng, 512 * KIB)}
    made.full()
    made.inc({"vda": sets.random_changes(rng, 512 * KIB, 30)})
    image = bytearray(512 * KIB)
    writers: list[Lazy] = []

    @contextmanager
    def writer() -> Iterator[Writer]:
        writers.append(Lazy(image, fail_at_flush))
        yield writers[-1]

    with ExitStack() as stack:
        opened: list[layers.Layer] = [
            stack.enter_context(
                layers.open_proven(made.path, point, point.disk("vda"), lambda: None)
            )
            for point in reversed(made.points)
        ]
        output = Output(writers=3, writer=writer)
        fill(output, opened, threads=Threads(lambda: None), progress=lambda _: None)
    assert all(len(each.free) == DEPTH for each in writers), "a slot was lost"
    return bytes(image), made.images[-1]["vda"]


def test_all_is_written_when_fill_returns(tmp_path: Path) -> None:
    found, wanted = filled(tmp_path, fail_at_flush=False)
    assert found == wanted


def test_failed_flush_fails_the_restore(tmp_path: Path) -> None:
    with pytest.raises(NbdError, match="flush failed"):
        filled(tmp_path, fail_at_flush=True)
