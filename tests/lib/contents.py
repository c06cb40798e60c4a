"""What the disks of a set hold, read block by block and proven, without any image."""

from contextlib import ExitStack
from pathlib import Path

from nbdbackupd.format.index import MAX_BLOCK, Kind
from nbdbackupd.model import flatten
from nbdbackupd.ops.sets import opened
from nbdbackupd.ops.sets.layers import MAX_STORED


def read_disk(path: Path, point_id: str, target: str) -> bytes:
    """All bytes of a disk at a point."""
    given = opened.open_set(path)
    (point,) = (each for each in given.known.points if each.id == point_id)
    disk = bytearray(point.disk(target).size)
    scratch = memoryview(bytearray(MAX_STORED))
    with ExitStack() as stack:
        layers = given.layers(point, target, stack, lambda: None)
        assert layers[-1].whole
        pieces = flatten.pieces([flatten.Layer(each.size, each.records()) for each in layers])
        for piece in pieces:
            # as a restore has it: a whole disk leaves nothing out
            assert piece.block is not None or piece.offset >= layers[-1].size
            if piece.block is None or piece.block.kind == Kind.ZERO:
                continue
            block = memoryview(bytearray(MAX_BLOCK))[: piece.block.length]
            layers[piece.layer].read(piece.block, block, scratch)
            start = piece.offset - piece.block.offset
            disk[piece.offset : piece.end] = block[start : start + piece.length]
    return bytes(disk)
