"""Bytes as people read them."""


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
