"""D-7: sets with streams of version 1, as virtnbdbackup's first release wrote them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.format import stream
from tests.lab.command import run
from tests.lib.ctl import Ctl

KIB = 1024
SIZE = 1024 * KIB
NAMES = [f"virtnbdbackup.{number}" for number in range(3)]
UUID = "5a1f0a3e-9d0f-4a8e-8a5e-0f2a3f9b1c77"
XML = f"""<domain type='kvm'><name>old</name><uuid>{UUID}</uuid><memory>65536</memory>
<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='/images/old.qcow2'/><target dev='sda' bus='sata'/></disk></devices></domain>"""

Extents = list[tuple[int, int, int | None]]
CHANGES: list[Extents] = [
    [(0, 256 * KIB, 0x11), (256 * KIB, 128 * KIB, None), (384 * KIB, 640 * KIB, 0x12)],
    [(64 * KIB, 64 * KIB, 0x21), (512 * KIB, 64 * KIB, None)],
    [(0, 64 * KIB, 0x31)],
]
"""By point: offset, length, and the byte that all are, or None for zeroes."""


def write(path: Path, meta: dict[str, Any], extents: Extents) -> None:
    payload = json.dumps(meta).encode()
    with path.open("wb") as file:
        file.write(stream.pack_header(stream.META, 0, len(payload)) + payload + b"\r\n")
        for offset, length, byte in extents:
            if byte is None:
                file.write(stream.pack_header(stream.ZERO, offset, length))
            else:
                file.write(stream.pack_header(stream.DATA, offset, length))
                file.write(bytes([byte]) * length + b"\r\n")
        file.write(stream.pack_header(stream.STOP, 0, 0))


def make(folder: Path, *, parents: bool, key: str) -> list[bytes]:
    """A full and two increments; returns what the disk held at each."""
    folder.mkdir()
    disk, states = bytearray(SIZE), []
    for number, extents in enumerate(CHANGES):
        for offset, length, byte in extents:
            disk[offset : offset + length] = bytes([byte or 0]) * length
        states.append(bytes(disk))
        meta: dict[str, Any] = {
            "virtualSize": SIZE,
            "dataSize": sum(length for _, length, byte in extents if byte is not None),
            "date": f"2021-05-0{number + 1}T12:00:00.123456", "diskName": "sda",
            "checkpointName": NAMES[number], "incremental": number > 0, key: 1,
        }  # fmt: skip
        if parents:
            meta["parentCheckpoint"] = NAMES[number - 1] if number else False
        name = f"sda.inc.{NAMES[number]}.data" if number else "sda.full.data"
        write(folder / name, meta, extents)
        (folder / f"vmconfig.{NAMES[number]}.xml").write_text(XML)
    (folder / "old.cpt").write_text(json.dumps(NAMES))
    return states


@pytest.mark.parametrize(
    ("parents", "key"), [(True, "streamVersion"), (False, "stream-version")], ids=["linked", "bare"]
)
def test_a_set_of_version_1(tmp_path: Path, *, parents: bool, key: str) -> None:
    """D-7: list, show, verify, restore, map and import read it, each point bit for bit."""
    made = tmp_path / "set"
    states = make(made, parents=parents, key=key)
    ctl = Ctl("test:///default", tmp_path)
    ids = ["full", *(f"inc.{name}" for name in NAMES[1:])]

    def check(path: Path) -> None:
        points = ctl.points(path)
        assert [each["id"] for each in points] == ids
        assert [each["domain"] for each in points] == ["old"] * 3
        for point, state in zip(points, states, strict=True):
            into = tmp_path / "out"
            (image,) = ctl.restore(
                path, into, "--point", point["id"], "--format", "raw", code=None
            ).values()
            assert image.read_bytes() == state
            shutil.rmtree(into)

    check(made)
    assert "sda" in ctl("show", made).stdout
    # with a word that no checksum vouches for a plain stream of that time
    assert "sound" in ctl("verify", made, code=None).stdout
    (image,) = ctl.restore(made, tmp_path / "q", code=None).values()
    assert '"format": "qcow2"' in run(["qemu-img", "info", "--output", "json", image])
    (disk,) = ctl("map", made, "--detach", "--json", code=None).json["map"]["disks"]
    run(["nbdcopy", disk["uri"], tmp_path / "mapped"])
    assert (tmp_path / "mapped").read_bytes() == states[-1]
    ctl("unmap", "--all")
    ctl("import", made, code=None)
    assert (made / "points").is_dir()
    check(made)
    ctl("verify", made)
