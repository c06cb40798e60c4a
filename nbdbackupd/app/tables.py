"""Tables for people."""

import os
from collections.abc import Mapping, Sequence
from typing import Final, TextIO

from nbdbackupd import plain

GAP: Final = "  "
COLOURS: Final = {"ok": "32", "warning": "33", "critical": "31", "unknown": "35", "failed": "31"}


def render(rows: Sequence[Sequence[str]], *, coloured: bool = False) -> list[str]:
    """Lines with aligned columns; ``coloured``: words of the last column that have a colour."""
    clean = [[plain.line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    lines = []
    for row in clean:
        *first, last = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        colour = COLOURS.get(last.split(" ")[0], "")
        lines.append(GAP.join([*first, paint(last.rstrip(), colour, coloured=coloured)]).rstrip())
    return lines


def paint(word: str, colour: str, *, coloured: bool) -> str:
    """A word of ours in a colour, as ECMA-48 numbers it; empty for none."""
    return f"\x1b[{colour}m{word}\x1b[0m" if coloured and colour else word


def wants_colour(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether a stream is a terminal whose user has nothing against colours (no-color.org)."""
    try:
        terminal = os.isatty(stream.fileno())
    except (OSError, ValueError):
        return False
    return terminal and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
