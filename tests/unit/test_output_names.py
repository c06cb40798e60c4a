"""File names of restored images: as the original's where that is safe."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackupd.app import ctl
from nbdbackupd.ops.restore import output_names
from nbdbackupd.ops.restore.output_names import Wanted


def names(*disks: tuple[str, str, str, str], domain: str = "vm1") -> list[str]:
    wanted = [Wanted(target=t, source=s, original=o, format=f) for t, s, o, f in disks]
    return list(output_names.choose(wanted, domain).values())


@pytest.mark.parametrize(
    ("source", "original", "wanted", "name"),
    [
        ("/i/vm1.qcow2", "qcow2", "qcow2", "vm1.qcow2"),
        ("/i/vm1.img", "qcow2", "qcow2", "vm1.img"),
        ("/i/vm1.qcow2", "qcow2", "raw", "vm1.raw"),
        ("/i/web.example.org", "raw", "qcow2", "web.example.org.qcow2"),
        ("/i/web.example.img", "raw", "qcow2", "web.example.qcow2"),
        ("/dev/vg/lv", "raw", "raw", "lv"),
        ("pool/volume", "qcow2", "qcow2", "volume"),
        ("", "raw", "raw", "vda.raw"),
        ("/i/disk of vm.qcow2", "qcow2", "qcow2", "disk of vm.qcow2"),
        ("/i/-rf.qcow2", "qcow2", "qcow2", "vda--rf.qcow2"),
        ("/i/.hidden", "raw", "raw", "vda-.hidden"),
        ("/i/config", "raw", "raw", "vda-config"),
        ("/i/vm1.xml", "raw", "raw", "vda-vm1.xml"),
    ],
)
def test_one_disk(source: str, original: str, wanted: str, name: str) -> None:
    assert names(("vda", source, original, wanted)) == [name]


def test_collisions() -> None:
    assert names(
        ("vda", "/a/disk.img", "raw", "raw"),
        ("vdb", "/b/Disk.img", "raw", "raw"),
        ("vdc", "/c/vda-disk.img", "raw", "raw"),
    ) == ["vda-disk.img", "vdb-Disk.img", "2-vda-disk.img"]


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, unique_by=lambda pair: pair[0]))
def test_always_safe_and_different(disks: list[tuple[str, str]]) -> None:
    found = names(*((target, source, "raw", "raw") for target, source in disks), domain="a\nb")
    assert len(set(found)) == len(disks)
    for name in found:
        assert output_names.is_plain(name)
        assert len(f"{name}.incomplete".encode(errors="surrogateescape")) <= 255


@pytest.mark.parametrize(
    "words",
    [("backup", "vm1"), ("restore", "/set"), ("estimate", "vm1"), ("check", "vm1"),
     ("import", "/set"), ("checkpoints", "vm1"), ("log", "vm1")],
    ids=lambda words: words[0],
)  # fmt: skip
def test_standard_output_is_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: tuple[str, str],
) -> None:  # fmt: skip
    """L-6: ``-o -`` is refused as long as nothing can be streamed."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        ctl.main([*words, "-o", "-"])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert "nothing is written to standard output; give a directory" in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []
