"""Finding a place in an index takes few reads, and the second time one."""

import random
from pathlib import Path

import pytest

from nbdbackupd.files import File
from nbdbackupd.format.index import NO_DIGEST, RECORD, SOME, Index, IndexHeader, Kind
from nbdbackupd.model.chain import Codec


def made(path: Path, count: int) -> list[tuple[int, int]]:
    """An index of so many records with gaps; where they start and end."""
    rng = random.Random(count)
    ranges, end = [], 0
    for _ in range(count):
        start = end + rng.choice((0, 0, 512, 4096))
        end = start + rng.randint(1, 4096)
        ranges.append((start, end))
    with path.open("wb") as file:
        file.write(IndexHeader(end + 4096, count, codec=Codec.NONE, raw=False).pack())
        for start, end in ranges:
            file.write(RECORD.pack(start, end - start, 0, 0, Kind.ZERO, NO_DIGEST))
    return ranges


@pytest.mark.parametrize("count", [0, 1, SOME - 1, SOME, SOME + 1, 5 * SOME + 7])
def test_each_border(tmp_path: Path, count: int) -> None:
    ranges = made(tmp_path / "x.index", count)
    borders = {0, *(each + shift for pair in ranges for each in pair for shift in (-1, 0, 1))}
    wanted = 0
    with Index(tmp_path / "x.index") as index:
        for offset in sorted(borders - {-1}):
            while wanted < count and ranges[wanted][1] <= offset:
                wanted += 1
            assert index.find(offset) == wanted


def test_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding: a search of 100,000 records read 24 bytes 17 times."""
    count = 100_000
    ranges = made(tmp_path / "x.index", count)
    reads = 0
    pread = File.pread

    def counted(file: File, length: int, place: int) -> bytes:
        nonlocal reads
        reads += 1
        return pread(file, length, place)

    with Index(tmp_path / "x.index") as index:
        monkeypatch.setattr(File, "pread", counted)
        rng = random.Random(1)
        numbers = [rng.randrange(count) for _ in range(2000)]
        for most in (len(numbers) + count // SOME + 1, len(numbers)):
            reads = 0
            for number in numbers:
                assert index.find(ranges[number][0]) == number
                assert index.record(number).offset == ranges[number][0]
            assert reads <= most
