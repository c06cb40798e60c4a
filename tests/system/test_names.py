"""Names, paths and devices that break programs: hostile, renamed, thirty of a kind, on a block."""

import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec, attach_loop, create_image, detach_loop
from tests.lab.guest import GuestOptions
from tests.lib.scene import scene, scene_of

pytestmark = pytest.mark.system
KIB = 1024
HOSTILE = "a 'b' \"c\" %41%2F &amp;<x> $(id) `id` ; | * ? \\ ü_é\u2013 "
SCSI = "<controller type='scsi' model='virtio-scsi'/>"


@pytest.fixture(scope="module")
def lab() -> Iterator[DaemonLab]:
    with DaemonLab() as lab:
        yield lab


def test_hostile_names(lab: DaemonLab, tmp_path: Path) -> None:
    name = (HOSTILE + "x" * 150)[:150]
    folder = lab.images / 'it\'s a "folder", 100% <&>'
    folder.mkdir()
    disks = [
        DiskSpec(target="vda", size=2 * MIB, path=folder / "ä 'b' \"c\", d=e:f%20&<g>.qcow2"),
        DiskSpec(target="vdb", size=2 * MIB, path=folder / "no suffix"),
    ]
    home = tmp_path / "the 'set' of \"%s\" & <co>, ü"
    home.mkdir()
    with scene(lab, home, name, disks) as here:
        for level in ("full", "inc", "diff", "copy"):
            here.guest.write("vda", MIB, 64 * KIB, len(here.history) + 1)
            saved = here.save("-l", level, "-z")
            assert saved.point["domain"] == name
        assert here.ctl("estimate", name, "-o", here.set, "--json").json["domain"] == name
        assert name in here.ctl("show", here.set).stdout
        here.prove_all()
        # the domain's own name is no part of a path that could lead elsewhere
        for path in here.set.rglob("*"):
            os.fsencode(path.name).decode("ascii")


def test_a_renamed_domain(lab: DaemonLab, tmp_path: Path) -> None:
    with scene(lab, tmp_path, "old", options=GuestOptions(uuid=str(uuid.uuid4()))) as here:
        guest = here.guest
        guest.write("vda", 0, MIB, 1)
        here.save()
        guest.stop()
        lab.virsh("domrename", "old", "new name")
        guest.name = "new name"
        guest.places = replace(
            guest.places,
            pid_file=guest.places.pid_file.with_name("new name.pid"),
            log=guest.places.log.with_name("new name.log"),
        )
        guest.start()
        guest.write("vda", MIB, MIB, 2)
        saved = here.save()
        assert saved.modes == {"vda": "delta"}
        assert saved.point["domain"] == "new name"
        # libvirt drops what it keeps under the old name, and with it the checkpoints' files
        guest.stop()
        lab.restart()
        guest.start()
        guest.write("vda", 2 * MIB, MIB, 3)
        assert here.save().modes == {"vda": "delta"}
        here.prove_all()


def test_thirty_disks_on_one_bus(lab: DaemonLab, tmp_path: Path) -> None:
    letters = [chr(ord("a") + number) for number in range(26)]
    targets = [f"sd{letter}" for letter in (*letters, "aa", "ab", "ac", "ad")]
    disks = [DiskSpec(target=target, size=MIB, bus="scsi") for target in targets]
    options = GuestOptions(extra_devices=SCSI)
    with scene(lab, tmp_path, "thirty", disks, options) as here:
        for number, target in enumerate(targets):
            here.guest.write(target, 0, 128 * KIB, number + 1)
        full = here.save()
        assert list(full.modes) == targets
        # names that begin with one another
        here.guest.write("sda", 0, 64 * KIB, 0xA1)
        here.guest.write("sdaa", 64 * KIB, 64 * KIB, 0xA2)
        inc = here.save("-z")
        written = {disk["target"] for disk in inc.point["disks"] if disk["data_bytes"]}
        assert written == {"sda", "sdaa"}
        here.prove_all()
        # one of them alone
        only = here.ctl.restore(here.set, tmp_path / "one", "-d", "sda")
        assert list(only) == ["sda"]


def test_block_devices(lab: DaemonLab, tmp_path: Path) -> None:
    specs, devices = [], []
    try:
        for target, kind in (("vda", "qcow2"), ("vdb", "raw")):
            backing = lab.images / f"{target}.backing"
            with backing.open("wb") as file:
                file.truncate(16 * MIB)
            devices.append(attach_loop(backing))
            spec = DiskSpec(target=target, size=8 * MIB, format=kind, path=devices[-1], block=True)
            if kind == "qcow2":
                create_image(spec, devices[-1])
            specs.append(spec)
        guest = lab.guest("blocks", specs)
        guest.start()
        here = scene_of(lab, tmp_path, guest)
        guest.write("vda", 0, 3 * MIB, 1)
        guest.write("vdb", 15 * MIB, MIB, 1)
        assert "--raw" in here.save(into=tmp_path / "other").skipped["vdb"]
        full = here.save("--raw")
        assert full.modes == {"vda": "full", "vdb": "full"}
        assert full.disk("vdb")["size"] == 16 * MIB
        guest.write("vda", MIB, 64 * KIB, 2)
        guest.write_zeroes("vdb", 15 * MIB, 64 * KIB, unmap=False)
        inc = here.save("--raw")
        assert inc.modes == {"vda": "delta", "vdb": "full"}
        assert inc.disk("vda")["data_bytes"] == 64 * KIB
        guest.stop()
        guest.start()
        guest.write("vda", 2 * MIB, 64 * KIB, 3)
        assert here.save("--raw").modes == {"vda": "delta", "vdb": "full"}
        here.prove_all()
        guest.close()
    finally:
        for device in devices:
            detach_loop(device)
