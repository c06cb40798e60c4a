"""G-1: whatever ends a run, the guest lives, has no job, and its next backup works.

The guest's disks are served by iothreads: QEMU 7.2 aborts if a client of its NBD server closes
first, and hangs if its job ends while a client is in its handshake. The guard of a run keeps both
from happening, and ends the job of a run that is dead at once.
"""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest, GuestOptions
from tests.lab.process import wait_until
from tests.lib.rigged import RiggedCtl, guards_of
from tests.lib.witness import Witness, wait_for_job

pytestmark = pytest.mark.system

DISKS = (DiskSpec(target="vda", size=16 * MIB), DiskSpec(target="vdb", size=16 * MIB))
SLOW = "SLOW1.5@block-written#2"
SOON = 15.0
"""Seconds in which a dead run's job is gone, on a machine that has other things to do."""

WRITE = "block-written#2"
ENDS = {
    f"TERM+@{WRITE}": 128 + signal.SIGTERM,
    f"INT+@{WRITE}": 128 + signal.SIGINT,
    f"HUP+@{WRITE}": 128 + signal.SIGHUP,
    "NOSPACE@stream-finished#2": 50,
    "EIO@stream-finished#1": 50,
    "KILL@job-begun#1": -signal.SIGKILL,
    "KILL+@job-begun#1": -signal.SIGKILL,
    "KILL@blocks-copied#1": -signal.SIGKILL,
    # a connection that the guard does not have yet; has, but before the handshake
    "KILL@connection-kept#2": -signal.SIGKILL,
    "KILL+@connection-kept#2": -signal.SIGKILL,
    # one that may have left its handshake, and has not; that has
    "KILL+@connection-going#2": -signal.SIGKILL,
    "KILL@connection-ready#2": -signal.SIGKILL,
    "KILL+@connection-ready#4": -signal.SIGKILL,
    f"KILL+@{WRITE}": -signal.SIGKILL,
    # the job has ended, the connections have not been seen to be closed
    "KILL@job-aborted#1": -signal.SIGKILL,
    "KILL+@job-aborted#1": -signal.SIGKILL,
    # the guard is killed at some step, and replaced
    "UNGUARD+@job-begun#1": 0,
    "UNGUARD@connection-kept#2": 0,
    "UNGUARD+@connection-kept#3": 0,
    f"UNGUARD+@{WRITE}": 0,
    "UNGUARD@job-aborted#1": 0,
}


@pytest.fixture(scope="module")
def shared(lab: DaemonLab) -> Guest:
    return lab.guest("vm1", DISKS, GuestOptions(iothreads=2))


@pytest.fixture
def guest(shared: Guest) -> Guest:
    """One that lives, whatever the tests before did to it."""
    if not shared.is_running():
        shared.start()
    return shared


@pytest.fixture
def witness(witness: Witness) -> Witness:
    """It has a full, and the guest has gone on since."""
    witness.run("-l", "full")
    witness.change()
    return witness


def assert_unharmed(guest: Guest, seconds: float = SOON) -> None:
    """It runs and answers; the job is gone, or goes soon."""
    wait_until(lambda: guest.block_jobs() == [], "the job's end", seconds)
    assert guest.is_running()
    assert not guest.is_paused()
    assert "running" in guest.virsh("domstate", "--domain", guest.name)


def assert_next_works(witness: Witness) -> None:
    witness.change()
    assert witness.run("-l", "inc").json["point"]["warnings"] == []
    witness.assert_clean()
    witness.check_restores()


@pytest.mark.parametrize("number", range(3))
def test_an_iothread_guest_survives_each_end(
    witness: Witness, guest: Guest, ctl: RiggedCtl, number: int
) -> None:
    """G-1: a third of all ends, one after the other: each run is the next one of another."""
    for fault in list(ENDS)[number::3]:
        with ctl.rigged(fault):
            if ENDS[fault]:
                ctl("backup", guest.name, "-o", witness.path, "-l", "inc", code=ENDS[fault])
            else:
                witness.run("-l", "inc")
        assert_unharmed(guest)
    assert_next_works(witness)


def while_it_runs(ctl: RiggedCtl, guest: Guest, witness: Witness, do: Callable[[int], None]) -> int:
    """Do something to a slow run within its copy; returns its exit status."""
    references = witness.take()
    with ctl.rigged(SLOW), ctl.start("backup", guest.name, "-o", witness.path) as process:
        ctl.faults = ()
        wait_for_job(guest)
        wait_until(lambda: bool(guards_of(process.pid)), "guard", 10)
        time.sleep(0.5)
        do(process.pid)
        process.communicate(timeout=100)
    witness.note(references)
    return process.returncode


def kill(pid: int) -> None:
    subprocess.run(["kill", "-KILL", str(pid)], check=True, timeout=10)


def test_a_guard_ignores_what_asks_it_to_end(
    witness: Witness, guest: Guest, ctl: RiggedCtl
) -> None:
    """G-1: a signal to all that belongs to a run does not take its guard away."""

    def ask(pid: int) -> None:
        guards = guards_of(pid)
        for name in ("TERM", "INT", "HUP"):
            subprocess.run(["kill", f"-{name}", *map(str, guards)], check=True, timeout=10)
        time.sleep(0.5)
        assert guards_of(pid) == guards
        kill(pid)

    assert while_it_runs(ctl, guest, witness, ask) == -signal.SIGKILL
    assert_unharmed(guest)
    assert_next_works(witness)


def test_a_new_guard_guards(witness: Witness, guest: Guest, ctl: RiggedCtl) -> None:
    """G-1: killed, it is replaced by one that knows all connections; then the run is killed."""

    def kill_both(pid: int) -> None:
        (old,) = guards_of(pid)
        kill(old)
        wait_until(lambda: guards_of(pid) not in ([], [old]), "another guard", 10)
        time.sleep(0.2)
        kill(pid)

    assert while_it_runs(ctl, guest, witness, kill_both) == -signal.SIGKILL
    assert_unharmed(guest)
    assert_next_works(witness)


@pytest.mark.parametrize("is_killed", [True, False], ids=["run-killed", "run-lives"])
def test_libvirtd_dies_and_comes_back(
    lab: DaemonLab, witness: Witness, guest: Guest, ctl: RiggedCtl, *, is_killed: bool
) -> None:
    """G-1: without libvirtd nobody can end the job; the guard does it when libvirtd is back."""

    def die(pid: int) -> None:
        lab.kill9()
        if is_killed:
            kill(pid)
            time.sleep(1.0)
            assert guest.block_jobs()
        lab.start()

    code = while_it_runs(ctl, guest, witness, die)
    assert code == (-signal.SIGKILL if is_killed else 0)
    assert_unharmed(guest, 60)
    assert_next_works(witness)


def test_the_external_tool_is_refused(witness: Witness, guest: Guest) -> None:
    """G-1: nbdinfo closes its connection first; nothing is begun."""
    refused = witness.run("-l", "inc", "--extents", "nbdinfo", code=20)
    assert "--extents own" in refused.json["error"]["message"]
    assert_unharmed(guest)
    assert_next_works(witness)


def test_a_guest_that_writes_all_the_time(witness: Witness, guest: Guest, ctl: RiggedCtl) -> None:
    """G-1: with requests in flight on all sides."""
    for fault, code in ((f"KILL+@{WRITE}", -signal.SIGKILL), (f"TERM+@{WRITE}", 143)):
        with ctl.rigged(SLOW, fault), ctl.start("backup", guest.name, "-o", witness.path) as run:
            wait_for_job(guest)
            while run.poll() is None:
                guest.write("vda", 0, MIB, 7)
                guest.write("vdb", 8 * MIB, MIB, 9)
        assert run.returncode == code
        assert_unharmed(guest)
    assert_next_works(witness)


def test_many_disks(lab: DaemonLab, ctl: RiggedCtl, tmp_path: Path) -> None:
    """G-1: all connections stay open until the job ends, and QEMU's server takes 100."""
    letters = "abcdefghijklmnopqrstuvwxy"
    disks = [DiskSpec(target=f"vd{letter}", size=MIB) for letter in letters]
    many = lab.guest("many", disks, GuestOptions(iothreads=2))
    many.start()
    for level in ("full", "inc"):
        ctl("backup", many.name, "-o", tmp_path / "many", "-l", level)
        assert_unharmed(many)
    many.destroy()
