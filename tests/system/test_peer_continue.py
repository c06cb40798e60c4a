"""A chain that the peer began goes on as ours: true increments from its last checkpoint.

See decision 20: its checkpoint is used only if libvirt made it when the set says, is never made
anew, and stays.
"""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.command import LabError
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lab.peer import BOOKWORM, TRIXIE, Peer, peer
from tests.lib.peer_sets import open_directory
from tests.lib.scene import WARNED, Saved, Scene, scene

pytestmark = [pytest.mark.system, pytest.mark.slow]

KIB = 1024
DISKS = (DiskSpec(target="vda", size=8 * MIB), DiskSpec(target="vdb", size=8 * MIB))
BASE = "virtnbdbackup.0"


BOTH = pytest.mark.parametrize("suite", [BOOKWORM, TRIXIE])
ONE = pytest.mark.parametrize("suite", [TRIXIE])


@pytest.fixture
def theirs(lab: DaemonLab, suite: str) -> Peer:
    return peer(suite, lab.launcher)


@pytest.fixture
def here(lab: DaemonLab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    name = request.node.name.replace("[", "-").replace("]", "")
    options = GuestOptions(uuid=str(uuid.uuid4()))
    with scene(lab, tmp_path, name, DISKS, options) as here:
        for target in here.guest.disks:
            here.guest.write(target, 0, 4 * MIB, 0xEE)
        yield here


def begin(here: Scene, theirs: Peer, into: Path, *levels: str) -> None:
    """Have the peer make a chain, each point with a change; then import it."""
    scratch = open_directory(here.lab.directory / "scratch")
    for number, level in enumerate(levels):
        here.guest.write("vda", (5 * MIB) + number * 64 * KIB, 64 * KIB, 1 + number)
        theirs.backup("-d", here.guest.name, "-l", level, "-o", into, "--scratchdir", scratch)
    # the older version has no checksums, which is a warning
    assert here.ctl("import", into, code=None).code in (0, WARNED)


def change(here: Scene, number: int) -> None:
    here.guest.write("vda", number * 256 * KIB, 64 * KIB, number)
    here.guest.write_zeroes("vdb", number * 64 * KIB, 64 * KIB, unmap=True)


@BOTH
def test_a_running_domain(here: Scene, theirs: Peer) -> None:
    begin(here, theirs, here.set, "full", "inc")
    change(here, 1)
    first = here.save()
    assert set(first.modes.values()) == {"delta"}
    assert first.point["parent"] == "inc.virtnbdbackup.1"
    assert sum(disk["data_bytes"] for disk in first.point["disks"]) == 64 * KIB
    change(here, 2)
    assert set(here.save().modes.values()) == {"delta"}
    here.prove_all()
    # theirs stay, ours is one
    known = here.checkpoints()
    assert {BASE, "virtnbdbackup.1"} < set(known)
    assert len(known) == 3


@BOTH
def test_a_domain_that_is_off(here: Scene, theirs: Peer) -> None:
    begin(here, theirs, here.set, "full")
    change(here, 1)
    references = here.references()
    here.guest.stop()
    report = here.ctl("backup", here.guest.name, "-o", here.set, "--json").json
    saved = Saved(set=here.set, report=report, references=references)
    assert set(saved.modes.values()) == {"delta"}
    here.prove(saved)
    assert BASE in here.bitmaps_off("vda")
    here.guest.start()
    change(here, 2)
    assert set(here.save().modes.values()) == {"delta"}
    here.prove_all()


@ONE
def test_a_set_whose_last_point_is_not_sound(here: Scene, theirs: Peer) -> None:
    """It goes on from the newest point that is: that bitmap has recorded ever since."""
    whole = here.directory / "whole"
    scratch = open_directory(here.lab.directory / "scratch")
    words: list[str | Path] = ["-d", here.guest.name, "-o", whole, "--scratchdir", scratch]
    theirs.backup("-l", "full", *words)
    change(here, 1)
    theirs.backup("-l", "inc", *words)
    (whole / "vda.inc.virtnbdbackup.1.data").unlink()
    change(here, 2)
    here.ctl("import", whole, "-o", here.set, "--sound", code=WARNED)
    saved = here.save()
    assert set(saved.modes.values()) == {"delta"}
    assert saved.point["parent"] == "full"
    here.prove_all()


@ONE
def test_another_chain_of_the_same_names(here: Scene, theirs: Peer) -> None:
    """The peer began anew elsewhere: its checkpoint has the name, and covers another time."""
    begin(here, theirs, here.set, "full")
    change(here, 1)
    begin(here, theirs, here.directory / "elsewhere", "full")
    # what that one says of changes must not let a run be left out
    saved = here.save("--threshold", "7M", code=WARNED)
    assert set(saved.modes.values()) == {"full"}
    assert "another chain has the same name" in saved.reasons["vda"]
    here.prove(saved)
    assert BASE in here.checkpoints()


@ONE
def test_its_checkpoint_is_gone(here: Scene, theirs: Peer) -> None:
    """It is not made anew: what the bitmap of that name covers could not be told."""
    begin(here, theirs, here.set, "full")
    change(here, 1)
    here.lab.virsh("checkpoint-delete", "--domain", here.guest.name, BASE, "--metadata")
    saved = here.save(code=WARNED)
    assert set(saved.modes.values()) == {"full"}
    assert BASE in saved.reasons["vda"]
    here.prove(saved)
    change(here, 2)
    assert set(here.save().modes.values()) == {"delta"}
    here.prove_all()


@ONE
def test_the_peer_stays_away_then(here: Scene, theirs: Peer) -> None:
    """It refuses domains with checkpoints of others, so no chain is ever mixed."""
    begin(here, theirs, here.set, "full")
    here.save()
    with pytest.raises(LabError, match="Foreign checkpoint"):
        begin(here, theirs, here.directory / "other", "full")
