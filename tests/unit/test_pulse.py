"""What systemd is told of a run, and when its watchdog is fed."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbackupd.systemd.notify import Pulse

MINUTES = 60 * 10**6


class Manager:
    """Listens as systemd does; its clock is moved by the test."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)
        self.now = 0.0

    def heard(self) -> list[str]:
        lines: list[str] = []
        while True:
            try:
                lines += self.socket.recv(4096).decode().split("\n")
            except BlockingIOError:
                return lines

    def later(self) -> None:
        self.now += 2.0


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    with manager.socket:
        yield manager


def pulse_for(manager: Manager, tmp_path: Path, **more: str) -> Pulse:
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": str(5 * MINUTES)}
    return Pulse(environ | more, lambda: manager.now)


def test_a_wait_is_life(manager: Manager, tmp_path: Path) -> None:
    pulse = pulse_for(manager, tmp_path)
    pulse.alive()
    assert manager.heard() == ["WATCHDOG=1"]
    # not for each of thousands of looks
    for _ in range(1000):
        pulse.alive()
    assert manager.heard() == []
    manager.later()
    pulse.alive()
    assert manager.heard() == ["WATCHDOG=1"]


def test_while_a_disk_is_copied_only_bytes_are_life(manager: Manager, tmp_path: Path) -> None:
    pulse = pulse_for(manager, tmp_path)
    pulse.progress("vda", 1, 100, 1)
    assert manager.heard() == ["STATUS=vda: 1 %", "WATCHDOG=1", f"WATCHDOG_USEC={5 * MINUTES}"]
    for _ in range(10):
        manager.later()
        pulse.alive()
    assert manager.heard() == []
    manager.later()
    pulse.progress("vda", 50, 100, 50)
    assert manager.heard() == ["STATUS=vda: 50 %", "WATCHDOG=1"]
    # copied: now fsync, of which nothing is seen, gets its time
    pulse.progress("vda", 100, 100, 100)
    assert manager.heard() == ["STATUS=vda: 100 %", "WATCHDOG=1", f"WATCHDOG_USEC={30 * MINUTES}"]
    manager.later()
    pulse.alive()
    assert manager.heard() == ["WATCHDOG=1"]
    pulse.progress("vdb", 0, 0, 0)
    pulse.progress("vdb", 1, 4, 1)
    assert f"WATCHDOG_USEC={5 * MINUTES}" in manager.heard()


def test_the_next_step_ends_the_copy(manager: Manager, tmp_path: Path) -> None:
    pulse = pulse_for(manager, tmp_path)
    pulse.progress("vda", 1, 100, 1)
    pulse.status("running\nthe programs after")
    manager.later()
    pulse.alive()
    assert manager.heard()[3:] == ["STATUS=running the programs after", "WATCHDOG=1"]


def test_nobody_to_tell(manager: Manager, tmp_path: Path) -> None:
    for environ in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": str(tmp_path / "none")},
                    {"NOTIFY_SOCKET": "vsock:2:1"}):  # fmt: skip
        pulse = Pulse(environ)
        pulse.alive()
        pulse.status("text")
        pulse.progress("vda", 1, 1, 1)
    # the watchdog of another process is not moved
    pulse = pulse_for(manager, tmp_path, WATCHDOG_PID="1")
    pulse.progress("vda", 1, 100, 1)
    assert manager.heard() == ["STATUS=vda: 1 %", "WATCHDOG=1"]


def test_an_abstract_socket(tmp_path: Path) -> None:
    name = f"nbdbackup-test-{tmp_path.name}"
    manager = Manager(f"\0{name}")
    with manager.socket:
        Pulse({"NOTIFY_SOCKET": f"@{name}"}).status("well")
        assert manager.heard() == ["STATUS=well"]
