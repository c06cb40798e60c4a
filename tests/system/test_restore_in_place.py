"""Restores onto the images of the very domain, under a real libvirt."""

import html
import json
import os
import random
import shutil
import stat
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.command import LabError, run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lab.process import wait_until
from tests.lib import sets
from tests.lib.ctl import Ctl, Result
from tests.lib.loops import content, loop
from tests.lib.scene import WARNED, Saved, Scene, assert_same, scene
from tests.lib.sets import Change, SetBuilder

pytestmark = pytest.mark.system
KIB = 1024
USAGE, DOMAIN, SOURCE, INTEGRITY, BUSY = 2, 20, 30, 40, 75
SIZE = 8 * MIB


@pytest.fixture
def here(lab: DaemonLab, tmp_path: Path) -> Iterator[Scene]:
    """A guest with an image file, a raw and a qcow2 block device, and two points of it; off."""
    name = f"in-place-{uuid.uuid4().hex[:8]}"
    with (
        loop(tmp_path / "one", SIZE) as one,
        loop(tmp_path / "two", 2 * SIZE) as two,
    ):
        run(["qemu-img", "create", "-q", "-f", "qcow2", two, str(SIZE)])
        for device in (one, two):
            shutil.chown(device, lab.qemu_user)
        disks = (
            DiskSpec(target="vda", size=SIZE),
            DiskSpec(target="vdb", size=SIZE, path=one, format="raw", block=True),
            DiskSpec(target="vdc", size=SIZE, path=two, block=True),
        )
        options = GuestOptions(uuid=str(uuid.uuid4()))
        with scene(lab, tmp_path, name, disks, options) as here:
            for target in here.guest.disks:
                here.guest.write(target, 0, 4 * MIB, 0xEE)
            here.save("--raw")
            change(here, 1)
            here.save("--raw", code=0)
            change(here, 2)
            here.guest.stop()
            yield here
            # the devices are another guest's next
            if here.guest.is_running():
                here.guest.stop()
            here.guest.undefine()


def change(here: Scene, number: int) -> None:
    for target in here.guest.disks:
        here.guest.write(target, number * 128 * KIB, 96 * KIB, number)
        here.guest.write_zeroes(target, MIB + number * 128 * KIB, 64 * KIB, unmap=True)


def restore(here: Scene, *options: str | Path, code: int = 0) -> Result:
    return here.ctl("restore", here.set, "--in-place", *options, code=code)


def state(here: Scene) -> dict[str, bytes]:
    """What all images hold, bit for bit."""
    found = {target: here.guest.image(target) for target in here.guest.disks}
    return {target: content(path, 2 * SIZE) if path.is_block_device() else path.read_bytes()
            for target, path in found.items()}  # fmt: skip


def assert_as_of(here: Scene, saved: Saved) -> None:
    for target, disk in here.guest.disks.items():
        copy = here.directory / "copy"
        shutil.copyfile(here.guest.image(target), copy)
        if disk.format == "raw":
            with copy.open("r+b") as file:
                file.truncate(SIZE)
        assert_same(copy, disk.format, saved.references[target])


def leftovers(here: Scene) -> list[str]:
    """Files beside the guest's images that a restore should have removed; others' stay out."""
    image = here.guest.image("vda")
    own = image.name.removesuffix("vda.qcow2")
    return sorted(
        each.name
        for each in image.parent.iterdir()
        if each.suffix in {".incomplete", ".replaced"} and each.name.startswith(own)
    )


def test_each_point_and_the_backups_after_it(here: Scene) -> None:
    first, second = here.history
    image = here.guest.image("vda")
    os.chown(image, 1234, 1235)
    image.chmod(0o640)
    refused = restore(here, code=USAGE)
    assert "--yes" in refused.stderr
    assert str(image) in refused.stderr
    for saved in (second, first):
        report = restore(here, "--yes", "--point", saved.id, "--json", code=0).json
        assert [disk["target"] for disk in report["disks"]] == ["vda", "vdb", "vdc"]
        assert {disk["target"]: disk["format"] for disk in report["disks"]} == {
            "vda": "qcow2", "vdb": "raw", "vdc": "qcow2"
        }  # fmt: skip
        assert report["config"] is None
        assert_as_of(here, saved)
        assert here.bitmaps_off("vda") == {} == here.bitmaps_off("vdc")
        assert leftovers(here) == []
        assert (image.stat().st_uid, image.stat().st_gid) == (1234, 1235)
        assert image.stat().st_mode & 0o777 == 0o640
    # libvirt starts it, the chain goes on: nothing is believed of the old bitmaps
    here.guest.start()
    change(here, 3)
    third = here.save("--raw", code=WARNED)
    assert third.point["level"] == "inc"
    assert set(third.modes.values()) == {"full"}
    assert {"vda", "vdc"} <= set(third.reasons)
    change(here, 4)
    fourth = here.save("--raw")
    assert fourth.modes == {"vda": "delta", "vdb": "full", "vdc": "delta"}
    assert here.checkpoints() == [fourth.point["checkpoint"]]
    here.guest.stop()
    here.prove_all()


def test_off_after_the_restore(here: Scene) -> None:
    """The first backup after it may be one of the domain that is still off."""
    restore(here, "--yes", "-d", "vda")
    change_off(here)
    saved = here.save("--raw", code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "full", "vdc": "delta"}
    here.guest.start()
    change(here, 5)
    assert here.save("--raw").modes == {"vda": "delta", "vdb": "full", "vdc": "delta"}
    here.prove_all()


def change_off(here: Scene) -> None:
    for target in ("vda", "vdc"):
        run(["qemu-io", "-f", "qcow2", "-c", "write -P 77 2M 64k", here.guest.image(target)])


def test_what_is_refused_changes_nothing(here: Scene) -> None:
    guest = here.guest

    def refuse(why: str, *options: str | Path, code: int = DOMAIN) -> None:
        result = restore(here, "--yes", *options, code=code)
        assert why in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr

    refuse("its place with --in-place", "-d", f"vda={here.directory / 'x'}", code=USAGE)
    refuse("make images in a directory", "--as-chain", code=USAGE)
    refuse("--compress makes images in a directory", "--compress", code=USAGE)
    # another program has the image open
    holder = ["qemu-io", "-f", "qcow2", "-c", "sleep 60000", str(guest.image("vda"))]
    with subprocess.Popen(holder) as process:
        try:
            wait_until(lambda: is_open(process.pid, guest.image("vda")), "open", 20)
            refuse("is in use", code=BUSY)
        finally:
            process.kill()
    before = state(here)
    # an overlay of another domain stands on one
    overlay = here.directory / "overlay.qcow2"
    backing = ["-b", str(guest.image("vda")), "-F", "qcow2"]
    run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, overlay])
    other = here.lab.guest(
        f"other-{uuid.uuid4().hex[:8]}", (DiskSpec(target="vda", path=overlay),),
        GuestOptions(uuid=str(uuid.uuid4())),
    )  # fmt: skip
    other.define()
    refuse(f"backing file of domain {other.name}")
    other.undefine()
    # a file that is missing in the set
    stream = next(here.set.glob("vdc.inc*.data"))
    away = stream.rename(here.directory / "away")
    refuse("missing", code=INTEGRITY)
    away.rename(stream)
    assert state(here) == before
    assert leftovers(here) == []
    guest.start()
    refuse("shut it down first")
    guest.virsh("managedsave", "--domain", guest.name)
    refuse("saved state")
    guest.virsh("managedsave-remove", "--domain", guest.name)
    guest.close()
    guest.undefine()
    refuse("is not known at")
    guest.define()
    restore(here, "--yes")


def is_open(pid: int, path: Path) -> bool:
    fds = Path(f"/proc/{pid}/fd")
    found = any(os.path.realpath(each) == os.path.realpath(path) for each in fds.iterdir())
    time.sleep(0.3 * found)  # it locks what it has opened
    return found


def test_damage_leaves_files_alone_and_says_what_is_lost(here: Scene) -> None:
    second = here.history[-1]
    image = here.guest.image("vda")
    before = image.read_bytes()
    flip(full(here, "vda"))
    result = restore(here, "--yes", code=INTEGRITY)
    assert "SHA-256" in result.stderr
    assert "incomplete now" not in result.stderr
    # files are made first, beside the old ones; the devices were not touched
    assert image.read_bytes() == before
    assert content(here.guest.image("vdb"), 9) != b"nbdbackup"
    flip(full(here, "vda"))
    flip(full(here, "vdc"))
    result = restore(here, "--yes", code=INTEGRITY)
    assert f"{here.guest.image('vdc')} is incomplete now" in result.stderr
    assert f"{image} is missing now" in result.stderr
    with pytest.raises(LabError):
        here.guest.start()
    flip(full(here, "vdc"))
    restore(here, "--yes")
    assert_as_of(here, second)
    assert leftovers(here) == []
    here.guest.start()


def full(here: Scene, target: str) -> Path:
    (path,) = here.set.glob(f"{target}.full*.data")
    return path


def flip(path: Path) -> None:
    """Change a bit in the middle; twice makes it good again."""
    with path.open("r+b") as file:
        place = path.stat().st_size // 2
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def test_killed_at_each_step(here: Scene) -> None:
    """Before the old images are set aside nothing is lost; after it the domain can't start."""
    second = here.history[-1]
    before = state(here)
    for step, is_harmless in (
        ("images-written#1", True),
        ("images-set-aside#1", True),
        ("images-written#2", False),
        ("images-named#1", False),
        ("device-finished#2", False),
    ):
        with here.ctl.rigged(f"KILL@{step}"):
            here.ctl("restore", here.set, "--in-place", "--yes", code=-9)
        if is_harmless:
            assert state(here) == before, step
        else:
            with pytest.raises(LabError):
                here.guest.start()
    restore(here, "--yes")
    assert_as_of(here, second)
    assert leftovers(here) == []
    here.guest.start()


def test_the_guests_start_ends_a_restore_that_can_end(here: Scene) -> None:
    """Before anything is lost, the guest that is to start comes first."""
    before = state(here)
    with here.ctl.start(
        "restore", here.set, "--in-place", "--yes", "--bandwidth-limit", "1M"
    ) as process:
        incomplete = here.guest.image("vda").with_name(f"{here.guest.image('vda').name}.incomplete")
        wait_until(incomplete.exists, "begin", 30)
        here.ctl("yield", here.guest.name)
        _, text = process.communicate(timeout=30)
    assert process.returncode == BUSY
    assert "is being started" in text
    assert state(here) == before


def test_a_start_while_a_device_is_written(here: Scene) -> None:
    """Giving way would help nobody now; a guest that runs nevertheless is noticed."""
    device = here.guest.image("vdb")
    words = ("restore", here.set, "--in-place", "--yes", "-d", "vdb", "--bandwidth-limit")
    with here.ctl.start(*words, "2M") as process:
        wait_until(lambda: content(device, 9) == b"nbdbackup", "begin", 30)
        here.ctl("yield", here.guest.name)
        _, text = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert content(device, SIZE) == here.history[-1].references["vdb"].read_bytes()
    with here.ctl.start(*words, "256K") as process:
        wait_until(lambda: content(device, 9) == b"nbdbackup", "begin", 30)
        with pytest.raises(LabError, match="Failed to lock"):
            here.guest.start()
        # another node of the device, as in libvirt's own mount namespace, has locks of its own
        node = here.guest.places.images / "node"
        os.mknod(node, 0o660 | stat.S_IFBLK, device.stat().st_rdev)
        shutil.chown(node, here.lab.qemu_user)
        here.guest.use_image("vdb", node)
        here.guest.define()
        here.guest.start()
        _, text = process.communicate(timeout=60)
    assert process.returncode == SOURCE, text
    assert f"{device} is incomplete now" in text
    assert "was started" in text
    here.guest.stop()
    here.guest.use_image("vdb", device)
    here.guest.define()
    restore(here, "--yes", "-d", "vdb")
    assert content(device, SIZE) == here.history[-1].references["vdb"].read_bytes()


XML = """<domain type='qemu'><name>vm1</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory>
<os><type arch='x86_64' machine='q35'>hvm</type>
{firmware}</os>
<features><acpi/></features><devices>{disks}</devices></domain>"""
FIRMWARE = """<loader readonly='yes' type='pflash'>/usr/share/none.fd</loader><nvram>{}</nvram>"""
DISK = """<disk type='{type}' device='disk'><driver name='qemu' type='qcow2'/>
<source file='{path}'/>{more}<target dev='{target}' bus='virtio'/></disk>"""


def define(
    lab: DaemonLab, tmp_path: Path, *, more: str = "", uefi: bool = False
) -> tuple[Path, Path]:
    """A domain that never runs, of the UUID of sets made by hand; its first image and NVRAM."""
    images = {target: tmp_path / f"{target} 'image'.qcow2" for target in ("vda", "vdb")}
    for image in images.values():
        run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"])
    disks = [
        DISK.format(type="file", path=html.escape(str(image), quote=True), target=target, more=more)
        for target, image in images.items()
    ]
    nvram = tmp_path / "VARS.fd"
    nvram.write_text("of today")
    nvram.chmod(0o644)
    path = tmp_path / "vm1.xml"
    firmware = FIRMWARE.format(nvram) if uefi else ""
    path.write_text(XML.format(uuid=sets.UUID, firmware=firmware, disks="".join(disks)))
    lab.virsh("define", path)
    return images["vda"], nvram


@pytest.fixture
def made(tmp_path: Path) -> SetBuilder:
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": sets.random_disk(random.Random(1), MIB), "vdb": bytearray(MIB)}
    made.full()
    made.inc({"vda": [Change(0, b"n" * 4096)]})
    return made


def test_firmware_variables_go_with_all_disks(
    lab: DaemonLab, tmp_path: Path, made: SetBuilder
) -> None:
    image, nvram = define(lab, tmp_path, uefi=True)
    ctl = Ctl(lab.uri, tmp_path / "ctl")
    try:
        ctl("restore", made.path, "--in-place", "--yes", "-d", "vda", code=WARNED)
        assert nvram.read_text() == "of today"
        assert sets.read_image(image, "qcow2") == made.images[1]["vda"]
        refused = ctl("restore", made.path, "--in-place", code=USAGE)
        assert f"nvram {nvram}" in refused.stderr
        ctl("restore", made.path, "--in-place", "--yes", "--point", "point1", code=WARNED)
        assert nvram.read_bytes() == b"vars point1" * 100
        assert nvram.stat().st_mode & 0o777 == 0o644
        assert sets.read_image(image, "qcow2") == made.images[0]["vda"]
        # a disk that came later is left as it is, and that is said
        more = tmp_path / "vdc.xml"
        run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "vdc", "1M"])
        more.write_text(DISK.format(type="file", path=tmp_path / "vdc", target="vdc", more=""))
        lab.virsh("attach-device", "--config", "vm1", more)
        report = ctl("restore", made.path, "--in-place", "--yes", "--json", code=WARNED).json
        assert any("vdc stay as they are" in warning for warning in report["warnings"])
        # an image that is lost comes back all the same
        image.unlink()
        ctl("restore", made.path, "--in-place", "--yes", code=WARNED)
        assert sets.read_image(image, "qcow2") == made.images[1]["vda"]
    finally:
        lab.virsh("undefine", "--nvram", "vm1")


def test_what_the_definition_opens_with_the_image(
    lab: DaemonLab, tmp_path: Path, made: SetBuilder
) -> None:
    """libvirt would put old blocks below the restored image, which does not know of them."""
    base = tmp_path / "base.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", base, "1M"])
    more = f"<backingStore type='file'><format type='qcow2'/><source file='{base}'/></backingStore>"
    image, _ = define(lab, tmp_path, more=more)
    ctl = Ctl(lab.uri, tmp_path / "ctl")
    try:
        refused = ctl("restore", made.path, "--in-place", "--yes", code=DOMAIN)
        assert f"stands on {base}" in refused.stderr
        # with --force the definition names it no more
        done = ctl("restore", made.path, "--in-place", "--yes", "--force", code=WARNED)
        assert f"disk vda stood on {base}, and will not any more" in done.stderr
        assert str(base) not in lab.virsh("dumpxml", "vm1", "--inactive")
        assert sets.read_image(image, "qcow2") == made.images[1]["vda"]
        # by the image alone: it is lost by a restore, so that has to be asked for
        define(lab, tmp_path)
        run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, image])
        refused = ctl("restore", made.path, "--in-place", "--yes", code=DOMAIN)
        assert f"stands on {base}" in refused.stderr
        ctl("restore", made.path, "--in-place", "--yes", "--force", code=WARNED)
        assert sets.read_image(image, "qcow2") == made.images[1]["vda"]
        run(["qemu-img", "snapshot", "-c", "mine", image])
        lab.virsh("snapshot-create-as", "vm1", "theirs")
        refused = ctl("restore", made.path, "--in-place", "--yes", code=DOMAIN)
        assert "snapshots (theirs)" in refused.stderr
        lab.virsh("snapshot-delete", "--metadata", "vm1", "theirs")
    finally:
        lab.virsh("undefine", "--snapshots-metadata", "vm1")


def test_a_clone_in_a_pool(here: Scene) -> None:
    """Volumes, and a domain on them, beside the original."""
    pool, name = f"p-{here.guest.name}", f"clone-{here.guest.name}"
    directory = here.lab.directory / pool
    directory.mkdir(mode=0o755)
    here.lab.virsh("pool-create-as", "--name", pool, "--type", "dir", "--target", directory)
    before = state(here)
    try:
        report = here.ctl(
            "restore", here.set, "--pool", pool, "-o", here.directory / "out",
            "--define", "--name", name, "--json", code=WARNED,
        ).json  # fmt: skip
        assert report["definition"]["name"] == name
        xml = here.lab.virsh("dumpxml", name)
        for disk in report["disks"]:
            assert disk["path"] in xml
            assert disk["path"].startswith(str(directory))
            assert_same(Path(disk["path"]), disk["format"],
                        here.history[-1].references[disk["target"]])  # fmt: skip
        assert state(here) == before
        here.lab.virsh("undefine", name)
    finally:
        here.lab.virsh("pool-destroy", pool)


def test_an_external_snapshot_collapses(here: Scene) -> None:
    """R-2: the definition names what is below the image; with --force it does no more."""
    guest, name = here.guest, here.guest.name
    base, overlay = guest.image("vda"), guest.image("vda").with_name(f"{name}-vda.snap")
    guest.start()
    others = [f"--diskspec={target},snapshot=no" for target in ("vdb", "vdc")]
    guest.virsh(
        "snapshot-create-as", "--domain", name, "s1", "--disk-only",
        f"--diskspec=vda,file={overlay}", *others,
    )  # fmt: skip
    guest.use_image("vda", overlay)
    change(here, 3)
    guest.stop()
    guest.virsh("snapshot-delete", "--domain", name, "s1", "--metadata")
    defined = guest.virsh("dumpxml", "--domain", name, "--inactive")
    assert "<backingStore type='file'" in defined
    before, below = state(here), base.read_bytes()
    told = restore(here, "--yes", code=DOMAIN).stderr
    assert f"stands on {base}, and would no longer: if that is meant, give --force" in told
    assert state(here) == before
    done = restore(here, "--yes", "--force", code=WARNED)
    assert f"disk vda stood on {base}, and will not any more" in done.stderr
    assert_as_of(here, here.history[-1])
    defined = guest.virsh("dumpxml", "--domain", name, "--inactive")
    assert "<backingStore type='file'" not in defined
    assert base.read_bytes() == below
    # what libvirt opens now is what was restored: it stands by itself
    guest.start()
    saved = here.references()
    assert saved["vda"].read_bytes() == here.history[-1].references["vda"].read_bytes()
    guest.stop()
    base.unlink()
    guest.start()
    guest.stop()


def test_a_data_file_comes_back(here: Scene) -> None:
    """D-2: the file that the header names gets the point's data, and owner and layout stay."""
    guest, last = here.guest, here.history[-1]
    image = guest.image("vda")
    data = image.with_name("data, of vda.raw")
    image.unlink()
    layout = f"data_file={str(data).replace(',', ',,')},data_file_raw=on"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", layout, image, str(SIZE)])
    run(["qemu-io", "-f", "qcow2", "-c", f"write -P 77 0 {SIZE}", image])
    for path in (image, data):
        shutil.chown(path, 1234, 1235)
    done = restore(here, "--yes", "--json")
    assert done.json["warnings"] == []
    (info,) = json.loads(run(["qemu-img", "info", "--output=json", "--backing-chain", image]))
    told = info["format-specific"]["data"]
    assert (told["data-file"], told["data-file-raw"]) == (str(data), True)
    assert data.read_bytes() == last.references["vda"].read_bytes()
    assert {(path.stat().st_uid, path.stat().st_gid) for path in (image, data)} == {(1234, 1235)}
    assert_as_of(here, last)
    assert leftovers(here) == []
    shutil.chown(data, here.lab.qemu_user)
    guest.start()
    assert here.references()["vda"].read_bytes() == last.references["vda"].read_bytes()
    guest.stop()
    # elsewhere it is one image, and that is said
    into = here.directory / "elsewhere"
    here.save("--raw", code=WARNED)
    done = here.ctl("restore", here.set, "-o", into, "-d", "vda", code=WARNED)
    assert "disk vda had its data in a file beside the image" in done.stderr
    # one that is no file is not touched
    image.unlink()
    layout = f"data_file={guest.image('vdb')},data_file_raw=on"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", layout, image, str(SIZE)])
    before = state(here)
    refused = restore(here, "--yes", "--force", code=DOMAIN).stderr
    assert "beside the image (data_file), and can't be restored in place: it is no file" in refused
    assert state(here) == before
