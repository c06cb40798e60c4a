"""The algebra of extents: what of a disk is read, what is a zero, what is left out.

An extent is a run of guest bytes with flags. A *cover* is a sequence of extents without gap or
overlap. All ranges are half open and in bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from nbdbackupd.errors import NbdError

STATE_HOLE = 1
STATE_ZERO = 2
"""Flags of ``base:allocation`` (NBD specification, "base:allocation metadata context")."""

STATE_DIRTY = 1
"""Flag of ``qemu:dirty-bitmap:NAME`` (QEMU docs/interop/nbd.txt)."""


class Extent(NamedTuple):
    """``length`` bytes from ``offset`` on, with the flags of one meta context."""

    offset: int
    length: int
    flags: int

    @property
    def end(self) -> int:
        """First byte after the extent."""
        return self.offset + self.length


class Segment(NamedTuple):
    """A piece of a plan: read ``length`` bytes at ``offset``, or (``zero``) note them as zero."""

    offset: int
    length: int
    zero: bool

    @property
    def end(self) -> int:
        """First byte after the segment."""
        return self.offset + self.length


class Overlap(NamedTuple):
    """A run in which two covers both have one value each."""

    offset: int
    length: int
    first: int
    second: int


def clip(extents: Iterable[Extent], start: int, end: int) -> Iterator[Extent]:
    """The parts of ``extents`` that lie in ``[start, end)``; empty parts are dropped."""
    for extent in extents:
        low = max(extent.offset, start)
        high = min(extent.end, end)
        if low < high:
            yield Extent(low, high - low, extent.flags)


def overlay(first: Iterable[Extent], second: Iterable[Extent]) -> Iterator[Overlap]:
    """Cut two covers of one range at all of their borders.

    Both must start at the same offset. The result ends where the shorter one ends, so that
    nothing is said about bytes that only one of them knows (F-15).
    """
    left_items, right_items = iter(first), iter(second)
    left, right = next(left_items, None), next(right_items, None)
    while left is not None and right is not None:
        offset = max(left.offset, right.offset)
        end = min(left.end, right.end)
        if offset < end:
            yield Overlap(offset, end - offset, left.flags, right.flags)
        if left.end == end:
            left = next(left_items, None)
        if right.end == end:
            right = next(right_items, None)


def plan_full(allocation: Iterable[Extent]) -> Iterator[Segment]:
    """Everything: a hole that reads as zero becomes a zero segment, all else is read.

    A hole without the zero flag may hold anything and is read; so is data that happens to be
    flagged zero without being a hole: only reading as zero counts.
    """
    return merge(
        Segment(extent.offset, extent.length, bool(extent.flags & STATE_ZERO))
        for extent in allocation
    )


def plan_delta(dirty: Sequence[Extent], allocation: Iterable[Extent]) -> Iterator[Segment]:
    """Only what changed; a changed range that reads as zero is a change to zero, never nothing.

    Raises NbdError if ``allocation`` does not reach as far as what changed: no change is left out.
    """
    left = sum(extent.length for extent in dirty if extent.flags & STATE_DIRTY)

    def changed() -> Iterator[Segment]:
        nonlocal left
        for run in overlay(dirty, allocation):
            if run.first & STATE_DIRTY:
                left -= run.length
                yield Segment(run.offset, run.length, bool(run.second & STATE_ZERO))

    yield from merge(changed())
    if left:
        raise NbdError(f"the NBD server did not say whether {left} bytes that changed are zeroes")


def proven(plan: Iterable[Segment], size: int, *, whole: bool) -> Iterator[Segment]:
    """The same plan, proven on its way: ascending, within ``size`` bytes; ``whole``: all of them.

    Raises NbdError where it is not.
    """
    end = 0
    for segment in plan:
        if segment.length <= 0 or segment.offset < end or segment.end > size:
            raise NbdError("the list of what to read is out of order", offset=segment.offset)
        if whole and segment.offset != end:
            raise NbdError("the list of what to read has a gap", offset=end)
        end = segment.end
        yield segment
    if whole and end != size:
        raise NbdError("the list of what to read ends before the disk", offset=end, size=size)


def dirty_groups(dirty: Iterable[Extent], near: int) -> Iterator[list[Extent]]:
    """The dirty extents of a cover, with the clean ones between those that are near one another.

    Each group is a cover that begins and ends dirty, without a clean extent longer than ``near``.
    """
    group: list[Extent] = []
    # clean extents that follow, of which nobody knows yet whether they lie in between
    pending: list[Extent] = []
    for extent in dirty:
        if extent.flags & STATE_DIRTY:
            if sum(each.length for each in pending) > near:
                yield group
                group, pending = [], []
            group += [*pending, extent]
            pending = []
        elif group:
            pending.append(extent)
    if group:
        yield group


def merge(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Join neighbours of one kind that touch."""
    held: Segment | None = None
    for segment in segments:
        if held is not None and held.end == segment.offset and held.zero == segment.zero:
            held = Segment(held.offset, held.length + segment.length, held.zero)
            continue
        if held is not None:
            yield held
        held = segment
    if held is not None:
        yield held


def split(segments: Iterable[Segment], block: int) -> Iterator[Segment]:
    """Cut data segments at multiples of ``block`` bytes of the guest's disk.

    Cutting at guest positions keeps blocks of different points on the same borders, so that an
    increment replaces whole blocks. Zero segments stay whole.
    """
    for segment in segments:
        if segment.zero:
            yield segment
            continue
        offset = segment.offset
        while offset < segment.end:
            end = min(segment.end, (offset // block + 1) * block)
            yield Segment(offset, end - offset, zero=False)
            offset = end
