"""The list of payload sizes at the end of a compressed stream, read in bounded memory.

It is JSON: a number for each block, the size of its one lz4 frame. Where virtnbdbackup had to
read an extent in several requests (QEMU's NBD server takes 32 MiB at most), the block is several
lz4 frames one behind the other, and its entry is an object, ``{"TOTAL": [SIZE, SIZE, …]}``
(written by 1.9.15 and 2.28, measured).
"""

import re
from array import array
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from nbdbackupd import documents
from nbdbackupd.errors import IntegrityError

CHUNK: Final = 1 << 20
MAX_SIZE: Final = (1 << 63) - 1
_NUMBERS: Final = re.compile(rb"[0-9 ,\r\n\t]*")


class Size(NamedTuple):
    """Bytes of one payload; ``parts`` are its lz4 frames if there are several, else empty."""

    total: int
    parts: tuple[int, ...] = ()


class Sizes:
    """All sizes of a stream by the number of the block: eight bytes of memory each."""

    def __init__(self) -> None:
        self._totals = array("Q")
        self._parts: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._totals)

    def __getitem__(self, number: int) -> Size:
        return Size(self._totals[number], self._parts.get(number, ()))

    def __iter__(self) -> Iterator[Size]:
        return (self[number] for number in range(len(self)))

    def add(self, size: Size) -> None:
        """Append one."""
        if size.parts:
            self._parts[len(self._totals)] = size.parts
        self._totals.append(size.total)

    def extend(self, numbers: bytes) -> None:
        """Append what a comma separates; raises ValueError, OverflowError."""
        found = array("Q", map(int, numbers.split(b",")))
        if 0 in found:
            raise ValueError("a payload of no bytes")
        self._totals.extend(found)


def parse(read: Callable[[int, int], bytes], start: int, length: int, maximum: int) -> Sizes:
    """The sizes in ``length`` bytes of JSON from ``start`` on; ``read`` takes place and length.

    Raises IntegrityError if that is no such list, or one of more than ``maximum`` sizes.
    """
    found = Sizes()
    try:
        for text in _pieces(read, start, length):
            if b"{" in text:
                for each in documents.parse_json(b"[%s]" % text):
                    found.add(_size(each))
            elif not _NUMBERS.fullmatch(text):
                raise ValueError("not a list of numbers")
            else:
                found.extend(text)
            if len(found) > maximum:
                raise ValueError("more of them than the file can hold blocks")
    except (ValueError, OverflowError) as err:
        raise IntegrityError(f"sizes of compressed blocks: {err}", offset=start) from err
    return found


def _size(value: object) -> Size:
    if isinstance(value, dict) and len(value) == 1:
        ((text, parts),) = value.items()
        if (
            isinstance(parts, list)
            and parts
            and all(type(part) is int and 0 < part <= MAX_SIZE for part in parts)
            and str(sum(parts)) == text
        ):
            return Size(sum(parts), tuple(parts))
    elif type(value) is int and 0 < value <= MAX_SIZE:
        return Size(value)
    raise ValueError("an entry is neither a size nor a list of them")


def _pieces(read: Callable[[int, int], bytes], start: int, length: int) -> Iterator[bytes]:
    """What is between the brackets, in pieces that end where an entry does."""
    if length < 2 or read(start, 1) != b"[" or read(start + length - 1, 1) != b"]":
        raise ValueError("not a JSON list")
    place, end, rest = start + 1, start + length - 1, b""
    while place < end:
        part = read(place, min(CHUNK, end - place))
        place += len(part)
        text = rest + part
        if place == end:
            rest = text
            break
        # an object is not cut: its commas are its own
        limit = len(text) if text.rfind(b"}") >= text.rfind(b"{") else text.rfind(b"{")
        cut = text.rfind(b",", max(text.rfind(b"}"), 0) if limit == len(text) else 0, limit)
        if cut < 0:
            if len(text) > 16 * CHUNK:
                raise ValueError("an entry without an end")
            rest = text
            continue
        yield text[:cut]
        rest = text[cut + 1 :]
    if rest.strip() or place > start + 1:
        yield rest
