"""Targets that are no ordinary file system: what they can't do costs as little as it may."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest
from tests.lib.odd_files import mounted
from tests.lib.scene import WARNED, Scene, assert_same, scene_of

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]
REPOSITORY = 50


@pytest.fixture(scope="module")
def guest(lab: DaemonLab) -> Guest:
    guest = lab.guest("Odd", [DiskSpec(size=8 * MIB)])
    guest.start()
    return guest


@pytest.fixture
def here(lab: DaemonLab, guest: Guest, tmp_path: Path) -> Iterator[Scene]:
    """The shared guest, with sets of the test's own."""
    here = scene_of(lab, tmp_path, guest)
    yield here
    for name in here.checkpoints():
        lab.virsh("checkpoint-delete", guest.name, name)


@pytest.mark.parametrize("oddities", ["fold", "nochmod", "nodelete", "noreplace nodirsync"])
def test_a_chain_on_it_is_whole(here: Scene, oddities: str) -> None:
    """D-4, D-5, D-6: each run says "saved" only of what others find there, and it is exact."""
    with mounted(here.directory / "below", here.directory / "at", *oddities.split()) as at:
        into = at / "Some Set"
        for number in range(3):
            here.guest.write("vda", number * MIB, MIB // 2, 0xA0 + number)
            saved = here.save("-l", "auto", into=into)
            assert saved.point["level"] == ("inc" if number else "full")
        hidden = {each.name for each in into.iterdir() if each.name.startswith(".")}
        assert hidden == {".lock", ".reading", *([".spare"] if oddities == "nodelete" else [])}
        here.prove_all()
        if oddities == "nochmod":
            (image,) = here.ctl.restore(into, at / "out").values()
            assert image.stat().st_mode & 0o077 == 0
    # and what is there is a set wherever it is copied to
    copied = here.directory / "copied"
    shutil.copytree(next((here.directory / "below").glob("[Ss]ome [Ss]et")), copied)
    assert [each["id"] for each in here.ctl.points(copied)] == [each.id for each in here.history]
    here.ctl("verify", copied)


def test_a_set_with_another_name_in_the_list_is_there(here: Scene) -> None:
    """D-4, L-1: where case is folded, a chain's set is not taken for gone."""
    with mounted(here.directory / "below", here.directory / "at", "fold") as at:
        here.save("-l", "full", into=at / "Some Set")
        (told,) = here.save("-l", "full").report["notes"]
        assert f"for set {at / 'Some Set'}; if no backup goes there any more" in told


def test_where_nothing_is_ever_replaced(here: Scene) -> None:
    """D-6: only the peer's list of checkpoints stays as it was, which is told."""
    oddities = ("nodelete", "noreplace")
    with mounted(here.directory / "below", here.directory / "at", *oddities) as at:
        for number in range(3):
            here.guest.write("vda", number * MIB, MIB // 2, 0xB0 + number)
            references = here.references()
            code = WARNED if number else 0
            done = here.ctl("backup", here.guest.name, "-o", at / "set", code=code)
            assert ("the list of checkpoints is not written" in done.stderr) == (number > 0)
        assert [each["level"] for each in here.ctl.points(at / "set")] == ["full", "inc", "inc"]
        (image,) = here.ctl.restore(at / "set", here.directory / "out").values()
        assert_same(image, "qcow2", references["vda"])


def test_a_run_that_dies_where_nothing_is_removed(here: Scene) -> None:
    """D-6: what it leaves is told, and stops nobody."""
    with mounted(here.directory / "below", here.directory / "at", "nodelete") as at:
        into = at / "set"
        here.save("-l", "full", into=into)
        with here.ctl.rigged("KILL@disk-copied#1"):
            here.ctl("backup", here.guest.name, "-o", into, code=-9)
        here.guest.write("vda", 5 * MIB, MIB, 0xEE)
        references = here.references()
        done = here.ctl("backup", here.guest.name, "-o", into, "--json", code=WARNED)
        assert "can't be removed" in done.stderr
        assert done.json["point"]["level"] == "inc"
        (image,) = here.ctl.restore(into, here.directory / "out").values()
        assert_same(image, "qcow2", references["vda"])


@pytest.mark.parametrize("kind", ["nochmod", "noheed"])
def test_files_that_everybody_may_read(here: Scene, kind: str) -> None:
    """D-5: a warning where a directory above is closed, a refusal where none is."""
    top = here.lab.directory / f"reach-{kind}"
    top.mkdir(mode=0o755)
    with mounted(here.directory / "below", top / "at", kind, "open") as at:
        done = here.ctl("backup", here.guest.name, "-o", at / "set", code=REPOSITORY)
        assert "others could read it, so mount the file system with modes" in done.stderr
        assert "file_mode=0600" in done.stderr
        assert here.checkpoints() == []
        here.assert_clean()
        top.chmod(0o700)
        done = here.ctl("backup", here.guest.name, "-o", at / "set", code=WARNED)
        assert done.stderr.count("modes of files can't be set") == 1
        assert f"only {top}, which nobody else may enter, protects them" in done.stderr
        here.ctl("verify", at / "set")


def test_a_target_that_gives_nothing_back(here: Scene) -> None:
    """D-4: no point, no checkpoint, where the published files are not what was written."""
    with mounted(here.directory / "below", here.directory / "at", "short") as at:
        done = here.ctl("backup", here.guest.name, "-o", at / "set", "-l", "full", code=REPOSITORY)
        assert "does not give back the restore point that was just written there" in done.stderr
        assert done.stderr.count("\n") == 1
        assert list((at / "set/points").iterdir()) == []
        assert here.checkpoints() == []
        here.assert_clean()
