"""Push mode: QEMU writes qcow2 images, each on the one before, and any QEMU opens them."""

import json
import subprocess
from pathlib import Path

import pytest

from nbdbackupd.errors import (
    WARNED,
    DomainError,
    IntegrityError,
    NoSpaceError,
    RepositoryError,
    SourceError,
    UsageError,
)
from tests.lab.command import run
from tests.lab.compare import first_difference
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest
from tests.lib.rigged import RiggedCtl
from tests.lib.witness import Witness

pytestmark = pytest.mark.system
SMALL_MIB = 3
DISKS = (
    # of one size: each may be mistaken for the other
    DiskSpec(target="vda", size=8 * MIB + 512),
    DiskSpec(target="vdb", size=8 * MIB + 512, cluster_size=4096),
)


@pytest.fixture(scope="module")
def guest(lab: DaemonLab) -> Guest:
    guest = lab.guest("vm1", DISKS)
    guest.start()
    return guest


@pytest.fixture
def witness(ctl: RiggedCtl, guest: Guest, request: pytest.FixtureRequest) -> Witness:
    """A set where QEMU's account gets through; the checkpoints of earlier ones are gone."""
    directory = guest.places.images / request.node.name
    directory.mkdir()
    directory.chmod(0o711)
    witness = Witness(ctl, guest, directory)
    witness.delete_checkpoints()
    witness.fill(4 * MIB)
    return witness


def check_images(witness: Witness) -> None:
    """Plain qemu-img sees each point in its newest image, and names nothing else below it."""
    for point in witness.points():
        for target, reference in witness.references(point["id"]).items():
            level = point["level"]
            ident = {"full": "", "inc": f".{point['checkpoint']}"}.get(level, f".{point['id']}")
            image = witness.path / f"{target}.{level}{ident}.qcow2"
            assert image.stat().st_mode & 0o777 == 0o600
            run(["qemu-img", "check", "-q", "-f", "qcow2", image])
            plain = witness.path.parent / "plain.raw"
            run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, plain])
            assert first_difference(reference, plain) is None, image
            info = json.loads(
                subprocess.run(
                    ["qemu-img", "info", "--output=json", image], check=True, capture_output=True
                ).stdout
            )
            assert "/" not in info.get("backing-filename", "")


def test_a_chain_of_images(witness: Witness, guest: Guest, tmp_path: Path) -> None:
    for level in ("full", "inc", "copy", "auto", "diff"):
        witness.change()
        point = witness.run("--push", "-l", level).json["point"]
        assert point["warnings"] == []
        assert {disk["layout"] for disk in point["disks"]} == {"qcow2"}
        delta = level not in ("full", "copy")
        assert {disk["mode"] for disk in point["disks"]} == {"delta" if delta else "full"}
        assert (point["stored_bytes"] < 4 * MIB) == delta
    witness.assert_clean()
    check_images(witness)
    witness.check_all()
    ctl = witness.ctl
    # what hangs on them stays as it is
    newer = witness.points()[3]["id"]
    told = ctl("merge", witness.path, "--point", newer, code=RepositoryError.exit_code).stderr
    assert "images that QEMU wrote are not merged" in told
    # the newest increments leave without a merge
    ctl("remove", witness.path, "--point", witness.points()[-1]["id"])
    assert len(witness.points()) == 4
    check_images(witness)
    # neither way is mixed with the other
    told = ctl("backup", "vm1", "-o", witness.path, code=RepositoryError.exit_code).stderr
    assert "was begun with --push" in told
    other = Witness(ctl, guest, tmp_path, "stream")
    other.run("-l", "copy")
    code = RepositoryError.exit_code
    told = ctl("backup", "vm1", "-o", other.path, "--push", "-l", "copy", code=code).stderr
    assert "was begun without --push" in told
    for options in (("-z",), ("-t", "raw"), ("--limit-rate", "1M"), ("--extents", "nbdinfo")):
        code = UsageError.exit_code
        ctl("backup", "vm1", "-o", witness.path, "--push", *options, code=code)
    # one byte, of a table that no restore asks
    image = witness.path / "vda.full.qcow2"
    with image.open("r+b") as file:
        file.seek(9)
        file.write(b"\x01")
    told = ctl("verify", witness.path, code=IntegrityError.exit_code).stdout
    assert "SHA-256 of the file is not the manifest's" in told


KILLS = (
    # the first is the look at images of one size
    "KILL+@job-begun#2",
    "KILL@image-taken#1",
    "KILL+@image-taken#2",
    "KILL@point-published#1",
    "KILL+@os-rename#9",
)


def test_killed(witness: Witness) -> None:
    """One long chain, so that what one kill leaves could harm all that come later."""
    witness.run("--push", "-l", "full")
    assert isinstance(witness.ctl, RiggedCtl)
    for fault in KILLS:
        before = len(witness.points())
        witness.change()
        with witness.ctl.rigged(fault):
            witness.run("--push", code=-9)
        assert len(witness.points()) == before
        witness.change()
        point = witness.run("--push").json["point"]
        assert (point["level"], point["warnings"]) == ("inc", []), fault
        witness.assert_clean()
    check_images(witness)
    witness.check_all()


def test_an_image_copied_over_that_of_another_disk(witness: Witness, guest: Guest) -> None:
    for target, pattern in (("vda", 1), ("vdb", 2)):
        guest.write(target, 5 * MIB, 64 * 1024, pattern)
    witness.run("--push", "-l", "full")
    guest.stop()
    guest.image("vda").write_bytes(guest.image("vdb").read_bytes())
    guest.start()
    point = witness.run("--push", code=WARNED).json["point"]
    assert {disk["target"]: disk["mode"] for disk in point["disks"]} == {
        "vda": "full",
        "vdb": "delta",
    }
    assert "that of disk vdb" in point["warnings"][0]
    witness.assert_clean()
    check_images(witness)
    witness.check_all()


def test_a_full_target(witness: Witness, guest: Guest, small: Path) -> None:
    """The run fails, the guest goes on, and the old base is good for the next one."""
    witness.run("--push", "-l", "full")
    path = small / "set"
    result = witness.ctl("backup", guest.name, "--push", "-o", path, code=None)
    # QEMU finds no space, or our own file does
    assert result.code in {NoSpaceError.exit_code, SourceError.exit_code}, result.stderr
    assert "nothing was saved" in result.stderr or "No space left" in result.stderr
    assert list(path.glob("*.qcow2")) == []
    assert list(path.glob(".draft*")) == []
    assert not guest.is_paused()
    witness.change()
    assert witness.run("--push").json["point"]["level"] == "inc"
    witness.assert_clean()
    witness.check_all()


def test_a_guest_that_is_off(witness: Witness, lab: DaemonLab) -> None:
    lab.guest("off", DISKS[:1])
    told = witness.ctl("backup", "off", "-o", witness.path, "--push", code=DomainError.exit_code)
    assert "start it, or leave --push out" in told.stderr
