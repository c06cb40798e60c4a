"""Everything around a run fails once: space, QEMU, libvirtd, the target."""

import contextlib
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest, GuestOptions
from tests.lab.process import wait_until
from tests.lib import bootsector
from tests.lib.rigged import RiggedCtl
from tests.lib.told import told
from tests.lib.witness import Witness, wait_for_copy, wait_for_job

pytestmark = pytest.mark.system
SMALL_MIB = 24

DISKS = (DiskSpec(target="vda", size=32 * MIB), DiskSpec(target="vdb", size=16 * MIB))
SLOW = "SLOW1.5@block-written#2"


@pytest.fixture(scope="module")
def only_guest(lab: DaemonLab) -> Guest:
    return lab.guest("vm1", DISKS)


@pytest.fixture
def guest(only_guest: Guest) -> Guest:
    """The guest, running whatever the test before has done to it."""
    if not only_guest.is_running():
        only_guest.start()
    return only_guest


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB for sets."""
    path = tmp_path / "small"
    path.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", path])
    yield path
    run(["umount", path])


def one_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


def ok(witness: Witness, level: str) -> None:
    """The next run is as if nothing had happened."""
    point = witness.run().json["point"]
    assert point["level"] == level
    assert point["warnings"] == []
    witness.assert_clean()
    witness.check_all()


# -- the target


def resize(path: Path, size: str) -> None:
    run(["mount", "-o", f"remount,size={size}", path])


def test_target_runs_full(witness: Witness, target: Path) -> None:
    witness.path = target / "set"
    resize(target, "5M")
    foretold, error = witness.run("-l", "full", code=50).stderr.splitlines()
    assert "it may not fit" in foretold
    assert "No space left on device" in error
    assert str(witness.path) in error
    assert "free space" in error
    assert witness.points() == []
    witness.assert_clean()
    resize(target, "64M")
    ok(witness, "full")
    ballast = target / "ballast"
    ballast.write_bytes(bytes(target.stat().st_blksize))
    run(["fallocate", "-l", str(free(target) - 2 * MIB), ballast])
    witness.fill(4 * MIB)
    foretold, error = witness.run(code=50).stderr.splitlines()
    assert "it may not fit" in foretold
    assert "No space left" in error
    witness.assert_clean()
    ballast.unlink()
    ok(witness, "inc")


def free(path: Path) -> int:
    return shutil.disk_usage(path).free


STEPS = [
    "NOSPACE@os-pwritev#1",
    "EIO@os-pwritev#4",
    "EIO@os-fsync#1",
    "NOSPACE@os-fsync#7",
    "EIO@os-fsync#12",
    "EIO@os-fsync#20",
    "EROFS@os-rename#3",
    "EIO@os-rename#12",
    "NOSPACE@file-created#1",
    "NOSPACE@file-created#6",
    "EIO@directory-synced#6",
    "EIO@directory-synced#9",
]


def test_target_fails_at_any_step(witness: Witness, ctl: RiggedCtl) -> None:
    witness.run("-l", "full")
    for step in STEPS:
        witness.change()
        with ctl.rigged(step):
            error = one_line(witness.run("-l", "inc", code=50).stderr)
        assert str(witness.path) in error or str(ctl.runtime) in error, step
        assert "[Errno" not in error
        witness.assert_clean()
    ok(witness, "inc")


def test_target_turns_read_only(witness: Witness, guest: Guest, target: Path) -> None:
    witness.path = target / "set"
    witness.run("-l", "full")
    witness.change()
    run(["mount", "-o", "remount,ro", target])
    assert "read-only" in one_line(witness.run(code=50).stderr)
    assert guest.block_jobs() == []
    run(["mount", "-o", "remount,rw", target])
    ok(witness, "inc")


def test_target_vanishes(witness: Witness, guest: Guest, ctl: RiggedCtl) -> None:
    moved = witness.path.with_name("moved")
    with ctl.rigged(SLOW), ctl.start("backup", guest.name, "-o", witness.path) as process:
        wait_for_copy(guest, witness.path)
        witness.path.rename(moved)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 50, stderr
    assert "Traceback" not in stderr
    assert guest.block_jobs() == []
    assert list(ctl.scratch.glob("*")) == []
    assert witness.checkpoints() == set()
    ok(witness, "full")


# -- scratch space


def test_scratch_fills_up(
    witness: Witness, guest: Guest, ctl: RiggedCtl, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctl, "scratch", small)
    guest.write("vda", 0, 32 * MIB, 1)
    options = ("-o", witness.path, "--scratch-reserve", "8M")
    with ctl.rigged(SLOW), ctl.start("backup", guest.name, *options) as process:
        wait_for_job(guest)
        for number in range(120):
            guest.write("vda", number % 32 * MIB, MIB, 2 + number // 32)
            time.sleep(0.02)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 30
    # G-4: only what is known
    assert "is filling up" in one_line(stderr)
    assert "the job was ended; no disk of the guest shows an error" in stderr
    logs = [path.read_text() for path in witness.path.glob("logs/*")]
    assert any("scratch-low" in told(log) for log in logs), logs
    assert str(small) in stderr
    assert "--scratch-dir" in stderr
    assert not guest.is_paused()
    for device in guest.qmp("query-blockstats"):
        assert device["stats"]["failed_wr_operations"] == 0
    witness.assert_clean()
    refused = witness.run("--scratch-reserve", "13M", code=30)
    assert "--scratch-dir" in one_line(refused.stderr)
    witness.assert_clean()
    point = witness.run("--scratch-reserve", "8M").json["point"]
    assert point["level"] == "full"
    witness.assert_clean()
    witness.check_all()


def fill(path: Path) -> None:
    """Use up all space of a file system at once."""
    with (path / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(MIB)):
            pass


def test_a_guest_that_writes_as_fast_as_it_can(
    lab: DaemonLab, ctl: RiggedCtl, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G-4: the job ends before the guest sees an error; where it can't, it says so and lets go."""
    monkeypatch.setattr(ctl, "scratch", small)
    run(["mount", "-o", "remount,size=160M", small])
    quick = lab.guest("quick", [DiskSpec(target="vda", size=192 * MIB)], GuestOptions(iothreads=1))
    quick.start()
    witness = Witness(ctl, quick, tmp_path, "quick")
    for number in range(12):
        quick.write("vda", number * 16 * MIB, 16 * MIB, 1)
    options = ("-o", witness.path, "--scratch-reserve", "32M", "--limit-rate", "4M")
    with ctl.start("backup", quick.name, *options) as process:
        wait_for_job(quick)
        for number in range(12):
            quick.write("vda", number * 16 * MIB, 16 * MIB, 2)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 30, stderr
    assert "no disk of the guest shows an error" in one_line(stderr)
    assert not quick.is_paused()
    quick.destroy()


def test_a_guest_that_was_held_goes_on(
    lab: DaemonLab, ctl: RiggedCtl, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G-4: space that goes at once can't be watched: the guest is let go, and that is said."""
    monkeypatch.setattr(ctl, "scratch", small)
    console = lab.directory / "console"
    image = bootsector.make_disk(lab.images / "held.qcow2", 32 * MIB, 1)
    disk = DiskSpec(target="vda", path=image, size=32 * MIB)
    options = GuestOptions(console_log=console, boots_its_disk=True)
    held = lab.guest("held", [disk], options)
    held.start()
    wait_until(lambda: len(bootsector.said(console)) > 40, "writes of the guest", 60)
    held.virsh("suspend", "--domain", held.name)
    words = ("-o", tmp_path / "held", "--scratch-reserve", "8M", "--limit-rate", "64K")
    slow = ctl.rigged("SLOW8@scratch-measured#3")
    with slow, ctl.start("backup", held.name, *words) as process:
        wait_for_job(held)
        # nothing that it wrote before is written again without space
        fill(small)
        held.virsh("resume", "--domain", held.name)
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 30, stderr
    assert "the guest was held by an error of vda meanwhile, and goes on" in one_line(stderr)
    before = len(bootsector.said(console))
    wait_until(lambda: len(bootsector.said(console)) > before, "more writes of the guest", 30)
    (small / "ballast").unlink()
    held.destroy()


# -- QEMU


def test_qemu_is_killed(witness: Witness, guest: Guest, ctl: RiggedCtl) -> None:
    witness.run("-l", "full")
    witness.change()
    witness.fill(4 * MIB)
    with ctl.rigged(SLOW), ctl.start("backup", guest.name, "-o", witness.path) as process:
        wait_for_copy(guest, witness.path)
        begun = time.monotonic()
        guest.kill9()
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - begun < 20
    assert process.returncode == 30, stderr
    # W-13
    assert f"domain {guest.name} ended during the backup" in stderr
    assert "DEAD" not in stderr
    assert len(witness.points()) == 1
    guest.wait_shut_off()
    witness.assert_no_files(allow={"run.json"})
    guest.start()
    witness.change()
    point = witness.run(code=3).json["point"]
    assert point["level"] == "inc"
    assert len(point["warnings"]) == 2
    assert all("bitmap" in warning for warning in point["warnings"])
    witness.assert_clean()
    witness.change()
    ok(witness, "inc")


def test_guest_shuts_down(witness: Witness, guest: Guest, ctl: RiggedCtl) -> None:
    witness.run("-l", "full")
    witness.fill(4 * MIB)
    with ctl.rigged(SLOW), ctl.start("backup", guest.name, "-o", witness.path) as process:
        wait_for_copy(guest, witness.path)
        guest.stop()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 30, stderr
    # W-13
    assert f"domain {guest.name} ended during the backup" in stderr
    assert "DEAD" not in stderr
    witness.assert_no_files(allow={"run.json"})
    # the next run needs no guest, and what the failed one left is gone after it
    point = witness.run("-l", "inc").json["point"]
    assert point["warnings"] == []
    witness.assert_no_files()
    assert witness.checkpoints() == {point["checkpoint"]}
    guest.start()
    witness.change()
    ok(witness, "inc")


def test_qemu_stops_answering(witness: Witness, guest: Guest, ctl: RiggedCtl) -> None:
    witness.run("-l", "full")
    witness.fill(4 * MIB)
    options = ("-o", witness.path, "--timeout", "2")
    with ctl.rigged(SLOW), ctl.start("backup", guest.name, *options) as process:
        wait_for_copy(guest, witness.path)
        guest.process().send(signal.SIGSTOP)
        # given up after two seconds; what ends the job then waits for libvirt, bounded
        time.sleep(6.0)
        guest.process().send(signal.SIGCONT)
        _, stderr = process.communicate(timeout=60)
    assert "for 2 s" in one_line(stderr)
    assert process.returncode == 30, stderr
    wait_until(lambda: bool(guest.qmp("query-status")), "answer of QEMU", 10)
    witness.change()
    ok(witness, "inc")


# -- libvirtd


@pytest.mark.parametrize("how", ["kill", "restart"])
def test_libvirtd_restarts(
    witness: Witness, guest: Guest, ctl: RiggedCtl, lab: DaemonLab, how: str
) -> None:
    witness.run("-l", "full")
    witness.fill(4 * MIB)
    references = witness.take()
    with ctl.rigged(SLOW), ctl.start("backup", guest.name, "-o", witness.path) as process:
        wait_for_copy(guest, witness.path)
        if how == "kill":
            lab.kill9()
        else:
            lab.stop()
        lab.start()
        assert process.poll() is None
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    witness.note(references)
    witness.assert_clean()
    witness.change()
    ok(witness, "inc")


def test_libvirtd_is_killed_while_the_job_begins(
    witness: Witness, guest: Guest, ctl: RiggedCtl, lab: DaemonLab
) -> None:
    witness.run("-l", "full")
    witness.change()
    references = witness.take()
    # the daemon stops in the middle of the call; QEMU may have begun the job or not
    slow = ctl.rigged("SLOW1.0@job-begun#1")
    with slow, ctl.start("backup", guest.name, "-o", witness.path) as process:
        time.sleep(1.2)
        lab.kill9()
        lab.start()
        _, stderr = process.communicate(timeout=100)
    assert process.returncode in (0, 20), stderr
    assert "Traceback" not in stderr
    witness.note(references)
    witness.change()
    refused = witness.ctl("abort", guest.name, code=None)
    if refused.code:
        # libvirt's own loss, and seldom: the message tells the way out
        assert (refused.code, "lost track of" in refused.stderr) == (75, True), refused.stderr
        guest.stop()
        lab.restart()
        guest.start()
        witness.change()
    ok(witness, "inc")
