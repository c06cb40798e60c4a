"""Bytes and times as people write and read them."""

import re
from typing import Final

from nbdbackupd.model.units import human_size

__all__ = ["human_size", "human_time", "parse_size"]

UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
PATTERN: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """``512M``, ``1.5GiB``, ``4096`` as bytes (units are powers of 1024).

    Raises ValueError for anything else.
    """
    found = PATTERN.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"not a size: {text!r} (examples: 4096, 512M, 1.5GiB)")
    return int(float(found[1]) * UNITS[found[2].lower()])


def human_time(seconds: float) -> str:
    """``3.2 s``, ``4:05``, ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
