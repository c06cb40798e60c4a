"""Indexes for streams and raw images of virtnbdbackup: what ``import`` makes and ``verify`` proves.

Such an index has a SHA-256 for each block of at most 1 MiB, as ours do; its header says that the
frames of the stream are larger than that. A range that a full leaves out is noted as zeroes.
"""

import io
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import IntegrityError
from nbdbackupd.format import blocks
from nbdbackupd.format.index import (
    HEADER,
    MAX_BLOCK,
    NO_DIGEST,
    RECORD,
    IndexHeader,
    Kind,
    Record,
)
from nbdbackupd.model.chain import DigestKind
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets.layers import IndexedLayer, Layer, ScannedLayer

BUFFER: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Indexed:
    """What an index holds: guest bytes as data and as zeroes."""

    data_bytes: int
    zero_bytes: int


def write(path: Path, layer: Layer, *, whole: bool, check: Callable[[], None]) -> Indexed:
    """Write the index of an open layer, durably; every block is read once.

    ``whole``: the disk was read in full. ``check`` is called for each block and may raise. Raises
    IntegrityError, OSError.
    """
    data = zero = count = 0
    fd = durable.create_exclusive(path)
    with io.BufferedWriter(io.FileIO(fd, "r+b"), BUFFER) as file:
        file.write(bytes(HEADER.size))
        for record in digested(layer, whole=whole, check=check):
            file.write(RECORD.pack(*record[:6]))
            count += 1
            if record.kind == Kind.DATA:
                data += record.length
            else:
                zero += record.length
        file.seek(0)
        file.write(IndexHeader(layer.size, count, layer.codec, layer.raw, not layer.raw).pack())
        file.flush()
        os.fsync(file.fileno())
    return Indexed(data, zero)


def digested(layer: Layer, *, whole: bool, check: Callable[[], None]) -> Iterator[Record]:
    """The records of a layer that has no digests, with those of the blocks as they are.

    A raw image's block of nothing but zeroes is a record of zeroes, as its holes are.
    """
    view = memoryview(mmap.mmap(-1, MAX_BLOCK))
    scratch = memoryview(mmap.mmap(-1, layering.MAX_STORED))
    for record in covered(layer, whole=whole):
        check()
        if record.kind != Kind.DATA:
            yield record
            continue
        block = view[: record.length]
        layer.read(record, block, scratch)
        yield record._replace(digest=blocks.digest(block, DigestKind.SHA256))


def covered(layer: Layer, *, whole: bool) -> Iterator[Record]:
    """The records, and if ``whole`` zeroes for all that is in none of them."""
    end = 0
    for record in layer.records():
        if whole and record.offset > end:
            yield Record(end, record.offset - end, 0, 0, Kind.ZERO, NO_DIGEST)
        end = record.end
        yield record
    if whole and end < layer.size:
        yield Record(end, layer.size - end, 0, 0, Kind.ZERO, NO_DIGEST)


def fits(indexed: IndexedLayer, scanned: ScannedLayer, check: Callable[[], None]) -> bool:
    """Whether an index tells of each block what the stream's frames say; no block is read."""
    if (indexed.size, indexed.codec) != (scanned.size, scanned.codec):
        return False
    told = indexed.records()
    try:
        for found in covered(scanned, whole=indexed.whole):
            check()
            record = next(told, None)
            if record is None or record._replace(digest=NO_DIGEST) != found:
                return False
        return next(told, None) is None
    except IntegrityError:
        return False
