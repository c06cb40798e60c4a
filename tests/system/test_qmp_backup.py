"""A QEMU without libvirt: each point equals what qemu-img says that the disks held."""

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbackupd.ops.sets.opened import open_set
from tests.lab.command import LabError
from tests.lab.process import wait_until
from tests.lib.contents import read_disk
from tests.lib.images import make, qemu_img
from tests.lib.rigged import RiggedCtl
from tests.lib.standalone import MIB, VARIABLES, Process, modern, proxmox, running

pytestmark = pytest.mark.system
SMALL_MIB = 36
WRITERS = int(os.environ.get("NBDBACKUP_WRITERS", "2"))


@pytest.fixture
def ctl() -> Iterator[RiggedCtl]:
    # a socket's path must be short
    with tempfile.TemporaryDirectory(prefix="nbq-", dir="/tmp") as directory:
        yield RiggedCtl("test:///none", Path(directory))


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Process]:
    with running(modern(tmp_path)) as process:
        yield process


def test_each_point_of_a_chain(qemu: Process, ctl: RiggedCtl, tmp_path: Path, seed: int) -> None:
    rng, into, expected = random.Random(seed), tmp_path / "set", {}
    for level in ("full", "inc", "diff", "inc", "copy", "inc"):
        qemu.scribble(rng)
        expected[qemu.backup(ctl, into, "-l", level, "--raw")["point"]["id"]] = qemu.contents()
        assert qemu.leftovers() == []
        if level == "diff":
            # quit and start: bitmaps are in the images
            qemu.quit()
            qemu.start()
    for point, disks in expected.items():
        for disk, content in disks.items():
            assert read_disk(into, point, disk) == content, (point, disk)
    levels = [[disk["mode"] for disk in each["disks"]] for each in ctl.points(into)]
    assert levels[1] == ["delta", "delta", "delta"]
    assert levels[3] == ["delta", "delta", "full"]
    assert len(qemu.bitmaps()) == 1
    ctl("verify", into)
    restored = ctl.restore(into, tmp_path / "out")
    for disk, path in restored.items():
        raw = tmp_path / "restored.raw"
        form = "raw" if disk == "disk3" else "qcow2"
        qemu_img("convert", "-f", form, "-O", "raw", path, raw)
        assert raw.read_bytes() == qemu.contents()[disk]


def test_a_chain_by_name(qemu: Process, ctl: RiggedCtl, tmp_path: Path, seed: int) -> None:
    """The first run names it; no other chain of the machine gets that name."""
    rng, into, other = random.Random(seed), tmp_path / "set", tmp_path / "other"
    qemu.scribble(rng)
    full = qemu.backup(ctl, into, "--raw", "--chain", "nightly")["point"]
    assert full["chain"].endswith("-nightly")
    assert qemu.bitmaps() == {f"nbdbackup.nightly.{full['id']}"}
    for options in ((), ("--chain", "nightly")):
        qemu.scribble(rng)
        assert qemu.backup(ctl, into, "--raw", *options)["point"]["chain"] == full["chain"]
    words = ("backup", "--qmp", qemu.socket, "vm7", "-o")
    said = ctl(*words, into, "--chain", "weekly", code=10).stderr
    assert "the chain of this set is nightly, not weekly" in said
    said = ctl(*words, other, "--chain", "nightly", code=10).stderr
    assert "has a chain nightly already" in said
    assert "a-z, 0-9 and _" in ctl(*words, other, "--chain", "a.b", code=2).stderr
    assert "begins no chain" in ctl(*words, other, "--chain", "a", "-l", "copy", code=2).stderr
    ctl("checkpoints", "--qmp", qemu.socket, "vm7", "--drop", "nightly", code=None)
    assert qemu.bitmaps() == set()


def test_as_proxmox_starts_it(ctl: RiggedCtl, tmp_path: Path, seed: int) -> None:
    """Eight disks at one instant, by filters: QEMU's are gone afterwards, whatever ends a run."""
    rng, into, expected = random.Random(seed), tmp_path / "set", {}
    with running(proxmox(tmp_path)) as process:

        def saved(*options: str, raw: str) -> None:
            point = process.backup(ctl, into, "--raw", *options)["point"]
            expected[point["id"]] = process.contents()
            assert process.leftovers() == []
            assert process.guest_runs
            assert {each["target"] for each in point["disks"]} == {*process.images}
            modes = {each["target"]: each["mode"] for each in point["disks"]}
            assert [modes["virtio0"], modes["disk7"]] == [raw, raw]
            full = {mode for name, mode in modes.items() if name not in ("virtio0", "disk7")}
            assert full == {"full" if len(expected) == 1 else "delta"}

        tops = process.tops()
        assert process.tops()["disk5"] == "throttle-5"
        process.scribble(rng)
        saved("-x", "drive-ide2", "--pause", raw="full")
        assert process.tops() == tops
        process.scribble(rng)
        # a guest that is halted for an instant, with filters below some of its disks
        for end in ("SLAY@filter-put#6", "KILL@filter-put#6", "STOP@filter-put#6"):
            with ctl.rigged(end):
                process.backup(ctl, into, "--raw", code=-signal.SIGKILL)
            if not end.startswith("SLAY"):
                # its guard lets the guest go; for that it kills one that does not move
                process.wait_clean()
                assert process.guest_runs
        process.scribble(rng)
        saved(raw="delta")
        assert process.tops() == tops
        # while it is read: the guest's firmware writes, and somebody wants to resize a disk
        process.scribble(rng)
        before = process.contents()
        with (
            ctl.rigged("SLOW2@disk-copied#1"),
            ctl.start("backup", "--qmp", process.socket, "vm7", "-o", into, "--raw") as run,
        ):
            wait_until(lambda: process.has_exports, "export", 60)
            process.monitor.human(f'qemu-io drive-efidisk0 "write -P 7 0 {VARIABLES}"')
            for name in ("drive-scsi0", "virtio1"):
                with pytest.raises(LabError, match="Permission conflict"):
                    process.monitor.execute("block_resize", {"device": name, "size": 16 * MIB})
            process.scribble(rng)
            _, said = run.communicate(timeout=60)
        assert run.returncode == 0, said
        assert process.tops() == tops
        points = ctl.points(into)
        expected[points[-1]["id"]] = before
        newest = open_set(into).known.newest
        (nvram,) = (each.name for each in newest.files if each.role == "nvram")
        assert (into / nvram).read_bytes() == bytes(VARIABLES)
        process.quit()
        process.start()
        saved(raw="full")
        # QEMU was given a relative name, and has left that directory
        (layer,) = open_set(into).known.newest.disk("scsi0").layers
        assert layer.path == os.fspath(tmp_path / "scsi0.qcow2")
        assert layer.inode == (tmp_path / "scsi0.qcow2").stat().st_ino
        said = ctl("backup", "--qmp", process.socket, "vm7", "-o", into, "-i", "sda", code=2).stderr
        assert "no disk sda, only: scsi0, ide2" in said
    assert [each["consistency"] for each in points[:2]] == ["paused", "crash"]
    (reason,) = {each["reason"] for each in ctl.points(into)[-1]["disks"] if each["mode"] == "full"}
    assert reason.startswith("QEMU knows the changes of a raw image as long as its process lives")
    for point, disks in expected.items():
        for disk, content in disks.items():
            assert read_disk(into, point, disk) == content, (point, disk)


@pytest.mark.parametrize("number", range(WRITERS))
def test_a_writer_that_never_stops(ctl: RiggedCtl, tmp_path: Path, seed: int, number: int) -> None:
    """What is written while bitmaps change hands is in the next increment, if in none before.

    ``NBDBACKUP_WRITERS=20`` has so many of them, by filters and by jobs in turn.
    """
    with running(modern(tmp_path, above=["throttle", "copy-on-read"][number % 2])) as qemu:
        write_through(qemu, ctl, tmp_path / "set", seed + number)


def write_through(qemu: Process, ctl: RiggedCtl, into: Path, seed: int) -> None:
    stop = threading.Event()

    def write() -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            qemu.scribble(rng, 1)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for level in ("full", "inc", "inc", "inc"):
            qemu.backup(ctl, into, "-l", level, "--raw")
    finally:
        stop.set()
        thread.join()
    last = qemu.backup(ctl, into, "--raw")["point"]
    contents = qemu.contents()
    for disk in contents:
        assert read_disk(into, last["id"], disk) == contents[disk]


ENDS = (
    "KILL@jobs-begun#1", "KILL+@jobs-begun#1", "KILL@connection-ready#1", "KILL@disk-copied#1",
    "KILL@requests-moved#2", "KILL@point-published#1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("above", "end"), [(["throttle", "copy-on-read"][n % 2], end) for n, end in enumerate(ENDS)]
)
def test_a_killed_run(ctl: RiggedCtl, tmp_path: Path, above: str, end: str) -> None:
    """Its guard ends what it left, without another run; the base stays what it was."""
    with running(modern(tmp_path, above=above)) as qemu:
        kill(qemu, ctl, tmp_path / "set", end)


def kill(qemu: Process, ctl: RiggedCtl, into: Path, end: str) -> None:
    rng = random.Random(3)
    qemu.scribble(rng)
    qemu.backup(ctl, into, "-x", "disk3")
    base = qemu.bitmaps()
    qemu.scribble(rng)
    with ctl.rigged(end):
        qemu.backup(ctl, into, "-x", "disk3", code=-signal.SIGKILL)
    qemu.wait_clean()
    assert qemu.bitmaps() >= base
    qemu.scribble(rng)
    point = qemu.backup(ctl, into, "-x", "disk3")["point"]
    assert [each["mode"] for each in point["disks"]] == ["delta", "delta"]
    assert len(qemu.bitmaps()) == 1
    contents = qemu.contents()
    for disk in ("disk1", "disk2"):
        assert read_disk(into, point["id"], disk) == contents[disk]


def test_the_sweep_of_the_next_run(qemu: Process, ctl: RiggedCtl, tmp_path: Path) -> None:
    into = tmp_path / "set"
    with ctl.rigged("SLAY@disk-copied#1"):
        qemu.backup(ctl, into, "-x", "disk3", code=-signal.SIGKILL)
    assert qemu.leftovers()
    qemu.backup(ctl, into, "-x", "disk3")
    assert qemu.leftovers() == []
    assert len(qemu.bitmaps()) == 1


def test_a_failed_run_keeps_the_base(qemu: Process, ctl: RiggedCtl, tmp_path: Path) -> None:
    into = tmp_path / "set"
    qemu.backup(ctl, into, "-x", "disk3")
    base = qemu.bitmaps()
    with ctl.rigged("NOSPACE@disk-copied#1"):
        qemu.backup(ctl, into, "-x", "disk3", code=None)
    assert qemu.leftovers() == []
    assert qemu.bitmaps() == base


def test_a_killed_qemu(qemu: Process, ctl: RiggedCtl, tmp_path: Path) -> None:
    """Bitmaps that were not stored are no base: whole disks, and the reason."""
    into = tmp_path / "set"
    qemu.io("disk1", f"write -P 7 0 {MIB}")
    qemu.backup(ctl, into, "-x", "disk3")
    qemu.quit()
    qemu.start()
    qemu.io("disk1", f"write -P 8 0 {MIB}")
    contents = qemu.contents()
    qemu.kill()
    qemu.start()
    point = qemu.backup(ctl, into, "-x", "disk3", code=3)["point"]
    assert [each["mode"] for each in point["disks"]] == ["full", "full"]
    assert "missing or inconsistent" in point["warnings"][0]
    assert read_disk(into, point["id"], "disk1") == contents["disk1"]
    assert len(qemu.bitmaps()) == 1
    qemu.backup(ctl, into, "-x", "disk3")


def test_qemu_ends_during_a_run(qemu: Process, ctl: RiggedCtl, tmp_path: Path) -> None:
    assert qemu.handle is not None
    with (
        ctl.rigged("SLOW3@disk-copied#1"),
        ctl.start("backup", "--qmp", qemu.socket, "vm7", "-o", tmp_path / "set", "--raw") as run,
    ):
        deadline = time.monotonic() + 60
        while not qemu.has_exports and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(1)
        qemu.kill()
        _, said = run.communicate(timeout=60)
    assert run.returncode == 30, said
    assert "Traceback" not in said
    assert "ended during the backup" in said


def test_guests_with_iothreads_live(ctl: RiggedCtl, tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", 8 * MIB)
    arguments = [
        *("-object", "iothread,id=io1"),
        *("-blockdev", f"driver=qcow2,node-name=n1,file.driver=file,file.filename={image}"),
        *("-device", "virtio-blk-pci,drive=n1,id=disk1,iothread=io1"),
    ]
    into = tmp_path / "set"
    with running(Process(tmp_path, arguments, {"disk1": (image, "qcow2")}, {})) as process:
        # the guest's firmware has found the disk: the iothread serves it
        wait_until(process.has_read, "read of the firmware", 60)
        process.backup(ctl, into)
        process.backup(ctl, into)
        for end in ENDS:
            with ctl.rigged(end):
                process.backup(ctl, into, code=-signal.SIGKILL)
            process.wait_clean()
            assert process.is_running
        process.backup(ctl, into)
        assert process.is_running


def test_monitors_that_do_not_serve(qemu: Process, ctl: RiggedCtl, tmp_path: Path) -> None:
    into = tmp_path / "set"
    words = ["vm7", "-o", os.fspath(into)]
    said = ctl("backup", "--qmp", qemu.directory / "own", *words, code=75).stderr
    assert "another program holds the monitor" in said
    said = ctl("backup", "--qmp", qemu.directory / "none", *words, code=20).stderr
    assert "no QEMU listens" in said
    assert "give its directory with -o" in ctl("backup", "--qmp", qemu.socket, "vm7", code=2).stderr
    assert qemu.handle is not None
    qemu.handle.send(signal.SIGSTOP)
    try:
        ctl("backup", "--qmp", qemu.socket, *words, code=75)
    finally:
        qemu.handle.send(signal.SIGCONT)


@pytest.mark.parametrize("way", ["jobs", "filters", "unwatched"])
def test_scratch_that_fills_up(ctl: RiggedCtl, tmp_path: Path, small: Path, way: str) -> None:
    """All that the guest writes lands, and the run says what has ended it."""
    into, filler = tmp_path / "set", small / "filler"
    ctl.scratch = small / "scratch"
    faults = ["SLOW5@disk-copied#1"]
    if way == "unwatched":
        faults.append("SLOW8@space-measured#1")
    with running(modern(tmp_path, above="copy-on-read" if way == "jobs" else "throttle")) as qemu:
        for disk in qemu.writers:
            qemu.io(disk, f"write -P 1 0 {8 * MIB}")
        with (
            ctl.rigged(*faults),
            ctl.start("backup", "--qmp", qemu.socket, "vm7", "-o", into, "--raw") as run,
        ):
            wait_until(lambda: qemu.has_exports, "export", 60)
            if way == "unwatched":
                free = os.statvfs(small)
                filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 4 * MIB))
            for number in range(32):
                for disk in qemu.writers:
                    qemu.io(disk, f"write -P 2 {number * MIB // 4} {MIB // 4}")
            _, said = run.communicate(timeout=60)
        assert run.returncode == 30, said
        assert ("could not be kept" if way == "unwatched" else "is filling up") in said
        errors = "no disk of the guest shows an error" if way == "jobs" else "no write of the guest"
        assert errors in said or way == "unwatched"
        assert qemu.leftovers() == []
        assert qemu.bitmaps() == set()
        assert {*qemu.contents().values()} == {b"\2" * 8 * MIB}
    filler.unlink(missing_ok=True)


def test_another_ones_nbd_server(qemu: Process, ctl: RiggedCtl, tmp_path: Path) -> None:
    address = {"type": "unix", "data": {"path": os.fspath(tmp_path / "theirs")}}
    qemu.monitor.execute("nbd-server-start", {"addr": address})
    said = qemu.backup(ctl, tmp_path / "set", "-x", "disk3", code=75)
    assert "QEMU's NBD server serves another program" in said
    assert qemu.leftovers() == []
    assert qemu.bitmaps() == set()
    qemu.monitor.execute("nbd-server-stop")
    qemu.backup(ctl, tmp_path / "set", "-x", "disk3")
