"""Which manifests this host wrote: known, changed, not known, and bounded."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbackupd.repo import written
from nbdbackupd.repo.written import Verdict
from tests.lib.points import full_point


def test_a_point_is_ours_changed_or_unknown(tmp_path: Path) -> None:
    """S-1: by id and digest, wherever its set is today."""
    state = tmp_path / "state"
    ours = replace(full_point("p1"), digest="a" * 64)
    assert written.verdict([state], ours) is Verdict.UNKNOWN
    written.note(state, ours)
    assert (state / written.NAME).stat().st_mode & 0o777 == 0o600
    assert written.verdict([tmp_path / "none", state], ours) is Verdict.OURS
    changed = replace(ours, digest="b" * 64)
    assert written.verdict([state], changed) is Verdict.CHANGED
    other = replace(full_point("p2"), digest="a" * 64)
    assert written.verdict([state], other) is Verdict.UNKNOWN
    # a peer's set has no manifests
    assert written.verdict([state], replace(ours, digest="")) is Verdict.UNKNOWN
    assert written.warnings([state], [ours, other]) == ()
    (line,) = written.warnings([state], [changed, other])
    assert "point p1 is not what this host wrote" in line
    assert "b" * 64 in line


def test_the_notes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MAX_SIZE", 2000)
    points = [replace(full_point(f"p{number}"), digest=f"{number:064}") for number in range(100)]
    for point in points:
        written.note(tmp_path, point)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3 * 2000
    found = written.verdicts([tmp_path], points)
    assert {found[point.id] for point in points[-20:]} == {Verdict.OURS}
    assert found["p0"] is Verdict.UNKNOWN


def test_manifests_that_are_written_anew_take_no_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge a day writes those of a whole set; what others have noted stays."""
    monkeypatch.setattr(written, "MAX_SIZE", 4000)
    other = replace(full_point("other"), digest="a" * 64)
    written.note(tmp_path, other)
    for number in range(100):
        written.note(tmp_path, *(replace(full_point(f"p{n}"), digest=f"{number:064}")
                                 for n in range(5)))  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [written.NAME]
    last = replace(full_point("p3"), digest=f"{99:064}")
    assert set(written.verdicts([tmp_path], [other, last]).values()) == {Verdict.OURS}


def test_notes_that_are_none(tmp_path: Path) -> None:
    """A cut line, a pipe, a directory that can't be made: never an error, never a wrong word."""
    point = replace(full_point("p1"), digest="a" * 64)
    (tmp_path / written.NAME).write_bytes(b"p1 aaaa")
    written.note(tmp_path, point)
    assert written.verdict([tmp_path], point) is Verdict.OURS
    (tmp_path / written.NAME).unlink()
    os.mkfifo(tmp_path / written.NAME)
    assert written.verdict([tmp_path], point) is Verdict.UNKNOWN
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    written.note(blocked, point)
    assert written.verdict([blocked], point) is Verdict.UNKNOWN
