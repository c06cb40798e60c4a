"""Points of a running guest are merged: increments go on, the peer restores the new full."""

from pathlib import Path

import pytest

from tests.lab.compare import first_difference
from tests.lab.disks import MIB, DiskSpec
from tests.lab.embed import EmbeddedLab
from tests.lab.peer import BOOKWORM, TRIXIE, peer
from tests.lib.rigged import RiggedCtl
from tests.lib.witness import Witness

pytestmark = [pytest.mark.system, pytest.mark.slow]
LAB = EmbeddedLab

DISKS = (
    DiskSpec(target="vda", size=16 * MIB + 512),
    DiskSpec(target="vdb", size=8 * MIB, cluster_size=4096),
)


@pytest.fixture(scope="module")
def witness(lab: EmbeddedLab, tmp_path_factory: pytest.TempPathFactory) -> Witness:
    """A full and three increments, merged into the second of them, and one more increment."""
    guest = lab.guest("vm1", DISKS)
    guest.start()
    ctl = RiggedCtl(lab.uri, lab.directory / "ctl")
    witness = Witness(ctl, guest, tmp_path_factory.mktemp("merge"))
    witness.fill(4 * MIB)
    for level in ("full", "inc", "inc", "inc"):
        witness.change()
        witness.run("-l", level, "-z")
    third = witness.points()[2]["id"]
    witness.ctl("merge", witness.path, "--point", third)
    witness.change()
    witness.run("-l", "auto", "-z")
    return witness


@pytest.mark.parametrize("suite", [BOOKWORM, TRIXIE])
def test_the_peer_restores_the_merged_full(witness: Witness, suite: str, tmp_path: Path) -> None:
    full = witness.points()[0]
    into = tmp_path / "restored"
    into.mkdir()
    peer(suite).restore(
        "-U", "test:///default", "-i", witness.path, "-o", into, "--until", full["checkpoint"]
    )
    for target, reference in witness.references(full["id"]).items():
        difference = first_difference(reference, into / witness.guest.image(target).name)
        assert difference is None, f"{target} differs at {difference}"


def test_increments_go_on(witness: Witness) -> None:
    """Each point that is left is bit for bit what the guest had, and the newest is no full."""
    points = witness.points()
    assert [point["level"] for point in points] == ["full", "inc", "inc"]
    assert [disk["mode"] for disk in points[-1]["disks"]] == ["delta", "delta"]
    assert points[-1]["warnings"] == []
    witness.check_all()
    witness.assert_clean()
    # all but the newest
    witness.ctl("merge", witness.path, "--point", points[-1]["id"])
    witness.check_all()
