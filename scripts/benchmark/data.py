"""The data that is backed up: realistic in what matters to speed, the same at every run.

As a program, ``data FILE BYTES`` makes the mixed image.
"""

import random
import struct
import sys
from pathlib import Path
from typing import BinaryIO

from tests.lab.command import run
from tests.lab.disks import GIB, MIB

CHUNK = MIB
# data comes in runs of this many chunks, with three times as much of a hole behind each
RUN_CHUNKS = 64
HOLE_FACTOR = 3
TEXT_BYTES = 16 * MIB
WORDS = 4000
PHRASES = 120
CLUSTER = 4096  # of the fragmented image


def mixed_image(path: Path, data_bytes: int) -> Path:
    """Make a qcow2 of four times ``data_bytes``, a quarter full.

    Every other MiB is incompressible, the rest is like a log file.
    """
    rng = random.Random(20240229)
    text = text_like(rng, TEXT_BYTES)
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        file.truncate(data_bytes * (1 + HOLE_FACTOR))
        for number in range(data_bytes // CHUNK):
            holes = number // RUN_CHUNKS * RUN_CHUNKS * HOLE_FACTOR
            file.seek((number + holes) * CHUNK)
            start = number % (TEXT_BYTES // CHUNK) * CHUNK
            file.write(rng.randbytes(CHUNK) if number % 2 else text[start : start + CHUNK])
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], timeout_seconds=900)
    raw.unlink()
    return path


def text_like(rng: random.Random, length: int) -> bytes:
    """Return lines that repeat and vary as those of a log file do (lz4 keeps a quarter)."""
    letters = "eeeeetttaaooiinnsshhrrddllcumwfgypbvk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 11))) for _ in range(WORDS)]
    phrases = [" ".join(rng.choices(words, k=12)) for _ in range(PHRASES)]
    lines: list[str] = []
    size = 0
    while size < length:
        number = rng.randrange(10**8)
        line = f"host{number % 7} daemon[{number % 4096}]: {rng.choice(phrases)} {number}\n"
        lines.append(line)
        size += len(line)
    return "".join(lines).encode("ascii")[:length]


def fragmented_image(path: Path, extents: int, size: int = 2048 * GIB) -> Path:
    """Make a qcow2 with at least ``extents`` separate 4 KiB clusters of data, in a moment.

    One L2 table with one cluster of data is entered many times in the L1 table: QEMU sees a disk
    with a million extents, the file has 8 MiB.  It is a sound image, as internal snapshots make
    them, too: the reference counts say how often each of the two is used.
    """
    options = f"cluster_size={CLUSTER},refcount_bits=32"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(size)])
    run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P 0x5a 0 {CLUSTER}", path])
    with path.open("r+b") as file:
        header = file.read(56)
        l1_entries, l1_table, refcount_table = struct.unpack_from(">IQQ", header, 36)
        l2_table = _read_offset(file, l1_table)
        data = _read_offset(file, l2_table)
        step = max(1, l1_entries // extents)
        entries = [0 if number % step else l2_table for number in range(l1_entries)]
        _write(file, l1_table, struct.pack(f">{l1_entries}Q", *entries))
        _write(file, l2_table, struct.pack(">Q", data))
        for cluster in (l2_table // CLUSTER, data // CLUSTER):
            block, entry = divmod(cluster, CLUSTER // 4)
            place = _read_offset(file, refcount_table + 8 * block) + 4 * entry
            _write(file, place, struct.pack(">I", l1_entries // step))
    return path


def _read_offset(file: BinaryIO, position: int) -> int:
    """Read a table's entry without its flag "used once only"."""
    file.seek(position)
    entry: int = struct.unpack(">Q", file.read(8))[0]
    return entry & ~(1 << 63)


def _write(file: BinaryIO, position: int, data: bytes) -> None:
    file.seek(position)
    file.write(data)


if __name__ == "__main__":
    mixed_image(Path(sys.argv[1]), int(sys.argv[2]))
