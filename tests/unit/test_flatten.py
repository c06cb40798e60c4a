"""Flattening against a byte array that replays the layers the slow way."""

import itertools
import random
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from nbdbackupd.model import flatten
from nbdbackupd.model.flatten import Layer, Part, Piece


class Block(NamedTuple):
    """A block of which each byte has the value of its layer."""

    offset: int
    length: int
    value: int


@st.composite
def layer(draw: st.DrawFn, value: int) -> Layer[Block]:
    size = draw(st.integers(1, 60))
    borders = sorted(draw(st.sets(st.integers(0, size), max_size=12)))
    blocks = [
        Block(start, end - start, value)
        for start, end in itertools.pairwise(borders)
        if draw(st.booleans())
    ]
    return Layer(size, blocks)


@st.composite
def chain(draw: st.DrawFn) -> list[Layer[Block]]:
    """Layers, newest first; the oldest has value 1."""
    count = draw(st.integers(1, 5))
    return [draw(layer(value)) for value in range(count, 0, -1)]


def replay(layers: list[Layer[Block]]) -> bytes:
    disk = bytearray()
    for each in reversed(layers):
        disk = disk[: each.size].ljust(each.size, b"\0")
        for block in each.blocks:
            disk[block.offset : block.offset + block.length] = bytes([block.value]) * block.length
    return bytes(disk)


@given(chain())
def test_pieces_equal_replay(layers: list[Layer[Block]]) -> None:
    disk = bytearray()
    for piece in flatten.pieces(layers):
        assert piece.offset == len(disk)
        assert piece.length > 0
        value = value_of(piece)
        assert piece.layer == (len(layers) - value if value else -1)
        disk += bytes([value]) * piece.length
    assert bytes(disk) == replay(layers)


@given(chain())
def test_parts_hold_each_block_once(layers: list[Layer[Block]]) -> None:
    disk = bytearray(layers[0].size)
    blocks: list[tuple[int, Block]] = []
    for part in flatten.parts(flatten.pieces(layers), len(layers)):
        blocks.append((part.layer, part.block))
        assert part.ranges
        for offset, length in part.ranges:
            assert part.block.offset <= offset
            assert offset + length <= part.block.offset + part.block.length
            assert not any(disk[offset : offset + length])
            disk[offset : offset + length] = bytes([part.block.value]) * length
    assert len(set(blocks)) == len(blocks)
    assert bytes(disk) == replay(layers)


@given(chain(), st.integers(0, 59))
def test_pieces_from_a_place_on(layers: list[Layer[Block]], start: int) -> None:
    start %= layers[0].size
    whole = [value_of(piece) for piece in flatten.pieces(layers) for _ in range(piece.length)]
    later = [
        Layer(each.size, [block for block in each.blocks if block.offset + block.length > start])
        for each in layers
    ]
    found = list(flatten.pieces(later, start))
    assert found[0].offset == start
    assert [value_of(piece) for piece in found for _ in range(piece.length)] == whole[start:]


def value_of(piece: Piece[Block]) -> int:
    return piece.block.value if piece.block else 0


def scattered(count: int, blocks: int) -> list[Layer[Block]]:
    """So many layers of a few long blocks each, all over the disk, above a full."""
    rng, size = random.Random(count), blocks * 16
    made = []
    for value in range(count, 1, -1):
        starts = sorted(rng.sample(range(size // 16), blocks // count))
        made.append(Layer(size, [Block(16 * at, rng.randint(1, 16), value) for at in starts]))
    return [*made, Layer(size, [Block(at, 64, 1) for at in range(0, size, 64)])]


def steps(layers: list[Layer[Block]]) -> tuple[int, bytes]:
    """Lines of the module that a merge executes, and the merged disk."""
    count = 0

    def line(_frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename == flatten.__file__ else None)
    try:
        found = list(flatten.pieces(layers))
    finally:
        sys.settrace(before)
    return count, b"".join(value_of(each).to_bytes(2) * each.length for each in found)


def test_a_block_costs_the_same_in_a_thousand_layers() -> None:
    """Finding: each piece cost a look at each layer; 103 microseconds of a thousand layers."""
    blocks = 4000
    for count in (10, 1000):
        layers = scattered(count, blocks)
        taken, found = steps(layers)
        wanted = bytearray(2 * layers[0].size)
        for each in reversed(layers):
            for block in each.blocks:
                place = slice(2 * block.offset, 2 * (block.offset + block.length))
                wanted[place] = block.value.to_bytes(2) * block.length
        assert found == wanted
        assert taken < 50 * sum(len(list(each.blocks)) for each in layers)


def test_lost_tail_stays_lost() -> None:
    layers = [Layer(6, []), Layer(2, []), Layer(6, [Block(0, 6, 1)])]
    assert list(flatten.pieces(layers)) == [Piece(0, 2, 2, Block(0, 6, 1)), Piece(2, 4, -1, None)]


def test_only_one_block_of_a_layer_is_read_ahead() -> None:
    taken = [0, 0]

    def blocks(number: int) -> Iterator[Block]:
        for offset in range(1000):
            taken[number] += 1
            yield Block(offset, 1, number)

    run = flatten.pieces([Layer(1000, blocks(0)), Layer(1000, blocks(1))])
    for count in range(1, 500):
        next(run)
        assert max(taken) <= count + 1


def test_block_with_a_hole_is_one_part() -> None:
    old, new = Block(0, 10, 1), Block(4, 2, 2)
    layers = [Layer(10, [new]), Layer(10, [old])]
    found = list(flatten.parts(flatten.pieces(layers), 2))
    assert found == [Part(0, new, ((4, 2),)), Part(1, old, ((0, 4), (6, 4)))]
