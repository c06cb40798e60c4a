"""What is done about a run that does not say that it lives."""

import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbackupd import durable, rundir
from nbdbackupd.source import silence
from nbdbackupd.source.guard import Charge, Guard, wait_for_guards
from nbdbackupd.source.silence import Silence, is_dying
from tests.lib.told import heard

pytestmark = pytest.mark.component
FULL = 1 << 60
"""A reserve that no disk has."""


def charge(directory: Path, reserve: int) -> Charge:
    return Charge(
        uri="", user="", password="", domain="vm1", uuid="u", run_id="r", pid=os.getppid(),
        runtime_dir="", scratch_dir=os.fspath(directory), scratch_reserve=reserve, scratch=(),
        is_reachable=True,
    )  # fmt: skip


class Asked:
    """A question to a QEMU that never answers."""

    def __init__(self, _charge: Charge) -> None:
        pass

    def is_old(self) -> bool:
        return False

    def is_unanswered(self) -> bool:
        return True


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Who would have got which signal."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(silence, "_Probe", Asked)
    monkeypatch.setattr(os, "kill", lambda *which: found.append(which))
    return found


@pytest.mark.parametrize(
    ("seconds", "reserve", "is_waited_for"),
    [(0.5, FULL, False), (3, FULL, True), (5, 0, False), (silence.LONG_SECONDS + 1, 0, True)],
)
def test_it_is_killed_where_somebody_waits(
    tmp_path: Path,
    killed: list[tuple[int, int]],
    seconds: float,
    reserve: int,
    *,
    is_waited_for: bool,
) -> None:
    watched = Silence(charge(tmp_path, reserve))
    with heard() as told:
        for _ in range(3):
            assert not watched.is_over(time.monotonic() - seconds)
    assert killed == [(os.getppid(), signal.SIGKILL)] * is_waited_for
    assert told == ["hung-run-killed"] * is_waited_for


def test_qemu_can_hold_up_no_guard(tmp_path: Path) -> None:
    """S-8: its account may open the socket's directory, and so lock that for ever."""
    sockets, own = tmp_path / f"{rundir.PROFILE}u", tmp_path / "u"
    sockets.mkdir()
    own.mkdir()
    guard = Guard(replace(charge(tmp_path, FULL), runtime_dir=os.fspath(sockets)), is_holding=False)
    try:
        assert durable.is_locked(own / rundir.GUARDS, shared=False)
        assert stat.S_IMODE((own / rundir.GUARDS).stat().st_mode) == 0o600
    finally:
        guard.is_settled = True
        guard.leave()
    fd = os.open(sockets, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    wait_for_guards(sockets)
    os.close(fd)


def test_a_parent_that_has_gone_is_not_judged(
    tmp_path: Path, killed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another process's."""
    watched = Silence(charge(tmp_path, FULL))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not watched.is_over(time.monotonic() - 100)
    assert killed == []


def test_a_process_that_lives_is_not_dying() -> None:
    """Neither is one that is stopped, or was asked to end and does not."""
    sleep = (
        "import signal, time; signal.pthread_sigmask(0, {15}); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", sleep], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGSTOP)
            assert not is_dying(process.pid)
        finally:
            process.kill()
    assert not is_dying(process.pid)
