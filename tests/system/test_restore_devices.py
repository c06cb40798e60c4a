"""Restores onto block devices: every byte of what they held before is gone, or it is told."""

import json
import os
import pty
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from nbdbackupd.errors import BusyError, IntegrityError, NoSpaceError, RepositoryError, UsageError
from nbdbackupd.model.choice import Choice
from nbdbackupd.ops.restore import restore
from nbdbackupd.ops.restore.request import OutputPlace
from nbdbackupd.ops.restore.restore import RestoreReport, RestoreRequest
from tests.lib import sets
from tests.lib.ctl import Ctl
from tests.lib.loops import content, loop
from tests.lib.sets import Change, SetBuilder

pytestmark = pytest.mark.system

KIB = 1 << 10
MIB = 1 << 20
SIZE = 8 * MIB
USAGE = 2


def run(request: RestoreRequest) -> RestoreReport:
    return restore.run(request, progress=lambda *_: None, cancelled=lambda: None)


def built(path: Path, size: int = SIZE, level: int | None = None) -> SetBuilder:
    """A full and an increment, with data and zeroes at odd places, also at the very beginning."""
    rng = random.Random(11)
    made = SetBuilder(path, level=level)
    made.disks = {"vda": sets.random_disk(rng, size), "vdb": sets.random_disk(rng, MIB)}
    made.disks["vda"][:4096] = rng.randbytes(4096)
    made.full()
    changes = sets.random_changes(rng, size, 60)
    made.inc({"vda": changes, "vdb": [Change(512, 700 * KIB)]})
    return made


def to(made: SetBuilder, device: Path, **how: object) -> RestoreRequest:
    return RestoreRequest(source=made.path, places=(OutputPlace("vda", device),), **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("sector", [512, 4096])
def test_every_byte_is_written(tmp_path: Path, sector: int) -> None:
    made = built(tmp_path / "set")
    for point, images in zip(made.points, made.images, strict=True):
        with loop(tmp_path / "device", SIZE, sector=sector) as device:
            report = run(to(made, device, choice=Choice(point=point.id), workers=3))
            assert content(device, SIZE) == images["vda"]
        assert report.disks[0].path == device
        assert report.disks[0].format == "raw"
        assert report.config is None


def test_a_larger_device_has_nothing_old_behind_the_disk(tmp_path: Path) -> None:
    made = built(tmp_path / "set", size=3 * MIB + 512)
    size = 80 * MIB + 4096
    with loop(tmp_path / "device", size) as device:
        run(to(made, device))
        found = content(device, size)
    assert found[: 3 * MIB + 512] == made.images[-1]["vda"]
    assert not any(found[3 * MIB + 512 :])


def test_a_disk_smaller_than_what_comes_last(tmp_path: Path) -> None:
    made = built(tmp_path / "set", size=16 * KIB)
    with loop(tmp_path / "device", 64 * KIB) as device:
        run(to(made, device))
        found = content(device, 64 * KIB)
    assert found[: 16 * KIB] == made.images[-1]["vda"]
    assert not any(found[16 * KIB :])


@pytest.mark.parametrize("size", [SIZE, 5 * MIB + 512])
def test_qcow2_on_a_device(tmp_path: Path, size: int) -> None:
    """Old bytes show nowhere, not even beside data that fills a part of a cluster."""
    made = built(tmp_path / "set", size=size)
    with loop(tmp_path / "device", 12 * MIB) as device:
        report = run(to(made, device, format="qcow2"))
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", device], check=True)
        out = tmp_path / "raw"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", device, out], check=True)
        assert out.read_bytes() == made.images[-1]["vda"]
        assert report.disks[0].format == "qcow2"
    # a device smaller than the disk will do for what it holds
    little = SetBuilder(tmp_path / "little")
    little.disks = {"vda": bytearray(64 * MIB)}
    little.disks["vda"][40 * MIB : 41 * MIB] = random.Random(8).randbytes(MIB)
    little.full()
    with loop(tmp_path / "device", 8 * MIB) as device:
        run(to(little, device, format="qcow2"))
        assert sets.read_image(shutil.copyfile(device, out), "qcow2") == little.images[0]["vda"]
    # its tables need room, too; that is found when it gets full, and told
    dense = SetBuilder(tmp_path / "dense")
    dense.disks = {"vda": bytearray(random.Random(2).randbytes(SIZE))}
    dense.full()
    with loop(tmp_path / "device", SIZE) as device:
        with pytest.raises(NoSpaceError, match="incomplete now"):
            run(to(dense, device, format="qcow2"))
        assert_incomplete(device)


def assert_incomplete(device: Path) -> None:
    """Nobody takes the device for a disk, and a look at it says why."""
    head = content(device, 4096)
    assert head.startswith(b"nbdbackup: this disk is incomplete. Disk vda of domain vm1, restore ")
    found = subprocess.run(
        ["blkid", "--probe", device], check=False, capture_output=True, text=True
    )
    assert found.stdout == ""


def test_damage_half_way(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    stream = made.path / made.points[0].disk("vda").file
    data = bytearray(stream.read_bytes())
    data[len(data) // 2] ^= 1
    stream.write_bytes(data)
    with loop(tmp_path / "device", SIZE) as device:
        with pytest.raises(IntegrityError, match=f"{device} is incomplete now"):
            run(to(made, device, choice=Choice(point="point1")))
        assert_incomplete(device)


def test_what_fails_beforehand_leaves_the_device_alone(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    old = b"\xa5" * SIZE
    with loop(tmp_path / "device", SIZE - 4096) as device:
        with pytest.raises(NoSpaceError, match="larger device"):
            run(to(made, device))
        assert content(device, SIZE - 4096) == old[: SIZE - 4096]
    with loop(tmp_path / "device", SIZE) as device:
        stream = made.path / made.points[0].disk("vda").file
        stream.rename(tmp_path / "away")
        with pytest.raises(IntegrityError, match="missing"):
            run(to(made, device))
        (tmp_path / "away").rename(stream)
        # another disk has no room: it is written first
        places = (OutputPlace("vda", device), OutputPlace("vdb", Path("/dev/full/x")))
        with pytest.raises(UsageError, match="no directory"):
            run(RestoreRequest(source=made.path, places=places))
        image = tmp_path / "b.qcow2"
        image.write_text("mine")
        with pytest.raises(RepositoryError, match="exists"):
            run(RestoreRequest(source=made.path, places=(places[0], OutputPlace("vdb", image))))
        assert content(device, SIZE) == old


def test_a_device_in_use(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    with loop(tmp_path / "device", SIZE) as device:
        subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
        before = content(device, SIZE)
        mounted = tmp_path / "mounted"
        mounted.mkdir()
        subprocess.run(["mount", "-o", "ro,noload", device, mounted], check=True)
        try:
            with pytest.raises(BusyError, match="in use"):
                run(to(made, device))
        finally:
            subprocess.run(["umount", mounted], check=True)
        assert content(device, SIZE) == before
        writer = ["qemu-io", "-f", "raw", "-c", "sleep 60000", str(device)]
        with subprocess.Popen(writer) as process:
            try:
                wait_for_open(process.pid, device)
                with pytest.raises(BusyError, match="another program"):
                    run(to(made, device))
            finally:
                process.kill()
        assert content(device, SIZE) == before
        run(to(made, device))
        assert content(device, SIZE) == made.images[-1]["vda"]


def wait_for_open(pid: int, path: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        fds = Path(f"/proc/{pid}/fd")
        if any(os.path.realpath(fd) == os.fspath(path) for fd in fds.iterdir()):
            time.sleep(0.2)  # it locks what it has opened
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} was not opened")


@pytest.fixture
def ctl(tmp_path: Path) -> Ctl:
    return Ctl("test:///default", tmp_path / "ctl")


def test_the_command_asks_before_it_overwrites(tmp_path: Path, ctl: Ctl) -> None:
    made = built(tmp_path / "set")
    with loop(tmp_path / "device", SIZE) as device:
        place = f"vda={device}"
        refused = ctl("restore", made.path, "-d", place, code=USAGE)
        assert "--yes" in refused.stderr
        assert str(device) in refused.stderr
        for answer, code in (("no", USAGE), ("yes", 0)):
            assert content(device, 4096) == b"\xa5" * 4096
            assert answered(ctl, answer, made.path, place) == code
        assert content(device, SIZE) == made.images[-1]["vda"]
        # to a script; with an image of another disk at a path of its own
        image = tmp_path / "b, c=d.raw"
        report = ctl(
            "restore", made.path, "-d", place, "-d", f"vdb={image}", "--format", "raw",
            "--point", "point1", "--yes", "--json", "--bandwidth-limit", "100M", "-j", "4",
        ).json  # fmt: skip
        assert content(device, SIZE) == made.images[0]["vda"]
        assert image.read_bytes() == made.images[0]["vdb"]
        assert [disk["path"] for disk in report["disks"]] == [str(device), str(image)]
    ctl("restore", made.path, "-d", "vda", code=USAGE)
    assert "two disks" in ctl(
        "restore", made.path, "-d", f"vda={image}", "-d", f"vdb={image}", "--force", code=USAGE
    ).stderr  # fmt: skip


def answered(ctl: Ctl, answer: str, source: Path, place: str) -> int:
    """The exit status of a restore at a terminal, where somebody answers."""
    ours, theirs = pty.openpty()
    try:
        argv = ctl.argv("restore", source, "-d", place)
        with subprocess.Popen(argv, stdin=theirs, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            os.write(ours, f"{answer}\n".encode())
            text = process.stderr.read()
            assert "overwritten" in text
            return process.wait(timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_killed_restore_leaves_no_disk(tmp_path: Path, ctl: Ctl) -> None:
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(random.Random(1).randbytes(SIZE))}
    made.full()
    with loop(tmp_path / "device", SIZE) as device:
        with ctl.start(
            "restore", made.path, "-d", f"vda={device}", "--yes", "--bandwidth-limit", "1M"
        ) as process:
            deadline = time.monotonic() + 30
            while content(device, 9) != b"nbdbackup":
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.kill()
            process.wait()
        assert_incomplete(device)
        with ctl.start(
            "restore",
            made.path,
            "-d",
            f"vda={device}",
            "--yes",
            "--bandwidth-limit",
            "1M",
            "--json",
        ) as process:
            time.sleep(2)
            process.terminate()
            out, text = process.communicate(timeout=30)
        assert process.returncode == 128 + 15, out
        assert f"{device} is incomplete now" in text
        ctl("restore", made.path, "-d", f"vda={device}", "--yes")
        assert content(device, SIZE) == made.images[0]["vda"]


def test_the_rate_is_kept(tmp_path: Path) -> None:
    """Of all disks together: 6 MiB at 3 MiB/s take about 2 s, however many are written at once."""
    rng = random.Random(3)
    made = SetBuilder(tmp_path / "set")
    made.disks = {f"vd{letter}": bytearray(rng.randbytes(2 * MIB)) for letter in "abc"}
    made.full()
    seen: dict[str, list[int]] = {}
    request = RestoreRequest(
        source=made.path, output=tmp_path / "out", jobs=3, workers=2, bandwidth=3 * MIB
    )
    begun = time.monotonic()
    report = restore.run(
        request,
        progress=lambda disk, done, _: seen.setdefault(disk, []).append(done),
        cancelled=lambda: None,
    )
    # less what may be taken at once: a quarter of a second and a block for each thread
    assert time.monotonic() - begun > 1.4
    assert [disk.target for disk in report.disks] == ["vda", "vdb", "vdc"]
    assert all(values[0] == 0 and values[-1] == 2 * MIB for values in seen.values())
    for disk in report.disks:
        assert sets.read_image(disk.path, "qcow2") == made.images[0][disk.target]
    document = json.loads(json.dumps(report.to_json()))
    assert document["data_bytes"] == 6 * MIB


def test_the_first_error_of_several_disks_ends_all(tmp_path: Path) -> None:
    rng = random.Random(3)
    made = SetBuilder(tmp_path / "set")
    made.disks = {f"vd{letter}": bytearray(rng.randbytes(4 * MIB)) for letter in "abc"}
    made.full()
    stream = made.path / made.points[0].disk("vdb").file
    data = bytearray(stream.read_bytes())
    data[200 * KIB] ^= 1
    stream.write_bytes(data)
    out = tmp_path / "out"
    request = RestoreRequest(source=made.path, output=out, jobs=3, bandwidth=2 * MIB)
    begun = time.monotonic()
    with pytest.raises(IntegrityError) as found:
        run(request)
    assert found.value.fields["disk"] == "vdb"
    assert time.monotonic() - begun < 5
    assert {path.suffix for path in out.iterdir()} == {".incomplete"}
