"""Manifests that were proven before: taken apart in less time, never believed unread."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from nbdbackupd.errors import IntegrityError
from nbdbackupd.format import manifest, proven
from nbdbackupd.format.proven import FEWEST, NAME, Proven
from nbdbackupd.model.chain import RestorePoint
from tests.lib import points
from tests.unit.test_manifest import restore_points


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Proven:
    """Another process: it knows no manifest."""
    return fresh(monkeypatch)


def fresh(monkeypatch: pytest.MonkeyPatch) -> Proven:
    found = Proven()
    monkeypatch.setattr(manifest, "PROVEN", found)
    monkeypatch.setattr(manifest, "_known", manifest._Known())
    return found


def digests(number: int) -> list[str]:
    return [hashlib.sha256(b"%d" % each).hexdigest() for each in range(number)]


def noted(directory: Path, names: list[str]) -> Proven:
    found = Proven()
    found.keep_in(directory)
    for each in names:
        found.add(each)
    found.save()
    return found


def later(directory: Path) -> Proven:
    found = Proven()
    found.keep_in(directory)
    return found


@given(restore_points)
def test_a_proven_manifest_reads_the_same(point: RestorePoint) -> None:
    data = manifest.pack(point)
    digest = hashlib.sha256(data).hexdigest()
    found = manifest._rebuilt(json.loads(data), digest)
    assert found == manifest.parse(data)
    assert found.digest == digest


def test_only_the_first_process_looks_at_all(
    own: Proven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.keep_in(tmp_path)
    packed = [manifest.pack(replace(points.full_point(), domain=f"vm{n}")) for n in range(FEWEST)]
    own.save()
    again = fresh(monkeypatch)
    again.keep_in(tmp_path)
    monkeypatch.setattr(manifest, "_load", None)
    found = [manifest.parse(data).domain for data in packed]
    assert found == [f"vm{n}" for n in range(FEWEST)]


def test_other_bytes_are_looked_at(own: Proven, tmp_path: Path) -> None:
    data = manifest.pack(points.full_point())
    own.keep_in(tmp_path)
    own.add(hashlib.sha256(data).hexdigest())
    with pytest.raises(IntegrityError):
        manifest.parse(data.replace(b'"vm1"', b'"vm2"'))


def test_what_fits_no_class_is_looked_at(own: Proven) -> None:
    """As if a program of this version, and of other classes, had proven it."""
    data = manifest.pack(points.full_point()).replace(b'"autostart"', b'"autostars"')
    own.add(hashlib.sha256(data).hexdigest())
    with pytest.raises(IntegrityError):
        manifest.parse(data)


def test_few_are_not_written(tmp_path: Path) -> None:
    state = tmp_path / "state"
    noted(state, digests(FEWEST - 1))
    assert not state.exists()
    noted(state, digests(FEWEST))
    assert (state / NAME).stat().st_mode & 0o777 == 0o600
    assert all(map(later(state).holds, digests(FEWEST)))
    assert not later(state).holds("0" * 64)


def test_two_processes_add_to_it(tmp_path: Path) -> None:
    every = digests(3 * FEWEST)
    first, second = later(tmp_path), later(tmp_path)
    for found, names in ((first, every[: 2 * FEWEST]), (second, every[FEWEST:])):
        for each in names:
            found.add(each)
    first.save()
    second.save()
    assert all(map(later(tmp_path).holds, every))


def test_the_older_half_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "MAX_SIZE", 65 * 3 * FEWEST)
    every = digests(4 * FEWEST)
    noted(tmp_path, every)
    held = later(tmp_path)
    assert [held.holds(each) for each in every] == [False] * 2 * FEWEST + [True] * 2 * FEWEST


def test_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "_HEAD", b"nbdbackupd 0.0.9")
    noted(tmp_path, digests(FEWEST))
    assert later(tmp_path).holds(digests(1)[0])
    monkeypatch.undo()
    assert not later(tmp_path).holds(digests(1)[0])


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_who_else_may_write_it_has_no_say(tmp_path: Path, mode: int) -> None:
    noted(tmp_path, digests(FEWEST))
    (tmp_path / NAME).chmod(mode)
    assert not later(tmp_path).holds(digests(1)[0])


def test_of_another_account(tmp_path: Path) -> None:
    noted(tmp_path, digests(FEWEST))
    os.chown(tmp_path / NAME, 12345, 12345)
    assert not later(tmp_path).holds(digests(1)[0])


def test_where_nothing_can_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to("elsewhere")
    assert not noted(tmp_path, digests(FEWEST)).holds("0" * 64)
    (tmp_path / "file").write_bytes(b"")
    found = noted(tmp_path / "file", digests(FEWEST))
    assert found.holds(digests(1)[0])


def test_a_damaged_file_costs_time_only(tmp_path: Path) -> None:
    noted(tmp_path, digests(FEWEST))
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-70] + b"\0\xff\n")
    held = later(tmp_path)
    assert held.holds(digests(1)[0])
    assert not held.holds(digests(FEWEST)[-1])
