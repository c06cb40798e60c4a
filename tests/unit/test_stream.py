"""Streams and indexes: what the writer wrote, the reader and plain arithmetic must find."""

import hashlib
import json
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackupd.errors import FormatError, IntegrityError, UnsupportedVersionError
from nbdbackupd.format import adler, blocks, stream
from nbdbackupd.format.index import Index, Kind
from nbdbackupd.format.stream import StreamMeta, StreamReader
from nbdbackupd.format.writer import RawWriter, StreamWriter
from nbdbackupd.model.chain import Codec, Compression

SIZE = 3 << 20


def make_meta(size: int = SIZE, *, level: int = 0) -> StreamMeta:
    packed = Compression(Codec.LZ4, level) if level else None
    return StreamMeta(
        virtual_size=size, data_size=0, date="2026-01-31T00:00:00Z", disk_name="vda",
        disk_format="qcow2", checkpoint="cp.1", compression=packed,
        parent_checkpoint="", incremental=False, extra=(("point", "p1"),),
    )  # fmt: skip


def write(directory: Path, level: int | None, seed: int = 1) -> bytes:
    """Write a stream of random blocks with its writes in random order; return the disk."""
    rng = random.Random(seed)
    disk = bytearray(SIZE)
    writer = StreamWriter(directory / "s", directory / "i", meta=make_meta(level=level or 0))
    placed, offset = [], 0
    while offset < SIZE:
        length = min(SIZE - offset, rng.choice([512, 4096, 65536, 262144]))
        choice = rng.randrange(4)
        if choice == 0:
            block = writer.zero(offset, length)
        elif choice == 1:
            block = writer.prepare(offset, memoryview(bytes(length)))
        else:
            data = rng.randbytes(length // 2) + bytes(length - length // 2)
            disk[offset : offset + length] = data
            block = writer.prepare(offset, memoryview(data))
        writer.place(block)
        placed.append(block)
        offset += length
    rng.shuffle(placed)
    for block in placed:
        writer.write(block)
    result = writer.finish()
    writer.close()
    raw = (directory / "s").read_bytes()
    assert result.file_size == len(raw)
    assert result.adler32 == zlib.adler32(raw)
    assert result.index_size == (directory / "i").stat().st_size
    assert result.data_bytes + result.zero_bytes == SIZE
    return bytes(disk)


@pytest.mark.parametrize("level", [None, 1, 9])
def test_frames_and_index_describe_the_disk(tmp_path: Path, level: int | None) -> None:
    disk = write(tmp_path, level)
    raw = (tmp_path / "s").read_bytes()
    with StreamReader(tmp_path / "s") as reader, Index(tmp_path / "i") as index:
        frames, records = list(reader.frames())[:-1], list(index)
        assert reader.meta.data_size == sum(each.length for each in records if each.kind == 0)
        assert [(each.start, each.length) for each in frames] == [
            (each.offset, each.length) for each in records
        ]
        assert records[0].offset == 0
        assert records[-1].end == SIZE
        for frame, record in zip(frames, records, strict=True):
            guest = disk[record.offset : record.end]
            if record.kind == Kind.ZERO:
                assert frame.kind == stream.ZERO
                assert not any(guest)
                continue
            assert (frame.position, frame.stored) == (record.position, record.stored)
            payload = raw[record.position : record.position + record.stored]
            if level is not None:
                payload = blocks.decompress(payload, record.length, Codec.LZ4)
            assert payload == guest
            assert hashlib.sha256(guest).digest() == record.digest


def test_neighbouring_zeroes_are_one_frame(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path / "s", tmp_path / "i", meta=make_meta())
    for offset in range(0, SIZE, 65536):
        block = writer.zero(offset, 65536)
        writer.place(block)
        writer.write(block)
    writer.finish()
    writer.close()
    with StreamReader(tmp_path / "s") as reader:
        assert [(each.kind, each.start, each.length) for each in reader.frames()] == [
            (stream.ZERO, 0, SIZE),
            (stream.STOP, 0, 0),
        ]


def test_an_empty_stream_is_well_formed(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path / "s", tmp_path / "i", meta=make_meta(level=2))
    writer.finish()
    writer.close()
    with StreamReader(tmp_path / "s") as reader, Index(tmp_path / "i") as index:
        assert [each.kind for each in reader.frames()] == [stream.STOP]
        assert list(index) == []


def test_a_raw_image_is_the_disk(tmp_path: Path) -> None:
    writer = RawWriter(tmp_path / "s", tmp_path / "i", disk_size=SIZE)
    data = random.Random(3).randbytes(65536)
    for block in (writer.zero(0, 1 << 20), writer.prepare(1 << 20, memoryview(data))):
        writer.place(block)
        writer.write(block)
    writer.finish()
    writer.close()
    image = bytes(1 << 20) + data + bytes(SIZE - (1 << 20) - 65536)
    assert (tmp_path / "s").read_bytes() == image
    with Index(tmp_path / "i") as index:
        assert index.header.raw
        assert [record.position for record in index] == [0, 1 << 20]


@given(st.binary(), st.binary())
def test_adler32_of_parts_is_adler32_of_the_whole(first: bytes, second: bytes) -> None:
    combined = adler.combine(zlib.adler32(first), zlib.adler32(second), len(second))
    assert combined == zlib.adler32(first + second)


@given(st.binary(), st.integers(0, 0xFFF0))
def test_adler32_is_zlibs_for_each_kind_of_buffer(data: bytes, value: int) -> None:
    for buffer in (data, bytearray(data), memoryview(data), memoryview(bytearray(data))):
        assert adler.adler32(buffer, value) == zlib.adler32(data, value)
        assert adler.adler32(buffer) == zlib.adler32(data)


@given(st.binary(max_size=60))
def test_headers_are_parsed_or_refused(raw: bytes) -> None:
    try:
        kind, start, length = stream.parse_header(raw, 0)
    except IntegrityError:
        return
    assert stream.pack_header(kind, start, length) == raw


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda each: st.dictionaries(st.text(), each) | st.lists(each),
    )
)
def test_meta_is_parsed_or_refused(document: object) -> None:
    with pytest.raises(FormatError):
        stream.parse_meta(json.dumps(document).encode())


def test_a_newer_stream_version_is_named() -> None:
    document = make_meta().to_json() | {"streamVersion": 3}
    with pytest.raises(UnsupportedVersionError, match="version=3"):
        stream.parse_meta(json.dumps(document).encode())


@pytest.mark.parametrize("level", [None, 2])
def test_every_truncation_is_noticed(tmp_path: Path, level: int | None) -> None:
    write(tmp_path, level)
    raw = (tmp_path / "s").read_bytes()
    cut = tmp_path / "cut"
    rng = random.Random(5)
    lengths = {
        0,
        1,
        39,
        40,
        41,
        len(raw) - 1,
        len(raw) - 40,
        *(rng.randrange(len(raw)) for _ in range(40)),
    }
    for length in lengths:
        cut.write_bytes(raw[:length])
        with pytest.raises(FormatError), StreamReader(cut) as reader:
            list(reader.frames())


@pytest.mark.parametrize("level", [None, 2])
def test_an_extra_byte_at_the_end_is_noticed(tmp_path: Path, level: int | None) -> None:
    write(tmp_path, level)
    with (tmp_path / "s").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(FormatError), StreamReader(tmp_path / "s") as reader:
        list(reader.frames())


def test_an_index_of_wrong_size_is_refused(tmp_path: Path) -> None:
    write(tmp_path, None)
    raw = (tmp_path / "i").read_bytes()
    for damaged in (raw[:-1], raw + b"x", raw[:31], b"", b"NBDXIDX2" + raw[8:]):
        (tmp_path / "i").write_bytes(damaged)
        with pytest.raises(IntegrityError):
            Index(tmp_path / "i")
