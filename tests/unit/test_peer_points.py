"""How the points of a peer's set are found and linked; the files are small ones of our own making.

``tests/system/test_peer_sets.py`` has real ones.
"""

import json
import os
import zlib
from pathlib import Path
from unittest.mock import Mock

import pytest

from nbdbackupd.errors import ChainBrokenError
from nbdbackupd.format import stream
from nbdbackupd.model.chain import DiskMode, Layout
from nbdbackupd.model.choice import Choice
from nbdbackupd.ops.sets import opened
from nbdbackupd.ops.sets.opened import OpenedSet

CP = "virtnbdbackup."
XML = """<domain><name>vm1</name><uuid>5a1f0a3e-9d0f-4a8e-8a5e-0f2a3f9b1c77</uuid>
<os><nvram>/var/lib/vm1.fd</nvram></os><devices>
<disk device='disk'><driver type='qcow2'/><source file='/i/a b.qcow2'/><target dev='sda'/></disk>
<disk device='disk'><driver type='raw'/><source file='/i/b.raw'/><target dev='sdb'/></disk>
</devices></domain>"""


def write(
    folder: Path,
    name: str,
    checkpoint: str,
    parent: str = "",
    *,
    disk: str = "sda",
    changes: bool | None = None,
    date: str = "2026-01-02T03:04:05.678901",
) -> None:
    """A stream of one block."""
    meta = {
        "virtualSize": 8192, "dataSize": 512, "date": date, "diskName": disk,
        "diskFormat": "qcow2", "checkpointName": checkpoint, "compressed": False,
        "compressionMethod": "lz4", "parentCheckpoint": parent,
        "incremental": bool(parent) if changes is None else changes, "streamVersion": 2,
    }  # fmt: skip
    payload = json.dumps(meta).encode()
    (folder / name).write_bytes(
        stream.pack_header(stream.META, 0, len(payload)) + payload + b"\r\n"
        + stream.pack_header(stream.DATA, 0, 512) + bytes(512) + b"\r\n"
        + stream.pack_header(stream.STOP, 0, 0)
    )  # fmt: skip


def chain(folder: Path, count: int) -> None:
    """A full and ``count`` increments, made in the wrong order as far as times can tell."""
    write(folder, "sda.full.data", f"{CP}0", date="2026-05-05T00:00:00")
    for number in range(1, count + 1):
        write(folder, f"sda.inc.{CP}{number}.data", f"{CP}{number}", f"{CP}{number - 1}",
              date=f"2026-01-{20 - number:02}T00:00:00")  # fmt: skip
        os.utime(folder / f"sda.inc.{CP}{number}.data", (10**9 - number, 10**9 - number))


def ids(found: OpenedSet) -> list[str]:
    return [point.id for point in found.known.points]


def test_order_comes_from_the_links(tmp_path: Path) -> None:
    chain(tmp_path, 12)
    write(tmp_path, "sda.diff.99.data", f"{CP}13", f"{CP}12")
    write(tmp_path, "sda.diff.100.data", f"{CP}4", f"{CP}3")
    write(tmp_path, "sda.copy.data", f"{CP}0")
    found = opened.open_set(tmp_path)
    made = [each for each in ids(found) if each.startswith("inc")]
    assert made == [f"inc.{CP}{number}" for number in range(1, 13)]
    points = {point.id: point for point in found.known.points}
    assert points["diff.99"].parent == f"inc.{CP}12"
    assert points["diff.100"].parent == f"inc.{CP}3"
    assert points["copy"].parent == ""
    assert points["copy"].checkpoint == points["diff.99"].checkpoint == ""
    assert found.written_by == "virtnbdbackup"


@pytest.mark.parametrize("missing", [f"sda.inc.{CP}2.data", "sda.full.data"])
def test_what_lacks_its_parent_is_named(tmp_path: Path, missing: str) -> None:
    chain(tmp_path, 4)
    (tmp_path / missing).unlink()
    with pytest.raises(ChainBrokenError, match=f"checkpoint {CP}"):
        opened.open_set(tmp_path)
    found = opened.open_set(tmp_path, sound=True)
    assert ids(found) == (["full", f"inc.{CP}1"] if "inc" in missing else [])
    assert any("is missing or damaged" in problem for problem in found.problems)
    assert len(found.problems) == (2 if "inc" in missing else 4)


def test_an_offline_increment_ends_a_line(tmp_path: Path) -> None:
    chain(tmp_path, 0)
    write(tmp_path, f"sda.inc.{CP}0.data", f"{CP}0", f"{CP}0")
    write(tmp_path, f"sda.inc.{CP}1.data", f"{CP}1", f"{CP}0")
    found = opened.open_set(tmp_path)
    parents = {point.id: (point.parent, point.checkpoint) for point in found.known.points}
    assert parents == {
        "full": ("", f"{CP}0"), f"inc.{CP}0": ("full", ""), f"inc.{CP}1": ("full", f"{CP}1"),
    }  # fmt: skip
    # now the one that made checkpoint 1 is replaced
    write(tmp_path, f"sda.inc.{CP}1.data", f"{CP}1", f"{CP}1")
    write(tmp_path, f"sda.inc.{CP}2.data", f"{CP}2", f"{CP}1")
    found = opened.open_set(tmp_path, sound=True)
    assert ids(found) == ["full", f"inc.{CP}0"]
    assert all("was replaced by one of the same name" in each for each in found.problems)


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, f"sda.inc.{CP}1.data", f"{CP}1", f"{CP}2")
    write(tmp_path, f"sda.inc.{CP}2.data", f"{CP}2", f"{CP}1")
    found = opened.open_set(tmp_path, sound=True)
    assert ids(found) == []
    assert len(found.problems) == 2


def test_disks_of_a_point_must_agree(tmp_path: Path) -> None:
    chain(tmp_path, 2)
    write(tmp_path, "sdaa.full.data", f"{CP}0", disk="sdaa")
    write(tmp_path, f"sdaa.inc.{CP}2.data", f"{CP}2", f"{CP}0", disk="sdaa")
    found = opened.open_set(tmp_path, sound=True)
    assert ids(found) == ["full", f"inc.{CP}1"]
    assert {disk.target for disk in found.known.points[0].disks} == {"sda", "sdaa"}
    assert any("do not belong together" in problem for problem in found.problems)


def test_a_disk_that_skipped_an_increment_is_named(tmp_path: Path) -> None:
    chain(tmp_path, 2)
    write(tmp_path, "sdb.full.data", f"{CP}0", disk="sdb")
    write(tmp_path, f"sdb.inc.{CP}2.data", f"{CP}2", f"{CP}1", disk="sdb")
    with pytest.raises(ChainBrokenError, match=r"disk sdb: .* does not hold the disk"):
        opened.open_set(tmp_path)


def test_a_disk_that_was_lost_is_named(tmp_path: Path) -> None:
    """The checkpoint tells which disks its run saved."""
    chain(tmp_path, 2)
    (tmp_path / "checkpoints").mkdir()
    disk = "<disk name='{}' checkpoint='bitmap' bitmap='x'/>"
    xml = f"<domaincheckpoint><name>x</name><disks>{disk.format('sda')}{disk.format('sdb')}</disks>"
    (tmp_path / f"checkpoints/{CP}2.xml").write_text(xml + "</domaincheckpoint>")
    found = opened.open_set(tmp_path, sound=True)
    assert ids(found) == ["full", f"inc.{CP}1"]
    assert "lacks disk sdb, which checkpoint" in found.problems[0]


def test_a_full_under_the_name_of_an_increment(tmp_path: Path) -> None:
    chain(tmp_path, 1)
    write(tmp_path, f"sda.inc.{CP}2.data", f"{CP}2", f"{CP}1", changes=False)
    point = Choice(point=f"inc.{CP}2").find(opened.open_set(tmp_path).known)
    assert point.disks[0].mode is DiskMode.FULL


def test_disks_of_a_differential_are_begun_one_after_another(tmp_path: Path) -> None:
    """With one worker each has its own seconds; the XML is written at the end of the run."""
    chain(tmp_path, 1)
    write(tmp_path, "sdb.full.data", f"{CP}0", disk="sdb")
    write(tmp_path, f"sdb.inc.{CP}1.data", f"{CP}1", f"{CP}0", disk="sdb")
    for begun, disk in ((100, "sda"), (130, "sdb"), (140, "sda"), (150, "sda"), (160, "sdb")):
        write(tmp_path, f"{disk}.diff.{begun}.data", f"{CP}2", f"{CP}1", disk=disk)
    # the run that began at 140 failed
    for ended in (131, 170):
        (tmp_path / f"vmconfig.{ended}.xml").write_text(XML)
    found = opened.open_set(tmp_path)
    files = {
        point.id: [disk.file for disk in point.disks]
        for point in found.known.points
        if point.level == "diff"
    }
    assert files == {
        "diff.131": ["sda.diff.100.data", "sdb.diff.130.data"],
        "diff.140": ["sda.diff.140.data"],
        "diff.170": ["sda.diff.150.data", "sdb.diff.160.data"],
    }
    assert Choice(point="diff.131").find(found.known).files[0].name == "vmconfig.131.xml"
    # a damaged stream takes its whole run with it
    (tmp_path / "sdb.diff.160.data").write_bytes(b"meta")
    found = opened.open_set(tmp_path, sound=True)
    assert "diff.170" not in ids(found)
    assert "diff.131" in ids(found)


def test_raw_images_need_evidence(tmp_path: Path) -> None:
    chain(tmp_path, 1)
    (tmp_path / "sdb.copy.data").write_bytes(bytes(4096))
    (tmp_path / f"vmconfig.{CP}0.xml").write_text(XML)
    (tmp_path / "vm1.fd").write_bytes(b"nvram")
    found = opened.open_set(tmp_path)
    full, inc = found.known.points
    assert {disk.target: disk.layout for disk in full.disks} == {
        "sda": Layout.STREAM, "sdb": Layout.RAW,
    }  # fmt: skip
    assert (full.domain, full.uuid[:8], full.disk("sda").source) == (
        "vm1",
        "5a1f0a3e",
        "/i/a b.qcow2",
    )
    assert {file.role: file.name for file in full.files} == {
        "domain-xml": f"vmconfig.{CP}0.xml", "nvram": "vm1.fd",
    }  # fmt: skip
    assert all(file.sha256 == "" for file in full.files)
    assert any(f"inc.{CP}1 does not hold disk sdb" in hint for hint in found.hints)
    assert (inc.domain, inc.uuid) == (full.domain, full.uuid)
    # a damaged stream is not taken for an image
    (tmp_path / "sda.full.data").write_bytes(bytes(4096))
    with pytest.raises(ChainBrokenError, match="not a frame header"):
        opened.open_set(tmp_path)


def test_files_of_others_do_no_harm(tmp_path: Path) -> None:
    chain(tmp_path, 1)
    write(tmp_path, "sda.inc.virtnbdbackup.2.data.partial", "x")
    (tmp_path / "vm1.cpt").write_text(json.dumps([f"{CP}0", f"{CP}1", f"{CP}2"]))
    (tmp_path / "vm1.txt").write_text("hello")
    (tmp_path / "sdz.full.data").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "sdy.inc.x.data")
    found = opened.open_set(tmp_path, sound=True)
    assert sum("not a regular file" in problem for problem in found.problems) == 2
    assert any("left of a run that failed" in hint for hint in found.hints)
    (tmp_path / "sdz.full.data").unlink()
    (tmp_path / "sdy.inc.x.data").unlink()
    found = opened.open_set(tmp_path)
    assert ids(found) == ["full", f"inc.{CP}1"]
    assert any(f"checkpoint {CP}2 is listed, but" in hint for hint in found.hints)


@pytest.mark.parametrize("date", ["", "yesterday", "0001-01-01T00:00:00+23:59", "9" * 30])
def test_dates_that_are_none(tmp_path: Path, date: str) -> None:
    write(tmp_path, "sda.full.data", f"{CP}0", date=date)
    found = opened.open_set(tmp_path)
    assert found.known.newest.created == "1970-01-01T00:00:00Z"
    assert any("nothing says when full was made" in hint for hint in found.hints)


def test_a_directory_is_read_once_not_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S-6: a year of hourly increments took hours to list, and so did 100000 files of a byte."""
    chain(tmp_path, 40)
    for path in list(tmp_path.glob("*.data")):
        path.with_name(f"{path.name}.chksum").write_text(str(zlib.adler32(path.read_bytes())))
    for number in range(160):
        (tmp_path / f"d{number}.copy.data").write_bytes(b"x")
        (tmp_path / f"e{number}.copy.qcow.json").write_bytes(b"{}")
    reads = Mock(wraps=os.scandir)
    monkeypatch.setattr(os, "scandir", reads)
    found = opened.open_set(tmp_path, sound=True)
    assert reads.call_count < 5
    assert len(found.problems) == 160
