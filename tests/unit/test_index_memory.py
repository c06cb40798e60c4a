"""Reading an index of any length takes a flat amount of memory."""

import os
from pathlib import Path

from nbdbackupd.format.index import HEADER, NO_DIGEST, RECORD, Index, IndexHeader, Kind
from nbdbackupd.model.chain import Codec

MIB = 1 << 20
COUNT = 500_000


def resident() -> int:
    """Bytes of memory that this process holds now, pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_iteration_lets_go_of_what_it_read(tmp_path: Path) -> None:
    path = tmp_path / "x.index"
    with path.open("wb") as file:
        file.write(IndexHeader(COUNT * 1024, COUNT, codec=Codec.NONE, raw=False).pack())
        for number in range(COUNT):
            file.write(RECORD.pack(number * 1024, 512, 0, 0, Kind.ZERO, NO_DIGEST))
    assert path.stat().st_size == HEADER.size + COUNT * RECORD.size
    with Index(path) as index:
        before = resident()
        peak = seen = 0
        for record in index:
            assert record.offset == seen * 1024
            seen += 1
            if seen % 10_000 == 0:
                peak = max(peak, resident())
        assert seen == COUNT
        assert peak - before < 8 * MIB
        assert [record.offset for record in index][-1] == (COUNT - 1) * 1024
