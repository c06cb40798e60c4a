"""Metrics files: the text format, to the letter, and what a run changes in them."""

import os
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nbdbackupd.errors import FormatError, RepositoryError
from nbdbackupd.model.chain import DiskMode, Level
from nbdbackupd.ops.sets.holdings import Holdings
from nbdbackupd.ops.sets.sizes import FileSystem
from nbdbackupd.ops.status import metrics
from nbdbackupd.ops.status.metrics import RunFacts
from tests.lib import points

NOW = datetime(2026, 2, 1, 3, 0, 0, 500000, tzinfo=UTC)
HOSTILE = 'a "quoted"\\ back\nslash, {x="y"} ü/../%'


def parse(path: Path) -> dict[str, tuple[dict[str, str], float]]:
    """Prometheus' text format 0.0.4, nothing optional allowed; each metric once."""
    text = path.read_bytes().decode("utf-8")
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    assert len(lines) % 3 == 0
    found: dict[str, tuple[dict[str, str], float]] = {}
    for about, kind, sample in zip(*[iter(lines)] * 3, strict=True):
        name = re.fullmatch(r"# HELP ([a-z_:][a-z0-9_:]*) [^\\]+", about)
        assert name is not None, about
        is_counter = name[1].endswith("_total")
        assert kind == f"# TYPE {name[1]} {'counter' if is_counter else 'gauge'}"
        got = re.fullmatch(
            r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (-?\d+(?:\.\d+)?)', sample
        )
        assert got is not None, sample
        assert got[1] == name[1]
        assert got[1] not in found
        labels = {
            key: re.sub(r"\\(.)", lambda each: "\n" if each[1] == "n" else each[1], value)
            for key, value in re.findall(r'([a-z]+)="((?:[^"\\]|\\.)*)"', got[2] or "")
        }
        found[got[1]] = labels, float(got[3])
    return found


def values(path: Path) -> dict[str, float]:
    return {name.removeprefix("nbdbackup_"): value for name, (_, value) in parse(path).items()}


def good(domain: str = "vm1") -> RunFacts:
    return RunFacts(
        domain=domain, ended=NOW, seconds=12.25, exit_status=0, succeeded=True,
        point=points.full_point(), stored_bytes=9, chain_points=1,
    )  # fmt: skip


def test_a_good_run(tmp_path: Path) -> None:
    path = metrics.record(tmp_path, good())
    assert values(path) == {
        "last_run_timestamp_seconds": NOW.timestamp(),
        "last_run_duration_seconds": 12.25,
        "last_run_exit_status": 0,
        "last_run_success": 1,
        "last_success_timestamp_seconds": NOW.timestamp(),
        "last_point_timestamp_seconds": datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC).timestamp(),
        "last_point_duration_seconds": 12.25,
        "last_point_stored_bytes": 9,
        "last_point_data_bytes": 4096,
        "last_point_full": 1,
        "last_point_demoted_disks": 0,
        "chain_points": 1,
        "runs_total": 1,
        "failed_runs_total": 0,
        "demotions_total": 0,
    }
    assert all(labels == {"domain": "vm1"} for labels, _ in parse(path).values())


def test_a_failed_run_keeps_what_the_last_good_one_was(tmp_path: Path) -> None:
    path = metrics.record(tmp_path, good())
    before = values(path)
    failed = RunFacts(
        domain="vm1", ended=NOW + timedelta(days=1), seconds=3.0, exit_status=20, succeeded=False
    )
    assert metrics.record(tmp_path, failed) == path
    assert values(path) == before | {
        "last_run_timestamp_seconds": NOW.timestamp() + 86400,
        "last_run_duration_seconds": 3,
        "last_run_exit_status": 20,
        "last_run_success": 0,
        "runs_total": 2,
        "failed_runs_total": 1,
    }


def test_a_first_run_that_fails_has_no_success(tmp_path: Path) -> None:
    failed = replace(good(), succeeded=False, exit_status=30, point=None)
    found = values(metrics.record(tmp_path, failed))
    assert "last_success_timestamp_seconds" not in found
    assert not [name for name in found if "point" in name]


def test_a_run_that_rightly_made_no_point(tmp_path: Path) -> None:
    path = metrics.record(tmp_path, good())
    later = replace(good(), ended=NOW + timedelta(hours=1), point=None)
    before = values(path)
    after = values(metrics.record(tmp_path, later))
    assert after["last_success_timestamp_seconds"] == NOW.timestamp() + 3600
    assert after["last_point_timestamp_seconds"] == before["last_point_timestamp_seconds"]
    assert after["chain_points"] == 1


def test_demotions_are_counted(tmp_path: Path) -> None:
    full = replace(points.full_point(), digest="0" * 64)
    disk = replace(points.disk_point("vda", "x", b"d", b"i"), reason="its bitmap is lost")
    raw = replace(disk, target="vdb", format="raw")
    sound = replace(disk, target="vdc", mode=DiskMode.DELTA, reason="")
    increment = replace(points.child_of(full), disks=(disk, raw, sound))
    assert increment.level is Level.INC
    facts = replace(good(), point=increment, chain_points=2)
    metrics.record(tmp_path, facts)
    found = values(metrics.record(tmp_path, facts))
    assert found["last_point_demoted_disks"] == 1
    assert found["demotions_total"] == 2
    assert found["last_point_full"] == 0


def test_hostile_names(tmp_path: Path) -> None:
    first = metrics.record(tmp_path, good(HOSTILE))
    second = metrics.record(tmp_path, good(HOSTILE.replace("/", "_")))
    path = metrics.record(tmp_path, good(HOSTILE))
    assert first == path != second
    assert path.parent == tmp_path
    assert values(path)["runs_total"] == 2
    assert {labels["domain"] for labels, _ in parse(path).values()} == {HOSTILE}
    assert sorted(os.listdir(tmp_path)) == sorted([first.name, second.name])  # noqa: PTH208
    with pytest.raises(FormatError):
        metrics.record(tmp_path, good(""))


@pytest.mark.parametrize(
    "junk", [b"", b"\xff\xfe", b'nbdbackup_runs_total{domain="vm1"} NaN\n' * 3, b"x" * 100000,
             b'nbdbackup_runs_total{domain="vm1"} many\nnbdbackup_other{domain="vm1"} 7\n'],
)  # fmt: skip
def test_a_damaged_file_is_replaced(tmp_path: Path, junk: bytes) -> None:
    path = metrics.record(tmp_path, good())
    path.write_bytes(junk)
    assert values(metrics.record(tmp_path, good()))["runs_total"] == 1


def test_others_may_read_it_whatever_the_umask_is(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        path = metrics.record(tmp_path, good())
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="missing"):
        metrics.record(tmp_path / "missing", good())
    assert not (tmp_path / "missing").exists()


def test_the_host(tmp_path: Path) -> None:
    path = metrics.record_host(tmp_path, domains=5, unprotected=2, moment=NOW)
    assert path.name == "nbdbackup.prom"
    assert values(path) == {
        "domains": 5, "unprotected_domains": 2, "host_timestamp_seconds": NOW.timestamp()
    }  # fmt: skip
    assert all(not labels for labels, _ in parse(path).values())


def test_what_sets_hold(tmp_path: Path) -> None:
    held = Holdings(
        stored_bytes=5, points=3, verified_points=2, verified="2026-02-01T00:00:00Z", damage=("x",)
    )
    path = metrics.record_sets(tmp_path, "vm1", held)
    assert values(path) == {
        "stored_bytes": 5,
        "points": 3,
        "verified_points": 2,
        "damaged_points": 1,
        "last_verified_timestamp_seconds": datetime(2026, 2, 1, tzinfo=UTC).timestamp(),
    }
    assert set(values(metrics.record_sets(tmp_path, "vm2", Holdings()))) == set(values(path)) - {
        "last_verified_timestamp_seconds"
    }
    metrics.record(tmp_path, good())
    gone = metrics.forget_others(tmp_path, ["vm1"])
    assert [each.name for each in gone] == ["nbdbackup_sets-vm2.prom"]
    assert path.exists()


def test_room_of_repositories(tmp_path: Path) -> None:
    places = [FileSystem(path='/a"b', size=9, free=4), FileSystem(path="/c", size=7, free=0)]
    text = metrics.record_repositories(tmp_path, places).read_text()
    assert 'nbdbackup_repository_free_bytes{path="/a\\"b"} 4\n' in text
    assert 'nbdbackup_repository_size_bytes{path="/c"} 7\n' in text
    assert text.count("# HELP") == 2
