"""A disk as nbdkit's plugin reads it, without nbdkit: shared frames, the cache, bad indexes."""

import hashlib
import os
import random
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbackupd.errors import IntegrityError
from nbdbackupd.format import blocks
from nbdbackupd.format.index import MAX_BLOCK, RECORD, IndexHeader
from nbdbackupd.model.chain import Codec, Compression, DigestKind
from nbdbackupd.ops.map.reader import PART, ServedDisk, ServedFile, ServedLayer, ServedPlan

MIB = 1 << 20


@pytest.fixture
def files() -> Iterator[list[int]]:
    """Descriptors to be closed in the end."""
    opened: list[int] = []
    yield opened
    for fd in opened:
        os.close(fd)


def opened(path: Path, data: bytes, files: list[int]) -> int:
    path.write_bytes(data)
    files.append(os.open(path, os.O_RDONLY))
    return files[-1]


def plan(
    tmp_path: Path, files: list[int], payload: bytes, header: IndexHeader,
    records: list[tuple[int, int, int, int, int, bytes]],
) -> ServedPlan:  # fmt: skip
    """A disk of one layer."""
    index = header.pack() + b"".join(RECORD.pack(*each) for each in records)
    layer = ServedLayer(
        stream=ServedFile(path="stream", fd=opened(tmp_path / "stream", payload, files)),
        index=ServedFile(path="index", fd=opened(tmp_path / "index", index, files)),
        index_start=0, index_size=len(index),
        codec=header.codec, raw=header.raw, is_made=False,
        longest=MAX_BLOCK, stored=1 << 27,
    )  # fmt: skip
    return ServedPlan(target="vda", whole=True, layers=(layer,), cache_bytes=4 * MIB, prove=False)


def read(disk: ServedDisk, offset: int, length: int) -> bytes:
    buffer = bytearray(b"?" * length)
    disk.read(memoryview(buffer), offset)
    return bytes(buffer)


def shared(tmp_path: Path, files: list[int], flaw: int = -1) -> tuple[ServedPlan, bytes]:
    """Three blocks in one lz4 frame, as in imported sets; the digest of one may be wrong."""
    data = random.Random(1).randbytes(1 << 16) * 40 + b"end"
    frame = blocks.compress(data, Compression(Codec.LZ4, 1))
    records = []
    for number, start in enumerate(range(0, len(data), MAX_BLOCK)):
        part = data[start : start + MAX_BLOCK]
        digest = hashlib.sha256(part + b"!" * (number == flaw)).digest()
        records.append((start, len(part), 100, len(frame), 0, digest))
    header = IndexHeader(len(data), len(records), codec=Codec.LZ4, raw=False, frames=True)
    return plan(tmp_path, files, bytes(100) + frame, header, records), data


def test_blocks_that_share_a_frame(tmp_path: Path, files: list[int]) -> None:
    given, data = shared(tmp_path, files)
    disk = ServedDisk(given, pytest.fail)
    assert read(disk, 0, len(data)) == data
    rng = random.Random(2)
    for _ in range(300):
        offset = rng.randrange(len(data))
        length = rng.randrange(1, min(len(data) - offset, 3 * MIB) + 1)
        assert read(disk, offset, length) == data[offset : offset + length]


def test_a_damaged_block_of_a_shared_frame(tmp_path: Path, files: list[int]) -> None:
    given, data = shared(tmp_path, files, flaw=1)
    told: list[str] = []
    disk = ServedDisk(given, told.append)
    assert read(disk, 0, MIB) == data[:MIB]
    for offset, length in ((MIB, 1), (MIB - 1, 2), (2 * MIB - 1, 1), (0, len(data))):
        with pytest.raises(IntegrityError):
            read(disk, offset, length)
    assert read(disk, 2 * MIB, 100) == data[2 * MIB :][:100]
    assert len(told) == 1


@pytest.mark.parametrize(
    "record",
    [
        (0, 4096, 100, 4095, 0),  # stored and guest bytes differ, uncompressed
        (0, 4096, 4000, 4096, 0),  # beyond the file
        (0, 8192, 100, 8192, 0),  # beyond the disk
        (0, 0, 100, 0, 0),
        (0, 4096, 100, 4096, 2),
        (0, 4096, 0, 7, 1),  # zeroes that are stored
        (1 << 63, 1 << 63, 100, 4096, 0),
    ],
)
def test_what_an_index_can_not_say(
    record: tuple[int, int, int, int, int], tmp_path: Path, files: list[int]
) -> None:
    header = IndexHeader(4096, 1, codec=Codec.NONE, raw=False)
    disk = ServedDisk(
        plan(tmp_path, files, bytes(5000), header, [(*record, bytes(32))]), pytest.fail
    )
    with pytest.raises(IntegrityError):
        read(disk, 0, 1)


def test_records_that_overlap(tmp_path: Path, files: list[int]) -> None:
    header = IndexHeader(8192, 2, codec=Codec.NONE, raw=False)
    records = [(0, 4096, 0, 4096, 0, bytes(32)), (4095, 4097, 0, 4097, 0, bytes(32))]
    disk = ServedDisk(plan(tmp_path, files, bytes(9000), header, records), pytest.fail)
    with pytest.raises(IntegrityError):
        read(disk, 0, 8192)


def test_a_file_that_was_cut(tmp_path: Path, files: list[int]) -> None:
    header = IndexHeader(4096, 1, codec=Codec.NONE, raw=False)
    records = [(0, 4096, 0, 4096, 0, bytes(32))]
    told: list[str] = []
    disk = ServedDisk(plan(tmp_path, files, bytes(4096), header, records), told.append)
    os.truncate(tmp_path / "stream", 100)
    assert read(disk, 0, 100) == bytes(100)
    with pytest.raises(IntegrityError, match="ends too early"):
        read(disk, 50, 100)
    assert len(told) == 1


def test_a_block_is_unpacked_by_one_thread(
    tmp_path: Path, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, data = shared(tmp_path, files)
    loads: list[int] = []
    real = blocks.decompress

    def slow(stored: bytes, length: int, codec: Codec) -> bytes:
        loads.append(threading.get_ident())
        time.sleep(0.1)
        return real(stored, length, codec)

    monkeypatch.setattr(blocks, "decompress", slow)
    disk = ServedDisk(given, pytest.fail)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: read(disk, n * 4096, 4096), range(64)))
    assert b"".join(found) == data[: 64 * 4096]
    assert len(loads) == 1


def test_a_proven_frame_is_neither_hashed_nor_unpacked_in_vain(
    tmp_path: Path, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first small read of a frame unpacks its head, the next one all of it; both are right."""
    hashed: list[int] = []
    unpacked: list[int] = []
    digest, whole = blocks.digest, blocks.decompress

    def noted(block: bytes, kind: DigestKind) -> bytes:
        hashed.append(len(block))
        return digest(block, kind)

    def noted_too(stored: bytes, length: int, codec: Codec) -> bytes:
        unpacked.append(length)
        return whole(stored, length, codec)

    for codec in (Codec.LZ4, Codec.ZSTD):
        parts = [random.Random(n).randbytes(MIB // 4) * 4 for n in range(3)]
        payload, records = bytearray(), []
        for number, part in enumerate(parts):
            frame = blocks.compress(part, Compression(codec, 1))
            proof = hashlib.sha256(part).digest()
            records.append((number * MIB, MIB, len(payload), len(frame), 0, proof))
            payload += frame
        header = IndexHeader(3 * MIB, 3, codec=codec, raw=False)
        (tmp_path / codec).mkdir()
        given = plan(tmp_path / codec, files, bytes(payload), header, records)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "digest", noted)
            patch.setattr(blocks, "decompress", noted_too)
            told: list[str] = []
            disk = ServedDisk(replace(given, cache_bytes=MIB), told.append)
            hashed.clear()
            unpacked.clear()
            for round_ in range(3):
                for number in range(3):
                    for at in (MIB - 4096, 4096):
                        found = read(disk, number * MIB + at, 4096)
                        assert found == parts[number][at : at + 4096]
                assert hashed == [MIB] * 3
                assert unpacked == [MIB] * 3 * (round_ + 1)
        assert told == []
        os.truncate(tmp_path / codec / "stream", 100)
        with pytest.raises(IntegrityError, match="ends too early"):
            read(disk, 0, 4096)


def test_clusters_of_a_qcow2_image(tmp_path: Path, files: list[int]) -> None:
    """They are no frames of ours, and each is unpacked whole, however small the read."""
    cluster = 64 << 10
    parts = [random.Random(n).randbytes(cluster // 4) * 4 for n in range(40)]
    payload, records = bytearray(), []
    for number, part in enumerate(parts):
        packer = zlib.compressobj(wbits=-12)
        frame = packer.compress(part) + packer.flush()
        proof = PART.pack(0, cluster)
        records.append((number * cluster, cluster, len(payload), len(frame), 0, proof))
        payload += frame
    header = IndexHeader(len(parts) * cluster, len(parts), codec=Codec.NONE, raw=False)
    given = plan(tmp_path, files, bytes(payload), header, records)
    layer = replace(given.layers[0], is_made=True, deflated=True)
    disk = ServedDisk(replace(given, layers=(layer,), cache_bytes=MIB), pytest.fail)
    for _ in range(3):
        for number, part in enumerate(parts):
            assert read(disk, number * cluster + 4096, 4096) == part[4096:8192]


def test_heads_of_frames_that_are_not_sound() -> None:
    for codec in (Codec.LZ4, Codec.ZSTD):
        frame = blocks.compress(bytes(4096), Compression(codec, 1))
        assert blocks.decompress_head(frame, 100, codec) == bytes(100)
        for wrong, length in ((frame, 4097), (frame[:9], 100), (b"x" + frame[1:], 100), (b"", 1)):
            with pytest.raises(IntegrityError, match="block "):
                blocks.decompress_head(wrong, length, codec)


def test_the_cache_keeps_to_its_limit(tmp_path: Path, files: list[int]) -> None:
    parts = [random.Random(n).randbytes(MIB) for n in range(10)]
    payload, records = bytearray(), []
    for number, part in enumerate(parts):
        frame = blocks.compress(part, Compression(Codec.LZ4, 1))
        records.append(
            (number * MIB, MIB, len(payload), len(frame), 0, hashlib.sha256(part).digest())
        )
        payload += frame
    header = IndexHeader(10 * MIB, 10, codec=Codec.LZ4, raw=False)
    given = plan(tmp_path, files, bytes(payload), header, records)
    for limit, most in ((4 * MIB, 4), (0, 1)):
        disk = ServedDisk(replace(given, cache_bytes=limit), pytest.fail)
        for number in (*range(10), 3, 3, 9):
            assert read(disk, number * MIB + 5, 100) == parts[number][5:105]
            assert len(disk._cache._frames) <= most
        assert disk._cache._bytes == sum(map(len, disk._cache._frames.values()))
