"""A run that is killed or interrupted at any step loses nothing and leaves nothing for ever."""

import signal
from pathlib import Path

import pytest

from tests.lab.disks import MIB, DiskSpec
from tests.lab.embed import EmbeddedLab
from tests.lab.guest import Guest
from tests.lib.rigged import RiggedCtl
from tests.lib.witness import Witness

pytestmark = pytest.mark.system
LAB = EmbeddedLab

DISKS = (DiskSpec(target="vda", size=16 * MIB), DiskSpec(target="vdb", size=16 * MIB))
FILES = 11
"""What a point of two disks publishes: stream, index, checksum, image info of each, three XML."""

BEFORE_COMMIT = [
    "KILL@file-replaced#1",
    "KILL+@file-replaced#1",
    "KILL+@file-replaced#2",
    "KILL@job-begun#1",
    "KILL+@job-begun#1",
    "KILL@metadata-collected#1",
    "KILL@blocks-copied#2",
    "KILL+@block-written#2",
    "KILL@stream-finished#2",
    "KILL@job-aborted#1",
    "KILL+@job-aborted#1",
    "KILL@point-published#1",
    "KILL@file-synced#3",
    "KILL@os-rename#1",
    "KILL+@os-rename#5",
    f"KILL@os-rename#{FILES + 1}",
    # with a connection in its handshake: who ends the job then hangs QEMU
    "KILL+@connection-kept#1",
    "KILL+@connection-going#2",
    "KILL@connection-ready#1",
]
AFTER_COMMIT = [
    f"KILL+@os-rename#{FILES + 1}",
    "KILL@run-forgotten#2",
    "KILL@draft-removed#1",
    "KILL+@draft-removed#1",
]
AFTER_COMMIT_OF_INCREMENT = [
    "KILL@derived-files-written#2",
    "KILL@checkpoint-deleted#1",
    "KILL+@checkpoint-deleted#1",
]
SOME_BEFORE = [fault for number, fault in enumerate(BEFORE_COMMIT) if number % 3 == 1]


@pytest.fixture(scope="module")
def guest(lab: EmbeddedLab) -> Guest:
    guest = lab.guest("vm1", DISKS)
    guest.start()
    return guest


def killed(witness: Witness, fault: str, *options: str) -> None:
    assert isinstance(witness.ctl, RiggedCtl)
    with witness.ctl.rigged(fault):
        witness.run(*options, code=-signal.SIGKILL)


@pytest.mark.parametrize("fault", SOME_BEFORE + AFTER_COMMIT)
def test_killed_full(witness: Witness, fault: str) -> None:
    killed(witness, fault, "-l", "full")
    is_committed = len(witness.points()) == 1
    assert is_committed == (fault in AFTER_COMMIT)
    witness.change()
    point = witness.run().json["point"]
    assert point["level"] == ("inc" if is_committed else "full")
    assert point["warnings"] == []
    witness.assert_clean()
    witness.change()
    assert witness.run("-l", "inc").json["point"]["warnings"] == []
    witness.assert_clean()
    witness.check_all()


@pytest.mark.timeout(400)  # two runs for each fault
def test_killed_increments(witness: Witness) -> None:
    """One long chain, so that what one kill leaves could harm all that come later."""
    witness.run("-l", "full")
    for fault in BEFORE_COMMIT + AFTER_COMMIT + AFTER_COMMIT_OF_INCREMENT:
        before = len(witness.points())
        witness.change()
        killed(witness, fault)
        assert (len(witness.points()) - before == 1) == (fault not in BEFORE_COMMIT), fault
        witness.change()
        point = witness.run("-l", "auto").json["point"]
        assert point["level"] == "inc"
        assert point["warnings"] == [], fault
        witness.assert_clean()
    witness.check_all()


@pytest.mark.parametrize("fault", [BEFORE_COMMIT[7], *AFTER_COMMIT[:2]])
@pytest.mark.parametrize("is_there", [True, False], ids=["there", "unmounted"])
def test_another_set_between(
    witness: Witness, ctl: RiggedCtl, guest: Guest, tmp_path: Path, fault: str, *, is_there: bool
) -> None:
    """A run into another set sweeps up after the dead one, and harms none of its chain."""
    witness.run("-l", "full")
    witness.change()
    killed(witness, fault)
    other = Witness(ctl, guest, tmp_path, "other")
    away = tmp_path / "away"
    if not is_there:
        witness.path.rename(away)
    # W-1: what a dead run left in a set that is away stays, and is warned of
    other.run("-l", "full", code=0 if is_there else 3)
    if not is_there:
        away.rename(witness.path)
    witness.change()
    point = witness.run().json["point"]
    assert point["level"] == "inc"
    assert point["warnings"] == []
    other.run("-l", "inc")
    bases = {each.points()[-1]["checkpoint"] for each in (witness, other)}
    assert witness.checkpoints() == bases
    for each in (witness, other):
        each.assert_no_files()
        each.check_all()


def test_killed_again_and_again(witness: Witness) -> None:
    """The run that sweeps up after a dead one is killed, too."""
    witness.run("-l", "full")
    witness.change()
    killed(witness, "KILL+@block-written#2")
    killed(witness, "KILL@checkpoint-deleted#1")
    killed(witness, "KILL+@checkpoint-deleted#1")
    killed(witness, "KILL@draft-removed#1")
    witness.change()
    assert witness.run().json["point"]["warnings"] == []
    witness.assert_clean()
    witness.check_all()
