"""What ``status`` keeps of sets: used while the same bytes lie there, and no longer."""

import json
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.model.proof import Proof, content_of
from nbdbackupd.ops.retention import history
from nbdbackupd.ops.status import status, summaries
from nbdbackupd.repo import protected, verified
from nbdbackupd.repo.protected import Protection
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.systemd import units
from tests.component.test_status import NOW, Host
from tests.component.test_status import host as host  # noqa: PLC0414 - a fixture

pytestmark = pytest.mark.component
RULES = "retention: {last: 2}\n"
STRANGE = "points/000009-p9.json"
Change = Callable[[Host, Path], object]


@pytest.fixture
def fleet(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Two domains, one that libvirt knows; rules that want half of the points away."""
    monkeypatch.setattr(units, "BOOTED", host.root / "none")
    host.libvirt("vm1")
    host.main(RULES)
    for name in ("vm1", "vm2"):
        for hours in range(4, 0, -1):
            host.save(name, NOW - timedelta(hours=hours))
    return host


def kept(host: Host) -> Path:
    return host.root / "state" / summaries.NAME


def forget(host: Host) -> None:
    kept(host).unlink(missing_ok=True)


def proof(root: Path, number: int, *damage: str) -> None:
    point = SetDirectory.open(root).load().points[number]
    verified.write(root, Proof(
        point=point.id, content=content_of(point), verified="2026-02-10T11:00:00Z", size=1,
        damage=damage,
    ))  # fmt: skip


def protect(root: Path) -> None:
    protected.write(root, Protection(point="p1", until="2026-02-10T13:00:00Z"))


def flip(root: Path) -> None:
    """Damage that no size, time or inode tells of."""
    path = sorted((root / "points").iterdir())[1]
    was = path.stat()
    data = bytearray(path.read_bytes())
    data[99] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def refuse(*_: object) -> Any:
    raise AssertionError("it is known")


def test_what_is_known_is_not_found_out_again(fleet: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fleet.status()
    assert {each["unwanted_points"] for each in found.values()} == {2}
    monkeypatch.setattr(status, "stored", refuse)
    monkeypatch.setattr(history, "unwanted", refuse)
    assert fleet.status() == found
    assert fleet.status("vm1") == {"vm1": found["vm1"]}
    assert fleet.status() == found


CHANGES: dict[str, Change] = {
    "damage": lambda _, root: flip(root),
    "lost": lambda _, root: max((root / "points").iterdir()).unlink(),
    "swapped": lambda _, root: min((root / "points").iterdir()).rename(root / STRANGE),
    "no set": lambda _, root: shutil.rmtree(root),
    "one more": lambda host, _: host.save("vm1", NOW),
    "another set": lambda host, _: host.save("vm1", NOW, set_name="2026-03"),
    "older set": lambda host, _: host.save("vm1", NOW - timedelta(days=50)),
    "generation": lambda _, root: (root / "generation").write_bytes(b"1\n"),
    "verified": lambda _, root: proof(root, 0),
    "damaged blocks": lambda _, root: proof(root, 3, "block 7"),
    "protected": lambda _, root: protect(root),
    "rules": lambda host, _: host.main("retention: {last: 1}\n"),
    "link": lambda _, root: link(root / "points"),
    "pipe": lambda _, root: os.mkfifo(root / STRANGE),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_is_seen(fleet: Host, what: str) -> None:
    before = fleet.status()
    CHANGES[what](fleet, fleet.repository / "vm1/2026-02")
    found = fleet.status()
    forget(fleet)
    assert fleet.status() == found
    assert found["vm1"] != before["vm1"]
    assert (found["vm2"] != before["vm2"]) == (what == "rules")


def test_each_directory_has_its_own(fleet: Host) -> None:
    """A copy with the same bytes is another one."""
    fleet.status()
    shutil.copytree(fleet.repository / "vm2", fleet.repository / "vm3")
    assert fleet.status()["vm3"]["set"] == str(fleet.repository / "vm3/2026-02")


def test_a_protection_that_runs_out(fleet: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    protect(fleet.repository / "vm1/2026-02")
    assert fleet.status()["vm1"]["unwanted_points"] == 1
    monkeypatch.setattr("nbdbackupd.app.context.now", lambda: NOW + timedelta(hours=2))
    assert fleet.status()["vm1"]["unwanted_points"] == 2


def test_a_point_of_the_future(fleet: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.save("vm1", NOW + timedelta(hours=3))
    assert fleet.status()["vm1"]["unwanted_points"] == 0
    monkeypatch.setattr("nbdbackupd.app.context.now", lambda: NOW + timedelta(hours=4))
    assert fleet.status()["vm1"]["unwanted_points"] == 3


def test_a_set_that_changes_while_it_is_read(fleet: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real = status.stored

    def slow(directory: Path, *more: Any) -> status.Stored:
        found = real(directory, *more)
        if directory.name == "vm1":
            monkeypatch.setattr(status, "stored", real)
            fleet.save("vm1", NOW)
        return found

    monkeypatch.setattr(status, "stored", slow)
    fleet.run("status")
    assert fleet.status()["vm1"]["points"] == 5


def test_what_is_kept_is_believed_only_as_it_was_written(fleet: Host) -> None:
    before = fleet.status()
    path = kept(fleet)
    sound = path.read_bytes()
    lied = sound.replace(b'"points": 4', b'"points": 7')
    assert lied != sound
    body = json.dumps({**json.loads(sound.partition(b"\n")[2]), "program": "0.0.9"}).encode()
    older = summaries._digest(body) + b"\n" + body
    for data in (lied, sound[:-5], b"", b"\xff\n", older):
        path.write_bytes(data)
        assert fleet.status() == before
        assert path.read_bytes() != data
    forged = lied.partition(b"\n")[2]
    for mode, points in ((0o600, 7), (0o620, 4), (0o602, 4)):
        path.write_bytes(summaries._digest(forged) + b"\n" + forged)
        path.chmod(mode)
        assert fleet.status()["vm1"]["points"] == points
        path.chmod(0o600)


def test_nothing_is_made_where_no_state_is(fleet: Host) -> None:
    shutil.rmtree(fleet.root / "state")
    fleet.status()
    assert not (fleet.root / "state").exists()
