"""Servers that tests start."""

from pathlib import Path


def is_listening(socket: Path) -> bool:
    """Whether a server listens there: the file is made before, and is refused until then."""
    accepting = "00010000"  # __SO_ACCEPTCON, see proc(5)
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.split()[3] == accepting and line.endswith(f" {socket}") for line in lines)
