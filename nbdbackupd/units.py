"""Bytes and times as people write and read them."""

import re
from datetime import UTC, datetime
from typing import Final

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


def parse_rate(text: str) -> int:
    """A size, of bytes per second. Raises ValueError for less than 64K, too."""
    rate = parse_size(text)
    if rate < LEAST_RATE:
        raise ValueError(f"a rate of at least 64K is needed, not {text!r}")
    return rate


def parse_seconds(text: str) -> float:
    """A number of seconds, not negative. Raises ValueError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise ValueError(f"not a number of seconds: {text!r}")
    return value


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


def human_size(size: int) -> str:
    """``1.5 GiB``: three significant digits at most, units are powers of 1024."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    if unit == "B":
        return f"{size} B"
    return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"


def utc_time(moment: datetime | None) -> str:
    """RFC 3339 in UTC, to the second, as the manifests have it; empty for none."""
    if moment is None:
        return ""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def local_time(moment: str | datetime) -> str:
    """``2026-01-31 23:59:59 CET``: in this host's zone, which is named; JSON has RFC 3339 UTC.

    A text that is no time stays what it is: it came from a set.
    """
    try:
        found = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
        local = found.astimezone()
    except (ValueError, OverflowError):  # also of one that no calendar has in this zone
        return str(moment)
    return f"{local:%Y-%m-%d %H:%M:%S %Z}"
