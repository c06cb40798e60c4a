"""Filling qcow2 images ourselves: QEMU must find them sound, and the bytes in them."""

import json
import random
import subprocess
import threading
from pathlib import Path

import pytest

from nbdbackupd.errors import FormatError, ProcessError
from nbdbackupd.qemu import image, qcow2
from nbdbackupd.qemu.image import CreateOptions
from tests.lib import sets

pytestmark = pytest.mark.component

KIB = 1 << 10
MIB = 1 << 20


def pieces(rng: random.Random, size: int) -> list[tuple[int, int]]:
    """Ranges of sectors that don't overlap, in no order."""
    sectors = size // 512
    borders = sorted(rng.sample(range(sectors + 1), min(2 * rng.randrange(1, 60), sectors)))
    found = [
        (start * 512, (end - start) * 512)
        for start, end in zip(borders[::2], borders[1::2], strict=False)
    ]
    rng.shuffle(found)
    return found


@pytest.mark.parametrize("cluster", [512, 4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("seed", range(3))
def test_random_writes_from_many_threads(
    tmp_path: Path, cluster: int, compat: str, seed: int
) -> None:
    rng = random.Random(f"{cluster} {compat} {seed}")
    path = tmp_path / "x.qcow2"
    size = rng.randrange(1, 40000) * 512
    image.create(path, size, CreateOptions(format="qcow2", cluster_size=cluster, compat=compat))
    wanted = bytearray(size)
    todo = pieces(rng, size)
    for offset, length in todo:
        wanted[offset : offset + length] = rng.randbytes(length)

    def work(mine: list[tuple[int, int]]) -> None:
        for offset, length in mine:
            filler.write(memoryview(wanted)[offset : offset + length], offset)

    with qcow2.Filler(path) as filler:
        threads = [threading.Thread(target=work, args=(todo[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        filler.finish()
    image.check(path, format="qcow2")
    assert sets.read_image(path, "qcow2") == wanted
    assert image.info(path).virtual_size == size
    use_it(path, size)


def use_it(path: Path, size: int) -> None:
    """What a guest does next: write, discard, write everything, a bitmap, a snapshot, a resize."""
    commands = ["write -P 7 0 512", f"discard 0 {size}", f"write -P 9 0 {size}", "flush"]
    argv = ["qemu-io", "-f", "qcow2"]
    for command in commands:
        argv += ["-c", command]
    subprocess.run([*argv, path], check=True, stdout=subprocess.DEVNULL)
    image.check(path, format="qcow2")
    assert sets.read_image(path, "qcow2") == b"\x09" * size
    subprocess.run(["qemu-img", "snapshot", "-c", "s", path], check=True)
    if image.info(path).can_hold_bitmaps:
        subprocess.run(["qemu-img", "bitmap", "--add", path, "b"], check=True)
        subprocess.run(["qemu-img", "snapshot", "-d", "s", path], check=True)
        subprocess.run(["qemu-img", "resize", "-q", path, str(size + MIB)], check=True)
    image.check(path, format="qcow2")


def test_holes_stay_unallocated(tmp_path: Path) -> None:
    """A huge disk with little in it: a small file, and QEMU knows what is empty."""
    path = tmp_path / "x.qcow2"
    size = 2 << 40
    image.create(path, size, CreateOptions(format="qcow2"))
    with qcow2.Filler(path) as filler:
        for offset in (size - 512, 0, size // 3 // 512 * 512):
            filler.write(memoryview(b"x" * 512), offset)
        filler.finish()
    image.check(path, format="qcow2")
    assert path.stat().st_blocks * 512 < MIB
    found = subprocess.run(
        ["qemu-img", "map", "--output", "json", path], check=True, capture_output=True, text=True
    )
    present = sum(each["length"] for each in json.loads(found.stdout) if each["present"])
    assert present <= 3 * 64 * KIB


def test_file_grows_with_its_data(tmp_path: Path) -> None:
    """Not with the places of the data: the last bytes of the disk don't make a long file."""
    path = tmp_path / "x.qcow2"
    image.create(path, 1 << 30, CreateOptions(format="qcow2"))
    with qcow2.Filler(path) as filler:
        filler.write(memoryview(b"x" * 512), (1 << 30) - 512)
        filler.finish()
    assert path.stat().st_size < 4 * MIB


def test_empty_and_tiny_disks(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    for size in (0, 512):
        image.create(path, size, CreateOptions(format="qcow2"))
        with qcow2.Filler(path) as filler:
            filler.finish()
        image.check(path, format="qcow2")
        assert sets.read_image(path, "qcow2") == bytes(size)


@pytest.mark.parametrize(
    "options",
    [
        CreateOptions(format="raw"),
        CreateOptions(format="qcow2", extended_l2=True, cluster_size=128 * KIB),
        CreateOptions(format="qcow2", refcount_bits=1),
        CreateOptions(format="qcow2", refcount_bits=64),
    ],
    ids=["raw", "extended", "bits1", "bits64"],
)
def test_others_are_left_to_qemu(tmp_path: Path, options: CreateOptions) -> None:
    path = tmp_path / "x"
    image.create(path, MIB, options)
    assert not qcow2.can_fill(path)
    with pytest.raises(FormatError):
        qcow2.Filler(path)


def test_data_file_and_backing_are_left_to_qemu(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for option in (f"data_file={tmp_path / 'd'}", f"backing_file={tmp_path / 'd'},backing_fmt=raw"):
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-o", option, path, "1M"], check=True
        )
        assert not qcow2.can_fill(path)


def test_common_options_are_ours(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for options in (
        CreateOptions(format="qcow2"),
        CreateOptions(format="qcow2", lazy_refcounts=True, compression_type="zstd"),
    ):
        image.create(path, MIB, options)
        assert qcow2.can_fill(path)
        before = image.info(path)
        with qcow2.Filler(path) as filler:
            filler.write(memoryview(b"y" * 512), 512)
            filler.finish()
        after = image.info(path)
        assert (before.lazy_refcounts, before.compression_type) == (
            after.lazy_refcounts, after.compression_type,
        )  # fmt: skip


def test_write_beyond_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    image.create(path, MIB, CreateOptions(format="qcow2"))
    with qcow2.Filler(path) as filler, pytest.raises(ValueError, match="beyond"):
        filler.write(memoryview(b"12"), MIB - 1)


def test_check_finds_damage(tmp_path: Path) -> None:
    path = tmp_path / "x"
    image.create(path, MIB, CreateOptions(format="qcow2"))
    data = bytearray(path.read_bytes())
    data[64 * KIB + 7] ^= 1  # the refcount table
    path.write_bytes(data)
    with pytest.raises(ProcessError):
        image.check(path, format="qcow2")
