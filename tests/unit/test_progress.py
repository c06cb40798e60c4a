"""The line on a terminal that tells how far a run is."""

import io

import pytest

from nbdbackupd.app import context
from nbdbackupd.app.context import Progress

MIB = 1 << 20


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(context, "time", made)
    return made


def shown(stream: io.StringIO) -> str:
    """What stands in the line now."""
    return stream.getvalue().rpartition("\r")[2].strip()


def test_several_disks_are_one(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream, "line") as line:
        line.part("vda", 0, 60 * MIB)
        line.part("vdb", 0, 40 * MIB)
        assert stream.getvalue() == ""
        # the clock starts with the first byte
        clock.now += 100
        line.part("vda", 10 * MIB, 60 * MIB)
        clock.now += 2
        line.part("vdb", 10 * MIB, 40 * MIB)
        assert shown(stream) == "2 disks   20%  20.0 MiB  10.0 MiB/s  8.0 s left"
        clock.now += 2
        line.part("vdb", 40 * MIB, 40 * MIB)
        assert shown(stream) == "2 disks   50%  50.0 MiB  12.5 MiB/s  4.0 s left"
        clock.now += 4
        line.part("vda", 60 * MIB, 60 * MIB)
        assert shown(stream) == "2 disks  100%  100 MiB  12.5 MiB/s"
    assert shown(stream) == ""


def test_one_disk_has_its_name(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream, "plain") as line:
        line.part("vda", 0, 4 * MIB)
        line.part("vda", MIB, 4 * MIB)
        clock.now += 11
        line.part("vda", 2 * MIB, 4 * MIB)
    assert stream.getvalue() == "vda   50%  2.0 MiB  186 KiB/s  11.0 s left\n"


def test_silence(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream, "none") as line:
        for done in (0, 1, 2):
            clock.now += 60
            line.part("vda", done, 2)
    assert stream.getvalue() == ""
