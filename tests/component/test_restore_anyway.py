"""What a restore does not depend on: a sound configuration, paths, what a set says by the way."""

import json
from pathlib import Path

import pytest

from nbdbackupd.ops.restore import restore
from nbdbackupd.ops.restore.restore import RestoreRequest
from nbdbackupd.ops.verify import verify
from nbdbackupd.ops.verify.verify import VerifyRequest
from tests.component.test_restore import built
from tests.lib.ctl import Ctl
from tests.lib.sets import SetBuilder, read_image

pytestmark = pytest.mark.component


@pytest.fixture
def ctl(tmp_path: Path) -> Ctl:
    return Ctl("test:///default", tmp_path / "ctl")


@pytest.fixture
def repository(tmp_path: Path) -> SetBuilder:
    """A repository with one set of domain vm1, of which a sound file of a domain tells."""
    home = tmp_path / "repository" / "vm1"
    home.mkdir(parents=True)
    made = built(home / "2026-01-31")
    etc = tmp_path / "etc"
    (etc / "domains.d").mkdir(parents=True)
    (etc / "nbdbackup.yaml").write_text("repository:\n  path: [broken\n")
    (etc / "domains.d" / "vm1.yaml").write_text(
        f"match:\n  name: vm1\nrepository:\n  path: {tmp_path / 'repository'}\n"
    )
    for path in (etc / "nbdbackup.yaml", etc / "domains.d" / "vm1.yaml"):
        path.chmod(0o600)
    return made


@pytest.mark.parametrize("words", [("restore", "-o", "OUT"), ("list",), ("show",), ("verify",)])
def test_a_broken_configuration_names_the_way(
    repository: SetBuilder, tmp_path: Path, ctl: Ctl, words: tuple[str, ...]
) -> None:
    """R-3: by name it is refused with the path of the set; by that path nothing is asked of it."""
    verb, *more = (str(tmp_path / "out") if word == "OUT" else word for word in words)
    etc = ("--config-dir", str(tmp_path / "etc"))
    told = ctl(verb, "vm1", *more, *etc, code=10).stderr
    assert "nbdbackup.yaml" in told
    assert told.rstrip().endswith(f"give the path of the set in place of vm1: {repository.path}")
    # these sets do not say how the images were made
    ctl(verb, str(repository.path), *more, *etc, code=3 if verb == "restore" else 0)


def test_without_a_set_the_default_place_is_named(tmp_path: Path, ctl: Ctl) -> None:
    """R-3: which repository a broken file meant is not known."""
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "nbdbackup.yaml").write_text(": :\n\t-")
    told = ctl("restore", "nobody-has-it", "-o", tmp_path / "out", "--config-dir", etc, code=10)
    assert "such as /var/lib/nbdbackup/repository/nobody-has-it/NAME" in told.stderr


def test_a_sequence_of_names_in_a_set(tmp_path: Path, ctl: Ctl) -> None:
    """R-4: as virtnbdrestore has it; the report names the point."""
    made = built(tmp_path / "set")
    names = ",".join(point.disk("vda").file for point in made.points[:4])
    done = ctl("restore", made.path, "--sequence", names, "-o", tmp_path / "out", "--json")
    report = json.loads(done.stdout)
    # the sets of these tests are as the peer's in that: no stream says its point's id
    assert report["point"] == made.points[3].checkpoint
    assert read_image(tmp_path / "out/vda.qcow2", "qcow2") == made.images[3]["vda"]
    strange = ctl("restore", made.path, "--sequence", "/etc/passwd", "-o", tmp_path / "out", code=2)
    assert "/etc/passwd is no file of" in strange.stderr
    ctl("restore", made.path, "--sequence", names, "--point", "x", "-o", tmp_path / "o", code=2)


@pytest.mark.parametrize("damage", ["garbage", "other format", "digest", "missing"])
def test_options_of_an_image_are_no_condition(tmp_path: Path, damage: str) -> None:
    """R-5: what a restore can do without is a warning and a default."""
    info = b'{"format": "vmdk", "virtual-size": 1}' if damage == "other format" else b"\xff{]"
    made = built(tmp_path / "set", image_info=info)
    for path in made.path.glob("*.qcow.json"):
        if damage == "missing":
            path.unlink()
        elif damage == "digest":
            path.write_bytes(info[::-1])
    report = restore.run(
        RestoreRequest(source=made.path, output=tmp_path / "out"),
        progress=lambda *_: None, cancelled=lambda: None,
    )  # fmt: skip
    for disk in report.disks:
        assert read_image(disk.path, "qcow2") == made.images[-1][disk.target]
    assert len(report.warnings) == len(report.disks)
    assert all("qemu-img's own options" in text for text in report.warnings)
    proof = verify.run(
        VerifyRequest(path=made.path, workers=1), progress=lambda *_: None, cancelled=lambda: None
    )
    # a file that is not what the manifest says is damage; one that was garbage at once is told
    assert bool(proof.problems) == (damage in ("digest", "missing"))
    assert bool(proof.warnings) != bool(proof.problems)


def test_verify_of_useless_options_is_no_plain_success(tmp_path: Path, ctl: Ctl) -> None:
    """R-5, W-1: a warning has status 3."""
    made = built(tmp_path / "set", image_info=b"garbage")
    done = ctl("verify", made.path, code=3)
    assert "warning: disk vda, point point1: how the original was made can't be read" in done.stderr
