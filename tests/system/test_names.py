"""Names, paths and images that break programs: hostile, renamed, thirty of a kind, tiny, far."""

import os
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec, attach_loop, create_image, detach_loop
from tests.lab.guest import GuestOptions
from tests.lab.process import wait_until
from tests.lib.scene import WARNED, assert_same, scene, scene_of

pytestmark = pytest.mark.system
KIB = 1024
HOSTILE = "a 'b' \"c\" %41%2F &amp;<x> $(id) `id` ; | * ? \\ ü_é\u2013 "
SCSI = "<controller type='scsi' model='virtio-scsi'/>"


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
        assert "--raw" in here.save(into=tmp_path / "other", code=WARNED).skipped["vdb"]
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


def test_odd_images(lab: DaemonLab, tmp_path: Path) -> None:
    frozen, outside = lab.images / "readonly.qcow2", lab.images / "outside.raw"
    run(["qemu-img", "create", "-q", "-f", "qcow2", frozen, "4M"])
    run(["qemu-io", "-c", "write -P 5 0 1M", frozen])
    pointer = lab.images / "pointer.qcow2"
    settings = f"data_file={outside},data_file_raw=on"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", settings, pointer, "4M"])
    outside.chmod(0o666)  # libvirt 9.0 does not know of it
    disks = [
        DiskSpec(target="vda", size=512),
        DiskSpec(target="vdb", size=MIB, cluster_size=512),
        DiskSpec(target="vdc", path=frozen, readonly=True),
        DiskSpec(target="vdd", path=pointer),
    ]
    with scene(lab, tmp_path, "odd", disks) as here:
        for number, options in enumerate((("-l", "full"), ("-z",), ())):
            here.guest.write("vda", 0, 512, number + 1)
            here.guest.write("vdb", 512 * number, 512, 7)
            here.guest.write("vdd", MIB * number, MIB, number + 1)
            saved = here.save(*options)
            mode = "delta" if number else "full"
            # nothing tracks changes of what can't change, nor those of others to a raw data file
            assert saved.modes == {"vda": mode, "vdb": mode, "vdc": "full", "vdd": "full"}
        here.guest.write_zeroes("vda", 0, 512, unmap=True)
        assert here.save().disk("vda")["zero_bytes"] == 512
        # data outside of the image is read through it, and a restore does not write there
        before = outside.read_bytes()
        here.prove_all(code=WARNED)  # of the data file
        assert outside.read_bytes() == before


def test_images_elsewhere(lab: DaemonLab, tmp_path: Path) -> None:
    image, socket = lab.images / "far.qcow2", lab.directory / "far.sock"
    run(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"])
    os.truncate(image, 16 * MIB)  # an NBD export does not grow
    far = f"""<disk type='network' device='disk'><driver name='qemu' type='qcow2'/>
        <source protocol='nbd' name='disk'><host transport='unix' socket='{socket}'/></source>
        <target dev='vdb' bus='virtio'/><alias name='ua-vdb'/></disk>"""
    serve: list[str | Path] = [
        "qemu-nbd",
        "-k",
        socket,
        "-x",
        "disk",
        "--persistent",
        "-e",
        "0",
        "-f",
        "raw",
        image,
    ]
    with subprocess.Popen(serve) as server:
        try:
            wait_until(socket.exists, "NBD server", 20)
            socket.chmod(0o777)
            options = GuestOptions(extra_devices=far)
            with scene(lab, tmp_path, "far", (DiskSpec(size=MIB),), options) as here:
                for number in range(3):
                    here.guest.write("vdb", number * MIB, MIB, number + 1)
                    report = here.ctl.backup("far", here.set)
                    modes = {disk["target"]: disk["mode"] for disk in report["point"]["disks"]}
                    mode = "delta" if number else "full"
                    assert modes == {"vda": mode, "vdb": mode}
                restored = here.ctl.restore(here.set, tmp_path / "r", "--format", "raw")["vdb"]
                expected = b"".join(bytes([number + 1]) * MIB for number in range(3))
                assert restored.read_bytes() == expected + bytes(5 * MIB)
        finally:
            server.kill()


def test_volumes_of_a_pool(lab: DaemonLab, tmp_path: Path) -> None:
    folder = lab.images / "pool"
    folder.mkdir(mode=0o755)
    lab.virsh("pool-create-as", "my pool", "dir", "--target", folder)
    # libvirt 9.0 makes volumes of this old version unless told otherwise, 11.3 does not
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", folder / "a b", "8M"])
    lab.virsh("pool-refresh", "my pool")
    volume = """<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>
        <source pool='my pool' volume='a b'/><target dev='vdb' bus='virtio'/>
        <alias name='ua-vdb'/></disk>"""
    options = GuestOptions(extra_devices=volume)
    try:
        with scene(lab, tmp_path, "pooled", (DiskSpec(size=MIB),), options) as here:
            told = here.ctl.backup("pooled", tmp_path / "old", code=WARNED)
            assert "qemu-img amend" in told["point"]["warnings"][0]
            here.guest.stop()
            run(["qemu-img", "amend", "-f", "qcow2", "-o", "compat=1.1", folder / "a b"])
            here.guest.start()
            for number in range(3):
                here.guest.write("vdb", number * MIB, MIB, number + 1)
                report = here.ctl.backup("pooled", here.set)
                modes = {disk["target"]: disk["mode"] for disk in report["point"]["disks"]}
                mode = "delta" if number else "full"
                assert modes == {"vda": mode, "vdb": mode}
            shown = here.ctl("show", here.set, "--json").json
            # where it lay is known without the pool
            assert shown["points"][-1]["disks"][1]["source"] == str(folder / "a b")
            here.guest.stop()
            restored = here.ctl.restore(here.set, tmp_path / "restored")["vdb"]
            run(["qemu-img", "convert", "-O", "raw", folder / "a b", tmp_path / "reference"])
            assert_same(restored, "qcow2", tmp_path / "reference")
    finally:
        lab.virsh("pool-destroy", "my pool")


def test_guests_that_are_saved_or_transient(lab: DaemonLab, tmp_path: Path) -> None:
    with scene(lab, tmp_path, "fleeting", options=GuestOptions(uuid=str(uuid.uuid4()))) as here:
        guest = here.guest
        here.save()
        guest.write("vda", 0, MIB, 1)
        lab.virsh("managedsave", guest.name)
        guest.start()
        guest.write("vda", MIB, MIB, 2)
        assert here.save().modes == {"vda": "delta"}
        guest.stop()
        xml = lab.images / "fleeting.xml"
        xml.write_text(lab.virsh("dumpxml", "--inactive", guest.name))
        guest.undefine()
        for number in (3, 4):
            lab.virsh("create", xml)
            guest.adopt_process()
            guest.write("vda", number * MIB, MIB, number)
            # libvirt forgets a transient domain's checkpoints with its end; the images don't
            assert here.save().modes == {"vda": "delta"}
            guest.write("vda", number * MIB, MIB, number + 10)
            if number == 3:
                process = guest.process()
                guest.qmp("quit")
                assert process.wait(20)
                wait_until(lambda: "fleeting" not in lab.virsh("list", "--all"), "end", 20)
        here.prove_all()
