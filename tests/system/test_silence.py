"""G-1: a run that has not ended, but does not move, holds up no guest.

It may be stopped while QEMU's answers wait for it, or wait in the kernel for a target that is gone,
so that it can't even be killed. Its guard sees that (source/silence.py).
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest, GuestOptions
from tests.lab.process import wait_until
from tests.lib.rigged import RiggedCtl
from tests.lib.witness import Witness

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]

ASKED = "STOP+@request-begun#3"
"""With three blocks of a disk to come, more than a socket takes."""

WRITTEN = "STOP@block-written#4"
"""With all connected: QEMU lets a handshake take 10 s."""

READ = "STOP@disk-copied#1"
SOON = 40.0
SCRATCH_MIB = 24


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A small file system; mounted before libvirtd begins, or QEMU might not see it."""
    path = Path(tempfile.mkdtemp(prefix="nbl-", dir="/tmp"))
    path.chmod(0o711)
    run(["mount", "-t", "tmpfs", "-o", f"size={SCRATCH_MIB}M,mode=711", "tmpfs", path])
    yield path
    run(["umount", path])
    path.rmdir()


@pytest.fixture(scope="module")
def lab(scratch: Path) -> Iterator[DaemonLab]:
    assert scratch.is_mount()
    with DaemonLab() as lab:
        yield lab


@pytest.fixture(scope="module")
def ctl(lab: DaemonLab) -> RiggedCtl:
    return RiggedCtl(lab.uri, lab.directory / "ctl")


@pytest.fixture(scope="module", params=[0, 2], ids=["no-iothread", "iothreads"])
def guest(lab: DaemonLab, request: pytest.FixtureRequest) -> Guest:
    number: int = request.param
    disks = [DiskSpec(target="vda", size=64 * MIB)]
    made = lab.guest(f"vm{number}", disks, GuestOptions(iothreads=number))
    made.start()
    return made


@pytest.fixture
def witness(ctl: RiggedCtl, guest: Guest, tmp_path: Path) -> Witness:
    made = Witness(ctl, guest, tmp_path)
    made.delete_checkpoints()
    made.fill(16 * MIB)
    return made


@contextmanager
def stopped(
    ctl: RiggedCtl, guest: Guest, target: Path, fault: str, *options: str | Path
) -> Iterator[subprocess.Popen[str]]:
    """A run that has stopped itself."""
    with ctl.rigged(fault), ctl.start("backup", guest.name, "-o", target, *options) as process:
        ctl.faults = ()
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "stop", 60)
        assert guest.block_jobs()
        yield process


def assert_next_works(witness: Witness) -> None:
    wait_until(lambda: witness.guest.block_jobs() == [], "the job's end", SOON)
    witness.change()
    witness.run()
    witness.assert_clean()
    witness.check_restores()


def test_a_guest_that_is_paused_waits_for_no_stopped_run(
    witness: Witness, guest: Guest, ctl: RiggedCtl
) -> None:
    with stopped(ctl, guest, witness.path, ASKED) as process:
        begun = time.monotonic()
        guest.virsh("suspend", "--domain", guest.name, timeout_seconds=SOON)
        assert process.wait(SOON) == -signal.SIGKILL
        # less than libvirt's own calls wait for one another
        assert time.monotonic() - begun < 30
        assert guest.is_paused()
        guest.virsh("resume", "--domain", guest.name)
    assert_next_works(witness)


def test_a_stopped_run_goes_on_if_nobody_waits(
    witness: Witness, guest: Guest, ctl: RiggedCtl
) -> None:
    references = witness.take()
    with stopped(ctl, guest, witness.path, WRITTEN) as process:
        time.sleep(20)
        guest.write("vda", 0, MIB, 7)
        assert guest.block_jobs()
        os.kill(process.pid, signal.SIGCONT)
        _, stderr = process.communicate(timeout=100)
        assert process.returncode == 0, stderr
    witness.note(references)
    witness.check_restores()
    assert_next_works(witness)


def test_scratch_space_is_watched_for_a_stopped_run(
    witness: Witness, guest: Guest, ctl: RiggedCtl, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctl, "scratch", scratch)
    with stopped(ctl, guest, witness.path, READ, "--scratch-reserve", "8M") as process:
        # the guest overwrites slowly what there is no room for
        for place in range(SCRATCH_MIB - 9):
            time.sleep(0.5)
            guest.write("vda", place * MIB, MIB, 9)
        assert process.wait(SOON) == -signal.SIGKILL
        wait_until(lambda: guest.block_jobs() == [], "the job's end", SOON)
        guest.write("vda", 0, 16 * MIB, 11)
        assert not guest.is_paused()
    monkeypatch.undo()
    assert_next_works(witness)


@pytest.mark.parametrize(
    ("fault", "code"), [("NOSPACE", 50), ("TERM", 128 + signal.SIGTERM)], ids=["full", "asked"]
)
def test_answers_that_nobody_wants_hold_up_no_guest(
    witness: Witness, guest: Guest, ctl: RiggedCtl, fault: str, code: int
) -> None:
    """A run that fails in the middle of a copy reads what it asked for, or QEMU can't go on."""
    with ctl.rigged(f"{fault}@block-written#2"):
        begun = time.monotonic()
        failed = ctl("backup", guest.name, "-o", witness.path, code=code)
    assert time.monotonic() - begun < 20
    # nothing of an end that was not seen
    assert len(failed.stderr.splitlines()) == 1
    assert guest.block_jobs() == []
    assert_next_works(witness)


@contextmanager
def target(directory: Path) -> Iterator[Path]:
    """A file system that can be made to hang: frozen, it lets no writer go, nor die."""
    image, path = directory / "image", directory / "mounted"
    path.mkdir()
    run(["truncate", "--size=256M", image])
    run(["mkfs.ext4", "-q", image])
    run(["mount", "-o", "loop", image, path])
    try:
        yield path
    finally:
        run(["umount", path])


def test_a_run_that_can_not_die_is_dead(
    witness: Witness, guest: Guest, ctl: RiggedCtl, tmp_path: Path
) -> None:
    """Its thread waits for a target that is gone; no signal ends that."""
    slow = "SLOW0.5@block-written#2"
    with target(tmp_path) as path, ctl.rigged(slow):
        with ctl.start("backup", guest.name, "-o", path / "set") as process:
            ctl.faults = ()
            wait_until(lambda: any((path / "set").glob(".draft*/*.data")), "copy", 60)
            run(["fsfreeze", "--freeze", path])
            try:
                time.sleep(2)
                # the guest does not wait for a target
                guest.virsh("suspend", "--domain", guest.name, timeout_seconds=5)
                guest.virsh("resume", "--domain", guest.name)
                assert guest.block_jobs()
                process.kill()
                wait_until(lambda: guest.block_jobs() == [], "the job's end", SOON)
                assert process.poll() is None
            finally:
                run(["fsfreeze", "--unfreeze", path])
            assert process.wait(SOON) == -signal.SIGKILL
        witness.change()
        ctl("backup", guest.name, "-o", path / "set")
        witness.assert_no_files()
