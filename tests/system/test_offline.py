"""A domain that is off is saved like one that runs: same set, same levels, same restore."""

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lab.process import wait_until
from tests.lib.scene import WARNED, Saved, Scene, scene

pytestmark = pytest.mark.system
KIB = 1024
BUSY = 75
TWO = (
    DiskSpec(target="vda", size=8 * MIB),
    DiskSpec(target="vdb", size=8 * MIB, cluster_size=4 * KIB),
)


@contextmanager
def guest_with(
    lab: DaemonLab, directory: Path, name: str, disks: tuple[DiskSpec, ...]
) -> Iterator[Scene]:
    """A guest with data on its first MiB, switched off."""
    options = GuestOptions(uuid=str(uuid.uuid4()))
    with scene(lab, directory, name, disks, options) as here:
        for target in here.guest.disks:
            here.guest.write(target, 0, MIB, 0xEE)
        here.guest.stop()
        yield here


@pytest.fixture
def here(lab: DaemonLab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    # long names would become the same when they are cut
    name = f"{request.node.originalname[:30]}-{uuid.uuid4().hex[:8]}"
    with guest_with(lab, tmp_path, name, TWO) as here:
        yield here


def change(here: Scene, number: int) -> None:
    """Write data and zeroes on all disks, by the guest or, while it is off, by another program."""
    for place, target in enumerate(here.guest.disks):
        at = (number % 8 * 2 + place) * 64 * KIB
        if here.guest.is_running():
            here.guest.write(target, at, 64 * KIB, number)
            here.guest.write_zeroes(target, at + 2 * MIB, 64 * KIB, unmap=True)
        else:
            commands = (f"write -P {number} {at} 64k", f"write -z -u {at + 2 * MIB} 64k")
            for command in commands:
                run(["qemu-io", "-f", "qcow2", "-c", command, here.guest.image(target)])


def deltas(saved: Saved) -> None:
    assert set(saved.modes.values()) == {"delta"}, saved.point


def stored(saved: Saved) -> int:
    return sum(disk["data_bytes"] + disk["zero_bytes"] for disk in saved.point["disks"])


def only_base(here: Scene, base: Saved) -> None:
    """The base's bitmap is the only one of ours in each image, and libvirt knows it alone."""
    name = base.point["checkpoint"]
    assert here.checkpoints() == [name]
    for target in here.guest.disks:
        assert here.bitmaps_off(target) == {name: ["auto"]}


def test_a_chain_that_goes_on_whether_the_domain_runs_or_not(here: Scene) -> None:
    full = here.save()
    assert full.point["level"] == "full"
    only_base(here, full)
    # nothing happened: next to nothing is stored, and it is said
    idle = here.save()
    deltas(idle)
    assert stored(idle) == 0
    assert sum(disk["stored_bytes"] for disk in idle.point["disks"]) < 8192
    only_base(here, idle)
    # other programs write while it is off
    change(here, 1)
    third = here.save()
    deltas(third)
    assert 0 < stored(third) <= 4 * 2 * 64 * KIB
    # the guest writes, the next point is made while it runs
    here.guest.start()
    change(here, 2)
    online = here.save()
    deltas(online)
    assert 0 < stored(online) <= 4 * 2 * 64 * KIB
    change(here, 3)
    here.guest.stop()
    last = here.save("-z")
    deltas(last)
    assert 0 < stored(last) <= 4 * 2 * 64 * KIB
    only_base(here, last)
    here.guest.start()
    change(here, 4)
    deltas(here.save())
    here.prove_all()


def test_what_boots_it_is_stored_once(lab: DaemonLab, here: Scene, tmp_path: Path) -> None:
    """An increment in which nothing changed takes next to nothing, and restores with its kernel."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(os.urandom(2 * MIB))
    xml = lab.virsh("dumpxml", here.guest.name, "--inactive")
    changed = tmp_path / "changed.xml"
    changed.write_text(xml.replace("</type>", f"</type><kernel>{kernel}</kernel>"))
    lab.virsh("define", changed)
    full, idle = here.save(), here.save()
    assert full.point["stored_bytes"] > 2 * MIB
    assert idle.point["stored_bytes"] < 32 * KIB
    old = kernel.read_bytes()
    kernel.write_bytes(os.urandom(2 * MIB))
    other = here.save()
    assert other.point["stored_bytes"] > 2 * MIB
    assert len([*here.set.glob("kernel.*")]) == 2
    for saved, content in ((full, old), (idle, old), (other, kernel.read_bytes())):
        out = tmp_path / f"out-{saved.id}"
        here.ctl("restore", here.set, "--point", saved.id, "-o", out)
        assert (out / "config" / "kernel" / "vmlinuz").read_bytes() == content
    here.ctl("verify", here.set)


def test_every_level_and_option(here: Scene) -> None:
    copy = here.save("-l", "copy", "-t", "raw")
    assert here.checkpoints() == []
    assert here.bitmaps_off("vda") == {}
    here.save("-l", "full")
    change(here, 1)
    base = here.history[-1]
    diff = here.save("-l", "diff", "-z", "9")
    deltas(diff)
    only_base(here, base)
    change(here, 2)
    assert stored(here.save("-l", "diff")) > stored(diff)
    here.save("-l", "inc", "--extents", "nbdinfo")
    here.save("-l", "copy", "-i", "vdb")
    assert copy.point["consistency"] in {"offline", "crash"}
    # only changes above the threshold are worth a point
    before = len(here.ctl.points(here.set))
    report = here.ctl(
        "backup", here.guest.name, "-o", here.set, "--json", "--threshold", "64K"
    ).json
    assert report["result"] == "skipped"
    assert len(here.ctl.points(here.set)) == before
    change(here, 3)
    estimate = here.ctl("estimate", here.guest.name, "-o", here.set, "--json").json
    assert {disk["mode"] for disk in estimate["disks"]} == {"delta"}
    saved = here.save("--threshold", "64K")
    assert estimate["bytes"] == stored(saved)
    here.prove_all()


def test_two_sets_side_by_side(here: Scene) -> None:
    other = here.directory / "other"
    here.save()
    here.save(into=other)
    for number in range(1, 5):
        change(here, number)
        saved = here.save(into=here.set if number % 2 else other)
        deltas(saved)
        assert stored(saved) <= 2 * 4 * 2 * 64 * KIB
        if number == 2:
            here.guest.start()
        if number == 3:
            here.guest.stop()
    here.prove_all()


def test_forgotten_checkpoints_and_a_new_name(here: Scene) -> None:
    here.save()
    here.guest.undefine()
    here.guest.define()
    change(here, 1)
    second = here.save()
    deltas(second)
    only_base(here, second)
    here.lab.virsh("domrename", "--domain", here.guest.name, "--new-name", f"{here.guest.name}-x")
    here.guest.name = f"{here.guest.name}-x"
    change(here, 2)
    deltas(here.save())
    here.prove_all()


def test_a_killed_guest_is_read_in_full_and_the_chain_goes_on(here: Scene) -> None:
    here.save()
    here.guest.start()
    change(here, 1)
    here.guest.kill9()
    here.guest.wait_shut_off()
    saved = here.save(code=WARNED)
    assert set(saved.modes.values()) == {"full"}
    assert all("inconsistent" in reason for reason in saved.reasons.values())
    assert saved.point["consistency"] == "crash"
    only_base(here, saved)
    change(here, 2)
    deltas(here.save())
    here.guest.start()
    here.guest.stop()
    deltas(here.save())
    here.prove_all()


def test_one_lost_bitmap_demotes_one_disk(here: Scene) -> None:
    full = here.save()
    change(here, 1)
    run(["qemu-img", "bitmap", "--remove", here.guest.image("vdb"), full.point["checkpoint"]])
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "delta", "vdb": "full"}
    deltas(here.save())
    here.prove_all()


def test_an_image_put_back_or_replaced(here: Scene) -> None:
    here.save()
    image = here.guest.image("vda")
    older = here.directory / "older.qcow2"
    shutil.copyfile(image, older)
    change(here, 1)
    here.save()
    # put back into the same file: the newest bitmap is not there
    shutil.copyfile(older, image)
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "delta"}
    # a copy is another image, whatever it holds
    image.rename(older)
    shutil.copyfile(older, image)
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "delta"}
    run(["qemu-img", "resize", "-q", image, "+1M"])
    saved = here.save(code=WARNED)
    assert "size" in saved.reasons["vda"]
    deltas(here.save())
    here.prove_all()


def test_an_image_copied_over_that_of_another_disk(here: Scene) -> None:
    # bitmaps of one checkpoint have one name: only what the disks held tells them apart
    one, other = (here.guest.image(target) for target in ("vda", "vdb"))
    for image, pattern in ((one, 1), (other, 2)):
        run(["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 5M 64k", image])
    here.save()
    change(here, 1)
    here.save()
    one.write_bytes(other.read_bytes())
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "delta"}
    assert "that of disk vdb" in saved.reasons["vda"]
    # now both hold the same, and it makes no difference
    one.write_bytes(other.read_bytes())
    deltas(here.save())
    # the same while it runs, with few differences and many changes
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 6M 512", one])
    here.save()
    one.write_bytes(other.read_bytes())
    here.guest.start()
    here.guest.write("vda", 0, 3 * MIB + 1024, 9)
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "delta"}
    here.guest.write("vda", 0, 64 * KIB, 9)
    deltas(here.save())
    here.prove_all()


def test_disks_that_hold_the_same(here: Scene) -> None:
    # a mirror within the guest: whose image it is makes no difference, as long as nothing else does
    one, other = (here.guest.image(target) for target in ("vda", "vdb"))
    here.save()
    for image in (one, other):
        run(["qemu-io", "-f", "qcow2", "-c", "write -P 3 3M 64k", image])
    deltas(here.save())
    here.guest.start()
    here.guest.write("vda", 0, 64 * KIB, 1)
    deltas(here.save())
    here.prove_all()


def test_external_snapshots(here: Scene) -> None:
    here.save()
    here.guest.start()
    change(here, 1)
    top = {}
    for number in (1, 2):
        specs = []
        for target in here.guest.disks:
            path = here.guest.image(target).with_suffix(f".{number}")
            specs += ["--diskspec", f"{target},file={path}"]
            top[target] = path
        here.lab.virsh(
            "snapshot-create-as", "--disk-only", "--no-metadata",
            "--domain", here.guest.name, *specs,
        )  # fmt: skip
        change(here, 1 + number)
    here.guest.stop()
    for target, path in top.items():
        here.guest.use_image(target, path)
    saved = here.save()
    deltas(saved)
    assert stored(saved) >= 3 * 2 * 64 * KIB
    change(here, 5)
    deltas(here.save())
    here.guest.start()
    change(here, 6)
    deltas(here.save())
    here.prove_all()


def test_a_bitmap_lost_in_a_lower_image(here: Scene) -> None:
    full = here.save()
    here.guest.start()
    change(here, 1)
    below = here.guest.image("vda")
    top = below.with_suffix(".top")
    here.lab.virsh(
        "snapshot-create-as", "--disk-only", "--no-metadata", "--domain", here.guest.name,
        "--diskspec", f"vda,file={top}", "--diskspec", "vdb,snapshot=no",
    )  # fmt: skip
    change(here, 2)
    here.guest.stop()
    here.guest.use_image("vda", top)
    run(["qemu-img", "bitmap", "--remove", below, full.point["checkpoint"]])
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "delta"}
    here.prove_all()


def test_raw_and_old_images(lab: DaemonLab, tmp_path: Path) -> None:
    disks = (
        DiskSpec(target="vda", size=4 * MIB),
        DiskSpec(target="vdb", size=4 * MIB, format="raw"),
    )
    with guest_with(lab, tmp_path, "raw-off", disks) as here:
        assert here.save(code=WARNED).skipped == {
            "vdb": "a raw image, which can't be saved incrementally; "
            "--raw saves it in full each time, and so does disks.raw"
        }
        other = tmp_path / "with-raw"
        here.save("--raw", into=other)
        saved = here.save("--raw", into=other)
        assert saved.modes == {"vda": "delta", "vdb": "full"}
        here.prove_all()


def test_a_raw_data_file_is_read_whole(lab: DaemonLab, tmp_path: Path) -> None:
    # what others write to it is in no bitmap
    data = lab.directory / "beside.raw"
    data.touch()
    data.chmod(0o666)  # QEMU's user must get at it, libvirt 9.0 does not see to that
    options = (f"data_file={data}", "data_file_raw=on")
    disks = (DiskSpec(target="vda", size=4 * MIB, options=options), DiskSpec(target="vdb"))
    with guest_with(lab, tmp_path, "raw-data", disks) as here:
        here.save()
        with data.open("r+b") as file:
            file.seek(2 * MIB)
            file.write(b"unseen by QEMU")
        assert here.save().modes == {"vda": "full", "vdb": "delta"}
        here.guest.start()
        change(here, 1)
        assert here.save().modes == {"vda": "full", "vdb": "delta"}
        for saved in here.history:
            here.prove(saved, "--format", "raw")


class TestStart:
    """The guest's start wins."""

    @contextmanager
    def reading(self, here: Scene, *options: str) -> Iterator[subprocess.Popen[str]]:
        """A run that reads the images, slowly."""
        with (
            here.ctl.rigged("SLOW1@block-written#1"),
            here.ctl.start(
                "backup", here.guest.name, "-o", here.set, "--json", *options
            ) as process,
        ):
            here.ctl.faults = ()
            drafts = here.set.glob
            wait_until(lambda: bool(list(drafts(".draft-*/*.data"))), "copying", 60)
            yield process

    def test_yield_lets_the_guest_start(self, here: Scene) -> None:
        first = here.save()
        for target in here.guest.disks:
            run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 8M", here.guest.image(target)])
        with self.reading(here) as process:
            told = here.ctl("yield", here.guest.name, "--json").json
            # after two seconds it would have given up
            assert told["seconds"] < 2.0
            assert [run["pid"] for run in told["runs"]] == [process.pid]
            here.guest.start()
            assert process.wait(10) == BUSY
        assert len(here.ctl.points(here.set)) == 1
        assert not list(here.set.glob(".draft-*"))
        # the old base holds all of it, and what the aborted run made is gone after the next
        change(here, 1)
        saved = here.save()
        deltas(saved)
        assert stored(saved) >= 2 * 8 * MIB
        here.guest.stop()
        only_base(here, saved)
        assert saved.point["parent"] == first.id
        here.prove_all()

    def test_yield_with_nothing_to_do(self, here: Scene) -> None:
        told = here.ctl("yield", here.guest.name, "--json").json
        assert told["runs"] == []
        here.guest.start()
        here.ctl("yield", here.guest.name)

    def test_a_raw_disk_that_changes_is_noticed(self, lab: DaemonLab, tmp_path: Path) -> None:
        disks = (DiskSpec(target="vda", size=8 * MIB, format="raw"),)
        with guest_with(lab, tmp_path, "raw-moving", disks) as here:
            run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 8M", here.guest.image("vda")])
            with self.reading(here, "-l", "copy", "--raw") as process:
                here.guest.start()
                here.guest.write("vda", 0, 64 * KIB, 9)
                # no hook tells of the start here, and no lock keeps it: it is seen (G-3)
                assert process.wait(60) == BUSY
            assert here.ctl.points(here.set) == []

    def test_a_stopped_run_does_not_keep_the_guest_from_starting(self, here: Scene) -> None:
        for target in here.guest.disks:
            run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 8M", here.guest.image(target)])
        with self.reading(here) as process:
            os.kill(process.pid, signal.SIGSTOP)
            here.ctl("yield", here.guest.name)
            here.guest.start()
            os.kill(process.pid, signal.SIGCONT)
            assert process.wait(30) == BUSY
        # W-8: what is said to be removed is gone, though libvirt never knew of it
        said = "".join(log.read_text() for log in (here.set / "logs").iterdir())
        left = [each for target in here.guest.disks for each in here.guest.bitmaps(target)]
        assert (" removed, the run that made it failed" in said) != bool(left)
        assert not left
        here.save()
        here.prove_all()


BEFORE_COMMIT = [
    "KILL+@lease-announced#1",
    "KILL@bitmap-added#1",
    "KILL+@bitmap-added#1",
    "KILL+@bitmap-added#2",
    "KILL@blocks-copied#1",
    "KILL@blocks-copied#2",
    "KILL@images-compared#1",
    "KILL@point-published#1",
    "KILL+@os-rename#5",
]
AFTER_COMMIT = [
    "KILL@base-advanced#1",
    "KILL@checkpoint-redefined#1",
    "KILL+@checkpoint-redefined#1",
    "KILL+@bitmap-removed#1",
    "KILL@checkpoint-deleted#1",
    "KILL+@checkpoint-deleted#1",
]


@pytest.mark.parametrize("fault", BEFORE_COMMIT + AFTER_COMMIT)
def test_killed_at_a_step(here: Scene, fault: str) -> None:
    here.save()
    change(here, 1)
    references = here.references()
    with here.ctl.rigged(fault):
        here.ctl("backup", here.guest.name, "-o", here.set, code=-signal.SIGKILL)
    points = here.ctl.points(here.set)
    assert len(points) == (2 if fault in AFTER_COMMIT else 1)
    if fault in AFTER_COMMIT:
        report = {"point": points[-1]}
        here.history.append(Saved(set=here.set, report=report, references=references))
    # half of them go on while it runs
    if len(fault) % 2:
        here.guest.start()
    change(here, 2)
    saved = here.save()
    deltas(saved)
    change(here, 3)
    deltas(here.save())
    if here.guest.is_running():
        here.guest.stop()
    only_base(here, here.history[-1])
    here.prove_all()
