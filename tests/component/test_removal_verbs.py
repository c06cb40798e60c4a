"""``merge`` and ``remove`` on the command line: what they do, and what they refuse in one line."""

import json
import os
from pathlib import Path

import pytest

from nbdbackupd.app import ctl
from nbdbackupd.model.chain import Level
from nbdbackupd.ops.sets import opened
from nbdbackupd.repo import layout, reading, written
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.written import Verdict
from tests.component.test_removal import chain, check
from tests.lib.sets import Change, SetBuilder

pytestmark = pytest.mark.component


class Bench:
    """A full, two increments, a differential, and the command line."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.set = chain(path, 3, count=2)
        self.set.inc({"vda": [Change(0, b"d" * 512)]}, level=Level.DIFF)
        self.path = self.set.path
        self.state = path / "state"
        self._capsys = capsys

    def run(self, verb: str, *words: str | os.PathLike[str]) -> tuple[int, str, str]:
        """Exit status, output, and the only line of complaint."""
        places: list[str | os.PathLike[str]] = ["--runtime-dir", self.path.parent / "run"]
        if verb in ("merge", "remove", "verify"):
            places += ["--checkpoint-dir", self.state]
        status = ctl.main([verb, *(os.fspath(word) for word in (*words, *places))])
        said = self._capsys.readouterr()
        complaints = [each for each in said.err.splitlines() if "warning: " not in each]
        assert len(complaints) == (status not in (0, 3)), said.err
        return status, said.out, said.err


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


def test_merge_and_remove(bench: Bench) -> None:
    status, _, said = bench.run("remove", bench.path, "--point", "point2")
    assert status == 50
    assert "restore point point2 is needed by point3: 'nbdbackupctl merge --point point3'" in said
    status, _, said = bench.run("remove", bench.path, "--point", "point3")
    assert (status, "the next increment starts from it" in said) == (50, True)
    status, _, said = bench.run("merge", bench.path, "--point", "point3")
    assert status == 0
    status, _, said = bench.run("merge", bench.path, "--point", "point3")
    assert (status, "hangs on no other" in said) == (50, True)
    status, out, _ = bench.run("remove", bench.path, "--point", "point4", "--json")
    assert (status, json.loads(out)["dropped"]) == (0, ["point4"])
    check(bench.set, ["point1", "point2", "point4"])
    status, _, said = bench.run("remove", bench.path, "--point", "point2")
    assert (status, "no restore point with id 'point2'" in said) == (50, True)


def test_what_must_stay(bench: Bench) -> None:
    assert bench.run("protect", bench.path, "--point", "point1")[0] == 0
    status, _, said = bench.run("merge", bench.path, "--point", "point2")
    assert (status, "restore point point1 is protected" in said) == (50, True)
    assert bench.run("unprotect", bench.path, "--point", "point1")[0] == 0
    # the differential hangs on the same point
    bench.set.inc({"vda": [Change(0, b"e" * 512)]})
    status, _, said = bench.run("merge", bench.path, "--point", "point5")
    assert (status, "point3 can't leave: needed by point4, point5" in said) == (50, True)
    status, _, said = bench.run("merge", bench.path, "--point", "point4")
    assert (status, "is a diff on which nothing hangs" in said) == (50, True)
    check(bench.set, [])


def test_what_is_no_set_of_ours(bench: Bench, tmp_path: Path) -> None:
    for path, word in ((tmp_path / "none", "holds no restore point"), (tmp_path, "no restore")):
        status, _, said = bench.run("merge", path, "--point", "x")
        assert (status, word in said) == (50, True), said
    peer = tmp_path / "peer"
    peer.mkdir()
    (peer / "vda.full.data").write_bytes(b"")
    status, _, said = bench.run("remove", peer, "--point", "full")
    assert (status, "virtnbdbackup" in said and "import" in said) == (50, True), said
    archive = tmp_path / "backup.zip"
    archive.write_bytes(b"PK\5\6" + bytes(18))
    status, _, said = bench.run("remove", archive, "--point", "full")
    assert (status, "is no directory" in said) == (50, True), said


def test_a_point_that_was_changed_is_not_merged(bench: Bench) -> None:
    """What this host wrote it vouches for afterwards, too; what somebody changed stays apart."""
    known = SetDirectory.open(bench.path).load().points
    for point in known[1:]:
        written.note(bench.state, point)
    assert bench.run("merge", bench.path, "--point", "point2")[0] == 0
    now = SetDirectory.open(bench.path).load().points
    verdicts = written.verdicts([bench.state], now)
    assert verdicts == {
        "point2": Verdict.OURS, "point3": Verdict.OURS, "point4": Verdict.OURS
    }  # fmt: skip
    with (bench.state / written.NAME).open("a") as file:
        file.write(f"point3 {'0' * 64}\n")
    names = (bench.state / written.NAME).read_text().replace(now[1].digest, "1" * 64)
    (bench.state / written.NAME).write_text(names)
    status, _, said = bench.run("merge", bench.path, "--point", "point3")
    assert (status, "point3 is not what this host wrote" in said) == (40, True), said


def test_a_merge_by_a_host_of_another_state_directory(bench: Bench, tmp_path: Path) -> None:
    """What it writes anew seems changed to the first one, which a person can put right."""
    written.note(bench.state, *SetDirectory.open(bench.path).load().points)
    first, bench.state = bench.state, tmp_path / "state-of-b"
    assert bench.run("merge", bench.path, "--point", "point2")[0] == 0
    bench.state = first
    status, _, said = bench.run("verify", bench.path)
    assert (status, "'nbdbackupctl verify --accept' notes it anew" in said) == (3, True), said
    assert bench.run("merge", bench.path, "--point", "point3")[0] == 40
    for words in (["--all"], [bench.path, "--boot-only"], [bench.path, "--limit", "1G"]):
        status, _, said = bench.run("verify", "--accept", *words)
        assert status == 2, said
    # only what is sound, and only if somebody says so
    stream = next(bench.path.glob("vda.inc.*.data"))
    sound = stream.read_bytes()
    stream.write_bytes(sound[:-1])
    assert bench.run("verify", bench.path, "--accept")[0] == 40
    stream.write_bytes(sound)
    assert bench.run("verify", bench.path)[0] == 3
    status, out, _ = bench.run("verify", bench.path, "--accept", "--json")
    assert (status, json.loads(out)["accepted"]) == (0, ["point2", "point3", "point4"])
    status, out, _ = bench.run("verify", bench.path, "--accept")
    assert (status, "trusted" in out) == (0, False)
    assert bench.run("merge", bench.path, "--point", "point3")[0] == 0
    check(bench.set, ["point1", "point2"])


def test_what_is_being_read_goes_later(bench: Bench) -> None:
    """Who has opened a point keeps its files; the next removal takes them away."""
    given = opened.open_set(bench.path, keep=True)
    old = bench.path / "vda.full.data"
    status, out, _ = bench.run("merge", bench.path, "--point", "point2")
    assert (status, "removed by the next run or removal: still being read" in out) == (3, True)
    assert old.exists()
    assert [each.id for each in SetDirectory.open(bench.path).load().points] == [
        "point2", "point3", "point4",
    ]  # fmt: skip
    # also of a set from which points leave again meanwhile
    assert bench.run("remove", bench.path, "--point", "point4")[0] == 3
    given.close()
    assert bench.run("merge", bench.path, "--point", "point3")[0] == 0
    assert not old.exists()
    check(bench.set, ["point1", "point2", "point4"])


def test_nobody_can_lock_where_nothing_can_be_made(tmp_path: Path) -> None:
    assert reading.hold(tmp_path / "none") is None


def test_a_generation_that_is_damaged(bench: Bench) -> None:
    for text in ("", "x\n", "0\n", "01\n", "1", "9" * 30):
        (bench.path / layout.GENERATION).write_text(text)
        for words in (("restore", "-o", bench.path.parent / "out"), ("merge", "--point", "point2")):
            status, _, said = bench.run(words[0], bench.path, *words[1:])
            assert (status, "generation" in said) == (40, True), said


def test_a_set_that_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an older set the newest can go, and at last the set."""
    older = chain(tmp_path, 4, count=1)
    newer = SetBuilder(tmp_path / "2026-12", disks={"vda": bytearray(4096)})
    newer.full()
    bench = Bench.__new__(Bench)
    bench.path, bench.state, bench._capsys = older.path, tmp_path / "state", capsys
    status, _, said = bench.run("remove", older.path, "--point", "point2")
    assert status == 0, said
    check(older, ["point2"])
    status, out, _ = bench.run("remove", older.path, "--point", "point1")
    assert (status, "is gone" in out, older.path.exists()) == (0, True, False)
