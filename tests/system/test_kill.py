"""A run that is killed or interrupted at any step loses nothing and leaves nothing for ever."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.disks import MIB, DiskSpec
from tests.lab.embed import EmbeddedLab
from tests.lab.guest import Guest
from tests.lib.rigged import RiggedCtl
from tests.lib.witness import Witness

pytestmark = pytest.mark.system

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
    "KILL+@block-written#3",
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
def lab() -> Iterator[EmbeddedLab]:
    with EmbeddedLab() as lab:
        yield lab


@pytest.fixture(scope="module")
def guest(lab: EmbeddedLab) -> Guest:
    guest = lab.guest("vm1", DISKS)
    guest.start()
    return guest


@pytest.fixture(scope="module")
def ctl(lab: EmbeddedLab) -> RiggedCtl:
    return RiggedCtl(lab.uri, lab.directory / "ctl")


@pytest.fixture
def alone(ctl: RiggedCtl, guest: Guest, tmp_path: Path, request: pytest.FixtureRequest) -> Witness:
    """A set of its own; the checkpoints of earlier ones are gone."""
    witness = Witness(ctl, guest, tmp_path, f"set{abs(hash(request.node.name)) % 1000}")
    witness.delete_checkpoints()
    witness.fill()
    return witness


def killed(witness: Witness, fault: str, *options: str) -> None:
    assert isinstance(witness.ctl, RiggedCtl)
    with witness.ctl.rigged(fault):
        witness.run(*options, code=-signal.SIGKILL)


@pytest.mark.parametrize("fault", SOME_BEFORE + AFTER_COMMIT)
def test_killed_full(alone: Witness, fault: str) -> None:
    killed(alone, fault, "-l", "full")
    is_committed = len(alone.points()) == 1
    assert is_committed == (fault in AFTER_COMMIT)
    alone.change()
    point = alone.run().json["point"]
    assert point["level"] == ("inc" if is_committed else "full")
    assert point["warnings"] == []
    alone.assert_clean()
    alone.change()
    assert alone.run("-l", "inc").json["point"]["warnings"] == []
    alone.assert_clean()
    alone.check_all()


@pytest.mark.timeout(400)  # two runs for each fault
def test_killed_increments(alone: Witness) -> None:
    """One long chain, so that what one kill leaves could harm all that come later."""
    alone.run("-l", "full")
    for fault in BEFORE_COMMIT + AFTER_COMMIT + AFTER_COMMIT_OF_INCREMENT:
        before = len(alone.points())
        alone.change()
        killed(alone, fault)
        assert (len(alone.points()) - before == 1) == (fault not in BEFORE_COMMIT), fault
        alone.change()
        point = alone.run("-l", "auto").json["point"]
        assert point["level"] == "inc"
        assert point["warnings"] == [], fault
        alone.assert_clean()
    alone.check_all()


@pytest.mark.parametrize("fault", [BEFORE_COMMIT[7], *AFTER_COMMIT[:2]])
@pytest.mark.parametrize("is_there", [True, False], ids=["there", "unmounted"])
def test_another_set_between(
    alone: Witness, ctl: RiggedCtl, guest: Guest, tmp_path: Path, fault: str, *, is_there: bool
) -> None:
    """A run into another set sweeps up after the dead one, and harms none of its chain."""
    alone.run("-l", "full")
    alone.change()
    killed(alone, fault)
    other = Witness(ctl, guest, tmp_path, "other")
    away = tmp_path / "away"
    if not is_there:
        alone.path.rename(away)
    # W-1: what a dead run left in a set that is away stays, and is warned of
    other.run("-l", "full", code=0 if is_there else 3)
    if not is_there:
        away.rename(alone.path)
    alone.change()
    point = alone.run().json["point"]
    assert point["level"] == "inc"
    assert point["warnings"] == []
    other.run("-l", "inc")
    bases = {each.points()[-1]["checkpoint"] for each in (alone, other)}
    assert alone.checkpoints() == bases
    for each in (alone, other):
        each.assert_no_files()
        each.check_all()


def test_killed_again_and_again(alone: Witness) -> None:
    """The run that sweeps up after a dead one is killed, too."""
    alone.run("-l", "full")
    alone.change()
    killed(alone, "KILL+@block-written#2")
    killed(alone, "KILL@checkpoint-deleted#1")
    killed(alone, "KILL+@checkpoint-deleted#1")
    killed(alone, "KILL@draft-removed#1")
    alone.change()
    assert alone.run().json["point"]["warnings"] == []
    alone.assert_clean()
    alone.check_all()
