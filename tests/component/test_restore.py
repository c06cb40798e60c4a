"""Restores of sets made by hand, compared byte by byte with what the guest's disks were."""

import fcntl
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nbdbackupd.errors import (
    BusyError,
    ChainBrokenError,
    IntegrityError,
    Interrupted,
    NbdbackupError,
    NoSpaceError,
    RepositoryError,
    UsageError,
)
from nbdbackupd.format.index import Index, Kind
from nbdbackupd.model.chain import DiskMode, Level
from nbdbackupd.model.choice import Choice
from nbdbackupd.ops.restore import restore
from nbdbackupd.ops.restore.request import Style
from nbdbackupd.ops.restore.restore import RestoreReport, RestoreRequest
from nbdbackupd.qemu import image
from nbdbackupd.qemu.image import CreateOptions
from tests.lib import sets
from tests.lib.sets import Change, SetBuilder

pytestmark = pytest.mark.component

KIB = 1 << 10
MIB = 1 << 20
TOP = Path(__file__).resolve().parents[2]


def run(request: RestoreRequest) -> RestoreReport:
    return restore.run(request, progress=lambda *_: None, cancelled=lambda: None)


def built(path: Path, seed: int = 1, size: int = 3 * MIB, **options: object) -> SetBuilder:
    """A full, three increments and a differential of two disks."""
    rng = random.Random(seed)
    made = SetBuilder(path, **options)  # type: ignore[arg-type]
    made.disks = {"vda": sets.random_disk(rng, size), "vdb": sets.random_disk(rng, MIB)}
    made.full()
    for number in range(3):
        changes = {"vda": sets.random_changes(rng, size, 20)}
        if number == 1:
            changes["vdb"] = [Change(64 * KIB, 128 * KIB), Change(700 * KIB, rng.randbytes(999))]
        made.inc(changes)
    made.inc({"vda": sets.random_changes(rng, size, 5)}, level=Level.DIFF)
    return made


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def data_block(made: SetBuilder) -> tuple[Path, int]:
    """The stream of vda's full, and where its first data block lies."""
    stream = made.path / made.points[0].disk("vda").file
    with Index(stream.with_name(f"{stream.name}.index")) as index:
        return stream, next(record.position for record in index if record.kind == Kind.DATA)


@pytest.mark.parametrize("output", ["qcow2", "raw"])
@pytest.mark.parametrize("level", [None, 1], ids=["plain", "lz4"])
def test_every_point_is_exact(tmp_path: Path, level: int | None, output: str) -> None:
    made = built(tmp_path / "set", level=level)
    for point, disks in zip(made.points, made.images, strict=True):
        out = tmp_path / point.id
        report = run(
            RestoreRequest(
                source=made.path,
                output=out,
                choice=Choice(point=point.id),
                format=output,
                workers=3,
            )
        )
        assert report.point == point.id
        for disk in report.disks:
            assert disk.path == out / f"{disk.target}.{output}"
            assert sets.read_image(disk.path, output) == disks[disk.target]
            assert disk.size == len(disks[disk.target])
        assert not list(out.rglob("*.incomplete"))


@pytest.mark.parametrize("output", ["qcow2", "raw"])
def test_odd_sizes(tmp_path: Path, output: str) -> None:
    """A virtual size that is no multiple of anything but a sector."""
    size = 10007 * 512
    made = built(tmp_path / "set", size=size, block=100 * KIB)
    report = run(RestoreRequest(source=made.path, output=tmp_path / "out", format=output))
    assert sets.read_image(report.disks[0].path, output) == made.images[-1]["vda"]
    assert image.info(report.disks[0].path).virtual_size == size


def test_large_sparse_disk(tmp_path: Path) -> None:
    """1000001 sectors, nearly all of them holes: the image stays small."""
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(1000001 * 512)}
    made.disks["vda"][-512:] = b"e" * 512
    made.full()
    made.inc({"vda": [Change(0, b"b" * 512)]})
    report = run(RestoreRequest(source=made.path, output=tmp_path / "out", format="raw"))
    path = report.disks[0].path
    assert path.read_bytes() == made.images[-1]["vda"]
    assert path.stat().st_blocks * 512 < 2 * MIB


def test_raw_layout(tmp_path: Path) -> None:
    rng = random.Random(2)
    made = SetBuilder(tmp_path / "set", raw=True, format="raw")
    made.disks = {"vda": sets.random_disk(rng, MIB)}
    made.full(Level.COPY)
    report = run(RestoreRequest(source=made.path, output=tmp_path / "out"))
    assert report.disks[0].path.name == "vda.raw"
    assert report.disks[0].path.read_bytes() == made.images[0]["vda"]


def test_disk_read_in_full_within_an_increment(tmp_path: Path) -> None:
    """What the demoted full holds as zero hides the older data; a resize goes with it."""
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(b"x" * MIB), "vdb": bytearray(b"y" * MIB)}
    made.full()
    made.disks["vda"] = bytearray(b"\0" * 300 * KIB + b"z" * 100 * KIB)
    made.inc({"vdb": [Change(0, 64 * KIB)]}, whole=("vda",))
    made.disks["vda"] += bytes(MIB)
    made.inc({"vda": [Change(512 * KIB, b"t" * 4096)]}, whole=("vda",))
    for point, disks in zip(made.points, made.images, strict=True):
        out = tmp_path / point.id
        for disk in run(
            RestoreRequest(source=made.path, output=out, choice=Choice(point=point.id))
        ).disks:
            assert sets.read_image(disk.path, "qcow2") == disks[disk.target]


def test_grown_and_shrunk_deltas(tmp_path: Path) -> None:
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(b"a" * MIB)}
    made.full()
    made.disks["vda"] = made.disks["vda"][: 512 * KIB]
    made.inc({"vda": [Change(4096, b"b" * 4096)]})
    made.disks["vda"] += bytes(MIB)
    made.inc({"vda": [Change(MIB, b"c" * 512)]})
    for point, disks in zip(made.points, made.images, strict=True):
        out = tmp_path / point.id
        report = run(RestoreRequest(source=made.path, output=out, choice=Choice(point=point.id)))
        assert sets.read_image(report.disks[0].path, "qcow2") == disks["vda"]


@pytest.mark.parametrize(
    "options",
    [
        CreateOptions(format="qcow2", cluster_size=4096, refcount_bits=1),
        CreateOptions(format="qcow2", cluster_size=2 * MIB, compression_type="zstd"),
        CreateOptions(
            format="qcow2", cluster_size=128 * KIB, extended_l2=True, lazy_refcounts=True
        ),
        CreateOptions(format="qcow2", compat="0.10"),
    ],
    ids=["4k", "2m", "extended", "v2"],
)
def test_creation_options_come_back(tmp_path: Path, options: CreateOptions) -> None:
    original = tmp_path / "original.qcow2"
    image.create(original, 3 * MIB, options)
    if options.compat != "0.10":
        subprocess.run(["qemu-img", "bitmap", "--add", original, "old"], check=True)
    made = built(tmp_path / "set", image_info=image.info_json(original).encode())
    report = run(RestoreRequest(source=made.path, output=tmp_path / "out"))
    assert sets.read_image(report.disks[0].path, "qcow2") == made.images[-1]["vda"]
    found, wanted = image.info(report.disks[0].path), image.info(original)
    same = replace(
        found, filename=wanted.filename, actual_size=wanted.actual_size, bitmaps=wanted.bitmaps
    )
    assert same == wanted
    assert found.bitmaps == ()
    subprocess.run(["qemu-img", "check", "-q", report.disks[0].path], check=True)


def test_data_file_image_comes_back_plain(tmp_path: Path) -> None:
    original = tmp_path / "original.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o",
         f"data_file={tmp_path / 'data.raw'},data_file_raw=on", original, "3M"],
        check=True,
    )  # fmt: skip
    made = built(tmp_path / "set", image_info=image.info_json(original).encode())
    report = run(RestoreRequest(source=made.path, output=tmp_path / "out"))
    assert image.info(report.disks[0].path).data_file == ""
    assert sets.read_image(report.disks[0].path, "qcow2") == made.images[-1]["vda"]


@pytest.mark.parametrize("output", ["qcow2", "raw"])
def test_preallocation(tmp_path: Path, output: str) -> None:
    made = built(tmp_path / "set", size=4 * MIB)
    report = run(
        RestoreRequest(
            source=made.path, output=tmp_path / "out", format=output, preallocate=True,
            disks=("vda",),
        )
    )  # fmt: skip
    path = report.disks[0].path
    assert path.stat().st_blocks * 512 >= 4 * MIB
    assert sets.read_image(path, output) == made.images[-1]["vda"]


COMPRESSED = [
    ("zlib", "", 5 * MIB),
    ("zstd", "cluster_size=64k,compression_type=zstd", 3 * MIB + 7 * 512),
    ("zlib", "cluster_size=2M", 10007 * 512),
    ("zlib", "cluster_size=512", MIB + 512),
    ("zstd", "extended_l2=on,cluster_size=128k,compression_type=zstd", 3 * MIB),
    ("zlib", "compat=0.10", 3 * MIB + 512),
]


@pytest.mark.parametrize(("method", "options", "size"), COMPRESSED)
@pytest.mark.parametrize("block", [100 * KIB, MIB])
def test_compressed(tmp_path: Path, method: str, options: str, size: int, block: int) -> None:
    """Each point of blocks that begin and end within clusters, some of them incompressible."""
    original = tmp_path / "original.qcow2"
    more = ["-o", options] if options else []
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *more, str(original), str(size)], check=True
    )
    info = image.info_json(original).encode()
    made = built(tmp_path / "set", size=size, block=block, image_info=info)
    for point, disks in zip(made.points, made.images, strict=True):
        request = RestoreRequest(
            source=made.path, output=tmp_path / point.id, choice=Choice(point=point.id),
            compress=True, workers=3,
        )  # fmt: skip
        for disk in run(request).disks:
            told = image.info(disk.path)
            assert (told.virtual_size, told.dirty) == (len(disks[disk.target]), False)
            assert told.compression_type in ("", method)
            assert sets.read_image(disk.path, "qcow2") == disks[disk.target]
            assert compressed_clusters(disk.path) > 0
        assert not list((tmp_path / point.id).rglob("*.incomplete"))


def compressed_clusters(path: Path) -> int:
    argv = ["qemu-img", "check", "--output", "json", str(path)]
    told = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return int(told.get("compressed-clusters", 0))


def test_a_compressed_image_is_small(tmp_path: Path) -> None:
    """About as ``qemu-img convert -c`` makes it, and of the same content; raw becomes qcow2."""
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(b"some text of a guest, line by line\n" * (1 << 18))}
    del made.disks["vda"][8 * MIB :]
    made.full()
    plain = run(RestoreRequest(source=made.path, output=tmp_path / "raw", format="raw"))
    theirs = tmp_path / "theirs.qcow2"
    argv = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2"]
    subprocess.run([*argv, str(plain.disks[0].path), str(theirs)], check=True)
    (ours,) = run(RestoreRequest(source=made.path, output=tmp_path / "o", compress=True)).disks
    assert ours.format == "qcow2"
    argv = ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2"]
    subprocess.run([*argv, str(ours.path), str(theirs)], check=True)
    assert ours.path.stat().st_blocks <= theirs.stat().st_blocks * 1.1 + 512


@pytest.mark.parametrize("wish", [{"format": "raw"}, {"preallocate": True}, {"style": Style.CHAIN}])
def test_wishes_that_contradict_compression(tmp_path: Path, wish: dict[str, object]) -> None:
    made = built(tmp_path / "set")
    asked = {"compress": True, **wish}
    with pytest.raises(UsageError, match="compressed"):
        run(RestoreRequest(source=made.path, output=tmp_path / "o", **asked))  # type: ignore[arg-type]
    assert not (tmp_path / "o").exists()


def test_files_beside_the_images(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    out = tmp_path / "out"
    report = run(RestoreRequest(source=made.path, output=out, choice=Choice(point="point2")))
    assert report.config == out / "vm1.xml"
    assert "point2" in (out / "vm1.xml").read_text()
    assert (out / "vm1.xml").stat().st_mode & 0o777 == 0o600
    assert (out / "config/nvram/vm1_VARS.fd").read_bytes() == b"vars point2" * 100
    assert (out / "config/tpm-state/tpm2/tpm2-00.permall").read_bytes() == b"tpm" * 77
    assert (out / "vda.qcow2").stat().st_mode & 0o777 == 0o600
    document = json.loads(json.dumps(report.to_json()))
    assert document["version"] == 1
    assert document["disks"][0]["target"] == "vda"


def test_choosing_the_point(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    source = made.path
    chosen = itertools.count()

    def point(**how: object) -> str:
        out = tmp_path / f"out{next(chosen)}"
        choice = Choice(**how)  # type: ignore[arg-type]
        request = RestoreRequest(source=source, output=out, disks=("vdb",), choice=choice)
        return run(request).point

    assert point() == "point5"
    assert point(until=made.points[2].checkpoint) == "point3"
    assert point(at=datetime(2026, 1, 31, 3, 59, 59, tzinfo=UTC)) == "point3"
    assert point(at=datetime(2026, 1, 31, 4, 0, 0, tzinfo=UTC)) == "point4"
    with pytest.raises(RepositoryError, match="no restore point is as old"):
        point(at=datetime(2025, 1, 1, tzinfo=UTC))
    with pytest.raises(RepositoryError, match="no restore point made checkpoint"):
        point(until="cp.9")
    with pytest.raises(RepositoryError, match="no restore point with id"):
        point(point="nosuch")
    with pytest.raises(UsageError):
        point(point="point1", until="x")
    with pytest.raises(RepositoryError, match="holds no disk vdz"):
        run(RestoreRequest(source=source, output=tmp_path / "z", disks=("vdz",)))
    with pytest.raises(RepositoryError):
        run(RestoreRequest(source=tmp_path / "nosuch", output=tmp_path / "z"))
    assert not (tmp_path / "z").exists()


def test_existing_targets(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    out = tmp_path / "out"
    request = RestoreRequest(source=made.path, output=out)
    run(request)
    before = (out / "vda.qcow2").stat()
    with pytest.raises(RepositoryError, match="--force") as refused:
        run(request)
    assert refused.value.exit_code == 50
    assert (out / "vda.qcow2").stat() == before
    run(replace(request, force=True, choice=Choice(point="point1")))
    assert sets.read_image(out / "vda.qcow2", "qcow2") == made.images[0]["vda"]


def test_failed_restore_keeps_the_old_target(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    out = tmp_path / "out"
    request = RestoreRequest(
        source=made.path, output=out, choice=Choice(point="point1"), disks=("vda",)
    )
    run(request)
    stream, position = data_block(made)
    flip(stream, position + 77)
    with pytest.raises(IntegrityError, match="SHA-256") as found:
        run(replace(request, force=True))
    assert found.value.exit_code == 40
    assert found.value.fields["file"] == stream
    assert found.value.fields["disk"] == "vda"
    assert found.value.fields["point"] == "point1"
    assert found.value.fields["offset"] == position
    assert sets.read_image(out / "vda.qcow2", "qcow2") == made.images[0]["vda"]
    assert (out / "vda.qcow2.incomplete").exists()


def test_proof_comes_before_the_first_byte(tmp_path: Path) -> None:
    """Each file that is missing, short or other is found before anything is written."""
    made = built(tmp_path / "set")
    out = tmp_path / "out"
    disk = made.points[0].disk("vda")
    for name in (disk.file, disk.index.name, "vmconfig.point5.xml"):
        path = made.path / name
        data = path.read_bytes()
        for bad in (None, data[:-1], data + b"x"):
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            else:
                path.symlink_to(tmp_path / "nowhere")
            with pytest.raises(IntegrityError) as found:
                run(RestoreRequest(source=made.path, output=out))
            assert found.value.fields["file"] == path
            assert not out.exists()
            path.unlink()
            path.write_bytes(data)
    manifest = made.path / "points/000002-point2.json"
    manifest.rename(tmp_path / "away")
    with pytest.raises(ChainBrokenError):
        run(RestoreRequest(source=made.path, output=out))
    assert not out.exists()


def test_files_of_other_disks_and_points_are_not_needed(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    (made.path / made.points[0].disk("vdb").file).unlink()
    (made.path / made.points[4].disk("vda").file).unlink()
    out = tmp_path / "out"
    run(RestoreRequest(source=made.path, output=out, disks=("vda",), choice=Choice(point="point4")))
    assert sets.read_image(out / "vda.qcow2", "qcow2") == made.images[3]["vda"]


def test_full_that_does_not_cover_its_disk(tmp_path: Path) -> None:
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(b"a" * MIB)}
    made._point(Level.FULL, {"vda": [Change(0, b"a" * 4096)]}, DiskMode.FULL)
    with pytest.raises(IntegrityError, match="no block holds") as found:
        run(RestoreRequest(source=made.path, output=tmp_path / "out", format="raw"))
    assert found.value.fields["guest"] == 4096


def test_damaged_config_file(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    (made.path / "nvram.point5.vm1_VARS.fd").write_bytes(b"VARS point5" * 100)
    out = tmp_path / "out"
    with pytest.raises(IntegrityError, match="SHA-256"):
        run(RestoreRequest(source=made.path, output=out))
    assert not (out / "vda.qcow2").exists()


def test_cancel(tmp_path: Path) -> None:
    made = built(tmp_path / "set", size=64 * MIB)
    calls = itertools.count()

    def cancelled() -> None:
        if next(calls) > 30:
            raise Interrupted(signal.SIGTERM)

    for output in ("raw", "qcow2"):
        calls = itertools.count()
        out = tmp_path / output
        request = RestoreRequest(source=made.path, output=out, format=output)
        with pytest.raises(Interrupted):
            restore.run(request, progress=lambda *_: time.sleep(0.05), cancelled=cancelled)
        assert not list(out.glob("vda.raw")) + list(out.glob("vda.qcow2"))


def test_progress_ends_at_the_size(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    seen: dict[str, list[int]] = {}

    def progress(disk: str, done: int, total: int) -> None:
        assert total == len(made.disks[disk])
        seen.setdefault(disk, []).append(done)

    request = RestoreRequest(source=made.path, output=tmp_path / "out")
    restore.run(request, progress=progress, cancelled=lambda: None)
    for disk, values in seen.items():
        assert values == sorted(values)
        assert values[-1] == len(made.disks[disk])


def test_second_restore_to_one_directory(tmp_path: Path) -> None:
    made = built(tmp_path / "set", size=MIB)
    request = RestoreRequest(source=made.path, output=tmp_path / "out")
    found: list[NbdbackupError] = []

    def progress(*_: object) -> None:
        if not found:
            try:
                run(request)
            except BusyError as err:
                found.append(err)

    # S-8: who may read the directory, and any account may, can lock it
    (tmp_path / "out").mkdir(mode=0o755)
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    restore.run(request, progress=progress, cancelled=lambda: None)
    os.close(fd)
    assert found
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("output", "compress"), [("qcow2", False), ("raw", False), ("qcow2", True)]
)
def test_kill_leaves_only_incomplete_files(tmp_path: Path, output: str, compress: bool) -> None:
    made = built(tmp_path / "set", size=32 * MIB)
    out = tmp_path / "out"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from nbdbackupd.ops.restore import restore\n"
        "source, out, form, compress = sys.argv[1:]\n"
        "request = restore.RestoreRequest(\n"
        "    source=Path(source), output=Path(out), format=form, compress=compress == 'True'\n"
        ")\n"
        "def progress(*_):\n"
        "    print('.', flush=True)\n"
        "    time.sleep(0.05)\n"
        "restore.run(request, progress=progress, cancelled=lambda: None)\n"
    )
    words = (os.fspath(made.path), os.fspath(out), output, str(compress))
    argv = [sys.executable, "-c", program, *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=TOP) as child:
        assert child.stdout is not None
        for _ in range(5):
            assert child.stdout.readline()
        child.kill()
    left = [path.name for path in out.rglob("*") if path.is_file()]
    assert sorted(left) == [".nbdbackup-restore", f"vda.{output}.incomplete"]
    # what the dead run left is in nobody's way; its qemu-nbd may hold the old image for a moment
    report = run(RestoreRequest(source=made.path, output=out, format=output, compress=compress))
    assert sets.read_image(report.disks[0].path, output) == made.images[-1]["vda"]


@pytest.mark.parametrize("options", [(), ("--compress",)], ids=["plain", "compressed"])
def test_a_full_target(tmp_path: Path, options: tuple[str, ...]) -> None:
    """One line, no image under its name; nothing of the set is touched."""
    made = built(tmp_path / "set", size=32 * MIB)
    before = {path.name: path.stat().st_mtime_ns for path in made.path.iterdir()}
    out = tmp_path / "out"
    out.mkdir()
    mount = 'mount -t tmpfs -o size=1m none "$1" && out=$1 && shift && "$@"'
    shell = f'{mount}; code=$?; ls "$out"; exit $code'
    argv = [
        *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, "sh"),
        *(os.fspath(out), sys.executable, "-m", "nbdbackupd", "restore", os.fspath(made.path)),
        *("-o", os.fspath(out), "--checkpoint-dir", os.fspath(tmp_path / "state"), *options),
    ]
    done = subprocess.run(argv, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == NoSpaceError.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert not [name for name in done.stdout.split() if not name.endswith(".incomplete")]
    after = {path.name: path.stat().st_mtime_ns for path in made.path.iterdir()}
    # the lock of those who read
    assert after.keys() - before.keys() <= {".reading"}
    assert before.items() <= after.items()


def test_restore_needs_no_libvirt(tmp_path: Path) -> None:
    made = built(tmp_path / "set", size=MIB)
    for name in ("libvirt", "libvirtmod"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from nbdbackupd.ops.verify import verify\n"
        "from nbdbackupd.ops.restore import restore\n"
        "try:\n"
        "    import libvirt\n"
        "except ImportError:\n"
        "    pass\n"
        "else:\n"
        "    sys.exit('libvirt can be imported')\n"
        "request = restore.RestoreRequest(source=Path(sys.argv[1]), output=Path(sys.argv[2]))\n"
        "restore.run(request, progress=lambda *_: None, cancelled=lambda: None)\n"
    )
    path = os.pathsep.join([os.fspath(tmp_path), os.fspath(TOP)])
    subprocess.run(
        [sys.executable, "-c", program, made.path, tmp_path / "out"],
        check=True, env={**os.environ, "PYTHONPATH": path}, timeout=60,
    )  # fmt: skip
    found = sets.read_image(tmp_path / "out/vda.qcow2", "qcow2")
    assert found == made.images[-1]["vda"]


def files_of(made: SetBuilder, target: str, count: int) -> tuple[Path, ...]:
    return tuple(made.path / point.disk(target).file for point in made.points[:count])


@pytest.mark.parametrize("level", [None, 1], ids=["plain", "lz4"])
@pytest.mark.parametrize("keep", ["index", "checksum", "nothing", "damaged index"])
def test_sequence_by_hand(tmp_path: Path, keep: str, level: int | None) -> None:
    made = built(tmp_path / "set", level=level)
    files = files_of(made, "vda", 4)
    for path in files:
        index = path.with_name(f"{path.name}.index")
        if keep == "damaged index":
            data = bytearray(index.read_bytes())
            data[40] ^= 1
            index.write_bytes(data)
        elif keep != "index":
            index.unlink()
        if keep == "nothing":
            path.with_name(f"{path.name}.chksum").unlink()
    report = run(RestoreRequest(sequence=files, output=tmp_path / "out"))
    assert sets.read_image(report.disks[0].path, "qcow2") == made.images[3]["vda"]
    assert len(report.warnings) == (0 if keep in ("index", "checksum") else 4)
    assert report.disks[0].path == tmp_path / "out/vda.qcow2"


def test_sequence_that_does_not_hang_together(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    one, two, three, _ = files_of(made, "vda", 4)
    other = files_of(made, "vdb", 1)[0]
    out = tmp_path / "out"
    for bad in ((two, three), (one, three), (one, three, two), (other, two)):
        with pytest.raises(ChainBrokenError):
            run(RestoreRequest(sequence=bad, output=out))
    with pytest.raises(IntegrityError, match="missing"):
        run(RestoreRequest(sequence=(tmp_path / "nosuch.data",), output=out))
    with pytest.raises(UsageError):
        run(RestoreRequest(sequence=(one,), source=made.path, output=out))
    assert not out.exists()


def test_sequence_with_damage(tmp_path: Path) -> None:
    made = built(tmp_path / "set")
    files = files_of(made, "vda", 2)
    flip(*data_block(made))
    request = RestoreRequest(sequence=files[:1], output=tmp_path / "out")
    with pytest.raises(IntegrityError, match="SHA-256"):
        run(request)
    files[0].with_name(f"{files[0].name}.index").unlink()
    with pytest.raises(IntegrityError, match="Adler-32"):
        run(request)


def test_odd_names_and_collisions(tmp_path: Path) -> None:
    made = built(tmp_path / "set", domain="-evil\tname")
    for target, source in (("vda", "/a/disk.img"), ("vdb", "/b/disk.img")):
        for number, point in enumerate(made.points):
            disks = tuple(
                replace(disk, source=source) if disk.target == target else disk
                for disk in point.disks
            )
            made.points[number] = replace(point, disks=disks)
    made.rewrite()
    report = run(RestoreRequest(source=made.path, output=tmp_path / "out"))
    assert sorted(disk.path.name for disk in report.disks) == ["vda-disk.img", "vdb-disk.img"]
    assert report.config is not None
    assert report.config.parent == tmp_path / "out"
    assert report.config.name.startswith("evil_name-")
    report = run(RestoreRequest(source=made.path, output=tmp_path / "raw", format="raw"))
    assert sorted(disk.path.name for disk in report.disks) == ["vda-disk.raw", "vdb-disk.raw"]
