"""The records of a state directory: whole, or not there."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.errors import FormatError, RepositoryError
from nbdbackupd.model.chain import ImageLayer
from nbdbackupd.model.plan import BaseDisk
from nbdbackupd.repo.state import Record, StateDirectory

UUID = "5a1f0a3e-9d0f-4a8e-8a5e-0f2a3f9b1c77"
RECORD = Record(
    chain="20261121T101500-0a1b2c3d",
    uuid=UUID,
    domain="vm \udcff/1",
    set="/backup/ä b",
    point="20261121T101500-0a1b2c3d",
    checkpoint="nbdbackup.0a1b2c3d.20261121T101500-0a1b2c3d",
    xml="<domaincheckpoint/>",
    disks=(
        BaseDisk(
            target="vda",
            size=1 << 30,
            bitmap="nbdbackup.0a1b2c3d.20261121T101500-0a1b2c3d",
            layers=(
                ImageLayer("/images/\udce4.qcow2", "qcow2", 1, 2),
                ImageLayer("rbd/x", "raw"),
            ),
        ),
        BaseDisk(target="vdb", size=0, bitmap="", layers=()),
    ),
)


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path / "a" / "state")


def test_saved_and_found(state: StateDirectory) -> None:
    assert state.records(UUID) == ()
    state.save(RECORD)
    other = replace(RECORD, chain="20261121T101500-ffffffff")
    state.save(other)
    state.save(replace(RECORD, uuid="another", chain="c"))
    assert state.records(UUID) == (RECORD, other)
    newer = replace(RECORD, point="p2")
    state.save(newer)
    assert state.records(UUID) == (newer, other)
    path = state.path(UUID, RECORD.chain)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path == state.directory / UUID / f"{RECORD.chain}.json"
    assert state.forget(UUID, RECORD.chain)
    assert not state.forget(UUID, RECORD.chain)
    assert state.records(UUID) == (other,)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", ".", "a\0b", "x" * 400, "ä b"])
def test_names_stay_within_the_directory(state: StateDirectory, name: str) -> None:
    record = replace(RECORD, chain=name, uuid=name)
    state.save(record)
    assert state.records(name) == (record,)
    files = [path for path in state.directory.parent.parent.rglob("*") if path.is_file()]
    assert [path.parent.parent for path in files] == [state.directory]


def test_every_missing_or_wrong_field_is_refused() -> None:
    document = json.loads(RECORD.pack())
    assert Record.parse(RECORD.pack()) == RECORD
    lost = replace(RECORD, lost={"nbdbackup.a.b": ("vda", "vd\udcff"), "c": ()})
    assert Record.parse(lost.pack()) == lost
    for wrong in (None, ["vda"], {"c": "vda"}, {"c": ["vda", 1]}):
        with pytest.raises(FormatError):
            Record.parse(json.dumps({**document, "lost": wrong}).encode())
    places: list[tuple[Any, ...]] = [(key,) for key in document]
    places += [("disks", 0, key) for key in document["disks"][0]]
    places += [("disks", 0, "layers", 0, key) for key in document["disks"][0]["layers"][0]]
    places += [("disks", 0), ("disks", 0, "layers", 0)]
    values: list[Any] = [None, True, 1.5, {}, ["x"], "remove"]
    for place in places:
        for wrong in values:
            changed = json.loads(RECORD.pack())
            inner = changed
            for step in place[:-1]:
                inner = inner[step]
            if wrong == "remove" and isinstance(place[-1], str):
                del inner[place[-1]]
            elif wrong == "remove":
                continue
            else:
                inner[place[-1]] = wrong
            with pytest.raises(FormatError):
                Record.parse(json.dumps(changed).encode())
    for text in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"version": 2}'):
        with pytest.raises(FormatError):
            Record.parse(text)
    for key in ("chain", "uuid"):
        with pytest.raises(FormatError):
            Record.parse(json.dumps({**document, key: ""}).encode())


def test_what_is_damaged_is_ignored_with_a_warning(
    state: StateDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    state.save(RECORD)
    folder = state.directory / UUID
    good = state.path(UUID, RECORD.chain).read_bytes()
    bad = {
        "cut.json": good[:-20],
        "empty.json": b"",
        "other-name.json": good,  # a copy: which of both is newer nobody knows
        "newer.json": good.replace(b'"version": 1', b'"version": 9'),
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    (folder / "directory.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / ".nbdbackup-tmp-1.json").write_bytes(good)
    (folder / "notes.txt").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert state.records(UUID) == (RECORD,)
    for name in (*bad, "directory.json", "pipe.json"):
        assert sum(name in line for line in caplog.messages) == 1
    assert len(caplog.messages) == len(bad) + 2


def test_a_directory_that_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / UUID).write_text("x")
    state = StateDirectory(tmp_path / "state")
    assert state.records(UUID) == ()
    assert "can't be read" in caplog.text
    with pytest.raises(RepositoryError):
        state.save(RECORD)
    assert not state.forget(UUID, RECORD.chain)
