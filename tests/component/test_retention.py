"""Retention with real sets: what is protected, what a prune takes, and what it leaves alone."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nbdbackupd import durable, rundir
from nbdbackupd.app import context as app_context
from nbdbackupd.app import ctl
from nbdbackupd.errors import BusyError, Interrupted, NoSpaceError, RepositoryError
from nbdbackupd.model.policy import LevelPolicy
from nbdbackupd.model.retention import Rules
from nbdbackupd.ops.removal import apply
from nbdbackupd.ops.retention import prune
from nbdbackupd.ops.sets.homes import home_of
from nbdbackupd.ops.sets.sets import next_run, sets_of
from nbdbackupd.repo import layout, protected, reading
from nbdbackupd.repo.protected import Protection
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.state import Record, StateDirectory
from tests.lib import chains, points
from tests.lib.house import House
from tests.lib.told import heard

pytestmark = pytest.mark.component

NOW = datetime(2026, 2, 10, 12, 0, 0, tzinfo=UTC)


@pytest.fixture(autouse=True)
def noon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("NBDBACKUP_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(app_context, "now", lambda: NOW)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    path = tmp_path / "set"
    chains.make_chain(path)
    return path


def command(*words: object) -> int:
    return ctl.main([str(each) for each in words])


# -- protect


def test_a_point_is_protected_and_listed(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with heard() as names:
        note = ["--until", "2026-12-31", "--note", "before the upgrade"]
        assert command("protect", chain, "--point", "p2", *note) == 0
        assert command("protect", chain, "--point", "latest") == 0
    assert names == ["point-protected", "point-protected"]
    said = capsys.readouterr().out
    assert "p2 is protected until 2026-12-31 23:59:59 UTC: before the upgrade\n" in said
    assert "p3 is protected for good\n" in said
    assert command("list", chain) == 0
    assert "protected until 2026-12-31 23:59:59 UTC: before the up" in capsys.readouterr().out
    assert command("list", "--json", chain) == 0
    told = json.loads(capsys.readouterr().out)["protections"]
    assert [(each["point"], each["since"], each["until"]) for each in told] == [
        ("p2", "2026-02-10T12:00:00Z", "2026-12-31T23:59:59Z"), ("p3", "2026-02-10T12:00:00Z", ""),
    ]  # fmt: skip
    found = protected.read(chain, ["p1", "p2", "p3"])
    assert {ident: each.holds(NOW) for ident, each in found.items()} == {"p2": True, "p3": True}
    assert not found["p2"].holds(datetime(2027, 1, 1, tzinfo=UTC))
    with heard() as names:
        assert command("unprotect", chain, "--point", "p2") == 0
    assert names == ["point-unprotected"]
    assert list(protected.read(chain, ["p1", "p2", "p3"])) == ["p3"]
    assert command("unprotect", chain, "--point", "p2") == RepositoryError.exit_code
    assert "p2 is not protected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--point", "none"], 50, "no restore point with id 'none'"),
        (["--point", "p1", "--until", "2026-02-09"], 2, "--until is over already"),
        (["--point", "p1", "--until", "1999-01-01"], 2, "--until is over already"),
        (["--point", "p1", "--until", "3026-12-31"], 2, "--until is too far away"),
        (["--point", "p1", "--note", "a\nb"], 2, "--note takes one line"),
        (["--point", "p1", "--note", "x" * 501], 2, "--note takes one line"),
    ],
)
def test_what_is_refused(
    chain: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert command("protect", chain, *words) == code
    assert said in capsys.readouterr().err
    assert not (chain / layout.PROTECTED).exists()


def test_a_busy_set_is_not_protected(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SetDirectory.open(chain).lock(owner="a test"):
        assert command("protect", chain, "--point", "p1") == BusyError.exit_code
    assert "a test" in capsys.readouterr().err
    assert not (chain / layout.PROTECTED).exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1]", b'{"version": 2}', b'{"version": 1, "point": "p2"}', b"\0" * 20000,
     b'{"version": 1, "point": "p1", "until": 5}', b'{"version": 1, "point": "p1", "x": ""}',
     b'{"version": 1, "point": "p1", "until": "2026-01-01"}',
     b'{"version": 1, "point": "p1", "until": "soon"}', None],
)  # fmt: skip
def test_a_damaged_note_protects(
    chain: Path, capsys: pytest.CaptureFixture[str], data: bytes | None
) -> None:
    note = chain / layout.protection("p1")
    note.parent.mkdir()
    if data is None:
        note.symlink_to("/etc/passwd")
    else:
        note.write_bytes(data)
    (found,) = protected.read(chain, ["p1", "p2"]).values()
    assert found == Protection(point="p1", damage=found.damage)
    assert found.damage
    assert found.holds(datetime(9999, 1, 1, tzinfo=UTC))
    assert command("list", chain) == 3
    said = capsys.readouterr()
    assert "protected by a note that can't be read" in said.out
    assert "can't be read, and protects" in said.err
    assert command("unprotect", chain, "--point", "p1") == 0
    assert protected.read(chain, ["p1"]) == {}


def test_notes_behind_a_link_are_not_read(chain: Path, tmp_path: Path) -> None:
    (chain / layout.PROTECTED).symlink_to(tmp_path)
    with pytest.raises(RepositoryError, match="is a symbolic link"):
        protected.read(chain, ["p1"])


# -- prune


@pytest.fixture
def house(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> House:
    return House(tmp_path, capsys)


def files(path: Path, *, suffix: str = "") -> set[str]:
    return {each for each in chains.tree(path) if each.endswith(suffix)}


def test_months_are_one_history(house: House) -> None:
    """A whole set goes, a chain's tail goes, and what an increment starts from is merged."""
    december = house.nights("2025-12-01T02:00", 4)
    january = house.nights("2026-01-25T02:00", 7)
    february = house.nights("2026-02-01T02:00", 10)
    house.rules("daily: 7, weekly: 1, monthly: 1")
    planned = house.fates("vm1", "--dry-run")
    assert len(house.left()["2025-12"]) == 4
    stays = [january[0], february[0], *february[3:]]
    # the first of February was a Sunday: of its week it is the newest, which leaves the 25th for
    # January
    assert planned == {
        **dict.fromkeys(december, "removed"),
        **dict.fromkeys(january[1:], "removed"),
        **dict.fromkeys(february[1:3], february[3]),
        **dict.fromkeys(stays, "kept"),
    }
    with heard() as names:
        assert house.fates("vm1", "--force") == planned
    assert "retention-done" in names
    assert house.left() == {"2026-01": january[:1], "2026-02": [february[0], *february[3:]]}
    assert not (house.home / "2025-12").exists()
    assert house.fates("vm1") == dict.fromkeys(stays, "kept")


def test_what_keeps_each_point_is_told(house: House) -> None:
    idents = house.nights("2026-02-01T02:00", 6)
    house.rules("last: 1, daily: 2, prune: never")
    house.run("protect", "vm1", "--point", idents[1], "--note", "for the audit")
    said = house.run("prune", "vm1", "-n")
    lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("2026")}
    assert lines[idents[0]].endswith(f"  merged into {idents[1]}")
    assert "  kept " in lines[idents[1]]
    assert lines[idents[1]].endswith("  protected for good: for the audit")
    assert lines[idents[2]].endswith(f"  merged into {idents[3]}")
    assert lines[idents[4]].endswith("  daily 2026-02-05")
    assert lines[idents[5]].endswith("  the next increment starts from it, last, newest")
    assert said.splitlines()[-1].startswith("vm1: 2 points would go, 4 stay, ")
    listed = {
        line.split()[1]: line for line in house.run("list", "vm1").splitlines() if "2026" in line
    }
    assert listed[idents[0]].endswith(f"  merged into {idents[1]}")
    assert listed[idents[4]].endswith("  daily 2026-02-05")
    assert json.loads(house.run("list", "vm1", "--json"))["sets"][0]["retention"][idents[4]] == (
        "daily 2026-02-05"
    )
    assert house.run("prune", "vm1").splitlines()[-1].startswith("vm1: 2 points went, 4 stay, ")
    assert house.left() == {"2026-02": [idents[1], *idents[3:]]}


def test_without_a_rule_nothing_goes(house: House) -> None:
    idents = house.nights("2026-02-01T02:00", 3)
    house.rules("minimum: 2")
    before = chains.tree(house.home)
    assert "no rule of retention is set" in house.run("prune", "vm1")
    assert house.fates("vm1", "--force") == dict.fromkeys(idents, "kept")
    assert chains.tree(house.home) == before


@pytest.mark.parametrize("dry", [True, False])
def test_what_stops_a_prune(house: House, dry: bool) -> None:
    """More than half at once, and a point from the future; a timer's unit has no --force."""
    house.nights("2026-02-01T02:00", 6)
    house.rules("daily: 2")
    words = ["-n"] if dry else []
    with heard() as names:
        said = house.run("prune", "vm1", *words, code=0 if dry else 50)
        assert "4 of 6 points would go at once, more than half" in said
        house.save("2026-02-10T13:30")
        ahead = chains.tree(house.home)
        said = house.run("prune", "vm1", "--force", *words, code=0 if dry else 50)
        assert "is dated 2026-02-10 13:30:00 UTC, which is yet to come" in said
    assert names.count("retention-refused") == (0 if dry else 2)
    assert chains.tree(house.home) == ahead


def test_runs_of_each_hour_and_rules_of_days(house: House) -> None:
    """Once a person has begun, a timer goes on; rules that take what it had kept stop it."""
    house.nights("2026-02-01T02:00", 8)
    first = datetime.fromisoformat("2026-02-09T00:00")
    for hour in range(12):
        house.save(f"{first + timedelta(hours=2 * hour):%Y-%m-%dT%H:%M}")
    house.rules("daily: 4")
    assert "more than half" in house.run("prune", "vm1", code=50)
    house.run("prune", "vm1", "--force")
    first += timedelta(days=1)
    ids = [house.save(f"{first + timedelta(hours=1 + hour):%Y-%m-%dT%H:%M}") for hour in range(10)]
    # the last removal was on the evening before
    os.utime(
        house.home / "2026-02" / layout.GENERATION, (first.replace(tzinfo=UTC).timestamp(),) * 2
    )
    house.rules("last: 1")
    assert "13 of 14 points would go at once, more than half" in house.run("prune", "vm1", code=50)
    house.rules("daily: 4")
    assert house.run("prune", "vm1").splitlines()[-1].startswith("vm1: 10 points went, 4 stay, ")
    assert house.left()["2026-02"][-1] == ids[-1]


def test_a_damaged_set_keeps_all(house: House) -> None:
    january = house.nights("2026-01-01T02:00", 4)
    february = house.nights("2026-02-01T02:00", 4)
    manifest = house.home / "2026-01/points" / f"000002-{january[1]}.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    house.rules("last: 2")
    before = chains.tree(house.home / "2026-01")
    said = house.run("prune", "vm1", "--force", code=3)
    assert "nothing is removed from it, since it is damaged" in said
    assert chains.tree(house.home / "2026-01") == before
    assert SetDirectory.open(house.home / "2026-02").load().points[0].id == february[2]


def test_what_is_damaged_fills_no_place(house: House) -> None:
    house.nights("2026-02-01T02:00", 6)
    spoiled = next((house.home / "2026-02").glob("vda.inc.nbdbackup.202602.5.data"))
    spoiled.write_bytes(spoiled.read_bytes()[:-1])
    house.run("verify", house.home / "2026-02", code=40)
    house.rules("last: 2")
    told = json.loads(house.run("prune", "vm1", "-n", "--json"))["points"]
    # the last two hang on what is damaged: the newest two that are sound stay, too
    assert [each["fate"] for each in told] == ["merged", "merged", "kept", "kept", "kept", "kept"]
    assert told[3]["reasons"] == ["last"]


@pytest.mark.parametrize("lock", ["domain", "set"])
def test_who_is_at_work_is_not_disturbed(house: House, lock: str) -> None:
    house.nights("2026-02-01T02:00", 3)
    house.rules("daily: 2")
    before = files(house.home)
    folder = rundir.make_domain_dir(house.root / "run", points.UUID)
    path = folder / rundir.LOCK if lock == "domain" else house.home / "2026-02" / layout.LOCK
    with durable.Lock(path, owner="backup of vm1"):
        assert "backup of vm1" in house.run("prune", "vm1", code=BusyError.exit_code)
    assert files(house.home) == before
    house.run("prune", "vm1")
    assert files(house.home) != before


def test_a_set_whose_base_is_noted_keeps_it(house: House) -> None:
    """Somebody goes on with an older set by hand: 'backup -o'."""
    january = house.nights("2026-01-01T02:00", 3)
    february = house.nights("2026-02-01T02:00", 4)
    record = Record(
        chain="c202601", uuid=points.UUID, domain="vm1", set=str(house.home / "2026-01"),
        point=january[-1], checkpoint="", xml="", disks=(),
    )  # fmt: skip
    StateDirectory(house.root / "state").save(record)
    house.rules("daily: 4")
    assert house.fates("vm1") == {
        **dict.fromkeys(january[:-1], january[-1]),
        **dict.fromkeys([january[-1], *february], "kept"),
    }
    assert house.left() == {"2026-01": january[-1:], "2026-02": february}


def test_a_prune_that_waits_can_be_ended(house: House) -> None:
    """The timer's waits half a day for a run, and a host that goes down does not."""
    house.nights("2026-02-01T02:00", 3)
    order = prune.PruneRequest(
        domain="vm1", directory=house.home, sets=sets_of(house.home), rules=Rules(daily=2),
        now=NOW, runtime_dir=house.root / "run", state_dirs=(), wait=600.0,
    )  # fmt: skip

    def end() -> None:
        raise Interrupted(15)

    before = files(house.home)
    folder = rundir.make_domain_dir(house.root / "run", points.UUID)
    with (
        durable.Lock(folder / rundir.LOCK, owner="backup of vm1"),
        pytest.raises(Interrupted),
    ):
        prune.prune(order, progress=lambda *_: None, cancelled=end)
    assert files(house.home) == before


def test_a_set_of_a_domain_is_judged_beside_the_others(house: House, tmp_path: Path) -> None:
    january = house.nights("2026-01-30T02:00", 2)
    february = house.nights("2026-02-01T02:00", 4)
    house.rules("daily: 3")
    assert house.fates(house.home / "2026-01", "-n") == dict.fromkeys(january, "removed")
    assert house.fates(house.home / "2026-01") == dict.fromkeys(january, "removed")
    assert house.left() == {"2026-02": february}
    # elsewhere it stands alone, and an increment may start from its newest point
    copied = tmp_path / "elsewhere"
    (house.home / "2026-02").rename(copied)
    assert house.fates(copied) == {
        february[0]: february[1], **dict.fromkeys(february[1:], "kept")
    }  # fmt: skip


def test_an_older_set_that_is_read_goes_later(house: House) -> None:
    house.nights("2026-01-30T02:00", 2)
    february = house.nights("2026-02-01T02:00", 4)
    house.rules("daily: 4")
    with reading.held(house.home / "2026-01"):
        assert "still being read" in house.run("prune", "vm1", code=3)
        assert files(house.home / "2026-01", suffix=".data")
    house.run("prune", "vm1")
    assert house.left() == {"2026-02": february}


def test_what_a_dead_run_left_goes_with_its_set(house: House) -> None:
    """The next run has begun another set, and never comes to sweep the old one."""
    house.nights("2026-01-30T02:00", 2)
    february = house.nights("2026-02-01T02:00", 4)
    old = house.home / "2026-01"
    for name in (".draft-dead", layout.SPARE):
        (old / name).mkdir()
        (old / name / layout.INTENT).write_bytes(chains.intent_for(3).pack())
    (old / ".draft-dead/vda.inc.data").write_bytes(b"x" * 4096)
    # the end of this one was cut short
    (house.home / "2025-12/points.1").mkdir(parents=True)
    (house.home / "2025-12" / layout.GENERATION).write_text("1\n")
    house.rules("daily: 4")
    house.run("prune", "vm1")
    assert [path.name for path in house.home.iterdir()] == ["2026-02"]
    assert house.left() == {"2026-02": february}


def test_all_domains(house: House) -> None:
    """One that is busy keeps nobody else's points from being removed."""
    house.nights("2026-02-01T02:00", 3)
    house.home.rename(house.repository / "vm2")
    house.numbers.clear()
    idents = house.nights("2026-02-01T02:00", 3)
    house.rules("daily: 2")
    with SetDirectory.open(house.repository / "vm2/2026-02").lock(owner="a run"):
        said = house.run("prune", "--all", code=BusyError.exit_code)
    assert "a run" in said
    assert house.left() == {"2026-02": idents[1:]}
    found = json.loads(house.run("prune", "--all", "--json"))["domains"]
    assert [(each["directory"][-3:], len(each["points"])) for each in found] == [
        ("vm1", 2), ("vm2", 3),
    ]  # fmt: skip
    for words in ([], ["vm1", "--all"]):
        assert "give the name of a domain" in house.run("prune", *words, code=2)


def test_an_unmounted_repository_is_no_empty_one(house: House) -> None:
    house.rules("daily: 2")
    main = house.root / "config/nbdbackup.yaml"
    text = main.read_text().replace("repository: {", f"repository: {{mount_point: {house.root}, ")
    assert "mount_point" in text
    main.write_text(text)
    for words in (["prune", "--all"], ["verify", "--all"], ["list", "--sizes"]):
        assert "nothing is mounted on" in house.run(*words, code=50)


def test_a_set_of_the_peer_is_left_alone(house: House, tmp_path: Path) -> None:
    path = tmp_path / "peer"
    path.mkdir()
    (path / "vda.full.data").write_bytes(b"x")
    house.rules("daily: 2")
    assert "holds no restore points of ours" in house.run("prune", path, code=50)
    assert files(path) == {"vda.full.data"}


# -- sets that are damaged, and one that has another name


def spoil(path: Path) -> None:
    """Flip a bit of the disk's first block."""
    data = bytearray(path.read_bytes())
    data[data.index(b"vda at")] ^= 1
    path.write_bytes(data)


def test_what_is_damaged_keeps_no_other_set(house: House) -> None:
    """Damage that a merge meets is told when the rest is done; what is noted is no failure."""
    january = house.nights("2026-01-20T02:00", 4)
    february = house.nights("2026-02-01T02:00", 8)
    house.rules("last: 6")
    house.run("protect", house.home / "2026-01", "--point", january[1])
    spoil(house.home / "2026-01/vda.inc.nbdbackup.202601.2.data")
    said = house.run("prune", "vm1", "--force", code=40)
    assert f"point={january[1]}" in said
    assert house.left() == {"2026-01": january, "2026-02": february[2:]}
    house.run("verify", house.home / "2026-02")
    house.run("verify", house.home / "2026-01", code=40)
    assert house.fates("vm1", "--force") == {
        **dict.fromkeys(january[:2], "kept"),
        **dict.fromkeys(january[2:], "removed"),
        **dict.fromkeys(february[2:], "kept"),
    }
    assert house.left()["2026-01"] == january[:2]
    reasons = json.loads(house.run("prune", "vm1", "-n", "--json"))["points"][0]["reasons"]
    assert reasons == [f"needed by {january[1]}, which is damaged"]
    # nothing leaves a set that lacks a file
    (house.home / "2026-02" / f"vmconfig.{february[-1]}.xml").unlink()
    house.rules("last: 4")
    house.run("verify", house.home / "2026-02", code=40)
    said = house.run("prune", "vm1", "--force", code=3)
    assert "nothing is removed from it, since it is damaged" in said
    assert house.left() == {"2026-01": january[:2], "2026-02": february[2:]}


@pytest.mark.parametrize("lost", ["generation", "points.1"])
def test_a_set_whose_manifests_are_lost_is_damaged_not_empty(house: House, lost: str) -> None:
    """A run begins another set beside it, and a prune goes on with the others."""
    house.nights("2026-01-20T02:00", 4)
    february = house.nights("2026-02-01T02:00", 4)
    house.rules("last: 6")
    house.run("prune", "vm1")
    path = house.home / "2026-01" / lost
    if path.is_dir():
        path.rename(house.root / "lost")
    else:
        path.write_bytes(b"")
    before = chains.tree(path.parent)
    house.rules("last: 3")
    assert "removed from it, since it is damaged: " in house.run("prune", "vm1", code=3)
    assert SetDirectory.open(house.home / "2026-02").load().points[0].id == february[1]
    assert chains.tree(path.parent) == before
    assert "director" in house.run("verify", path.parent, code=40)
    (house.home / "2026-02").rename(house.root / "away")
    assert home_of(house.repository, "vm1", points.UUID) == house.home
    planned = next_run(house.home, points.UUID, LevelPolicy(), NOW)
    assert (planned.directory, planned.is_new) == ("2026-02", True)
    # now it is the only one
    assert "no sound restore points" in house.run("list", "vm1", code=40)
    for verb in (["prune"], ["prune", "--scheduled"], ["verify", "--older-than", "1d"]):
        assert "director" in house.run(*verb, "vm1", code=40)
    for source in ("vm1", path.parent):
        code = 50 if source == "vm1" else 40
        out = house.root / "out"
        said = house.run("restore", source, "--point", february[0], "-o", out, code=code)
        assert "director" in said


def test_a_link_to_a_set_is_no_other_set(house: House) -> None:
    idents = house.nights("2026-02-01T02:00", 4)
    (house.home / "latest").symlink_to("2026-02")
    (house.home / "loop").symlink_to("loop")
    house.rules("last: 3")
    house.run("prune", house.home / "loop", code=50)
    assert house.fates(house.home / "latest", "-n") == house.fates("vm1", "-n")
    assert house.fates("vm1") == {idents[0]: idents[1], **dict.fromkeys(idents[1:], "kept")}


def test_a_set_that_was_moved_elsewhere_goes_behind_its_link(house: House) -> None:
    house.nights("2026-01-30T02:00", 2)
    february = house.nights("2026-02-01T02:00", 4)
    away = house.root / "away"
    (house.home / "2026-01").rename(away)
    (house.home / "2026-01").symlink_to(away)
    house.rules("last: 4")
    house.run("prune", "vm1")
    assert not away.exists()
    assert house.fates("vm1") == dict.fromkeys(february, "kept")


def test_what_gives_room_goes_where_nothing_can_be_merged(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    january = house.nights("2026-01-20T02:00", 5)
    february = house.nights("2026-02-01T02:00", 4)
    house.rules("last: 3")
    house.run("protect", house.home / "2026-01", "--point", january[2])
    with monkeypatch.context() as patch:
        patch.setattr(apply, "SPARE", 1 << 60)
        assert "merging needs up to" in house.run(
            "prune", "vm1", "--force", code=NoSpaceError.exit_code
        )
    assert house.left() == {"2026-01": january[:3], "2026-02": february}
    house.run("prune", "vm1", "--force")
    assert house.left() == {"2026-01": january[2:3], "2026-02": february[1:]}


def test_a_note_of_no_time_is_passed_over(house: House) -> None:
    idents = house.nights("2026-02-01T02:00", 3)
    house.run("verify", house.home / "2026-02")
    note = house.home / "2026-02" / layout.verified(idents[0])
    told = json.loads(note.read_text())
    note.write_text(json.dumps(told | {"verified": "0001-01-01T00:00:00+23:00"}))
    house.rules("last: 2")
    assert "is no time in UTC" in house.run("prune", "vm1", code=3)
    assert house.left() == {"2026-02": idents[1:]}


# -- the timer


def test_a_timer_of_a_domain_that_was_not_saved_yet(house: House) -> None:
    """A name that is mistyped at a terminal is an error, and so is a repository that is away."""
    house.rules("last: 2")
    assert "nothing was removed" in house.run("prune", "--scheduled", "vm1")
    house.home.mkdir(parents=True)
    assert "nothing was removed" in house.run("prune", "--scheduled", "vm1")
    for name in ("vm1", "vm"):
        house.run("prune", name, code=50)
    (house.root / "config/nbdbackup.yaml").write_text(
        f"repository: {{path: {house.repository}, marker: here}}\nretention: {{last: 2}}\n"
    )
    assert "marker" in house.run("prune", "--scheduled", "vm1", code=50)
    for words in (["--all"], [house.home]):
        assert "takes the name of a domain" in house.run("prune", "--scheduled", *words, code=2)


def test_a_timer_of_a_name_that_two_domains_have_had(house: House) -> None:
    older = house.nights("2026-01-20T02:00", 3)
    (house.home).rename(house.repository / "aside")
    other = "0f0f0f0f-9d0f-4a8e-8a5e-0f2a3f9b1c77"
    newer = [house.save(f"2026-02-0{day}T02:00", uuid=other) for day in (1, 2, 3)]
    house.home.rename(house.repository / f"vm1@{other[:8]}")
    (house.repository / "aside").rename(house.home)
    house.rules("last: 2")
    assert "means more than one domain" in house.run("prune", "vm1", code=2)
    house.run("prune", "--scheduled", "vm1")
    assert house.left() == {"2026-01": older[1:]}
    home, house.home = house.home, house.repository / f"vm1@{other[:8]}"
    assert house.left() == {"2026-02": newer[1:]}
    # one that can't be read keeps only what has its name
    (home / "2026-01/logs").symlink_to("/")
    house.home = house.repository / "vm9"
    idents = house.nights("2026-02-01T02:00", 3)
    assert "is a symbolic link" in house.run("prune", "--all", code=50)
    assert house.left() == {"2026-02": idents[1:]}
