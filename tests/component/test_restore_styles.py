"""Several points in one restore, as a chain of images or as snapshots in one."""

import errno
import os
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbackupd.errors import IntegrityError, NbdbackupError, RepositoryError, UsageError
from nbdbackupd.model.chain import Level
from nbdbackupd.model.choice import Choice
from nbdbackupd.ops.restore import restore
from nbdbackupd.ops.restore.request import (
    OutputPlace,
    RestoredDisk,
    RestoreReport,
    RestoreRequest,
    Style,
)
from nbdbackupd.qemu import image
from nbdbackupd.qemu.image import CreateOptions
from tests.lib import sets
from tests.lib.sets import Change, SetBuilder

pytestmark = pytest.mark.component

KIB = 1 << 10
MIB = 1 << 20
STYLES = (Style.CHAIN, Style.SNAPSHOTS)


def run(request: RestoreRequest) -> RestoreReport:
    return restore.run(request, progress=lambda *_: None, cancelled=lambda: None)


def built(path: Path, *, level: int | None = None, info: bytes = b"") -> SetBuilder:
    """A full, increments with data and zeroes over older data, one disk read anew, and a copy."""
    rng = random.Random(5)
    made = SetBuilder(path, level=level, image_info=info)
    made.disks = {"vda": bytearray(rng.randbytes(3 * MIB)), "vdb": sets.random_disk(rng, MIB)}
    made.full()
    made.inc({"vda": [Change(0, 64 * KIB), Change(70 * KIB, b"x" * 512), Change(MIB, MIB)]})
    made.full(Level.COPY)
    made.inc({"vda": sets.random_changes(rng, 3 * MIB, 20)}, whole=("vdb",))
    made.inc({name: sets.random_changes(rng, MIB, 9) for name in ("vda", "vdb")}, whole=("vda",))
    made.inc({"vda": sets.random_changes(rng, 3 * MIB, 9)})
    return made


def of_point(disk: RestoredDisk, point: str, size: int, out: Path) -> bytes:
    """What QEMU reads of the disk at one point: of a snapshot, or of a chain up to there."""
    if disk.images or len(disk.points) == 1:
        path = [*disk.images, disk.path][disk.points.index(point)]
    else:
        path = out.with_name("applied")
        argv = ["qemu-img", "convert", "-f", "qcow2", "-l", f"snapshot.name={point}", "-O", "raw"]
        subprocess.run([*argv, disk.path, out], check=True)
        # of the newest size, whatever the snapshot's was
        read = out.read_bytes()[:size]
        shutil.copyfile(disk.path, path)
        subprocess.run(["qemu-img", "snapshot", "-a", point, path], check=True)
        assert sets.read_image(path, "qcow2")[: len(read)] == read
    return sets.read_image(path, "qcow2")


def prove(made: SetBuilder, report: RestoreReport, points: list[str], tmp_path: Path) -> None:
    """Each point of each disk is that of the guest, and the images are sound."""
    ids = [point.id for point in made.points]
    for disk in report.disks:
        assert list(disk.points) == points
        for ident in points:
            wanted = made.images[ids.index(ident)][disk.target]
            assert of_point(disk, ident, len(wanted), tmp_path / "raw") == wanted, (
                disk.target,
                ident,
            )
        for path in (*disk.images, disk.path):
            subprocess.run(["qemu-img", "check", "-q", path], check=True)
            assert image.info(path).bitmaps == ()
        assert (
            sets.read_image(disk.path, "qcow2") == made.images[ids.index(points[-1])][disk.target]
        )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("level", [None, 1], ids=["plain", "lz4"])
def test_every_point_is_exact(tmp_path: Path, style: Style, level: int | None) -> None:
    made = built(tmp_path / "set", level=level)
    out = tmp_path / "out"
    report = run(RestoreRequest(source=made.path, output=out, style=style, jobs=2, workers=2))
    points = ["point1", "point2", "point4", "point5", "point6"]
    prove(made, report, points, tmp_path)
    assert not list(out.rglob("*.incomplete"))
    left = sorted(path.name for path in out.glob("vd*"))
    if style is Style.SNAPSHOTS:
        assert left == ["vda.qcow2", "vdb.qcow2"]
    else:
        older = [f"vda.{point}.qcow2" for point in points[:-1]]
        assert [name for name in left if name.startswith("vda")] == [*older, "vda.qcow2"]


@pytest.mark.parametrize("style", STYLES)
def test_the_oldest_point_can_be_chosen(tmp_path: Path, style: Style) -> None:
    made = built(tmp_path / "set")

    def request(name: str, since: str = "", point: str = "") -> RestoreRequest:
        return RestoreRequest(
            source=made.path, output=tmp_path / name, style=style, since=since,
            choice=Choice(point=point),
        )  # fmt: skip

    prove(made, run(request("a", since="point2", point="point5")), ["point2", "point4", "point5"],
          tmp_path)  # fmt: skip
    prove(made, run(request("b", since="point6")), ["point6"], tmp_path)
    prove(made, run(request("c", point="point3")), ["point3"], tmp_path)
    for wrong, why in (("point3", "is not one that it hangs on"), ("nosuch", "no restore point")):
        with pytest.raises(RepositoryError, match=why):
            run(request("d", since=wrong))
    with pytest.raises(RepositoryError, match="point2 can't begin with point5"):
        run(request("d", since="point5", point="point2"))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("style", STYLES)
def test_disks_that_grow_and_shrink(tmp_path: Path, style: Style) -> None:
    """What a shrunk disk lost does not come back when it grows, whether it is read anew or not."""
    for whole in ((), ("vda",)):
        made = SetBuilder(tmp_path / f"set{len(whole)}")
        made.disks = {"vda": bytearray(b"a" * MIB)}
        made.full()
        made.disks["vda"] = made.disks["vda"][: 512 * KIB]
        made.inc({"vda": [Change(4096, b"b" * 4096)]}, whole=whole)
        made.disks["vda"] += bytes(2 * MIB)
        made.inc({"vda": [Change(MIB, b"c" * 512)]}, whole=whole)
        out = tmp_path / f"out{len(whole)}"
        report = run(RestoreRequest(source=made.path, output=out, style=style))
        prove(made, report, ["point1", "point2", "point3"], tmp_path)
        told = any("of other sizes" in warning for warning in report.warnings)
        assert told == (style is Style.SNAPSHOTS)


@pytest.mark.parametrize("style", STYLES)
def test_odd_images(tmp_path: Path, style: Style) -> None:
    """Options of the original come back; a version that can't hold snapshots of two sizes not."""
    for number, options in enumerate(
        (
            CreateOptions(format="qcow2", compat="0.10"),
            CreateOptions(format="qcow2", cluster_size=128 * KIB, extended_l2=True),
            CreateOptions(format="qcow2", cluster_size=4 * KIB, refcount_bits=64),
            CreateOptions(format="qcow2", cluster_size=2 * MIB),
        )
    ):
        original = tmp_path / "original"
        image.create(original, 3 * MIB, options)
        made = built(tmp_path / f"set{number}", info=image.info_json(original).encode())
        out = tmp_path / f"out{number}"
        report = run(RestoreRequest(source=made.path, output=out, style=style, disks=("vda",)))
        prove(made, report, ["point1", "point2", "point4", "point5", "point6"], tmp_path)
        found = image.info(report.disks[0].path)
        assert found.cluster_size == (options.cluster_size or 64 * KIB)
        assert found.extended_l2 == options.extended_l2


def test_backing_files_are_named_relative(tmp_path: Path) -> None:
    """The chain can be moved as a whole; names with colons and commas are no protocols."""
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(b"a" * MIB)}
    made.full()
    made.inc({"vda": [Change(0, b"b" * 4096)]})
    made.inc({"vda": [Change(4096, 8192)]})
    place = OutputPlace("vda", tmp_path / "nbd:x,y z.qcow2")
    report = run(RestoreRequest(source=made.path, places=(place,), style=Style.CHAIN))
    prove(made, report, ["point1", "point2", "point3"], tmp_path)
    chain = image.info_chain(report.disks[0].path, format="qcow2")
    assert [each.backing_format for each in chain] == ["qcow2", "qcow2", ""]
    assert all("/" not in each.backing.removeprefix("./") for each in chain)
    moved = tmp_path / "moved"
    moved.mkdir()
    disk = report.disks[0]
    for path in (*disk.images, disk.path):
        path.rename(moved / path.name)
    assert sets.read_image(moved / disk.path.name, "qcow2") == made.images[-1]["vda"]


def test_what_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    rng = random.Random(3)
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(rng.randbytes(4 * MIB))}
    made.full()
    made.inc({"vda": [Change(0, b"n" * 512)]}, whole=("vda",))
    made.inc({"vda": [Change(MIB, b"m" * 512)]})
    out = tmp_path / "out"
    report = run(RestoreRequest(source=made.path, output=out, style=Style.SNAPSHOTS))
    prove(made, report, ["point1", "point2", "point3"], tmp_path)
    # the block of the second point that differs, and the third point's change
    assert report.disks[0].data_bytes == 4 * MIB + 64 * KIB + 512
    assert report.disks[0].path.stat().st_blocks * 512 < 5 * MIB


@pytest.mark.parametrize("style", STYLES)
def test_damage_and_missing_layers_are_loud(tmp_path: Path, style: Style) -> None:
    made = built(tmp_path / "set")
    stream = made.path / made.points[1].disk("vda").file
    data = stream.read_bytes()
    at = data.index(b"x" * 512)
    stream.write_bytes(data[:at] + b"y" + data[at + 1 :])
    out = tmp_path / "out"
    request = RestoreRequest(source=made.path, output=out, style=style)
    with pytest.raises(IntegrityError) as found:
        run(request)
    assert found.value.fields["point"] == "point2"
    assert found.value.fields["disk"] == "vda"
    assert not [path for path in out.glob("vd*") if not path.name.endswith(".incomplete")]
    stream.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        run(RestoreRequest(source=made.path, output=tmp_path / "none", style=style))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "wish",
    [
        {"format": "raw"},
        {"preallocate": True},
        {"style": Style.PLAIN, "since": "point1"},
    ],
)
def test_wishes_that_contradict(tmp_path: Path, wish: dict[str, object]) -> None:
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(MIB)}
    made.full()
    asked = {"style": Style.CHAIN, **wish}
    with pytest.raises(UsageError):
        run(RestoreRequest(source=made.path, output=tmp_path / "o", **asked))  # type: ignore[arg-type]
    assert not (tmp_path / "o").exists()


def test_an_older_image_is_not_replaced(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    out = tmp_path / "out"
    out.mkdir()
    (out / "vda.point2.qcow2").write_text("mine")
    request = RestoreRequest(source=made.path, output=out, style=Style.CHAIN)
    with pytest.raises(NbdbackupError, match="--force"):
        run(request)
    assert (out / "vda.point2.qcow2").read_text() == "mine"
    report = run(replace(request, force=True))
    prove(made, report, ["point1", "point2", "point4", "point5", "point6"], tmp_path)


def test_a_chain_that_replaces_another_never_mixes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end between two renames leaves images that are of one chain, or none."""
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(b"a" * MIB)}
    made.full()
    made.inc({"vda": [Change(0, b"b" * 4096)]})
    made.inc({"vda": [Change(4096, b"c" * 4096)]})
    out = tmp_path / "out"
    request = RestoreRequest(source=made.path, output=out, style=Style.CHAIN, force=True)
    report = run(request)
    images = [*report.disks[0].images, report.disks[0].path]
    rename, left = os.rename, 0

    def failing(source: Path, target: Path) -> None:
        nonlocal left
        if target in images:
            left -= 1
            if left < 0:
                raise OSError(errno.EIO, "no more")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    for count in range(3):
        left = count
        with pytest.raises(NbdbackupError):
            run(request)
        assert [path.exists() for path in images] == [number < count for number in range(3)]
    left = 3
    prove(made, run(request), ["point1", "point2", "point3"], tmp_path)
