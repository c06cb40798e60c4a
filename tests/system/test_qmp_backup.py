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
from tests.lab.process import wait_until
from tests.lib.contents import read_disk
from tests.lib.images import make, overlay, qemu_img
from tests.lib.rigged import RiggedCtl
from tests.lib.standalone import MIB, Process, running

pytestmark = pytest.mark.system
SMALL_MIB = 36
UUID = "3c4f1a52-9a3e-4a40-9bb1-0a1d7a4b9c11"


@pytest.fixture
def ctl() -> Iterator[RiggedCtl]:
    # a socket's path must be short
    with tempfile.TemporaryDirectory(prefix="nbq-", dir="/tmp") as directory:
        yield RiggedCtl("test:///none", Path(directory))


def modern(directory: Path, *more: str) -> Process:
    """-blockdev, a throttle filter above one disk, an overlay, a raw disk."""
    one, three = make(directory / "one.qcow2", 8 * MIB), directory / "three.raw"
    two = overlay(directory / "two.qcow2", make(directory / "below.qcow2", 8 * MIB))
    qemu_img("create", "-q", "-f", "raw", three, str(8 * MIB))
    arguments = [
        *("-uuid", UUID, "-S", "-object", "throttle-group,id=g0,x-iops-total=100000"),
        *("-blockdev", f"driver=qcow2,node-name=n1,file.driver=file,file.filename={one}"),
        *("-blockdev", "driver=throttle,node-name=t1,throttle-group=g0,file=n1"),
        *("-device", "virtio-blk-pci,drive=t1,id=disk1"),
        *("-blockdev", f"driver=qcow2,node-name=n2,file.driver=file,file.filename={two}"),
        *("-device", "virtio-blk-pci,drive=n2,id=disk2"),
        *("-blockdev", f"driver=raw,node-name=n3,file.driver=file,file.filename={three}"),
        *("-device", "virtio-blk-pci,drive=n3,id=disk3"),
        *more,
    ]
    images = {"disk1": (one, "qcow2"), "disk2": (two, "qcow2"), "disk3": (three, "raw")}
    writers = {name: f"/machine/peripheral/{name}/virtio-backend" for name in images}
    return Process(directory, arguments, images, writers)


def proxmox(directory: Path) -> Process:
    """-drive, as qemu-server writes it, relative names, and a guest that runs."""
    make(directory / "disk.qcow2", 8 * MIB)
    arguments = [
        *("-name", "vm7,debug-threads=on", "-smbios", f"type=1,uuid={UUID}"),
        *("-device", "virtio-scsi-pci,id=scsihw0"),
        *("-drive", "file=disk.qcow2,if=none,id=drive-scsi0,format=qcow2,cache=none,aio=threads"),
        *("-device", "scsi-hd,bus=scsihw0.0,scsi-id=0,drive=drive-scsi0,id=scsi0,bootindex=100"),
        *("-drive", "if=none,id=drive-ide2,media=cdrom"),
        *("-device", "ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2"),
    ]
    images = {"scsi0": (directory / "disk.qcow2", "qcow2")}
    return Process(directory, arguments, images, {"scsi0": "scsi0"})


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
    assert levels[1] == ["delta", "delta", "full"]
    assert levels[3] == ["delta", "delta", "full"]
    assert len(qemu.bitmaps()) == 1
    ctl("verify", into)
    restored = ctl.restore(into, tmp_path / "out")
    for disk, path in restored.items():
        raw = tmp_path / "restored.raw"
        form = "raw" if disk == "disk3" else "qcow2"
        qemu_img("convert", "-f", form, "-O", "raw", path, raw)
        assert raw.read_bytes() == qemu.contents()[disk]


def test_as_proxmox_starts_it(ctl: RiggedCtl, tmp_path: Path, seed: int) -> None:
    rng, into = random.Random(seed), tmp_path / "set"
    with running(proxmox(tmp_path)) as process:
        process.scribble(rng)
        qemu = process.backup(ctl, into, "-i", "drive-scsi0", "--pause")
        assert qemu["point"]["uuid"] == UUID
        assert qemu["point"]["consistency"] == "paused"
        assert process.monitor.execute("query-status")["running"]
        # QEMU was given a relative name, and has left that directory
        (layer,) = open_set(into).known.newest.disk("scsi0").layers
        assert layer.path == os.fspath(tmp_path / "disk.qcow2")
        assert layer.inode == (tmp_path / "disk.qcow2").stat().st_ino
        assert read_disk(into, qemu["point"]["id"], "scsi0") == process.contents()["scsi0"]
        process.scribble(rng)
        point = process.backup(ctl, into)["point"]
        assert [each["mode"] for each in point["disks"]] == ["delta"]
        assert read_disk(into, point["id"], "scsi0") == process.contents()["scsi0"]
        said = ctl("backup", "--qmp", process.socket, "vm7", "-o", into, "-i", "sda", code=2).stderr
        assert "no disk sda, only: scsi0, ide2" in said


def test_a_writer_that_never_stops(
    qemu: Process, ctl: RiggedCtl, tmp_path: Path, seed: int
) -> None:
    """What is written while bitmaps change hands is in the next increment, if in none before."""
    into, stop = tmp_path / "set", threading.Event()

    def write() -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            qemu.scribble(rng, 1)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for level in ("full", "inc", "inc", "inc"):
            qemu.backup(ctl, into, "-l", level, "-x", "n3")
    finally:
        stop.set()
        thread.join()
    last = qemu.backup(ctl, into, "-x", "disk3")["point"]
    contents = qemu.contents()
    for disk in ("disk1", "disk2"):
        assert read_disk(into, last["id"], disk) == contents[disk]


ENDS = (
    "KILL@jobs-begun#1", "KILL+@jobs-begun#1", "KILL@connection-ready#1", "KILL@disk-copied#1",
    "KILL@requests-moved#2", "KILL@point-published#1",
)  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_a_killed_run(qemu: Process, ctl: RiggedCtl, tmp_path: Path, end: str) -> None:
    """Its guard ends what it left, without another run; the base stays what it was."""
    rng, into = random.Random(3), tmp_path / "set"
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
        ctl.start(
            "backup", "--qmp", qemu.socket, "vm7", "-o", tmp_path / "set", "-x", "disk3"
        ) as run,
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


def test_scratch_that_fills_up(qemu: Process, ctl: RiggedCtl, tmp_path: Path, small: Path) -> None:
    """The run ends before the guest sees anything of it."""
    into = tmp_path / "set"
    for disk in qemu.writers:
        qemu.io(disk, f"write -P 1 0 {8 * MIB}")
    ctl.scratch = small / "scratch"
    with (
        ctl.rigged("SLOW8@disk-copied#1"),
        ctl.start("backup", "--qmp", qemu.socket, "vm7", "-o", into, "--raw") as run,
    ):
        wait_until(lambda: qemu.has_exports, "export", 60)
        for number in range(32):
            for disk in qemu.writers:
                qemu.io(disk, f"write -P 2 {number * MIB // 4} {MIB // 4}")
        _, said = run.communicate(timeout=60)
    assert run.returncode == 30, said
    assert "is filling up" in said
    assert "no disk of the guest shows an error" in said
    assert qemu.leftovers() == []
    assert qemu.bitmaps() == set()


def test_another_ones_nbd_server(qemu: Process, ctl: RiggedCtl, tmp_path: Path) -> None:
    address = {"type": "unix", "data": {"path": os.fspath(tmp_path / "theirs")}}
    qemu.monitor.execute("nbd-server-start", {"addr": address})
    said = qemu.backup(ctl, tmp_path / "set", "-x", "disk3", code=75)
    assert "QEMU's NBD server serves another program" in said
    assert qemu.leftovers() == []
    assert qemu.bitmaps() == set()
    qemu.monitor.execute("nbd-server-stop")
    qemu.backup(ctl, tmp_path / "set", "-x", "disk3")
