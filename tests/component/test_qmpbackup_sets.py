"""Sets as qmpbackup lays them out: read right or refused by name; and what import makes."""

import hashlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbackupd.errors import ChainBrokenError, FormatError
from nbdbackupd.model.chain import DiskMode, Level
from nbdbackupd.ops.sets import opened
from tests.lib.ctl import ROOT, Ctl
from tests.lib.images import qemu_img
from tests.lib.qmpbackup_sets import KIB, MIB, SIZE, QmpbackupSet, io, stacked
from tests.lib.standalone import Process, running

pytestmark = pytest.mark.component


@pytest.fixture
def ctl() -> Iterator[Ctl]:
    # a socket's path must be short
    with tempfile.TemporaryDirectory(prefix="nbq-", dir="/tmp") as directory:
        yield Ctl("test:///default", Path(directory))


@pytest.fixture
def made(tmp_path: Path) -> QmpbackupSet:
    """A full and two increments of two disks, whose times and backing names tell lies."""
    found = QmpbackupSet(tmp_path / "set")
    found.run("FULL")
    found.run("INC")
    found.run("INC")
    return found


def ids(path: Path) -> list[str]:
    return [each.id for each in opened.open_set(path, sound=True).known.points]


def check(ctl: Ctl, path: Path, references: dict[str, dict[str, bytes]], *options: str) -> None:
    """Restore each point and compare each disk; import keeps the ids."""
    for point, disks in references.items():
        into = path.parent / "restored"
        done = ctl("restore", path, "-o", into, "--point", point, "--format", "raw", "--json",
                   *options, code=None)  # fmt: skip
        assert done.code in (0, 3), done.stderr
        images = {each["target"]: Path(each["path"]) for each in done.json["disks"]}
        for disk, wanted in disks.items():
            assert images[disk].read_bytes() == wanted, (point, disk)
        shutil.rmtree(into)


def test_points_are_what_qemu_reads(ctl: Ctl, made: QmpbackupSet, tmp_path: Path) -> None:
    copy = made.run("COPY", packed=True)
    made.run("INC", packed=True)
    again = made.run("FULL", "cluster_size=4k", packed=True)
    made.run("INC")
    for number, layers in enumerate(made.layers.values()):
        os.utime(layers[0], (2_000_000_000 + number,) * 2)
    # as after "qmprestore rebase", or made to harm
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow",
             made.layers["d1.qcow2"][1])  # fmt: skip
    made.config("d3.raw", "raw", **{"virtual-size": MIB})
    (made.path / "d3.raw").mkdir()
    raw = random.Random(1).randbytes(MIB)
    for point in made.references:
        # what a guest writes does not make a qcow2 image of a raw one
        data = b"QFI\xfb" + raw[4:] if point.startswith("COPY") else raw
        (made.path / f"d3.raw/{point}-d3.raw").write_bytes(data)
        if not point.startswith("INC"):
            made.references[point]["d3.raw"] = data
    found = opened.open_set(made.path)
    assert ids(made.path) == list(made.references)
    assert found.written_by == "qmpbackup"
    points = {each.id: each for each in found.known.points}
    assert points[copy].level is Level.COPY
    assert points[copy].parent == ""
    assert {each.mode for each in points[again].disks} == {DiskMode.FULL}
    skipped = [[each.target for each in point.skipped] for point in found.known.points]
    assert skipped == [[], ["d3.raw"], ["d3.raw"], [], ["d3.raw"], [], ["d3.raw"]]
    assert sum("raw increment" in each for each in found.hints) == 4
    assert not any("has 1048576 bytes" in each for each in found.hints)
    made.config("d3.raw", "raw")
    hints = opened.open_set(made.path).hints
    assert sum("has 1048576 bytes, its disk had 4194304" in each for each in hints) == 3
    check(ctl, made.path, made.references)
    told = ctl("verify", made.path, code=3).stdout
    assert "sound: 7 point(s)" in told
    with ctl.start("map", made.path, "-d", "d2.qcow2", "--socket", tmp_path / "socket") as mapped:
        assert mapped.stdout is not None
        mapped.stdout.readline()
        uri = f"nbd+unix:///?socket={tmp_path / 'socket'}"
        qemu_img("convert", "-f", "raw", "-O", "raw", uri, tmp_path / "mapped")
    last = list(made.references)[-1]
    assert (tmp_path / "mapped").read_bytes() == made.references[last]["d2.qcow2"]
    before = {each: each.read_bytes() for each in made.path.rglob("*-*") if each.is_file()}
    done = ctl("import", made.path, "-o", tmp_path / "ours", "--name", "vm7", code=3)
    assert "raw increment" in done.stdout
    assert before == {each: each.read_bytes() for each in before}
    ctl("verify", tmp_path / "ours")
    check(ctl, tmp_path / "ours", made.references)
    listed = ctl("list", tmp_path / "ours", "--json").json
    assert [each["domain"] for each in listed["points"]] == ["vm7"] * 7
    assert (
        "imported already"
        in ctl("import", made.path, "-o", tmp_path / "ours", "--name", "vm7").stdout
    )
    assert (
        "another set"
        in ctl("import", made.path, "-o", tmp_path / "ours", "--name", "vm8", code=50).stderr
    )


def test_as_a_chain_of_images(ctl: Ctl, made: QmpbackupSet, tmp_path: Path) -> None:
    """What "qmprestore rebase" is for."""
    ctl("restore", made.path, "-o", tmp_path / "out", "-d", "d1.qcow2", "--as-chain", code=3)
    image = tmp_path / "out/d1.qcow2"
    told = qemu_img("info", "--backing-chain", image)
    assert told.count("\nfile format: qcow2") == 3
    qemu_img("convert", "-O", "raw", image, tmp_path / "raw")
    last = list(made.references)[-1]
    assert (tmp_path / "raw").read_bytes() == made.references[last]["d1.qcow2"]


@pytest.mark.parametrize("is_flat", [False, True], ids=["one disk's folder", "--no-subdir"])
def test_other_layouts(ctl: Ctl, tmp_path: Path, is_flat: bool) -> None:
    made = QmpbackupSet(tmp_path / "set", is_flat=is_flat)
    made.run("FULL")
    made.run("INC")
    if is_flat:
        check(ctl, made.path, made.references)
        return
    for disks in made.references.values():
        del disks["d2.qcow2"]
    check(ctl, made.path / "d1.qcow2", made.references)
    hints = opened.open_set(made.path / "d1.qcow2").hints
    assert sum("only its first bytes tell" in each for each in hints) == 2


def test_months_are_sets(ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    for name in ("2026-11", "2026-12"):
        made = QmpbackupSet(tmp_path / "backup" / name)
        made.run("FULL")
    told = ctl("list", tmp_path / "backup", code=50).stderr
    assert "one for each month" in told
    assert f"name {tmp_path}/backup/2026-12" in told
    check(ctl, made.path, made.references)


def test_a_name_without_time_is_a_point_of_its_own(ctl: Ctl, made: QmpbackupSet) -> None:
    full = made.layers["d1.qcow2"][0]
    full.rename(full.with_name("d1.qcow2"))
    found = opened.open_set(made.path, sound=True)
    assert "COPY.d1.qcow2" in [each.id for each in found.known.points]
    assert any("no time in its name" in each for each in found.hints)
    # of the other disk nothing is lost, and nothing is put together that may not belong together
    told = ctl("restore", made.path, "-o", made.path.parent / "out", code=50).stderr
    assert "before it does not hold the disk" in told
    last = list(made.references)[-1]
    references = {last: {"d2.qcow2": made.references[last]["d2.qcow2"]}}
    check(ctl, made.path, references, "-d", "d2.qcow2")


def test_what_comes_after_a_run_that_failed_is_refused(made: QmpbackupSet) -> None:
    first, second, third = made.references
    lost = made.layers["d2.qcow2"][1]
    lost.rename(lost.with_name(f"{lost.name}.partial"))
    with pytest.raises(ChainBrokenError, match="of a run that failed, and took changes"):
        opened.open_set(made.path)
    assert ids(made.path) == [first]
    full = made.run("FULL")
    after = made.run("INC")
    assert ids(made.path) == [first, full, after]
    # a copy clears no bitmap
    made.run("COPY")
    for each in made.path.rglob(f"COPY-{made.stamp}-*"):
        each.rename(each.with_name(f"{each.name}.partial"))
    last = made.run("INC")
    assert ids(made.path) == [first, full, after, last]
    assert {second, third}.isdisjoint(ids(made.path))


def test_what_is_missing_or_not_clear_is_named(made: QmpbackupSet) -> None:
    first, second, third = made.references
    layers = made.layers["d1.qcow2"]

    def problems(words: str) -> None:
        with pytest.raises(ChainBrokenError, match=words):
            opened.open_set(made.path)

    kept = layers[1].read_bytes()
    layers[1].unlink()
    problems(f"{third}-d1.qcow2 is not read: {second} before it does not hold the disk")
    layers[1].symlink_to("/etc/shadow")
    problems("not a regular file")
    layers[1].unlink()
    layers[1].write_bytes(kept[:70])
    problems("too early")
    layers[1].write_bytes(kept)
    assert opened.open_set(made.path).problems == ()
    io(layers[0], ["write 0 512"])
    qemu_img("snapshot", "-c", "FULL-BACKUP", layers[0])
    problems("snapshotrebase")
    qemu_img("snapshot", "-d", "FULL-BACKUP", layers[0])
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", layers[0])
    problems("backing file, which no full")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", layers[0])
    assert ids(made.path) == [first, second, third]
    made.config("d1.qcow2", "vmdk")
    problems("format 'vmdk', which is not read")
    made.config("d1.qcow2")
    for level in ("FULL", "INC"):
        made.stamp = 1_900_000_000
        made.run(level)
    problems("a full and an increment have one time")


def test_names_that_are_one(tmp_path: Path) -> None:
    made = QmpbackupSet(tmp_path / "set", disks=("a", "b", "a.b"))
    made.run("FULL")
    shutil.copy(made.path / f"b/FULL-{made.stamp}-b", made.path / f"a/FULL-{made.stamp}-b")
    with pytest.raises(FormatError, match="two disks would have one name"):
        opened.open_set(made.path)


def test_a_hundred_layers_need_few_descriptors(ctl: Ctl, tmp_path: Path) -> None:
    made = QmpbackupSet(tmp_path / "set", disks=("d1.qcow2",))
    made.run("FULL")
    for number in range(99):
        made.stamp += 60
        path = made.place("d1.qcow2", "INC")
        shutil.copy(made.layers["d1.qcow2"][0], path)
        if number % 33 == 32:
            made.layers["d1.qcow2"].append(path)
    for number, path in enumerate(sorted((made.path / "d1.qcow2").glob("INC-*"))):
        qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
        if number % 33 == 32:
            io(path, [f"write -P {number} {number * 8 * KIB} {MIB}"])
    wanted = stacked(made.layers["d1.qcow2"], tmp_path / "stacked")
    argv = ["prlimit", "--nofile=64:64", "--", *ctl.argv(
        "restore", made.path, "-o", tmp_path / "out", "--format", "raw")]  # fmt: skip
    done = subprocess.run(
        argv, cwd=ROOT, env=ctl.environment, capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    found = hashlib.sha256((tmp_path / "out/d1.raw").read_bytes()).hexdigest()
    assert found == hashlib.sha256(wanted).hexdigest()


def test_import_leaves_nothing_half_done(ctl: Ctl, made: QmpbackupSet, tmp_path: Path) -> None:
    out = tmp_path / "ours"
    wrong: list[tuple[str | Path, ...]] = [(), ("--link", "-o", out), ("-o", made.path)]
    for words in wrong:
        assert "written anew" in ctl("import", made.path, *words, code=2).stderr
    for name in ((), ("--name", "a/b"), ("--name", "a\nb")):
        assert "--name" in ctl("import", made.path, "-o", out, *name, code=2).stderr
    ctl("import", made.path, "-o", out, "--name", "vm7", "--uuid", "x", code=2)
    assert not out.exists()
    path = made.layers["d2.qcow2"][2]
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    told = ctl("import", made.path, "-o", out, "--name", "vm7", code=40).stderr
    assert path.name in told
    assert [each.name for each in out.iterdir() if each.name != ".lock"] == []
    path.write_bytes(data)
    ctl("import", made.path, "-o", out, "--name", "vm7", code=3)
    assert ids(out) == list(made.references)
    told = ctl("remove", made.path, "--point", ids(out)[0], code=50).stderr
    assert "is a set of qmpbackup" in told


def test_a_run_goes_on_with_what_was_imported(ctl: Ctl, made: QmpbackupSet, tmp_path: Path) -> None:
    """It reads the disks in full: qmpbackup's bitmaps are not to be relied on."""
    images = {}
    arguments = []
    for number, (disk, layers) in enumerate(made.layers.items()):
        path = tmp_path / disk
        shutil.copy(layers[0], path)
        images[f"disk{number}"] = (path, "qcow2")
        arguments += ["-drive", f"file={path},format=qcow2,if=none,id=drive{number}"]
        arguments += ["-device", f"virtio-blk-pci,drive=drive{number},id=disk{number}"]
    writers = {name: f"/machine/peripheral/{name}/virtio-backend" for name in images}
    out = tmp_path / "ours"
    ctl("import", made.path, "-o", out, "--name", "vm7", code=3)
    with running(Process(tmp_path, arguments, images, writers)) as process:
        first = process.backup(ctl, out, code=None)
        process.scribble(random.Random(4))
        second = process.backup(ctl, out)
        wanted = process.contents()
    assert [each["point"]["level"] for each in (first, second)] == ["inc", "inc"]
    assert ids(out)[:3] == list(made.references)
    modes = [
        {each.target: each.mode for each in point.disks}
        for point in opened.open_set(out).known.points[3:]
    ]
    assert [set(each.values()) for each in modes] == [{DiskMode.FULL}, {DiskMode.DELTA}]
    ctl("verify", out)
    check(ctl, out, made.references | {ids(out)[-1]: wanted})
