"""The sets of a domain side by side: which one goes on, which one a name and a wish mean."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.app import ctl
from nbdbackupd.errors import (
    BusyError,
    FormatError,
    NoFullError,
    ProcessError,
    RepositoryError,
    UsageError,
)
from nbdbackupd.model.chain import BackupSet, Level, RestorePoint
from nbdbackupd.model.choice import Choice
from nbdbackupd.model.policy import LevelPolicy, NextRun, Rotate
from nbdbackupd.model.proof import Proof, content_of
from nbdbackupd.ops.run import around
from nbdbackupd.ops.sets import homes, lookup, sets
from nbdbackupd.repo import verified
from nbdbackupd.repo.set_directory import SetDirectory
from tests.lib import chains, points

OTHER = "11111111-2222-4333-8444-555555555555"
RULES = LevelPolicy(rotate=Rotate.MONTHLY)


def add(
    path: Path, number: int, day: str, *, uuid: str = points.UUID, wanted: Level = Level.INC
) -> RestorePoint:
    """Publish point ``p<number>``, made at noon of a day; the first of a set is a full."""
    repository = SetDirectory.open(path)
    with repository.lock(owner="test"):
        known = repository.load().points
        level = wanted if known else Level.FULL
        intent = replace(chains.intent_for(number, level=level), uuid=uuid)
        with repository.draft(intent) as draft:
            point = chains.fill(draft, known, level)
            return draft.publish(replace(point, created=f"{day}T12:00:00Z", uuid=uuid))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A domain with a set of November and one of December."""
    home = tmp_path / "repository" / "vm1"
    for number, day in ((1, "2025-11-10"), (2, "2025-11-20")):
        add(home / "2025-11", number, day)
    for number, day in ((3, "2025-12-05"), (4, "2025-12-06"), (5, "2025-12-07")):
        add(home / "2025-12", number, day)
    return home


def after(home: Path, day: str, wanted: Level = Level.AUTO, uuid: str = points.UUID) -> NextRun:
    now = datetime.fromisoformat(f"{day}T12:00:00+00:00")
    return sets.next_run(home, uuid, RULES, now, wanted)


def test_a_set_goes_on_until_the_month_turns(home: Path) -> None:
    found = sets.sets_of(home)
    assert [each.path.name for each in found] == ["2025-11", "2025-12"]
    assert found[1].began is not None
    assert found[1].began.astimezone(UTC).isoformat() == "2025-12-05T12:00:00+00:00"
    run = after(home, "2025-12-20")
    assert (run.directory, run.is_new, run.level, run.problem) == (
        "2025-12", False, Level.INC, "",
    )  # fmt: skip
    run = after(home, "2026-01-20")
    assert (run.directory, run.is_new, run.level) == ("2026-01", True, Level.FULL)
    assert after(home, "2025-12-20", Level.FULL).directory == "2025-12.2"


def test_increments_are_counted(home: Path) -> None:
    now = datetime(2025, 12, 20, tzinfo=UTC)
    for limit, new in ((2, True), (3, False)):
        rules = replace(RULES, max_increments=limit)
        assert sets.next_run(home, points.UUID, rules, now).is_new == new


def test_nothing_there(tmp_path: Path) -> None:
    assert sets.sets_of(tmp_path / "none") == ()
    assert after(tmp_path / "none", "2026-01-20").directory == "2026-01"
    with pytest.raises(NoFullError):
        after(tmp_path / "none", "2026-01-20", Level.INC)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("damage", ["manifest", "all manifests", "stream", "link"])
def test_a_damaged_set_is_not_continued(home: Path, damage: str) -> None:
    manifests = sorted((home / "2025-12/points").iterdir())
    if damage in {"manifest", "all manifests"}:
        # without the full nothing of it is sound
        for path in manifests[: 1 if damage == "manifest" else None]:
            path.write_text("{}")
        moment = datetime(2025, 12, 7, 12, tzinfo=UTC).timestamp()
        os.utime(home / "2025-12/points", (moment, moment))
    elif damage == "stream":
        next((home / "2025-12").glob("vdb.inc.*.data")).unlink()
    else:
        manifests[1].unlink()
    run = after(home, "2025-12-20")
    # a new one, not the older one, whose base is gone
    assert (run.directory, run.level) == ("2025-12.2", Level.FULL)
    assert "set 2025-12 can't be continued" in run.problem


def test_a_set_is_not_continued_whose_base_is_known_to_be_damaged(home: Path) -> None:
    """Only what the newest base is made of counts, and only as long as nobody has repaired it."""
    path = home / "2025-12"
    known = SetDirectory.open(path).load()

    def note(point: RestorePoint, *damage: str) -> NextRun:
        proof = Proof(
            point=point.id, content=content_of(point), verified="2025-12-19T00:00:00Z", size=1,
            damage=damage,
        )  # fmt: skip
        verified.write(path, proof)
        return after(home, "2025-12-20")

    assert note(known.points[0]).directory == "2025-12"
    run = note(known.points[0], "vda.full.data: bad")
    assert (run.directory, run.level) == ("2025-12.2", Level.FULL)
    assert run.problem == (
        f"set 2025-12 can't be continued: point {known.points[0].id} is damaged: vda.full.data: bad"
    )
    assert run.reason == run.problem
    assert note(known.points[0]).problem == ""
    # a copy is no base
    copy = add(path, 9, "2025-12-19", wanted=Level.COPY)
    assert note(copy, "vda.copy: bad").directory == "2025-12"


def test_the_set_of_another_domain_is_not_continued(home: Path) -> None:
    """H-6: nor does it stand in the way of one's own, in a directory that two once shared."""
    run = after(home, "2025-12-20", uuid=OTHER)
    assert (run.directory, run.is_new, run.problem) == ("2025-12.2", True, "")
    add(home / "2025-12.2", 6, "2025-12-21", uuid=OTHER)
    assert after(home, "2025-12-22", uuid=OTHER).directory == "2025-12.2"
    run = after(home, "2025-12-22")
    assert (run.directory, run.level, run.problem) == ("2025-12", Level.INC, "")


def test_a_directory_belongs_to_one_uuid(home: Path) -> None:
    """H-6."""
    repository = home.parent
    assert homes.home_of(repository, "vm1", points.UUID) == home
    beside = homes.home_of(repository, "vm1", OTHER)
    assert beside == repository / f"vm1@{OTHER[:8]}"
    assert homes.home_of(repository, "../x", OTHER) == repository / "%2E.%2Fx"
    with pytest.raises(FormatError):
        homes.home_of(repository, "", OTHER)
    # who has begun a first point has the directory already
    begun = SetDirectory.open(repository / "new/2026-01")
    with begun.lock(owner="test"), begun.draft(chains.intent_for(1, level=Level.FULL)):
        assert homes.home_of(repository, "new", points.UUID) == repository / "new"
        assert homes.home_of(repository, "new", OTHER).name == f"new@{OTHER[:8]}"
    assert homes.home_of(repository, "new", OTHER) == repository / "new"
    # the beginning of a UUID is nobody's own
    add(beside / "2026-01", 1, "2026-01-01", uuid=f"{OTHER[:-1]}f")
    assert homes.home_of(repository, "vm1", OTHER) == repository / f"vm1@{OTHER}"
    assert homes.home_of(repository / "none", "vm1", OTHER) == repository / "none/vm1"


def test_a_name_of_two_domains_is_asked_back(home: Path) -> None:
    """H-6: by name never one of two, by UUID each, with what an older version put together."""
    repository = home.parent
    add(home / "2025-12.2", 6, "2025-12-21", uuid=OTHER)
    with pytest.raises(UsageError) as caught:
        find(home, "vm1")
    for told in (points.UUID, OTHER, str(home), "newest point 2025-12-21"):
        assert told in str(caught.value)
    add(repository / f"vm1@{OTHER[:8]}/2026-01", 7, "2026-01-02", uuid=OTHER)
    with pytest.raises(UsageError, match="vm1 means more than one domain"):
        find(home, "vm1")
    mine, other = find(home, points.UUID), find(home, OTHER)
    assert [each.path.name for each in mine.sets] == ["2025-11", "2025-12"]
    assert [each.path.name for each in other.sets] == ["2025-12.2", "2026-01"]
    assert (mine.directory, other.directory) == (home, repository / f"vm1@{OTHER[:8]}")
    assert other.choose() == repository / f"vm1@{OTHER[:8]}/2026-01"
    # the directory's own name means its domain
    assert find(home, f"vm1@{OTHER[:8]}").sets == other.sets[1:]


def test_what_stands_in_the_way(home: Path) -> None:
    (home / "2026-01").write_text("no directory")
    assert after(home, "2026-01-20").directory == "2026-01.2"
    # a run that failed in a new set has left a log, and the next one begins there
    (home / "2026-02/logs").mkdir(parents=True)
    assert after(home, "2026-02-20").directory == "2026-02"
    (home / "2026-03").symlink_to("/nowhere")
    assert after(home, "2026-03-20").directory == "2026-03.2"
    (home / "kept").mkdir()
    assert "kept" not in {each.path.name for each in sets.sets_of(home)}


# -- by name


def find(home: Path, name: str) -> lookup.DomainSets:
    return lookup.find(name, [home.parent])


def test_which_set_a_wish_means(home: Path) -> None:
    found = find(home, "vm1")
    assert [each.path.name for each in found.sets] == ["2025-11", "2025-12"]
    at = datetime.fromisoformat
    for wish, name in (
        ({}, "2025-12"),
        ({"point": "latest"}, "2025-12"),
        ({"point": "p2"}, "2025-11"),
        ({"until": f"nbdbackup-{points.CHAIN}-2"}, "2025-11"),
        ({"at": at("2025-12-31T00:00:00+00:00")}, "2025-12"),
        ({"at": at("2025-12-05T12:00:00+00:00")}, "2025-12"),
        ({"at": at("2025-12-05T11:59:59+00:00")}, "2025-11"),
    ):
        wishes: dict[str, Any] = wish
        assert found.choose(Choice(**wishes)).name == name, wish
    for wrong, why in (
        ({"point": "p"}, "more than one restore point with id 'p'"),
        ({"point": "x"}, "domain vm1, 2 sets in .*: no restore point with id 'x'"),
        ({"until": "x"}, "no restore point made checkpoint 'x'"),
        ({"at": at("2025-11-01T00:00:00+00:00")}, "no restore point is as old as 2025-11-01"),
    ):
        wishes = wrong
        with pytest.raises(RepositoryError, match=why):
            found.choose(Choice(**wishes))
    # an id of its own is not the beginning of another one
    add(home / "2025-12", 41, "2025-12-08")
    assert find(home, "vm1").choose(Choice(point="p4")).name == "2025-12"
    # a new set whose first run has failed holds nothing that could be meant
    (home / "2026-02/logs").mkdir(parents=True)
    assert find(home, "vm1").choose().name == "2025-12"


def test_names_and_typos(home: Path) -> None:
    assert find(home, points.UUID.upper()).directory == home
    for name, why in (
        ("vm2", "did you mean vm1"),
        ("database", "which holds vm1"),
        (OTHER, "neither a directory nor a domain"),
        ("", "neither"),
    ):
        with pytest.raises(RepositoryError, match=why):
            find(home, name)
    hostile = home.parent / "%2Evm%0A~x"
    add(hostile / "2025-12", 1, "2025-12-01", uuid=OTHER)
    assert find(home, OTHER).directory == hostile
    # the same domain under its old and its new name
    add(home.parent / "vm1-old/2025-10", 1, "2025-10-01")
    with pytest.raises(RepositoryError, match="more than one place"):
        find(home, points.UUID)
    with pytest.raises(RepositoryError, match=r"neither .*give the path"):
        lookup.find("vm1", [home / "nowhere"])


def test_sources_by_name_on_the_command_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "etc"
    config.mkdir()
    (config / "nbdbackup.yaml").write_text(f"repository: {{path: {home.parent}}}\n")

    def said(verb: str, *argv: str | Path, code: int = 0) -> tuple[str, str]:
        own = ["--checkpoint-dir", tmp_path / "state"] if verb in ("restore", "verify") else []
        head = ["-c", "test:///default", "--runtime-dir", tmp_path / "run"]
        assert ctl.main([str(word) for word in (*head, verb, *argv, *own)]) == code
        out, err = capsys.readouterr()
        return out, err

    def run(verb: str, *argv: str, code: int = 0) -> Any:
        return json.loads(said(verb, *argv, "--config-dir", config, "--json", code=code)[0])

    listed = run("list", "vm1")
    assert (listed["domain"], listed["directory"]) == ("vm1", str(home))
    assert [each["set"] for each in listed["sets"]] == [
        str(home / "2025-11"), str(home / "2025-12"),
    ]  # fmt: skip
    assert listed["sets"][0] == json.loads(said("list", home / "2025-11", "--json")[0])
    text, _ = said("list", "vm1", "--config-dir", config)
    assert text.index("2025-11: vm1") < text.index("2025-12: vm1")
    assert run("show", "vm1", "--point", "p2")["set"] == str(home / "2025-11")
    assert said("verify", "vm1", "--config-dir", config)[0].startswith("sound: 3 point(s), ")
    assert run("verify", "vm1", "--older-than", "1d")["points"] == 2  # those of the older set
    done = run("verify", "--all", "--older-than", "1d")
    assert (done["points"], done["sets"]) == (0, [])
    for wrong in (["--all", "vm1"], ["vm1", "--limit", "1G", "--point", "p1"], []):
        run("verify", *wrong, code=2)
    (home / "2025-12/vda.full.data.index").write_bytes(b"spoiled")
    assert "vda.full.data.index: disk vda" in run_all(said, config)
    _, verified = said("verify", "vm1", "--config-dir", config, code=40)
    assert f"{home / '2025-12'} is damaged" in verified
    error = run("restore", "vm", "-o", str(tmp_path / "out"), code=50)["error"]["message"]
    assert "did you mean vm1" in error
    # what is a path stays one, whatever the configuration is like
    (config / "nbdbackup.yaml").write_text("nonsense\n")
    said("list", home / "2025-11", "--config-dir", config)
    assert "nonsense" not in said("list", "./vm1/x", "--config-dir", config, code=50)[1]
    said("list", "vm1", "--config-dir", config, code=10)
    # a damaged set is told, the others are listed
    (config / "nbdbackup.yaml").write_text(f"repository: {{path: {home.parent}}}\n")
    next((home / "2025-11/points").glob("*p1.json")).write_text("{}")
    listed = run("list", "vm1", code=40)
    assert [len(each["points"]) for each in listed["sets"]] == [3, 0]


def run_all(said: Callable[..., tuple[str, str]], config: Path) -> str:
    """What a damaged set is told as when all are verified."""
    out, err = said("verify", "--all", "--limit", "1T", "--config-dir", config, code=40)
    assert "damage was found: 1 problem" in err
    return out


# -- places and programs


def test_places_are_taken_and_freed(tmp_path: Path) -> None:
    calls = 0

    def cancelled() -> None:
        nonlocal calls
        calls += 1

    def place(wait: float = 0.0) -> Any:
        return around.slot(
            tmp_path / "run", 2, owner="run of vm", wait_seconds=wait, cancelled=cancelled
        )

    with place() as first, place() as second:
        assert (first, second) == (1, 2)
        with pytest.raises(BusyError, match=f"at most 2 runs .*process {os.getpid()}"), place():
            pass
        assert calls == 0
        with pytest.raises(BusyError, match=r"after 0.5 s"), place(0.5):
            pass
        assert calls >= 2
    with place() as again:
        assert again == 1


def test_programs_one_after_the_other(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def tell(text: str) -> tuple[str, ...]:
        return ("/bin/sh", "-c", f'echo "$0 $X" >>{log}; [ "$0" != bad ]', text)

    around.run_each([tell("a b"), tell("c")], {"X": "$1;"}, timeout=10)
    assert log.read_text() == "a b $1;\nc $1;\n"
    with pytest.raises(ProcessError, match="sh failed with exit status 1"):
        around.run_each([tell("bad"), tell("d")], {}, timeout=10)
    assert log.read_text().splitlines()[2:] == ["bad "]
    waits = 0

    def waiting() -> None:
        nonlocal waits
        waits += 1

    programs = [tell("bad"), ("/bin/sleep", "60"), tell("e"), ("/no/such",)]
    problems = around.run_all(programs, {}, timeout=0.5, waiting=waiting)
    assert [each.split(": ")[1].split()[0] for each in problems] == ["sh", "sleep", "program"]
    assert "sleep did not end within 0.5 s" in problems[1]
    assert "program such was not found" in problems[2]
    assert log.read_text().endswith("e \n")
    assert waits > 3


def test_old_sets_are_not_shown_as_the_newest(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """W-1: the repository of now is not mounted, an earlier one holds sets of the name."""
    etc = tmp_path / "etc"
    (etc / "domains.d").mkdir(parents=True)
    (etc / "nbdbackup.yaml").write_text(f"repository: {{path: {home.parent}}}\n")
    mount = tmp_path / "backup"
    (etc / "domains.d" / "vm1.yaml").write_text(
        f"match: {{name: vm1}}\nrepository: {{path: {mount}/vms, mount_point: {mount}}}\n"
    )
    for words in (("list", "vm1"), ("verify", "vm1", "--point", "p5"), ("show", "vm1")):
        assert ctl.main(["--config-dir", str(etc), *words]) != 0
        told = capsys.readouterr().err
        assert f"nothing is mounted on {mount}" in told
        assert f"what {home} has is told, which may be older" in told
    assert ctl.main(["--config-dir", str(etc), "list", "vm2"]) == RepositoryError.exit_code
    assert "is not mounted" not in capsys.readouterr().err
    (etc / "nbdbackup.yaml").write_text(f"repository: {{path: {mount}/none}}\n")
    assert ctl.main(["--config-dir", str(etc), "list", "vm1"]) == RepositoryError.exit_code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(
        f"nbdbackupctl: no set of vm1 can be seen: nothing is mounted on {mount}"
    )
    (etc / "nbdbackup.yaml").write_text(f"repository: {{path: {home.parent}}}\n")
    mount.mkdir()
    (etc / "domains.d" / "vm1.yaml").write_text(
        f"match: {{name: vm1}}\nrepository: {{path: {home.parent}}}\n"
    )
    assert ctl.main(["--config-dir", str(etc), "list", "vm1"]) == 0
    assert capsys.readouterr().err == ""


def test_a_stranger_beside_it_keeps_nobody_from_a_set(home: Path) -> None:
    """R-3: what can't be read may hold the newest point of a UUID, so the way round is named."""
    add(home / "2026-01", 1, "2026-01-01")
    (home.parent / "evil\udcff/2026-01").mkdir(parents=True)
    (home.parent / "evil\udcff/2026-01/points").symlink_to(home)
    assert find(home, "vm1").choose() == home / "2026-01"
    with pytest.raises(RepositoryError, match=r"symbolic link.*give the name of domain"):
        find(home, points.UUID)
    with pytest.raises(RepositoryError, match="did you mean vm1"):
        find(home, "vm2")


@pytest.mark.parametrize(
    ("chain", "began"),
    [
        ("20251105t120000-1a2b3c4d", "2025-11-05T12:00:00+00:00"),
        ("c0ffee00", "2026-03-01T00:00:00+00:00"),
        ("00010101t000000-1a2b3c4d", "2026-03-01T00:00:00+00:00"),
    ],
)
def test_a_merge_makes_a_set_no_newer(home: Path, chain: str, began: str) -> None:
    """Else a set whose tail is merged each day would never be followed by another."""
    full = sets.sets_of(home)[0].known.points[0]
    merged = replace(full, merged=("p0",), chain=chain, created="2026-03-01T00:00:00Z")
    found = sets.DomainSet(path=home, known=BackupSet((merged,)))
    assert found.began == datetime.fromisoformat(began)
