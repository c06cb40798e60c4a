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
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import nbd

from nbdbackupd.errors import NbdError
from nbdbackupd.model import extents
from nbdbackupd.model.extents import Extent, Segment
from nbdbackupd.nbdio.client import ALLOCATION, DIRTY_PREFIX, Connection, errno_name

MIN_WINDOW: Final = 64 << 20
MAX_WINDOW: Final = 2 << 30
"""Below 4 GiB, which a 32-bit request length can't say."""

FEW: Final = 4096
MANY: Final = 16384


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
    """Reads covers window by window over a connection that negotiated the contexts."""

    def __init__(self, connection: Connection, *, bitmap: str = "") -> None:
        """``bitmap`` names the dirty bitmap; without it a plan reads the whole disk."""
        self._connection = connection
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
            covers = self._ask(start, end)
            allocation = covers[ALLOCATION].extents
            if self._dirty:
                yield from extents.plan_delta(covers[self._dirty].extents, allocation)
            else:
                yield from extents.plan_full(allocation)
            self._adapt(max(len(cover.extents) for cover in covers.values()))
            start = end

    def _adapt(self, count: int) -> None:
        if count < FEW:
            self._window = min(self._window * 2, MAX_WINDOW)
        elif count > MANY:
            self._window = max(self._window // 2, MIN_WINDOW)

    def _ask(self, start: int, end: int) -> dict[str, _Cover]:
        """All contexts' covers of one window, complete."""
        names = [ALLOCATION, self._dirty] if self._dirty else [ALLOCATION]
        covers = {name: _Cover(start, end) for name in names}
        while (position := min(cover.position for cover in covers.values())) < end:
            self._request(position, end, covers)
            if min(cover.position for cover in covers.values()) <= position:
                raise NbdError(
                    "the NBD server said nothing about a range",
                    offset=position, **self._connection.where,
                )  # fmt: skip
        return covers

    def _request(self, start: int, end: int, covers: dict[str, _Cover]) -> None:
        failures: list[int] = []
        done: list[int] = []

        def extent(context: str, offset: int, entries: list[int], error: "nbd.CInt") -> int:
            if error.value:
                failures.append(error.value)
            elif context in covers:
                covers[context].extend(offset, entries)
            return 0

        def completed(error: "nbd.CInt") -> int:
            done.append(error.value)
            return 1

        connection = self._connection
        try:
            connection.handle.aio_block_status(end - start, start, extent, completed)
        except nbd.Error as err:
            raise connection.translate("can't ask for block status", err) from err
        connection.wait(lambda: bool(done), "asked for block status")
        for code in [*done, *failures]:
            if code:
                raise NbdError(
                    f"block status failed: {errno_name(code)}", offset=start, **connection.where
                )
