"""A domain is defined on what the peer saved, whose XML is that of a running guest."""

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.peer import TRIXIE, peer
from tests.lib.peer_sets import PeerSets
from tests.lib.rigged import RiggedCtl
from tests.lib.scene import assert_same

pytestmark = [pytest.mark.system, pytest.mark.slow]
WARNED = 3


def test_a_clone_of_a_peers_set(tmp_path: Path) -> None:
    with DaemonLab() as lab:
        disks = (DiskSpec(size=8 * MIB), DiskSpec(target="vdb", size=8 * MIB, format="raw"))
        guest = lab.guest("vm1", disks)
        guest.start()
        scratch = lab.directory / "scratch"
        scratch.mkdir()
        scratch.chmod(0o777)
        sets = PeerSets(
            peer=peer(TRIXIE, lab.launcher), guest=guest, directory=tmp_path, scratch=scratch
        )
        for target in guest.disks:
            guest.write(target, MIB, MIB, 0x33)
        sets.note("now")
        path = sets.run("copy", "copy", "--raw")

        ctl = RiggedCtl(lab.uri, tmp_path / "ctl")
        into = lab.images / "back"
        words = ("-o", into, "--define", "--start", "--json")
        report = ctl("restore", path, *words, code=WARNED).json
        assert report["definition"]["started"]
        assert report["definition"]["name"] == "restore_vm1"
        root = ET.fromstring(lab.virsh("dumpxml", "restore_vm1", "--inactive"))
        files = [source.get("file") for source in root.findall("./devices/disk/source")]
        assert files == [disk["path"] for disk in report["disks"]]
        assert root.find("./devices/disk/backingStore") is None
        assert lab.virsh("domstate", "vm1").strip() == "running"
        lab.virsh("destroy", "restore_vm1")
        for disk in report["disks"]:
            reference = sets.references["now"][disk["target"]]
            assert_same(Path(disk["path"]), disk["format"], reference)
        guest.close()
