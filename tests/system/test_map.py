"""Points of a real guest, mapped: what NBD clients read is what the guest's disks held."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.lab.command import run
from tests.lab.disks import MIB, DiskSpec
from tests.lab.embed import EmbeddedLab
from tests.lab.guest import Guest
from tests.lib.rigged import RiggedCtl
from tests.lib.witness import Witness

pytestmark = [pytest.mark.system, pytest.mark.slow]
LAB = EmbeddedLab

KIB = 1024
DISKS = (
    DiskSpec(target="vda", size=24 * MIB),
    DiskSpec(target="vdb", size=16 * MIB + 5 * 512, cluster_size=4096),
)


@pytest.fixture(scope="module")
def guest(lab: EmbeddedLab) -> Guest:
    guest = lab.guest("vm1", DISKS)
    guest.start()
    return guest


@pytest.fixture(scope="module", params=["", "-z"], ids=["plain", "lz4"])
def chain(
    lab: EmbeddedLab,
    guest: Guest,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Witness:
    """A full, increments, and one in which a disk that has grown was read in full."""
    ctl = RiggedCtl(lab.uri, lab.directory / f"ctl{request.param}")
    witness = Witness(ctl, guest, tmp_path_factory.mktemp("map"))
    options = [request.param] if request.param else []
    witness.fill(6 * MIB)
    witness.run("-l", "full", *options)
    for _ in range(2):
        witness.change()
        witness.run("-l", "inc", *options)
    size = guest.disk_size("vdb") + MIB
    guest.virsh("blockresize", "vm1", "vdb", f"{size}B")
    witness.change()
    guest.write("vdb", size - 64 * KIB, 64 * KIB, 0x77)
    witness.run("-l", "inc", *options, code=3)
    witness.change()
    witness.run("-l", "diff", *options)
    return witness


@contextlib.contextmanager
def mapped(chain: Witness, *options: str) -> Iterator[dict[str, Any]]:
    """The disks of a map by target."""
    report = chain.ctl("map", chain.path, "--detach", "--json", *options).json["map"]
    try:
        yield {disk["target"]: disk for disk in report["disks"]}
    finally:
        chain.ctl("unmap", report["id"])
    assert list((chain.ctl.runtime / "map").iterdir()) == [chain.ctl.runtime / "map" / "gate"]


def test_every_point_is_what_the_guest_held(chain: Witness) -> None:
    points = chain.points()
    assert [point["level"] for point in points] == ["full", "inc", "inc", "inc", "diff"]
    assert [disk["mode"] for disk in points[3]["disks"]] == ["delta", "full"]
    for point in points:
        with mapped(chain, "--point", point["id"]) as disks:
            for target, reference in chain.references(point["id"]).items():
                words = ["qemu-img", "compare", "-f", "raw", "-F", "raw"]
                assert "identical" in run([*words, disks[target]["uri"], reference])


def test_a_copy_leaves_holes_out(chain: Witness, tmp_path: Path) -> None:
    point = chain.points()[-1]["id"]
    with mapped(chain) as disks:
        out = tmp_path / "out.raw"
        run(["nbdcopy", disks["vda"]["uri"], out])
        reference = chain.references(point)["vda"]
        assert out.read_bytes() == reference.read_bytes()
        # the guest wrote 6 MiB of data and some blocks: 64 KiB each, no more
        assert out.stat().st_blocks * 512 <= reference.stat().st_blocks * 512 + MIB
        assert out.stat().st_blocks * 512 < 10 * MIB


def test_an_overlay_of_qemu_on_a_map(chain: Witness, tmp_path: Path) -> None:
    """As an instant recovery has it: writes go to the overlay, the set is not touched."""
    point = chain.points()[-1]["id"]
    with mapped(chain, "-d", "vda") as disks:
        overlay = tmp_path / "overlay.qcow2"
        uri = disks["vda"]["uri"]
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, overlay])
        run(["qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 300k", overlay])
        wanted = bytearray(chain.references(point)["vda"].read_bytes())
        wanted[MIB : MIB + 300 * KIB] = b"\5" * (300 * KIB)
        run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, tmp_path / "all.raw"])
        assert (tmp_path / "all.raw").read_bytes() == wanted
        run(["qemu-img", "rebase", "-f", "qcow2", "-b", "", overlay])
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, tmp_path / "all.raw"])
    assert (tmp_path / "all.raw").read_bytes() == wanted
    chain.ctl("verify", chain.path)


def test_a_map_outlives_the_files_of_its_set(chain: Witness, tmp_path: Path) -> None:
    """The servers have them open: what becomes of the names does not matter."""
    point = chain.points()[-1]["id"]
    with mapped(chain, "-d", "vdb") as disks:
        away = tmp_path / "away"
        os.rename(chain.path, away)  # noqa: PTH104 - of directories
        try:
            client = nbd.NBD()
            client.connect_unix(disks["vdb"]["socket"])
            size = client.get_size()
            found = b"".join(
                bytes(client.pread(min(MIB, size - start), start)) for start in range(0, size, MIB)
            )
            client.shutdown()
        finally:
            os.rename(away, chain.path)  # noqa: PTH104
        assert found == chain.references(point)["vdb"].read_bytes()
