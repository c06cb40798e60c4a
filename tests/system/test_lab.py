"""The lab itself: if these fail, no other system test means anything."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.base import UNPRIVILEGED_USER
from tests.lab.command import LabError, run
from tests.lab.compare import first_difference
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.embed import EmbeddedLab
from tests.lab.guest import GuestOptions
from tests.lab.process import command_line

pytestmark = pytest.mark.system

CHECKPOINT = """<domaincheckpoint><name>{name}</name>
<disks><disk name='vda' checkpoint='bitmap'/></disks></domaincheckpoint>"""
PULL = """<domainbackup mode='pull'>{incremental}
<server transport='unix' socket='{directory}/b.sock'/>
<disks><disk name='vda' backup='yes' type='file'>
<scratch file='{directory}/scratch'/></disk></disks>
</domainbackup>"""


def begin_pull_job(lab: EmbeddedLab, domain: str, checkpoint: str, since: str | None) -> str:
    """Begin a pull-mode backup by virsh and return the NBD URI of vda."""
    incremental = f"<incremental>{since}</incremental>" if since else ""
    backup, point = lab.directory / "backup.xml", lab.directory / "checkpoint.xml"
    backup.write_text(PULL.format(incremental=incremental, directory=lab.directory))
    point.write_text(CHECKPOINT.format(name=checkpoint))
    lab.virsh("backup-begin", domain, backup, point)
    return f"nbd+unix:///vda?socket={lab.directory}/b.sock"


@pytest.mark.parametrize("iothreads", [0, 2])
def test_guest_writes_are_in_the_reference(tmp_path: Path, iothreads: int) -> None:
    with EmbeddedLab() as lab:
        disks = [DiskSpec(size=16 * MIB), DiskSpec(target="vdb", format="raw")]
        guest = lab.guest(disks=disks, options=GuestOptions(iothreads=iothreads))
        guest.start()
        guest.write("vda", 0, 2 * MIB, 0xAA)
        guest.write_zeroes("vda", 65536, 65536, unmap=True)
        guest.write_zeroes("vda", 4096, 4096, unmap=False)
        guest.discard("vda", MIB, 65536)
        guest.write("vdb", 512, 512, 0xBB)
        source = tmp_path / "source"
        source.write_bytes(random.Random(1).randbytes(8192))
        guest.write_file("vda", 8 * MIB, source)
        assert guest.is_running()
        expected = bytearray(16 * MIB)
        expected[: 2 * MIB] = b"\xaa" * (2 * MIB)
        for offset, length in ((65536, 65536), (4096, 4096), (MIB, 65536)):
            expected[offset : offset + length] = bytes(length)
        expected[8 * MIB : 8 * MIB + 8192] = source.read_bytes()
        assert guest.reference("vda", tmp_path / "vda.raw").read_bytes() == expected
        vdb = guest.reference("vdb", tmp_path / "vdb.raw").read_bytes()
        assert (vdb[:512], vdb[512:1024]) == (bytes(512), b"\xbb" * 512)
        assert not guest.is_paused()


@pytest.mark.parametrize("iothreads", [0, 1])
def test_failed_guest_write_is_an_error(iothreads: int) -> None:
    with EmbeddedLab() as lab:
        guest = lab.guest(disks=[DiskSpec(size=MIB)], options=GuestOptions(iothreads=iothreads))
        guest.start()
        with pytest.raises(LabError, match="failed"):
            guest.write("vda", 8 * MIB, 512, 1)


def test_bitmaps_see_what_a_guest_with_iothreads_writes() -> None:
    with EmbeddedLab() as lab:
        guest = lab.guest(options=GuestOptions(iothreads=1))
        guest.start()
        guest.write("vda", 0, 4 * MIB, 1)
        place = lab.directory / "checkpoint.xml"
        place.write_text(CHECKPOINT.format(name="cp1"))
        lab.virsh("checkpoint-create", guest.name, place)

        def dirty() -> int:
            count: int = guest.bitmaps("vda")["cp1"]["count"]
            return count

        assert dirty() == 0
        changes: list[Callable[[int], None]] = [
            lambda at: guest.write("vda", at, 65536, 2),
            lambda at: guest.write_zeroes("vda", at, 65536, unmap=False),
            lambda at: guest.write_zeroes("vda", at, 65536, unmap=True),
            lambda at: guest.discard("vda", at, 65536),
        ]
        for number, change in enumerate(changes):
            change(number * MIB)
            assert dirty() == (number + 1) * 65536
        guest.pause()
        guest.write("vda", 5 * MIB, 65536, 2)
        guest.resume()
        guest.write("vda", 6 * MIB, 65536, 2)
        assert dirty() == 6 * 65536


def test_leaves_nothing_behind_after_an_error() -> None:
    seen: list[tuple[EmbeddedLab, int]] = []

    def fail() -> None:
        with EmbeddedLab() as lab:
            guest = lab.guest()
            guest.start()
            seen.append((lab, guest.process().pid))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    lab, pid = seen[0]
    assert command_line(pid) == []
    assert not lab.directory.exists()


def test_pull_backup_by_separate_clients(tmp_path: Path) -> None:
    with EmbeddedLab() as lab:
        guest = lab.guest()
        guest.start()
        guest.write("vda", 0, MIB, 0x11)
        reference = guest.reference("vda", tmp_path / "reference.raw")
        uri = begin_pull_job(lab, guest.name, "cp1", since=None)
        # the client that began the job is gone; the guest writes on
        guest.write("vda", 0, MIB, 0x22)
        run(["nbdcopy", uri, tmp_path / "full.raw"])
        assert "Backup" in lab.virsh("domjobinfo", guest.name)
        guest.abort_job()
        assert first_difference(tmp_path / "full.raw", reference) is None
        assert guest.bitmaps("vda")["cp1"]["recording"]
        uri = begin_pull_job(lab, guest.name, "cp2", since="cp1")
        dirty = run(["nbdinfo", "--map=qemu:dirty-bitmap:backup-vda", uri])
        guest.abort_job()
        assert dirty.splitlines()[0].split()[:3] == ["0", str(MIB), "1"]


@pytest.mark.parametrize("iothreads", [0, 1])
@pytest.mark.parametrize("how", ["stop", "destroy", "kill9"])
def test_life_of_a_guest(how: str, iothreads: int) -> None:
    with EmbeddedLab() as lab:
        guest = lab.guest(options=GuestOptions(iothreads=iothreads))
        guest.start()
        guest.pause()
        assert guest.is_paused()
        guest.resume()
        {"stop": guest.stop, "destroy": guest.destroy, "kill9": guest.kill9}[how]()
        assert not guest.is_running()
        guest.wait_shut_off()
        guest.start()
        guest.write("vda", 0, 512, 1)
        assert guest.is_running()


@pytest.mark.parametrize("iothreads", [0, 2])
def test_kinds_of_disks(tmp_path: Path, iothreads: int) -> None:
    base = tmp_path / "base.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", base, "8M"])
    iso = tmp_path / "cd.iso"
    iso.write_bytes(bytes(MIB))
    disks = [
        DiskSpec(target="vda", size=8 * MIB, backing=base, serial="S1"),
        DiskSpec(target="vdb", size=8 * MIB, compat="0.10", cluster_size=4096),
        DiskSpec(target="sda", size=8 * MIB, bus="sata"),
        DiskSpec(target="hda", device="cdrom", format="raw", path=iso),
        DiskSpec(target="hdb", device="cdrom", format="raw"),
        DiskSpec(target="fda", device="floppy", format="raw"),
    ]
    with EmbeddedLab() as lab:
        options = GuestOptions(iothreads=iothreads)
        guest = lab.guest("a b'c\"&<", disks, options)
        guest.start()
        for target in ("vda", "vdb", "sda"):
            guest.write(target, 0, 4096, 7)
            assert guest.disk_size(target) == 8 * MIB
        guest.attach(DiskSpec(target="vdc", size=MIB))
        guest.write("vdc", 0, 512, 1)
        guest.random_ops(random.Random(2), 40)


def test_first_difference(tmp_path: Path) -> None:
    left, right = tmp_path / "left.raw", tmp_path / "right.raw"
    left.write_bytes(bytes(9 * MIB))
    right.write_bytes(bytes(9 * MIB))
    assert first_difference(left, right) is None
    with right.open("r+b") as file:
        file.seek(8 * MIB + 77)
        file.write(b"x")
    assert first_difference(left, right) == 8 * MIB + 77
    right.write_bytes(bytes(5 * MIB))
    assert first_difference(left, right) == 5 * MIB
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", left, tmp_path / "left.qcow2"])
    assert first_difference(left, tmp_path / "left.qcow2") is None


def test_private_daemon_restarts_under_a_running_guest() -> None:
    with DaemonLab() as lab:
        guest = lab.guest()
        guest.start()
        pid = guest.process().pid
        assert Path(f"/proc/{pid}").owner() == UNPRIVILEGED_USER
        lab.restart()
        assert lab.virsh("domstate", guest.name).strip() == "running"
        lab.kill9()
        guest.write("vda", 0, 512, 1)
        lab.start()
        assert guest.process().pid == pid
        assert lab.virsh("domstate", guest.name).strip() == "running"
        guest.stop()
    assert not lab.directory.exists()
