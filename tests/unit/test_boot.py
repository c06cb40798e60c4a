"""What a boot is told by: its definition, its record, and the test that is kept in the set."""

import json
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from nbdbackupd.errors import (
    BusyError,
    DomainError,
    FormatError,
    NoSpaceError,
    RepositoryError,
    UnsupportedVersionError,
)
from nbdbackupd.model import bootxml
from nbdbackupd.model.bootxml import MappedDisk
from nbdbackupd.ops.boot import record as boot_record
from nbdbackupd.ops.boot.record import BootDisk, BootRecord, Phase, Places
from nbdbackupd.repo import boot_tests
from nbdbackupd.repo.boot_tests import BootTest

XML = """
<domain type='kvm'>
  <name>vm</name><memory unit='GiB'>4</memory><currentMemory unit='GiB'>2</currentMemory>
  <devices>
    <disk type='block' device='lun' sgio='unfiltered' snapshot='external'>
      <driver name='qemu' type='raw' cache='none' io='native'/>
      <source dev='/dev/old' index='3'/>
      <backingStore type='file'><source file='/old'/></backingStore>
      <target dev='sda' bus='scsi'/><shareable/><transient/><serial>S</serial>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='/other'/>
      <target dev='sdb' bus='scsi'/><readonly/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sdc' bus='sata'/></disk>
    {console}
  </devices>
</domain>
"""
DISKS = {
    "sda": MappedDisk(overlay='/o/it\'s <a> "disk"', socket="/s/a&b.sock"),
    "sdb": MappedDisk(overlay="/o/b", socket="/s/b.sock"),
}


def over_map(port: str = "", **options: object) -> ET.Element:
    """The definition on overlays, parsed."""
    text = bootxml.over_map(XML.format(console=port), DISKS, **options)  # type: ignore[arg-type]
    return ET.fromstring(text)


def disk(root: ET.Element, target: str) -> ET.Element:
    """The disk of that name."""
    found = root.find(f"./devices/disk/target[@dev='{target}']/..")
    assert found is not None
    return found


def test_disks_stand_on_the_map_alone() -> None:
    first = disk(over_map(), "sda")
    assert first.attrib == {"type": "file", "device": "disk"}
    assert [each.get("file") or each.get("dev") for each in first.iter("source")] == [
        DISKS["sda"].overlay,
        None,
    ]
    below = first.find("backingStore")
    assert below is not None
    assert [each.attrib for each in below.iter()] == [
        {"type": "network"},
        {"type": "raw"},
        {"protocol": "nbd"},
        {"transport": "unix", "socket": DISKS["sda"].socket},
        {},
    ]
    driver = first.find("driver")
    assert driver is not None
    assert driver.attrib == {
        "name": "qemu", "type": "qcow2", "discard": "unmap",
        "error_policy": "stop", "rerror_policy": "stop",
    }  # fmt: skip
    assert [each.tag for each in first] == [
        "driver", "source", "backingStore", "target", "serial",
    ]  # fmt: skip
    # libvirt takes no policy for writes to what can't be written to
    second = disk(over_map(), "sdb").find("driver")
    assert second is not None
    assert "error_policy" not in second.attrib


@pytest.mark.parametrize(
    "console",
    [
        "",
        "<serial type='pty'><log file='/theirs'/></serial><console type='pty'/>",
        "<console type='pty'><target type='serial'/></console>",
        "<console type='pty'><target type='virtio'/></console>",
    ],
)
def test_the_first_serial_port_is_logged(console: str) -> None:
    root = over_map(console, console="/w/console.log")
    (log,) = root.iter("log")
    assert log.attrib == {"file": "/w/console.log", "append": "off"}
    (port,) = [each for each in root.iter() if log in list(each)]
    target = port.find("target")
    assert target is None or target.get("type") == "serial"
    assert "log" not in {each.tag for each in over_map("").iter()}


def test_memory() -> None:
    root = over_map(memory=(1 << 20) + 1)
    for tag in ("memory", "currentMemory"):
        (found,) = root.iter(tag)
        assert (found.text, found.attrib) == ("1025", {"unit": "KiB"})
    assert over_map().findtext("memory") == "4"
    by_hand = XML.replace("<devices>", "<cpu><numa/></cpu><devices>", 1).format(console="")
    with pytest.raises(DomainError, match="laid out by hand"):
        bootxml.over_map(by_hand, DISKS, memory=1 << 20)


@pytest.mark.parametrize("text", ["", "<x", "<domainsnapshot/>"])
def test_no_domain(text: str) -> None:
    with pytest.raises(DomainError):
        bootxml.over_map(text, {})
    with pytest.raises(DomainError, match="has no disk sdz"):
        bootxml.over_map(XML, {"sdz": DISKS["sda"]})


def test_what_disks_stand_on() -> None:
    """As libvirt 9.0 tells it of a domain whose copies are ready, under way, and changed over."""
    below = "<backingStore type='network'><source protocol='nbd'/><backingStore/></backingStore>"
    text = f"""<domain><devices>
      <disk><source file='/o/a'/>{below}
        <mirror job='copy' ready='yes'><source file='/f/a'/></mirror><target dev='vda'/></disk>
      <disk><source file='/o/b'/>{below}
        <mirror job='copy'><source dev='/dev/b'/></mirror><target dev='vdb'/></disk>
      <disk><source file='/f/c'/><backingStore/><target dev='vdc'/></disk>
      <disk device='cdrom'><target dev='sda'/></disk>
    </devices></domain>"""
    found = [
        (each.target, each.path, each.is_mapped, each.mirror, each.is_ready)
        for each in bootxml.live_disks(text)
    ]
    assert found == [
        ("vda", "/o/a", True, "/f/a", True),
        ("vdb", "/o/b", True, "/dev/b", False),
        ("vdc", "/f/c", False, "", False),
    ]


RECORD = BootRecord(
    name="a / 'b'", uri="qemu:///system", source="/set", point="p", created="c", started="s",
    attended=True, phase=Phase.PIVOTING, held=True, files=("/f",),
    disks=(BootDisk(target="vda", size=7, overlay="/o", socket="/s", final="/f", format="raw"),),
)  # fmt: skip


class TestRecord:
    """It survives whatever ends the process that wrote it."""

    def places(self, directory: Path, name: str = RECORD.name) -> Places:
        return Places.of(name, directory / "run", directory / "scratch")

    def test_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        places = self.places(tmp_path)
        assert places.read() is None
        places.make()
        places.write(RECORD)
        assert places.read() == RECORD
        assert places.note.stat().st_mode & 0o777 == 0o600
        other = self.places(tmp_path, "a")
        other.make()
        other.write(replace(RECORD, name="a"))
        found = boot_record.all_of(tmp_path / "scratch", tmp_path / "run")
        assert [record.name for _, record in found] == ["a", RECORD.name]
        assert [each.work for each, _ in found] == [other.work, places.work]
        (places.work / "config/nvram").mkdir(parents=True)
        (places.work / "config/nvram/vars").touch()
        (places.work / "link").symlink_to(other.work)
        places.remove()
        assert not places.work.exists()
        assert not places.sockets.exists()
        assert other.read() is not None
        places.remove()

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("", FormatError),
            ("[]", FormatError),
            ("{}", FormatError),
            ('{"version": 1}', FormatError),
            ('{"version": 2}', UnsupportedVersionError),
            ("[" * 100000, FormatError),
        ],
    )
    def test_damaged(self, tmp_path: Path, text: str, kind: type[Exception]) -> None:
        places = self.places(tmp_path)
        places.make()
        places.note.write_text(text)
        with pytest.raises(kind):
            places.read()
        # it hides no other one
        assert boot_record.all_of(tmp_path / "scratch", tmp_path / "run") == []

    @pytest.mark.parametrize("key", json.loads(RECORD.pack()))
    def test_each_member_counts(self, tmp_path: Path, key: str) -> None:
        document = json.loads(RECORD.pack())
        document[f"{key}x"] = document.pop(key)
        with pytest.raises(FormatError):
            BootRecord.parse(json.dumps(document).encode(), tmp_path)

    def test_one_attends(self, tmp_path: Path) -> None:
        places = self.places(tmp_path)
        assert places.attendant() == ""
        with places.attended():
            assert str(os.getpid()) in places.attendant()
            with pytest.raises(BusyError, match="is attended to by process"), places.attended():
                pytest.fail("two attend")
        assert places.attendant() == ""

    def test_long_names_have_short_paths(self, tmp_path: Path) -> None:
        first, second = (self.places(tmp_path, "ä" * 200 + end) for end in "ab")
        assert len(first.sockets.name) <= boot_record.MAX_NAME
        assert first.sockets != second.sockets


TEST = BootTest(
    point="p1", tested="2026-01-31T23:59:59Z", passed=True, waited_for="agent", seconds=1.5,
    picture="p1.png",
)  # fmt: skip


class TestResult:
    """A boot test is read back; what is no test takes nothing from the set."""

    def test_the_newest_counts(self, tmp_path: Path) -> None:
        path = boot_tests.write(tmp_path, TEST, b"PNG")
        assert boot_tests.read(tmp_path) == {"p1": TEST}
        assert (path.parent / "p1.png").read_bytes() == b"PNG"
        failed = replace(TEST, passed=False, reason="no sign", picture="p1.ppm")
        boot_tests.write(tmp_path, failed, b"P6")
        assert boot_tests.read(tmp_path) == {"p1": failed}
        assert sorted(each.name for each in path.parent.iterdir()) == ["p1.json", "p1.ppm"]
        bare = replace(TEST, picture="")
        boot_tests.write(tmp_path, bare, b"")
        assert [each.name for each in path.parent.iterdir()] == ["p1.json"]
        assert {each.stat().st_mode & 0o777 for each in path.parent.iterdir()} == {0o600}

    @pytest.mark.parametrize(
        "change",
        [
            {"passed": 1},
            {"seconds": "1"},
            {"seconds": float("inf")},
            {"version": 2},
            {"reason": None},
            {"more": ""},
        ],
    )
    def test_wrong_types(self, tmp_path: Path, change: dict[str, object]) -> None:
        path = boot_tests.write(tmp_path, TEST, b"")
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert boot_tests.read(tmp_path) == {}

    def test_files_of_others(self, tmp_path: Path) -> None:
        folder = boot_tests.write(tmp_path, TEST, b"").parent
        (folder / "a.json").write_bytes(b"\xff")
        (folder / "b.json").mkdir()
        (folder / "c.json").symlink_to("/etc/passwd")
        os.mkfifo(folder / "d.json")
        assert list(boot_tests.read(tmp_path)) == ["p1"]
        assert boot_tests.read(tmp_path / "absent") == {}

    def test_not_written(self, tmp_path: Path) -> None:
        (tmp_path / "boot-tests").touch()
        with pytest.raises(RepositoryError):
            boot_tests.write(tmp_path, TEST, b"")
        (tmp_path / "boot-tests").unlink()
        (tmp_path / "boot-tests").symlink_to("/dev/full")
        with pytest.raises((RepositoryError, NoSpaceError)):
            boot_tests.write(tmp_path, TEST, b"")
