"""Which block devices only this host can reach, on made-up hosts (H-7)."""

import os
import stat
from pathlib import Path

import pytest

from nbdbackupd.source import reach

PCI = "devices/pci0000:00/0000:00:1f.2"


class Sysfs:
    """A tree as /sys; each device is named by its path below it."""

    def __init__(self, top: Path) -> None:
        self.top = top
        (top / "dev/block").mkdir(parents=True)

    def add(self, path: str, number: str, **files: str) -> Path:
        real = self.top / path
        real.mkdir(parents=True)
        for name, text in files.items():
            file = real / name.replace("__", "/")
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{text}\n")
        (self.top / "dev/block" / number).symlink_to(real)
        return real

    def put_on(self, above: Path, *below: Path) -> None:
        (above / "slaves").mkdir(exist_ok=True)
        for each in below:
            (above / "slaves" / each.name).symlink_to(each)


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    monkeypatch.setattr(reach, "SYS", tmp_path)
    real_stat = os.stat

    def device(path: object, **options: object) -> object:
        if isinstance(path, str) and path.startswith("/dev/n"):
            major, minor = (int(word) for word in path.removeprefix("/dev/n").split(":"))
            mode = stat.S_IFBLK
            return type("S", (), {"st_mode": mode, "st_rdev": os.makedev(major, minor)})()
        return real_stat(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", device)
    return Sysfs(tmp_path)


OWN = {
    "ata": f"{PCI}/ata3/host2/target2:0:0/2:0:0:0/block/sda",
    "usb": f"{PCI}/usb2/2-1/2-1:1.0/host6/target6:0:0/6:0:0:0/block/sda",
    "controller": f"{PCI}/host0/target0:2:0/0:2:0:0/block/sda",
    "card": "devices/platform/soc/mmc_host/mmc0/mmc0:0001/block/mmcblk0",
    "zvol": "devices/virtual/block/zd16",
}
OTHERS = {
    "fibre channel": f"{PCI}/host1/rport-1:0-0/target1:0:0/1:0:0:0/block/sdb",
    "iscsi": "devices/platform/host6/session1/target6:0:0/6:0:0:0/block/sdb",
    "offloaded iscsi": f"{PCI}/host6/session1/target6:0:0/6:0:0:0/block/sdb",
    "sas": f"{PCI}/host0/port-0:0/end_device-0:0/target0:0:0/0:0:0:0/block/sdb",
    "virtio": f"{PCI}/virtio1/block/vda",
    "rbd": "devices/rbd/0/block/rbd0",
    "drbd": "devices/virtual/block/drbd0",
    "nbd": "devices/virtual/block/nbd0",
    "unknown": "devices/virtual/block/new0",
}


@pytest.mark.parametrize("kind", OWN)
def test_disks_of_this_host(sysfs: Sysfs, kind: str) -> None:
    sysfs.add(OWN[kind], "8:0")
    assert reach.is_own("/dev/n8:0")


@pytest.mark.parametrize("kind", OTHERS)
def test_disks_that_others_may_reach(sysfs: Sysfs, kind: str) -> None:
    sysfs.add(OTHERS[kind], "8:0")
    assert not reach.is_own("/dev/n8:0")


@pytest.mark.parametrize("transport", ["pcie", "tcp", "fc", "rdma", ""])
def test_nvme(sysfs: Sysfs, transport: str) -> None:
    controller = sysfs.top / f"{PCI}/nvme/nvme0"
    controller.mkdir(parents=True)
    (controller / "transport").write_text(f"{transport}\n")
    sysfs.add(f"{PCI}/nvme/nvme0/nvme0n1", "259:0")
    assert reach.is_own("/dev/n259:0") == (transport == "pcie")


@pytest.mark.parametrize(("second", "own"), [("pcie", True), ("tcp", False)])
def test_nvme_with_multipath(sysfs: Sysfs, second: str, own: bool) -> None:
    real = sysfs.add("devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "259:0")
    for name, transport in (("nvme0", "pcie"), ("nvme1", second)):
        controller = sysfs.top / name
        controller.mkdir()
        (controller / "transport").write_text(f"{transport}\n")
        (real.parent / name).symlink_to(controller)
    assert reach.is_own("/dev/n259:0") == own


def test_volumes_are_what_they_lie_on(sysfs: Sysfs) -> None:
    """LVM over MD over partitions; one leg on a SAN is enough."""
    disk = sysfs.add(OWN["ata"], "8:0")
    part = sysfs.add(f"{OWN['ata']}/sda1", "8:1", partition="1")
    (part / "slaves").mkdir()
    array = sysfs.add("devices/virtual/block/md0", "9:0")
    sysfs.put_on(array, part)
    volume = sysfs.add("devices/virtual/block/dm-0", "253:0", dm__uuid="LVM-abc")
    sysfs.put_on(volume, array)
    assert all(reach.is_own(f"/dev/n{number}") for number in ("8:0", "8:1", "9:0", "253:0"))
    san = sysfs.add(OTHERS["fibre channel"], "8:16")
    sysfs.put_on(array, san)
    assert not reach.is_own("/dev/n253:0")
    assert reach.is_own("/dev/n8:0")
    mirror = sysfs.add("devices/virtual/block/dm-1", "253:1", dm__uuid="mpath-3600")
    sysfs.put_on(mirror, disk)
    assert not reach.is_own("/dev/n253:1")


def test_a_circle_of_volumes_ends(sysfs: Sysfs) -> None:
    one = sysfs.add("devices/virtual/block/dm-0", "253:0")
    sysfs.put_on(one, one)
    assert not reach.is_own("/dev/n253:0")


@pytest.mark.parametrize(
    ("kind", "own"),
    [("ext4", True), ("btrfs", True), ("nfs4", False), ("fuse.sshfs", False), ("ocfs2", False)],
)
def test_loop_devices_and_files(
    sysfs: Sysfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, own: bool
) -> None:
    mounts = tmp_path / "mounts"
    monkeypatch.setattr(reach, "MOUNTS", mounts)
    place = tmp_path / "a place"
    place.mkdir()
    image = place / "image.raw"
    image.write_text("")
    escaped = str(place).replace(" ", "\\040")
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"23 22 0:50 / {escaped} rw,relatime shared:5 - {kind} server:/x rw\n"
        f"24 22 0:51 / {escaped}er rw - nfs4 server:/y rw\n"
    )
    sysfs.add("devices/virtual/block/loop0", "7:0", loop__backing_file=str(image))
    assert reach.is_own("/dev/n7:0") == own
    assert reach.is_own(str(image)) == own
    image.unlink()
    assert not reach.is_own("/dev/n7:0")


def test_what_is_not_there() -> None:
    assert not reach.is_own("/dev/no such")
    assert not reach.is_own("nbd://host/x")
