"""qcow2 files read by hand: what a layer holds is what QEMU takes from it, put on another image."""

import os
import random
import struct
from pathlib import Path

import pytest

from nbdbackupd.errors import FormatError, IntegrityError, UnsupportedVersionError
from nbdbackupd.files import File
from nbdbackupd.format import qcow2
from nbdbackupd.format.index import MAX_BLOCK, Kind
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets.layers import Qcow2Layer
from tests.lib.images import qemu_img
from tests.lib.qmpbackup_sets import MIB, SIZE, layer, scribble, stacked

pytestmark = pytest.mark.component
FILL = 0xA5


def onto(path: Path, size: int = SIZE) -> bytes:
    """A disk of ``FILL``, with what the layer holds written on it."""
    disk = bytearray([FILL]) * size
    view = memoryview(bytearray(MAX_BLOCK))
    scratch = memoryview(bytearray(layering.MAX_STORED))
    end = 0
    with Qcow2Layer(path, lambda: None) as found:
        assert found.size == size
        for record in found.records():
            assert end <= record.offset < record.end <= size
            end = record.end
            part = bytes(record.length)
            if record.kind == Kind.DATA:
                assert record.length <= MAX_BLOCK
                found.read(record, view[: record.length], scratch)
                part = bytes(view[: record.length])
            disk[record.offset : record.end] = part
    return bytes(disk)


def expected(path: Path, tmp_path: Path, size: int = SIZE) -> bytes:
    below = tmp_path / "below.raw"
    below.write_bytes(bytes([FILL]) * size)
    return stacked([path], tmp_path / "stacked", below=below)


@pytest.mark.parametrize(
    "options",
    [
        (), ("cluster_size=512",), ("cluster_size=2M",), ("compat=0.10",), ("extended_l2=on",),
        ("extended_l2=on", "cluster_size=2M"), ("lazy_refcounts=on",),
        ("preallocation=metadata", "cluster_size=4k"),
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "compressed"])
def test_as_qemu_reads_it(tmp_path: Path, options: tuple[str, ...], packed: bool) -> None:
    rng = random.Random(" ".join(options))
    commands = scribble(rng, 30)
    if "compat=0.10" in options:  # it has no zero clusters
        commands = [each for each in commands if "-z" not in each]
    path = layer(tmp_path / "image", commands, *options)
    if packed:
        raw, source = tmp_path / "raw", tmp_path / "source"
        path.rename(source)
        qemu_img("convert", "-O", "raw", source, raw)
        words = [word for each in options if "prealloc" not in each for word in ("-o", each)]
        qemu_img("convert", "-c", "-O", "qcow2", *words, raw, path)
    assert onto(path) == expected(path, tmp_path)


@pytest.mark.parametrize("size", [512, MIB + 512, 3 * MIB - 1536])
def test_sizes_that_no_cluster_divides(tmp_path: Path, size: int) -> None:
    for number, verb in enumerate(("write -P 7", "write -z")):
        path = layer(tmp_path / f"{number}", [f"{verb} 0 {size}"], size=size)
        assert onto(path, size) == expected(path, tmp_path, size)
    raw = tmp_path / "raw"
    raw.write_bytes(random.Random(1).randbytes(size // 2).ljust(size, b"\3"))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, tmp_path / "packed")
    assert onto(tmp_path / "packed", size) == raw.read_bytes()


def test_what_an_image_names_is_never_opened(tmp_path: Path) -> None:
    """A pipe: whoever opened it would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    path = layer(tmp_path / "image", ["write -P 7 64k 64k"])
    wanted = expected(path, tmp_path)
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "pipe", path)
    assert onto(path) == wanted
    with Qcow2Layer(path, lambda: None) as found:
        assert sum(each.length for each in found.records()) == 64 << 10


def test_what_is_not_read_is_refused(tmp_path: Path) -> None:
    def refused(path: Path, error: type[FormatError], words: str) -> None:
        with pytest.raises(error, match=words):
            Qcow2Layer(path, lambda: None)

    data = tmp_path / "other"
    refused(
        layer(tmp_path / "data", ["write 0 64k"], f"data_file={data}"), FormatError, "another file"
    )
    zstd = layer(tmp_path / "zstd", ["write -c 0 64k"], "compression_type=zstd")
    refused(zstd, FormatError, "zstd")
    good = layer(tmp_path / "good", scribble(random.Random(2), 20))
    raw = good.read_bytes()

    def changed(place: int, data: bytes) -> Path:
        path = tmp_path / "changed"
        path.write_bytes(raw[:place] + data + raw[place + len(data) :])
        return path

    refused(changed(0, b"raw!"), IntegrityError, "not a qcow2")
    refused(changed(4, b"\0\0\0\4"), UnsupportedVersionError, "version")
    refused(changed(20, b"\0\0\0\x40"), IntegrityError, "header")
    refused(changed(24, b"\x7f" * 8), IntegrityError, "header")
    refused(changed(35, b"\1"), FormatError, "encrypted")
    refused(changed(72 + 7, b"\2"), IntegrityError, "corrupt")
    refused(changed(72, b"\x80"), UnsupportedVersionError, "newer")
    (tmp_path / "short").write_bytes(raw[: len(raw) // 2])
    refused(tmp_path / "short", IntegrityError, "too early|can't be")


def test_a_small_file_stands_for_no_endless_disk(tmp_path: Path) -> None:
    """All of its L1 entries point to one table."""
    path = layer(tmp_path / "image", ["write 0 64k"], size=1 << 40)
    raw = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", raw, 40)
    first = raw[l1 : l1 + 8]
    for number in range(2048):
        raw[l1 + number * 8 : l1 + number * 8 + 8] = first
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match="used twice"):
        Qcow2Layer(path, lambda: None)


def test_whatever_the_bytes_are_the_end_is_a_line(tmp_path: Path) -> None:
    rng = random.Random(5)
    sound = layer(tmp_path / "sound", scribble(rng, 10, packed=True)).read_bytes()
    path = tmp_path / "broken"
    (l1,) = struct.unpack_from(">Q", sound, 40)
    (l2,) = struct.unpack_from(">Q", sound, l1)
    places = [*range(112), *range(l1, l1 + 8), *range(l2 & ~(1 << 63), (l2 & ~(1 << 63)) + 512)]
    told = []
    for _ in range(300):
        raw = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            raw[rng.choice(places)] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        try:
            with File(path) as file:
                size = qcow2.read_header(file).size
            if size <= 16 * MIB:
                onto(path, size)
        except FormatError as err:
            told.append(str(err))
    assert len(told) > 50
    assert not any("\n" in each for each in told)
