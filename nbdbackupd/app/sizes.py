"""Bytes and times as people write and read them."""

import re
from typing import Final

from nbdbackupd.model.units import human_size

__all__ = ["human_size", "human_time", "parse_duration", "parse_size"]

LEAST_RATE: Final = 64 << 10
"""Bytes per second: slower than this a single block of a disk would take minutes."""

UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
MAX_SIZE: Final = float(1 << 63)
PATTERN: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
TIMES: Final = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
TIME_PART: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(min|[smhdw]?)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """``512M``, ``1.5GiB``, ``4096`` as bytes (units are powers of 1024).

    Raises ValueError for anything else.
    """
    found = PATTERN.fullmatch(text.strip())
    size = float(found[1]) * UNITS[found[2].lower()] if found else MAX_SIZE
    if size >= MAX_SIZE:
        raise ValueError(f"not a size: {text!r} (examples: 4096, 512M, 1.5GiB)")
    return int(size)


def parse_duration(text: str) -> float:
    """``90``, ``30s``, ``2h``, ``1h30m``, ``7d``, ``2w`` as seconds; units in lower case.

    Raises ValueError for anything else.
    """
    rest, total = text.strip(), 0.0
    bare = TIME_PART.fullmatch(rest)
    while rest:
        found = TIME_PART.match(rest)
        if found is None or (not found[2] and bare is None):
            break
        total += float(found[1]) * TIMES[found[2]]
        rest = rest[found.end() :]
    if rest or not text.strip() or total >= 1e9:
        raise ValueError(f"not a duration: {text!r} (examples: 30s, 10m, 2h, 1h30m, 7d)")
    return total


def human_time(seconds: float) -> str:
    """``3.2 s``, ``4:05``, ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
