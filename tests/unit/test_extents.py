"""The algebra of extents against a byte array."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from nbdbackupd.model import extents
from nbdbackupd.model.extents import Extent, Segment

SIZE = 200


def covers(flags: st.SearchStrategy[int]) -> st.SearchStrategy[list[Extent]]:
    """Covers of ``[0, SIZE)``, neighbours of equal flags included."""

    def build(cuts: set[int], values: list[int]) -> list[Extent]:
        borders = [0, *sorted(cuts), SIZE]
        return [
            Extent(low, high - low, values[number % len(values)])
            for number, (low, high) in enumerate(itertools.pairwise(borders))
        ]

    return st.builds(
        build,
        st.sets(st.integers(1, SIZE - 1), max_size=30),
        st.lists(flags, min_size=1, max_size=31),
    )


ALLOCATION = covers(st.sampled_from([0, 1, 2, 3]))
DIRTY = covers(st.sampled_from([0, 1]))


def paint(runs: list[Extent]) -> list[int]:
    """The flags of each byte."""
    return [run.flags for run in runs for _ in range(run.length)]


def paint_plan(plan: list[Segment]) -> list[str]:
    """``d`` read, ``z`` zero, ``-`` left out; fails on overlap or disorder."""
    out = ["-"] * SIZE
    end = 0
    for segment in plan:
        assert segment.offset >= end
        assert segment.length > 0
        end = segment.end
        out[segment.offset : segment.end] = ["z" if segment.zero else "d"] * segment.length
    return out


@given(ALLOCATION)
def test_full_reads_all_that_does_not_read_as_zero(allocation: list[Extent]) -> None:
    wanted = ["z" if flags & 2 else "d" for flags in paint(allocation)]
    assert paint_plan(list(extents.plan_full(allocation))) == wanted


@given(DIRTY, ALLOCATION)
def test_delta_keeps_each_dirty_byte_and_nothing_else(
    dirty: list[Extent], allocation: list[Extent]
) -> None:
    wanted = [
        "-" if not is_dirty & 1 else "z" if flags & 2 else "d"
        for is_dirty, flags in zip(paint(dirty), paint(allocation), strict=True)
    ]
    assert paint_plan(list(extents.plan_delta(dirty, allocation))) == wanted


@given(DIRTY, ALLOCATION)
def test_plans_have_no_neighbours_of_one_kind(
    dirty: list[Extent], allocation: list[Extent]
) -> None:
    plan = list(extents.plan_delta(dirty, allocation))
    for one, other in itertools.pairwise(plan):
        assert one.end < other.offset or one.zero != other.zero


@given(ALLOCATION, st.integers(1, 64))
def test_split_cuts_at_guest_positions_and_changes_nothing(
    allocation: list[Extent], block: int
) -> None:
    plan = list(extents.plan_full(allocation))
    pieces = list(extents.split(plan, block))
    assert paint_plan(pieces) == paint_plan(plan)
    for piece in pieces:
        if not piece.zero:
            assert piece.offset // block == (piece.end - 1) // block


@given(ALLOCATION, st.integers(0, SIZE), st.integers(0, SIZE))
def test_clip_keeps_what_lies_inside(allocation: list[Extent], start: int, end: int) -> None:
    kept = list(extents.clip(allocation, start, end))
    assert paint(kept) == paint(allocation)[start:end]


def test_overlay_says_nothing_beyond_the_shorter_cover() -> None:
    first = [Extent(0, 10, 1)]
    second = [Extent(0, 4, 0), Extent(4, 3, 2)]
    runs = list(extents.overlay(first, second))
    assert [(run.offset, run.length, run.first, run.second) for run in runs] == [
        (0, 4, 1, 0),
        (4, 3, 1, 2),
    ]


def test_a_large_random_cover_needs_no_recursion() -> None:
    rng = random.Random(7)
    dirty, offset = [], 0
    for _ in range(50_000):
        length = rng.randrange(1, 9)
        dirty.append(Extent(offset, length, rng.randrange(2)))
        offset += length
    plan = list(extents.plan_delta(dirty, [Extent(0, offset, 0)]))
    assert sum(each.length for each in plan) == sum(each.length for each in dirty if each.flags)


def test_dirty_groups() -> None:
    cover = [
        Extent(0, 10, 0), Extent(10, 5, 1), Extent(15, 4, 0), Extent(19, 1, 1), Extent(20, 3, 0),
        Extent(23, 2, 0), Extent(25, 5, 1), Extent(30, 5, 1), Extent(35, 100, 0),
    ]  # fmt: skip
    assert list(extents.dirty_groups(cover, 4)) == [cover[1:4], cover[6:8]]
    assert list(extents.dirty_groups(cover, 5)) == [cover[1:8]]
    assert list(extents.dirty_groups(cover, 0)) == [cover[1:2], cover[3:4], cover[6:8]]
    assert list(extents.dirty_groups(cover[:1], 9)) == []
    assert list(extents.dirty_groups([], 9)) == []


@given(covers(st.sampled_from([0, 1])), covers(st.sampled_from([0, 1, 2, 3])), st.integers(0, SIZE))
def test_groups_plan_the_same_as_the_whole(
    dirty: list[Extent], allocation: list[Extent], near: int
) -> None:
    """Asking near changes only leaves no byte out and brings none in."""
    pieces = []
    for group in extents.dirty_groups(dirty, near):
        clipped = extents.clip(allocation, group[0].offset, group[-1].end)
        pieces += list(extents.plan_delta(group, clipped))
    assert list(extents.merge(pieces)) == list(extents.plan_delta(dirty, allocation))
