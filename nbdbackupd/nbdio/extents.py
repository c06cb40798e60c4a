"""Asking a server which parts of a disk are dirty, data, zero or hole.

A reply to a block status request holds, for each negotiated meta context, a list of extents from
the asked offset on. The NBD specification (NBD_CMD_BLOCK_STATUS) leaves the server much freedom:

* **exact**: the lists cover the asked range;
* **short**: a list ends before it, also each context at another place; at least one extent must
  be there, so the next request goes on where the *shortest* list ended;
* **long**: the last extent reaches beyond the asked range (a server may say what it knows);
* **consecutive extents of equal flags**: allowed; the plan joins them;
* a context may be **missing** from the reply only if the request failed for it.

So each context has a position of its own: what a reply says about bytes before that position is
old news and dropped, what it says beyond the window is cut off. The window, not the disk, bounds
the memory; it grows while replies are small, so that a huge empty disk takes few requests.

A reply tells of all contexts that its connection negotiated. The changes of a disk are few, while
saying what is allocated makes QEMU read all tables of an image (1.5 s for 1 TiB, QEMU 7.2). So
each context can have a connection of its own, and what is allocated is asked near changes only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import nbd

from nbdbackupd.errors import NbdError
from nbdbackupd.model import extents
from nbdbackupd.model.extents import Extent, Segment
from nbdbackupd.nbdio.client import ALLOCATION, DIRTY_PREFIX, Connection, errno_name
from nbdbackupd.nbdio.requests import Requests

MIN_WINDOW: Final = 64 << 20
MAX_WINDOW: Final = 2 << 30
"""Below 4 GiB, which a 32-bit request length can't say."""

LOOK: Final = 4096
"""Bytes that are asked about to see whether a server lives; a block of any medium."""

FEW: Final = 4096
MANY: Final = 16384

NEAR: Final = 64 << 20
"""Changes that are not further apart share a request: one costs about as much as QEMU needs to
look through so many bytes of a disk."""


@dataclass(slots=True)
class _Cover:
    """What one context has said of the window ``[start, end)`` so far, without gap."""

    start: int
    end: int
    extents: list[Extent] = field(default_factory=list)

    @property
    def position(self) -> int:
        return self.extents[-1].end if self.extents else self.start

    def extend(self, offset: int, entries: list[int]) -> None:
        """Add a reply: ``entries`` alternates length and flags, from ``offset`` on."""
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            said = Extent(offset, length, flags)
            self.extents.extend(extents.clip([said], self.position, self.end))
            offset += length


class ExtentReader:
    """Reads covers window by window over connections that negotiated the contexts."""

    def __init__(
        self, connection: Connection, *, bitmap: str = "", changes: Connection | None = None
    ) -> None:
        """``bitmap`` names the dirty bitmap; without it a plan reads the whole disk.

        ``changes`` is a connection that negotiated the bitmap alone, which is quicker; else
        ``connection`` is asked for both.
        """
        self._connection = connection
        self._changes = changes or connection
        self._dirty = DIRTY_PREFIX + bitmap if bitmap else ""
        self._window = MIN_WINDOW

    def plan(self) -> Iterator[Segment]:
        """What to read, ascending: see ``model.extents``. Joined across windows.

        Raises NbdError if the server fails or makes no progress.
        """
        return extents.merge(self._segments())

    def _segments(self) -> Iterator[Segment]:
        start, size = 0, self._connection.size
        while start < size:
            end = min(start + self._window, size)
            if self._dirty:
                yield from self._delta(start, end)
            else:
                allocation = _ask(self._connection, ALLOCATION, start, end)
                yield from extents.plan_full(allocation)
                self._adapt(len(allocation))
            start = end

    def _delta(self, start: int, end: int) -> Iterator[Segment]:
        dirty = _ask(self._changes, self._dirty, start, end)
        count = len(dirty)
        for group in extents.dirty_groups(dirty, NEAR):
            allocation = _ask(self._connection, ALLOCATION, group[0].offset, group[-1].end)
            yield from extents.plan_delta(group, allocation)
            count += len(allocation)
        self._adapt(count)

    def _adapt(self, count: int) -> None:
        if count < FEW:
            self._window = min(self._window * 2, MAX_WINDOW)
        elif count > MANY:
            self._window = max(self._window // 2, MIN_WINDOW)


def prove_alive(connection: Connection) -> None:
    """Raise NbdError unless the server answers; the connection negotiated base:allocation.

    No byte of the disk is read: it might be one that can't be.
    """
    if connection.size:
        _ask(connection, ALLOCATION, 0, min(connection.size, LOOK))


def _ask(connection: Connection, context: str, start: int, end: int) -> list[Extent]:
    """One context's cover of one window, complete."""
    cover = _Cover(start, end)
    while (position := cover.position) < end:
        _request(connection, context, position, cover)
        if cover.position <= position:
            raise NbdError(
                "the NBD server said nothing about a range", offset=position, **connection.where
            )
    return cover.extents


def _request(connection: Connection, context: str, start: int, cover: _Cover) -> None:
    failures: list[int] = []

    def extent(name: str, offset: int, entries: list[int], error: "nbd.CInt") -> int:
        if error.value:
            failures.append(error.value)
        elif name == context:
            cover.extend(offset, entries)
        return 0

    with Requests(connection) as requests:
        requests.ask(
            "ask for block status",
            lambda done: connection.handle.aio_block_status(cover.end - start, start, extent, done),
            {"offset": start},
        )
    if failures:
        raise NbdError(
            f"block status failed: {errno_name(failures[0])}", offset=start, **connection.where
        )
