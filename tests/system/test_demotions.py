"""A disk whose changes can't be known is read in full, says why, and the others go on."""

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest, GuestOptions
from tests.lib.scene import WARNED, Saved, Scene, scene

pytestmark = pytest.mark.system
KIB = 1024
DOMAIN = 20
TWO = (DiskSpec(target="vda", size=8 * MIB), DiskSpec(target="vdb", size=8 * MIB))


@pytest.fixture
def here(lab: DaemonLab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A guest with data on two disks and a full of it."""
    # an UUID of its own: a definition without one would be that of another domain
    options = GuestOptions(uuid=str(uuid.uuid4()))
    with scene(lab, tmp_path, request.node.name, TWO, options) as here:
        for target in here.guest.disks:
            here.guest.write(target, 0, 4 * MIB, 0xEE)
        here.save()
        yield here


def change(here: Scene, pattern: int) -> None:
    """Write data and zeroes on all disks."""
    for number, target in enumerate(here.guest.disks):
        here.guest.write(target, (pattern % 8 + number) * 64 * KIB, 64 * KIB, pattern)
        here.guest.write_zeroes(target, MIB + pattern % 16 * 64 * KIB, 64 * KIB, unmap=True)


def assert_demoted(here: Scene, saved: Saved, target: str, why: str) -> None:
    """One disk is read in full, and report, manifest, list and log say the reason."""
    assert {name: mode for name, mode in saved.modes.items() if mode == "full"} == {target: "full"}
    assert why in saved.reasons[target]
    assert any(target in warning and why in warning for warning in saved.warnings)
    assert why in saved.stderr
    (manifest,) = here.set.glob(f"points/*{saved.id}.json")
    disks = {disk["target"]: disk for disk in json.loads(manifest.read_bytes())["disks"]}
    assert why in disks[target]["reason"]
    assert why in here.ctl("list", here.set).stdout
    (log,) = (here.set / "logs").glob(f"*{saved.id}*")
    assert why in log.read_text()


def assert_all_deltas(saved: Saved) -> None:
    assert set(saved.modes.values()) == {"delta"}


def remove_bitmap(guest: Guest, target: str, name: str) -> None:
    """Remove a bitmap behind libvirt's back."""
    image = str(guest.image(target))
    node = next(
        node["node-name"]
        for node in guest.qmp("query-named-block-nodes")
        if node["file"] == image and node["drv"] == "qcow2"
    )
    guest.qmp("block-dirty-bitmap-remove", {"node": node, "name": name})


def test_a_lost_bitmap(here: Scene) -> None:
    change(here, 1)
    remove_bitmap(here.guest, "vdb", here.history[-1].point["checkpoint"])
    # what warns otherwise fails here, and leaves nothing
    assert "missing or inconsistent" in here.refuse("--strict", code=DOMAIN)
    assert len(here.checkpoints()) == 1
    assert_demoted(here, here.save(code=WARNED), "vdb", "missing or inconsistent")
    change(here, 2)
    assert_all_deltas(here.save("--strict"))
    assert here.checkpoints() == [here.history[-1].point["checkpoint"]]
    for target in ("vda", "vdb"):
        assert list(here.guest.bitmaps(target)) == here.checkpoints()
    here.prove_all()


def test_a_lost_bitmap_in_a_differential(here: Scene) -> None:
    change(here, 1)
    remove_bitmap(here.guest, "vda", here.history[-1].point["checkpoint"])
    for number in (2, 3):
        assert_demoted(here, here.save("-l", "diff", code=WARNED), "vda", "missing or")
        change(here, number)
    here.save(code=WARNED)
    assert_all_deltas(here.save())
    here.prove_all()


def test_an_inconsistent_bitmap(here: Scene) -> None:
    guest = here.guest
    guest.stop()  # stores the bitmaps
    guest.start()
    change(here, 1)
    image = guest.image("vdb")
    crashed = here.directory / "crashed.qcow2"
    guest.pause()
    shutil.copyfile(image, crashed)
    guest.resume()
    guest.stop()
    # as if QEMU had died with this disk alone: its bitmap is marked as in use
    shutil.copyfile(crashed, image)
    guest.start()
    change(here, 2)
    assert_demoted(here, here.save(code=WARNED), "vdb", "missing or inconsistent")
    change(here, 3)
    assert_all_deltas(here.save())
    here.prove_all()


def test_a_killed_qemu(here: Scene) -> None:
    for is_stored in (False, True):
        if is_stored:
            here.guest.stop()
            here.guest.start()
        change(here, 1 + is_stored)
        here.guest.kill9()
        here.guest.wait_shut_off()
        here.guest.start()
        change(here, 3 + is_stored)
        saved = here.save(code=WARNED)
        assert set(saved.reasons) == {"vda", "vdb"}
        assert saved.point["level"] == "inc"
        change(here, 5 + is_stored)
        assert_all_deltas(here.save())
        assert here.checkpoints() == [here.history[-1].point["checkpoint"]]
    here.prove_all()


def test_grown_plugged_and_removed_disks(here: Scene) -> None:
    guest = here.guest
    change(here, 1)
    here.lab.virsh("blockresize", "--domain", guest.name, "vda", "12M")
    guest.write("vda", 10 * MIB, MIB, 7)
    grown = here.save(code=WARNED)
    assert_demoted(here, grown, "vda", f"from {8 * MIB} to {12 * MIB}")
    assert grown.disk("vda")["size"] == 12 * MIB
    guest.attach(DiskSpec(target="vdc", size=4 * MIB))
    change(here, 2)
    assert_demoted(here, here.save(code=WARNED), "vdc", "not part of")
    change(here, 3)
    assert_all_deltas(here.save())
    guest.stop()
    del guest.disks["vdb"]
    guest.virsh("detach-disk", "--config", "--domain", guest.name, "vdb")
    guest.start()
    change(here, 4)
    assert "vdb" in here.refuse("--strict", code=DOMAIN)
    less = here.save(code=WARNED)
    assert less.modes == {"vda": "delta", "vdc": "delta"}
    assert "disk vdb is part of" in less.warnings[0]
    assert "no longer of the domain" in less.warnings[0]
    assert here.save().modes == less.modes
    here.prove_all()


def test_images_that_change_places(here: Scene) -> None:
    guest = here.guest
    first, second = guest.image("vda"), guest.image("vdb")
    guest.stop()
    guest.use_image("vda", second)
    guest.use_image("vdb", first)
    guest.define()
    guest.start()
    change(here, 1)
    swapped = here.save(code=WARNED)
    assert swapped.modes == {"vda": "full", "vdb": "full"}
    assert "another image" in swapped.reasons["vda"]
    guest.stop()
    # a rename within the file system is the same image
    moved = second.rename(second.with_name("moved.qcow2"))
    guest.use_image("vda", moved)
    # a copy is another one, though it holds the bitmap: what it was a copy of may be older
    copied = first.with_name("copied.qcow2")
    shutil.copyfile(first, copied)
    guest.use_image("vdb", copied)
    guest.define()
    guest.start()
    change(here, 2)
    assert_demoted(here, here.save(code=WARNED), "vdb", "another image")
    change(here, 3)
    assert_all_deltas(here.save())
    here.prove_all()


def test_an_image_from_yesterday(here: Scene) -> None:
    guest = here.guest
    image, old = guest.image("vda"), here.directory / "old.qcow2"
    guest.stop()
    shutil.copyfile(image, old)
    guest.start()
    change(here, 1)
    here.save()
    change(here, 2)
    guest.stop()
    # the same file, but what it held before the last point: its bitmap is not in there
    shutil.copyfile(old, image)
    guest.start()
    change(here, 3)
    assert_demoted(here, here.save(code=WARNED), "vda", "missing or inconsistent")
    guest.stop()
    # new, empty, of the same name; the file system may well give it the old inode
    image.unlink()
    run(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"])
    guest.start()
    change(here, 4)
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "delta"}
    here.prove_all()


def test_metadata_that_libvirt_loses(here: Scene) -> None:
    guest = here.guest
    change(here, 1)
    (name,) = here.checkpoints()
    guest.virsh("checkpoint-delete", "--metadata", "--domain", guest.name, name)
    assert_all_deltas(here.save())
    change(here, 2)
    guest.stop()
    guest.undefine()
    guest.define()
    guest.start()
    assert here.checkpoints() == []
    change(here, 3)
    assert_all_deltas(here.save("-l", "diff"))
    assert_all_deltas(here.save())
    assert here.checkpoints() == [here.history[-1].point["checkpoint"]]
    change(here, 4)
    # and both at once: forgotten, and one bitmap gone
    (name,) = here.checkpoints()
    guest.virsh("checkpoint-delete", "--metadata", "--domain", guest.name, name)
    remove_bitmap(guest, "vdb", name)
    assert_demoted(here, here.save(code=WARNED), "vdb", "missing or inconsistent")
    change(here, 5)
    assert_all_deltas(here.save())
    here.prove_all()


def test_checkpoints_of_others(here: Scene, tmp_path: Path) -> None:
    def create(name: str, *targets: str) -> None:
        disks = [f"{target},checkpoint=bitmap" for target in targets]
        disks += [f"{each},checkpoint=no" for each in here.guest.disks if each not in targets]
        specs = [word for disk in disks for word in ("--diskspec", disk)]
        here.lab.virsh("checkpoint-create-as", here.guest.name, name, *specs)

    ours = here.checkpoints()
    create("theirs.1", "vda")
    change(here, 1)
    assert_all_deltas(here.save())
    create("theirs.2", "vda", "vdb")
    change(here, 2)
    # another target of our own: its chain does not disturb the first one, nor the other way
    other = tmp_path / "other"
    here.save(into=other)
    change(here, 3)
    assert_all_deltas(here.save())
    change(here, 4)
    here.lab.virsh("checkpoint-delete", "--domain", here.guest.name, "theirs.1")
    assert_all_deltas(here.save(into=other))
    change(here, 5)
    assert_all_deltas(here.save())
    heads = {saved.set: saved.point["checkpoint"] for saved in here.history}
    assert sorted(here.checkpoints()) == sorted(["theirs.2", *heads.values()])
    assert not set(ours) & set(here.checkpoints())
    here.prove_all()


def test_external_snapshots(here: Scene) -> None:
    guest = here.guest
    base = guest.image("vda")
    change(here, 1)
    overlay = base.with_name("overlay.qcow2")
    guest.virsh(
        "snapshot-create-as", "--disk-only", "--atomic", "--no-metadata", "--domain", guest.name,
        "--diskspec", f"vda,file={overlay}", "--diskspec", "vdb,snapshot=no",
    )  # fmt: skip
    change(here, 2)
    # the delta lies in two layers
    assert_all_deltas(here.save())
    change(here, 3)
    assert_all_deltas(here.save())
    change(here, 4)
    guest.virsh(
        "blockcommit", "--active", "--pivot", "--wait", "--domain", guest.name, "vda",
    )  # fmt: skip
    assert guest.image("vda") == base
    change(here, 5)
    assert_all_deltas(here.save())
    here.prove_all()


def test_a_bitmap_lost_below_an_overlay(here: Scene) -> None:
    guest = here.guest
    name = here.history[-1].point["checkpoint"]
    base = guest.image("vda")
    change(here, 1)
    guest.virsh(
        "snapshot-create-as", "--disk-only", "--atomic", "--no-metadata", "--domain", guest.name,
        "--diskspec", f"vda,file={base.with_name('top.qcow2')}", "--diskspec", "vdb,snapshot=no",
    )  # fmt: skip
    change(here, 2)
    guest.stop()
    run(["qemu-img", "bitmap", "--remove", base, name])
    guest.start()
    change(here, 3)
    # libvirt itself would give a short delta, without a word
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "delta"}
    here.prove_all()
