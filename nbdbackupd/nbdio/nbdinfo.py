"""A second opinion on extents: libnbd's ``nbdinfo`` tool instead of our own queries.

It asks for one meta context at a time and prints the whole disk at once, so memory grows with the
number of extents; it is here to cross-check ``nbdio.extents``.
"""

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from nbdbackupd import documents, proc
from nbdbackupd.errors import NbdError
from nbdbackupd.model import extents
from nbdbackupd.model.extents import Extent, Segment
from nbdbackupd.nbdio.client import ALLOCATION, DIRTY_PREFIX, Endpoint

SECONDS = 600.0
MAX_VALUES = 1 << 24


def plan(endpoint: Endpoint, size: int) -> Iterator[Segment]:
    """What to read of the export of ``size`` bytes, as ``ExtentReader.plan``.

    Raises ProcessError if nbdinfo is missing or fails, NbdError if it answers nonsense.
    """
    allocation = _extents(endpoint, ALLOCATION, size)
    if not endpoint.bitmap:
        return extents.plan_full(allocation)
    dirty = _extents(endpoint, DIRTY_PREFIX + endpoint.bitmap, size)
    return extents.merge(extents.plan_delta(dirty, allocation))


def _extents(endpoint: Endpoint, context: str, size: int) -> list[Extent]:
    uri = f"nbd+unix:///{quote(endpoint.export)}?socket={quote(str(endpoint.socket))}"
    text = proc.output(["nbdinfo", "--json", f"--map={context}", uri], timeout=SECONDS)
    try:
        entries: list[dict[str, Any]] = documents.parse_json(text, values=MAX_VALUES)
        found = [
            Extent(int(entry["offset"]), int(entry["length"]), int(entry["type"]))
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError) as err:
        raise NbdError(f"nbdinfo gave no list of extents for {context}: {err}") from err
    end = 0
    for extent in found:
        if extent.offset != end or extent.length <= 0:
            raise NbdError(f"nbdinfo left a gap in {context}", offset=end)
        end = extent.end
    if end != size:
        raise NbdError(f"nbdinfo told of a part of the disk only in {context}", offset=end)
    return found
