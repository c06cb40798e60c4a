"""What verifications note of points, and what follows from that."""

import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nbdbackupd.errors import RepositoryError, UsageError
from nbdbackupd.model.chain import BackupSet, DiskMode, Level
from nbdbackupd.model.proof import Proof, Soundness, content_of, soundness
from nbdbackupd.ops.sets import holdings
from nbdbackupd.ops.sets.sets import sets_of
from nbdbackupd.ops.verify import by_age, verify
from nbdbackupd.ops.verify.by_age import AgedReport, AgedRequest
from nbdbackupd.ops.verify.verify import VerifyReport, VerifyRequest
from nbdbackupd.repo import layout, verified
from nbdbackupd.repo.set_directory import SetDirectory
from tests.lib import chains, points

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
DAY = 86400.0


def check(path: Path, **more: object) -> VerifyReport:
    request = replace(VerifyRequest(path=path, clock=lambda: NOW), **more)  # type: ignore[arg-type]
    return verify.run(request, progress=lambda *_: None, cancelled=lambda: None)


def aged(*paths: Path, now: datetime = NOW, **more: object) -> AgedReport:
    request = replace(AgedRequest(paths=paths, clock=lambda: now), **more)  # type: ignore[arg-type]
    return by_age.run(request, progress=lambda *_: None, cancelled=lambda: None)


def notes(path: Path) -> dict[str, Proof]:
    return verified.read(path, SetDirectory.open(path).load())


def spoil(path: Path, name: str) -> None:
    data = bytearray((path / name).read_bytes())
    data[-60] ^= 1
    (path / name).write_bytes(data)


def test_each_point_gets_a_note(tmp_path: Path) -> None:
    path = tmp_path / "2026-06"
    path.mkdir()
    made = chains.make_chain(path)
    report = check(path)
    found = notes(path)
    assert list(found) == ["p1", "p2", "p3"]
    assert {each.verified for each in found.values()} == {"2026-06-01T12:00:00Z"}
    assert sum(each.size for each in found.values()) == report.checked_bytes
    assert all(not each.damage for each in found.values())
    assert (path / "verified" / "p1.json").stat().st_mode & 0o777 == 0o644
    held = holdings.look(sets_of(tmp_path))
    assert (held.points, held.verified_points, held.damage) == (3, 3, ())
    assert held.verified == "2026-06-01T12:00:00Z"
    kept = [each for each in path.rglob("*") if each.suffix in (".data", ".index", ".xml")]
    assert held.stored_bytes == sum(each.stat().st_size for each in kept)
    # the same files are the same content, whatever the manifest says of its parent
    assert content_of(replace(made[1], parent_digest="0" * 64)) == content_of(made[1])


def test_damage_is_noted_and_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "2026-06"
    path.mkdir()
    middle = chains.make_chain(path)[1]
    spoil(path, middle.disks[1].file)
    assert check(path).problems
    found = notes(path)
    assert [bool(each.damage) for each in found.values()] == [False, True, False]
    states = soundness(SetDirectory.open(path).load(), found)
    assert states["p1"] == Soundness(verified="2026-06-01T12:00:00Z")
    assert states["p2"].damage == states["p3"].damage
    assert states["p2"].damage.startswith(f"point p2 is damaged: {middle.disks[1].file}")
    held = holdings.look(sets_of(tmp_path))
    assert (held.verified_points, len(held.damage)) == (1, 1)
    assert held.damage[0].startswith("2026-06: point p2 was damaged at 2026-06-01 ")
    spoil(path, middle.disks[1].file)
    assert not check(path).problems
    assert not any(each.damage for each in notes(path).values())


def test_what_was_not_looked_at_is_not_noted(tmp_path: Path) -> None:
    """Neither is what can't be read today, nor a point of which only some disks were."""
    path = tmp_path / "2026-06"
    path.mkdir()
    made = chains.make_chain(path)
    check(path, only=frozenset({"p2"}))
    assert list(notes(path)) == ["p2"]
    (path / "verified" / "p2.json").unlink()
    check(path, clock=None)
    assert not notes(path)
    (path / made[0].disks[0].file).chmod(0)
    if os.geteuid():
        assert check(path).problems
        assert list(notes(path)) == ["p2", "p3"]


def test_only_what_hangs_on_damage_is_damaged() -> None:
    """A disk that was read in full stands by itself; two disks are looked at one by one."""
    full = points.full_point("p1")
    child = replace(points.child_of(full), id="p2")
    known = BackupSet((full, child))
    proof = Proof(point="p1", content="", verified="2026-01-01T00:00:00Z", size=1, damage=("bad",))
    good = Proof(point="p2", content="", verified="2026-01-02T00:00:00Z", size=1)
    proofs = {"p1": proof, "p2": good}
    assert soundness(known, proofs)["p2"].damage == "point p1 is damaged: bad"
    whole = replace(child, disks=tuple(replace(d, mode=DiskMode.FULL) for d in child.disks))
    alone = soundness(BackupSet((full, whole)), proofs)["p2"]
    assert alone == Soundness(verified="2026-01-02T00:00:00Z")
    assert soundness(known, {"p2": good})["p2"] == Soundness()
    older = replace(proof, damage=())
    assert soundness(known, {**proofs, "p1": older})["p2"].verified == older.verified


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b"x" * (1 << 17),
        b'{"version": 1}',
        b'{"version": 2, "point": "p1", "content": "", "verified": "2026-06-01T12:00:00Z", '
        b'"bytes": 1, "damage": []}',
        b'{"version": 1, "point": "p1", "content": "%s", "verified": "now", "bytes": 1, '
        b'"damage": []}',
        b'{"version": 1, "point": "p1", "content": "%s", "verified": "2026-06-01T12:00:00", '
        b'"bytes": 1, "damage": []}',
        b'{"version": 1, "point": "p1", "content": "%s", "verified": "2026-06-01T12:00:00Z", '
        b'"bytes": -1, "damage": []}',
        b'{"version": 1, "point": "p1", "content": "%s", "verified": "2026-06-01T12:00:00Z", '
        b'"bytes": 1, "damage": [1]}',
        None,
    ],
)
def test_a_damaged_note_counts_as_none(
    tmp_path: Path, text: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    point = chains.add_point(tmp_path, 1, Level.FULL)
    note = tmp_path / layout.verified("p1")
    note.parent.mkdir()
    if text is None:
        note.symlink_to("/etc/passwd")
    else:
        note.write_bytes(text.replace(b"%s", content_of(point).encode()))
    assert notes(tmp_path) == {}
    assert str(note) in caplog.text
    check(tmp_path)
    assert list(notes(tmp_path)) == ["p1"]


def test_a_note_of_other_files_says_nothing(tmp_path: Path) -> None:
    chains.add_point(tmp_path, 1, Level.FULL)
    check(tmp_path)
    note = tmp_path / layout.verified("p1")
    document = json.loads(note.read_text())
    note.write_text(json.dumps({**document, "content": "0" * 64}))
    assert notes(tmp_path) == {}


def test_a_set_that_can_not_be_written(tmp_path: Path) -> None:
    """A link in the place of the notes is not followed, and what is not noted is told."""
    path = tmp_path / "set"
    path.mkdir()
    chains.add_point(path, 1, Level.FULL)
    (path / layout.VERIFIED).write_text("in the way")
    report = check(path)
    assert not report.problems
    assert "verified" in report.unnoted
    assert aged(path).warnings == (report.unnoted,)
    with pytest.raises(RepositoryError):
        verified.write(tmp_path / "gone", Proof(point="p1", content="", verified="", size=0))
    assert not (tmp_path / "gone").exists()


def test_what_waits_longest_comes_first(tmp_path: Path) -> None:
    old, new = tmp_path / "2026-05", tmp_path / "2026-06"
    for path in (old, new):
        path.mkdir()
        chains.make_chain(path)
    check(old, clock=lambda: NOW - timedelta(days=40))
    check(new, clock=lambda: NOW - timedelta(days=2))
    (new / layout.verified("p3")).unlink()
    # one at least, and that is the one that never was
    first = aged(old, new, older_than=30 * DAY, limit=1)
    assert [(path, report.points) for path, report in first.sets] == [(new, 1)]
    assert (first.left, first.points) == (3, 1)
    assert notes(new)["p3"].verified == "2026-06-01T12:00:00Z"
    second = aged(old, new, older_than=30 * DAY)
    assert [(path, report.points) for path, report in second.sets] == [(old, 3)]
    assert second.left == 0
    assert aged(old, new, older_than=30 * DAY).to_json()["points"] == 0
    assert aged(old, new).points == 6
    # a clock that was wrong must not put it off for years
    check(old, clock=lambda: NOW + timedelta(days=3000))
    assert aged(old, older_than=30 * DAY).points == 3


def test_a_damaged_manifest_is_told_when_nothing_is_due(tmp_path: Path) -> None:
    chains.make_chain(tmp_path)
    check(tmp_path)
    spoil(tmp_path, "points/000003-p3.json")
    report = aged(tmp_path, older_than=DAY)
    assert report.points == 0
    assert len(report.problems) == 1
    assert str(tmp_path) in report.problems[0]
    assert report.to_json()["sound"] is False
    with pytest.raises(RepositoryError, match="no restore point"):
        aged(tmp_path / "nothing")
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "vda.full.data").write_bytes(b"x")
    with pytest.raises(UsageError, match="import"):
        aged(tmp_path / "peer")
