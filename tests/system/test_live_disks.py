"""Disks that are no ordinary ones: attached to the running domain alone, or of no bytes."""

import contextlib
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.lab.command import LabError
from tests.lab.disks import MIB, DiskSpec, create_image
from tests.lab.embed import EmbeddedLab
from tests.lib.scene import WARNED, Scene, assert_same, scene

pytestmark = pytest.mark.system
LAB = EmbeddedLab


def attach_live(here: Scene, target: str, size: int) -> None:
    """Plug a disk in while the guest runs, and nowhere else."""
    spec = DiskSpec(target=target, size=size)
    image = here.guest.places.images / f"{here.guest.name}-{target}.qcow2"
    create_image(spec, image)
    image.chmod(0o666)
    xml = here.directory / f"{target}.xml"
    xml.write_text(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
        f"<source file='{image}'/><target dev='{target}' bus='virtio'/></disk>"
    )
    here.guest.virsh("attach-device", "--domain", here.guest.name, "--file", xml, "--live")


def test_a_disk_that_was_attached_live_comes_back(lab: EmbeddedLab, tmp_path: Path) -> None:
    """D-3: the set holds what ran, and so does the domain that is made of it."""
    with scene(lab, tmp_path, "hot", (DiskSpec(size=4 * MIB),)) as here:
        here.guest.write("vda", 0, MIB, 1)
        attach_live(here, "vdb", 2 * MIB)
        saved = here.ctl("backup", "hot", "-o", here.set, "--json").json
        assert [disk["target"] for disk in saved["point"]["disks"]] == ["vda", "vdb"]
        for options in (("--define", "--name", "again"), ("--adjust-config",)):
            into = tmp_path / options[0]
            done = here.ctl("restore", here.set, "-o", into, *options, "--json", code=WARNED)
            assert "disk vdb was attached while the domain ran, and is added" in done.stderr
            root = ET.parse(done.json["definition"]["config"]).getroot()
            found = {
                disk.find("target").get("dev"): disk.find("source").get("file")  # type: ignore[union-attr]
                for disk in root.findall("./devices/disk")
            }
            assert found == {disk["target"]: disk["path"] for disk in done.json["disks"]}
            assert list(found) == ["vda", "vdb"]
        lab.virsh("start", "again")
        # an embedded libvirt may say that it is off already when it has just ended it
        with contextlib.suppress(LabError):
            lab.virsh("destroy", "again")
        lab.virsh("undefine", "again")


def test_an_image_of_no_bytes_is_saved_when_off(lab: EmbeddedLab, tmp_path: Path) -> None:
    """W-11: there is no change of it to be tracked."""
    disks = (DiskSpec(size=4 * MIB), DiskSpec(target="vdb", size=0))
    with scene(lab, tmp_path, "empty", disks) as here:
        here.guest.write("vda", 0, MIB, 1)
        here.guest.stop()
        full = here.save()
        assert full.modes == {"vda": "full", "vdb": "full"}
        more = here.save()
        assert more.modes == {"vda": "delta", "vdb": "full"}
        report = here.ctl("restore", here.set, "-o", tmp_path / "out", "--json").json
        assert [disk["size"] for disk in report["disks"]] == [4 * MIB, 0]
        for disk in report["disks"]:
            assert_same(Path(disk["path"]), disk["format"], more.references[disk["target"]])
