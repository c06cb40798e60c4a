"""Logical volumes by what LVM2 writes on its disks: where each of them lies.

Read from the label (one of the first four sectors), the header of the metadata area and its text,
as LVM2's own source lays them out (format_text/layout.h; the same since 2004). Whoever wrote the
disk may be hostile: all is bounded and checked, and what does not fit is left out. Only volumes
that lie in one piece on one disk have a place here; of others only the name is known.
"""

import itertools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

SECTOR: Final = 512
LABEL: Final = b"LABELONE"
TYPE: Final = b"LVM2 001"
MDA_MAGIC: Final = b" LVM2 x[5A%r0N*>"
MAX_TEXT: Final = 16 << 20
MAX_AREAS: Final = 8
CRC_START: Final = 0xF597A6CF
"""LVM2's CRC-32 begins with this and is not inverted at the end."""

TOKEN: Final = re.compile(r'\s+|#[^\n]*|("(?:[^"\\]|\\.)*"|[A-Za-z0-9_.+\-]+|[{}\[\]=,])')
MAX_DEPTH: Final = 16
NAME: Final = re.compile(r"(?!-)[A-Za-z0-9_.+\-]{1,127}")
"""What lvm(8) allows for groups and volumes; they become arguments of other programs."""

Read = Callable[[int, int], bytes]
"""Bytes of a physical volume: offset, length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """A logical volume, named ``group/name``, of ``size`` bytes.

    ``physical`` is the id of the physical volume that holds all of it from ``offset`` on, in
    bytes; empty if it lies in several pieces.
    """

    name: str
    size: int
    physical: str = ""
    offset: int = 0


def volumes(read: Read) -> tuple[str, tuple[Volume, ...]]:
    """The id of a physical volume, and the visible volumes of its group; empty if it is none."""
    label = next((sector for sector in range(4) if _is_label(read(sector * SECTOR, SECTOR))), None)
    if label is None:
        return "", ()
    header = read(label * SECTOR, SECTOR)
    position = int.from_bytes(header[20:24], "little")
    physical = _dashed(header[position : position + 32].decode("ascii", "replace"))
    for offset, size in _metadata_areas(header, position + 40):
        group = _parsed(_text(read, offset, size))
        if group:
            return physical, tuple(_volumes(*group))
    return physical, ()


def _is_label(sector: bytes) -> bool:
    return (
        sector[:8] == LABEL
        and sector[24:32] == TYPE
        and _crc(sector[20:SECTOR]) == int.from_bytes(sector[16:20], "little")
    )


def _crc(data: bytes) -> int:
    return zlib.crc32(data, CRC_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _dashed(raw: str) -> str:
    """An id as the metadata's text has it: 6-4-4-4-4-4-6."""
    cuts = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(raw[start:end] for start, end in itertools.pairwise(cuts))


def _metadata_areas(header: bytes, position: int) -> list[tuple[int, int]]:
    """Places of the metadata areas: the second of two lists that each end with zeroes."""
    lists: list[list[tuple[int, int]]] = []
    while len(lists) < 2:
        found: list[tuple[int, int]] = []
        while len(found) <= MAX_AREAS and position + 16 <= len(header):
            offset, size = (
                int.from_bytes(header[position + each : position + each + 8], "little")
                for each in (0, 8)
            )
            position += 16
            if not offset:
                break
            found.append((offset, size))
        lists.append(found)
    return lists[1][:MAX_AREAS]


def _text(read: Read, offset: int, size: int) -> str:
    """The newest text of an area, or nothing if its header or checksum is wrong."""
    header = read(offset, SECTOR)
    if header[4:20] != MDA_MAGIC or int.from_bytes(header[24:32], "little") != offset:
        return ""
    start, length = (int.from_bytes(header[each : each + 8], "little") for each in (40, 48))
    checksum = int.from_bytes(header[56:60], "little")
    if not SECTOR <= start < size or not 0 < length <= min(size, MAX_TEXT):
        return ""
    # the area is a ring behind its header
    first = min(length, size - start)
    text = read(offset + start, first) + read(offset + SECTOR, length - first)
    return text.decode("utf-8", "replace") if _crc(text) == checksum else ""


def _parsed(text: str) -> tuple[str, Mapping[str, Any]] | None:
    """Name and content of the group, or None if the text makes no sense."""
    tokens = [found[1] for found in TOKEN.finditer(text.rstrip("\0")) if found[1]]
    tokens.reverse()
    try:
        top = _section(tokens, 0)
    except (IndexError, ValueError):
        return None
    groups = [(name, each) for name, each in top.items() if isinstance(each, dict)]
    return groups[0] if len(groups) == 1 else None


def _section(tokens: list[str], depth: int) -> dict[str, Any]:
    """``name { … }`` and ``name = value`` up to the closing brace; ``tokens`` are reversed."""
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    found: dict[str, Any] = {}
    while tokens:
        name = tokens.pop()
        if name == "}":
            if not depth:
                raise ValueError("too many braces")
            return found
        sign = tokens.pop()
        if sign == "{":
            found[name] = _section(tokens, depth + 1)
        elif sign == "=":
            found[name] = _value(tokens)
        else:
            raise ValueError("neither a section nor a value")
    if depth:
        raise ValueError("a brace is missing")
    return found


def _value(tokens: list[str]) -> Any:
    word = tokens.pop()
    if word != "[":
        return word[1:-1] if word.startswith('"') else word
    values = []
    while (word := tokens.pop()) != "]":
        if word != ",":
            values.append(word[1:-1] if word.startswith('"') else word)
    return values


def _volumes(group: str, content: Mapping[str, Any]) -> Sequence[Volume]:
    found = []
    logical = content.get("logical_volumes")
    if not isinstance(logical, dict) or not NAME.fullmatch(group):
        return ()
    for name, each in logical.items():
        if not NAME.fullmatch(name) or name in (".", ".."):
            continue
        try:
            if "VISIBLE" in each["status"]:
                found.append(_volume(f"{group}/{name}", each, content))
        except (KeyError, ValueError, TypeError, AttributeError):
            continue
    return found


def _volume(name: str, logical: Mapping[str, Any], content: Mapping[str, Any]) -> Volume:
    """Sizes are in extents of so many sectors; ``stripes`` names a physical volume and where."""
    extent = _number(content["extent_size"]) * SECTOR
    count = _number(logical["segment_count"])
    segments = [logical[f"segment{number}"] for number in range(1, min(count, 4096) + 1)]
    size = sum(_number(each["extent_count"]) for each in segments) * extent
    pieces = []
    for each in segments:
        if each["type"] != "striped" or each["stripe_count"] != "1":
            return Volume(name=name, size=size)
        physical, start = each["stripes"]
        pieces.append((physical, _number(start), _number(each["extent_count"])))
    for (before, start, length), (after, then, _) in itertools.pairwise(pieces):
        if (before, start + length) != (after, then):
            return Volume(name=name, size=size)
    physical, start, _ = pieces[0]
    volume = content["physical_volumes"][physical]
    offset = _number(volume["pe_start"]) * SECTOR + start * extent
    return Volume(name=name, size=size, physical=str(volume["id"]), offset=offset)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(text)
    return int(text)
