"""A prune of several sets that is killed at any step, also between two of them."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nbdbackupd.app import context as app_context
from nbdbackupd.repo import written
from nbdbackupd.repo.set_directory import SetDirectory
from tests.lib import chains
from tests.lib.house import House
from tests.lib.rigged import RiggedCtl

pytestmark = pytest.mark.component

RULES = "daily: 7, weekly: 1, monthly: 1"
SETS = 3
"""One that goes as a whole, one whose tail goes, one in which points are merged."""

FAULTS = (
    *(f"KILL@set-removal-applied#{number}" for number in range(1, SETS + 1)),
    *(f"KILL+@set-removal-applied#{number}" for number in range(1, SETS + 1)),
    *(f"KILL@removals-swept#{number}" for number in range(1, SETS + 1)),
    *(f"KILL+@removals-swept#{number}" for number in range(1, SETS + 1)),
    *(f"KILL@generation-switched#{number}" for number in range(1, SETS + 1)),
    *(f"KILL+@generation-switched#{number}" for number in range(1, SETS + 1)),
    "KILL@empty-set-removed#1",
    "KILL+@empty-set-removed#1",
    *(f"KILL+@directory-synced#{number}" for number in range(2, 32, 5)),
)
SLOW = "SLOW0.05@directory-synced#1"
ROUNDS = int(os.environ.get("NBDBACKUP_KILLS", "8"))


@pytest.fixture(autouse=True)
def noon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("NBDBACKUP_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(app_context, "now", lambda: datetime(2026, 2, 10, 12, 0, 0, tzinfo=UTC))


@pytest.fixture
def house(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> House:
    house = House(tmp_path, capsys)
    house.nights("2025-12-01T02:00", 4)
    house.nights("2026-01-25T02:00", 7)
    house.nights("2026-02-01T02:00", 10)
    house.rules(RULES)
    for path in house.home.iterdir():
        # what a merge has written anew is not to seem somebody else's
        assert written.note(tmp_path / "state", *SetDirectory.open(path).load().points)
    return house


def expected(target: str, ident: str) -> str:
    """The SHA-256 of a disk at a point: ``chains.fill`` writes the first block anew each time."""
    block = f"{target} at {ident}".encode().ljust(chains.BLOCK, b".")
    return hashlib.sha256(block.ljust(chains.DISK_SIZE, b"\0")).hexdigest()


def check_restored(house: House) -> None:
    """Each point that is there is what it was, and none of it seems changed (status 3)."""
    for name, idents in house.left().items():
        for ident in idents:
            output = house.root / "restored"
            words = ("--point", ident, "-o", output, "--format", "raw")
            told = json.loads(house.run("restore", house.home / name, "--json", *words))
            for disk in told["disks"]:
                found = hashlib.sha256(Path(disk["path"]).read_bytes()).hexdigest()
                assert found == expected(disk["target"], ident), (name, ident)
            assert len(told["disks"]) == 2
            shutil.rmtree(output)


def names(house: House) -> dict[str, bool]:
    """All that lies in the repository, and whether it is a directory."""
    return {str(path.relative_to(house.home)): path.is_dir() for path in house.home.rglob("*")}


def prune(house: House, *, fault: str = "", seconds: float = 0.0) -> int:
    """Run the verb as a process of its own, perhaps until it is killed; its status."""
    ctl = RiggedCtl("qemu:///system", house.root, {"TZ": "UTC"})
    words = ["--config-dir", str(house.root / "config")]
    with (
        ctl.rigged(*([fault] if fault else [])),
        ctl.start("prune", "vm1", "--force", *words) as process,
    ):
        if seconds:
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            process.kill()
        _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    return process.returncode


def kill_and_go_on(house: House, tmp_path: Path, *, fault: str = "", seconds: float = 0.0) -> int:
    """Nothing that a rule wants is lost, now or after the next prune, which leaves nothing."""
    untouched = tmp_path / "untouched"
    shutil.copytree(house.home, untouched, copy_function=shutil.copy2)
    points = house.left()
    assert prune(house) == 0
    kept, wanted = house.left(), names(house)
    assert [len(each) for each in kept.values()] == [1, 8]
    shutil.rmtree(house.home)
    untouched.rename(house.home)

    status = prune(house, fault=fault, seconds=seconds)
    now = house.left()
    for name, idents in kept.items():
        assert set(idents) <= set(now[name]) <= set(points[name])
    check_restored(house)
    house.run("prune", "vm1", "--force")
    assert house.left() == kept
    assert names(house) == wanted
    check_restored(house)
    house.run("verify", house.home / "2026-02")
    return status


@pytest.mark.parametrize("fault", FAULTS)
def test_killed_at_a_step(house: House, tmp_path: Path, fault: str) -> None:
    assert kill_and_go_on(house, tmp_path, fault=fault) == -signal.SIGKILL


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_killed_at_any_moment(house: House, tmp_path: Path, seed: int) -> None:
    """It is slowed, so that most of these moments are within its work."""
    seconds = random.Random(seed).uniform(0.4, 2.4)
    status = kill_and_go_on(house, tmp_path, fault=SLOW, seconds=seconds)
    assert status in {0, -signal.SIGKILL}
