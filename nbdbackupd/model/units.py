"""Bytes and times as people read them."""

from datetime import datetime


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


def local_time(moment: str | datetime) -> str:
    """``2026-01-31 23:59:59 CET``: in this host's zone, which is named; JSON has RFC 3339 UTC.

    A text that is no time stays what it is: it came from a set.
    """
    try:
        found = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    except ValueError:
        return str(moment)
    return f"{found.astimezone():%Y-%m-%d %H:%M:%S %Z}"
