"""The XML of jobs and checkpoints: what we write, what we read back."""

from xml.etree import ElementTree as ET

import pytest

from nbdbackupd.errors import CheckpointError, DomainError
from nbdbackupd.model import jobxml
from nbdbackupd.model.jobxml import JobDisk

HOSTILE = '/s/it\'s "q" <&> ü/x'

STORED = """
<domaincheckpoint>
  <name>cp.1</name>
  <parent><name>cp.0</name></parent>
  <creationTime>1795218872</creationTime>
  <disks>
    <disk name='vda' checkpoint='bitmap' bitmap='cp.1' size='65536'/>
    <disk name='vdb' checkpoint='bitmap' bitmap='cp.1'/>
    <disk name='vdc' checkpoint='no'/>
    <disk name='vdd' checkpoint='bitmap' bitmap='cp.1' size='0'/>
  </disks>
  <domain type='kvm'><name>vm1</name><disks><disk name='x'/></disks></domain>
</domaincheckpoint>
"""


def test_push_xml() -> None:
    disks = [JobDisk(target="vda", scratch=HOSTILE, base="c"), JobDisk(target="vdb", scratch="b")]
    text = jobxml.push_xml(disks, ["vdc"])
    root = ET.fromstring(text)
    assert root.attrib == {"mode": "push"}
    assert root.find("server") is None
    first, second, third = root.findall("./disks/disk")
    assert (first.get("backupmode"), first.get("incremental")) == ("incremental", "c")
    assert (second.get("backupmode"), second.get("incremental")) == ("full", None)
    assert third.attrib == {"name": "vdc", "backup": "no"}
    assert [each.get("type") for each in root.iter("driver")] == ["qcow2", "qcow2"]
    job = jobxml.parse_backup_job(text)
    assert (job.mode, job.scratch) == ("push", {"vda": HOSTILE, "vdb": "b"})


def test_backup_xml() -> None:
    text = jobxml.backup_xml(
        HOSTILE,
        [
            JobDisk(target="vda", scratch=HOSTILE + "a", base="cp 'x'", bitmap="changes-vda"),
            JobDisk(target="vdb", scratch=HOSTILE + "b", bitmap="changes-vdb"),
        ],
        ["vdc"],
    )
    root = ET.fromstring(text)
    server = root.find("server")
    assert root.attrib == {"mode": "pull"}
    assert server is not None
    assert server.attrib == {"transport": "unix", "socket": HOSTILE}
    first, second, third = root.findall("./disks/disk")
    assert first.attrib == {
        "name": "vda",
        "backup": "yes",
        "type": "file",
        "exportname": "vda",
        "backupmode": "incremental",
        "incremental": "cp 'x'",
        "exportbitmap": "changes-vda",
    }
    assert second.get("backupmode") == "full"
    assert second.get("exportbitmap") is None
    assert third.attrib == {"name": "vdc", "backup": "no"}
    assert [element.get("file") for element in root.iter("scratch")] == [
        HOSTILE + "a",
        HOSTILE + "b",
    ]
    job = jobxml.parse_backup_job(text)
    assert job.socket == HOSTILE
    assert job.scratch == {"vda": HOSTILE + "a", "vdb": HOSTILE + "b"}
    assert HOSTILE in str(job)


def test_foreign_jobs_are_described() -> None:
    tcp = (
        "<domainbackup mode='pull'><server transport='tcp' name='::1' port='10809'/></domainbackup>"
    )
    assert "NBD server ::1:10809" in str(jobxml.parse_backup_job(tcp))
    push = (
        "<domainbackup mode='push'><disks><disk name='vda' type='file'>"
        "<target file='/b/x.qcow2'/></disk><disk name='vdb' backup='no'/></disks></domainbackup>"
    )
    job = jobxml.parse_backup_job(push)
    assert job.scratch == {"vda": "/b/x.qcow2"}
    assert "push mode" in str(job)


@pytest.mark.parametrize("text", ["", "<domain/>", "<domainbackup>"])
def test_no_job_xml(text: str) -> None:
    with pytest.raises(DomainError):
        jobxml.parse_backup_job(text)


def test_checkpoint_xml() -> None:
    root = ET.fromstring(jobxml.checkpoint_xml("cp <1>", ["vda"], ["vdb"]))
    assert root.findtext("name") == "cp <1>"
    assert [disk.attrib for disk in root.findall("./disks/disk")] == [
        {"name": "vda", "checkpoint": "bitmap"},
        {"name": "vdb", "checkpoint": "no"},
    ]


def test_sound_sizes() -> None:
    assert jobxml.sound_sizes(STORED) == {"vda": 65536, "vdd": 0}
    assert jobxml.checkpoint_name(STORED) == "cp.1"


def test_redefinable() -> None:
    root = ET.fromstring(jobxml.redefinable(STORED, ["vda", "vdb", "vdz"]))
    assert [element.tag for element in root] == ["name", "creationTime", "disks"]
    assert root.findtext("creationTime") == "1795218872"
    assert [disk.attrib for disk in root.iter("disk")] == [
        {"name": "vda", "checkpoint": "bitmap", "bitmap": "cp.1"},
        {"name": "vdb", "checkpoint": "bitmap", "bitmap": "cp.1"},
    ]


def test_redefinable_adds_the_time_that_libvirt_wants() -> None:
    text = (
        "<domaincheckpoint><name>x</name>"
        "<disks><disk name='a' checkpoint='bitmap'/></disks></domaincheckpoint>"
    )
    assert "<creationTime>" in jobxml.redefinable(text, ["a"])


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        (STORED, ["vdc"]),
        (STORED, []),
        ("<domaincheckpoint><name>x</name></domaincheckpoint>", ["vda"]),
        ("<domain/>", ["vda"]),
        ("garbage", ["vda"]),
    ],
)
def test_not_redefinable(text: str, targets: list[str]) -> None:
    with pytest.raises(CheckpointError):
        jobxml.redefinable(text, targets)


def test_a_stored_checkpoint_is_built_anew() -> None:
    """S-3: libvirt would run the emulator of a definition in it."""
    stored = (
        "<domaincheckpoint><name>cp</name><description>d</description>"
        "<creationTime>7</creationTime><state>x</state><parent><name>p</name></parent>"
        "<domain><devices><emulator>/tmp/x</emulator></devices></domain>"
        "<inactiveDomain><devices><emulator>/tmp/x</emulator></devices></inactiveDomain>"
        "<disks><disk name='vda' checkpoint='bitmap' bitmap='b' size='1' file='/tmp/x'>"
        "<source file='/tmp/x'/></disk><disk name='vdb' checkpoint='no'/></disks>"
        "</domaincheckpoint>"
    )
    assert jobxml.redefinable(stored, ["vda"]) == (
        "<domaincheckpoint><name>cp</name><description>d</description>"
        "<creationTime>7</creationTime>"
        '<disks><disk name="vda" checkpoint="bitmap" bitmap="b" /></disks></domaincheckpoint>'
    )
