"""Random access to a chain, against a disk that was written layer by layer."""

import itertools
import random
from collections.abc import Iterator

import pytest

from nbdbackupd.model import view
from nbdbackupd.model.view import MISSING, ZERO, BlockPlace, View


class Held:
    """A layer in memory, which counts how often it is searched."""

    def __init__(self, size: int, places: list[BlockPlace]) -> None:
        self.size = size
        self.all = places
        self.searches = 0

    def places(self, start: int) -> Iterator[BlockPlace]:
        self.searches += 1
        return (place for place in self.all if place.offset + place.length > start)


def layer(rng: random.Random, size: int, count: int, *, whole: bool) -> Held:
    """Blocks without overlap; ``whole``: without gap, too."""
    borders = sorted({0, size, *(rng.randrange(size) for _ in range(count))})
    pairs = itertools.pairwise(borders)
    return Held(
        size,
        [
            BlockPlace(start, end - start, number, rng.random() < 0.3)
            for number, (start, end) in enumerate(pairs)
            if whole or rng.random() < 0.4
        ],
    )


def owners(layers: list[Held]) -> list[tuple[int, int]]:
    """Layer and block of each byte, by writing one layer over the other, oldest first."""
    disk: list[tuple[int, int]] = []
    for number, each in reversed(list(enumerate(layers))):
        # what a disk lost when it shrank does not come back when it grows
        disk = [*disk[: each.size], *[(ZERO, 0)] * (each.size - len(disk))]
        for place in each.all:
            owner = (ZERO, 0) if place.zero else (number, place.number)
            disk[place.offset : place.offset + place.length] = [owner] * place.length
    return disk


def found(view_: View, offset: int, length: int) -> list[tuple[int, int]]:
    """The same by the view; its spans must follow one another."""
    disk: list[tuple[int, int]] = []
    for at, count, number, block in view_.spans(offset, length):
        assert at == offset + len(disk)
        assert count > 0
        disk += [(number, block)] * count
    return disk


@pytest.mark.parametrize("seed", range(30))
def test_every_byte_has_the_owner_that_a_replay_gives(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    # small windows, and too little room for all of them
    monkeypatch.setattr(view, "ALIGN", rng.choice([16, 100, 4096]))
    monkeypatch.setattr(view, "ENOUGH", rng.choice([1, 7, 256]))
    sizes = [rng.randrange(200, 3000) for _ in range(rng.randrange(1, 8))]
    layers = [
        layer(rng, size, rng.randrange(1, 40), whole=number == len(sizes) - 1)
        for number, size in enumerate(sizes)
    ]
    expected = owners(layers)
    seen = View(layers, whole=True, most=rng.choice([1, 20, 1 << 20]))
    assert seen.size == len(expected)
    for _ in range(300):
        offset = rng.randrange(seen.size)
        length = rng.randrange(1, rng.choice([2, 50, seen.size + 1]) + 1)
        length = min(length, seen.size - offset)
        assert found(seen, offset, length) == expected[offset : offset + length]


def test_a_full_with_a_gap_is_not_taken_for_zeroes() -> None:
    full = Held(100, [BlockPlace(0, 40, 0, zero=False), BlockPlace(60, 40, 1, zero=False)])
    delta = Held(120, [BlockPlace(50, 5, 0, zero=True)])
    seen = View([delta, full], whole=True)
    assert list(seen.spans(0, 120)) == [
        (0, 40, 1, 0),
        (40, 10, MISSING, 0),
        (50, 5, ZERO, 0),
        (55, 5, MISSING, 0),
        (60, 40, 1, 1),
        (100, 20, ZERO, 0),
    ]
    assert View([delta, full], whole=False).spans(40, 20) == [(40, 20, ZERO, 0)]


def test_a_place_is_searched_once() -> None:
    full = Held(1 << 30, [BlockPlace(n << 20, 1 << 20, n, zero=False) for n in range(1 << 10)])
    seen = View([full], whole=True)
    for offset in (5 << 20, (5 << 20) + 77, 100 << 20, 6 << 20):
        assert found(seen, offset, 10) == [(0, offset >> 20)] * 10
    assert full.searches == 1
    seen.spans(1 << 29, 10)
    assert full.searches == 2


def test_memory_is_bounded() -> None:
    full = Held(1 << 20, [BlockPlace(n * 16, 16, n, zero=False) for n in range(1 << 16)])
    seen = View([full], whole=True, most=2000)
    seen.spans(0, 1 << 20)
    assert sum(len(window.starts) for window in seen._windows.values()) <= 2000
    assert list(seen._windows) == sorted(seen._starts)
