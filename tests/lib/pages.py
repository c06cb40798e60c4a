"""Markdown pages, cut into what a test compares."""

import re
from pathlib import Path
from typing import Final

TOP: Final = Path(__file__).resolve().parents[2]
FORMAT: Final = TOP / "docs/format.md"
DESIGN: Final = TOP / "docs/design.md"
PAGES: Final = (TOP / "README.md", *sorted((TOP / "docs").rglob("*.md")))


def tables(page: Path, column: str) -> list[list[list[str]]]:
    """The tables whose first column has that title: their rows, cut into cells."""
    found: list[list[list[str]]] = []
    is_inside = False
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(f"| {column} |"):
            found.append([])
            is_inside = True
        elif not line.startswith("|"):
            is_inside = False
        elif is_inside and not set(line) <= set("|-"):
            found[-1].append(cells)
    return found


def section(page: Path, heading: str) -> str:
    """The text under a heading, up to the next one."""
    text = page.read_text()
    start = text.index(f"\n{heading}\n") + len(heading) + 2
    return re.split(r"^#+ ", text[start:], maxsplit=1, flags=re.MULTILINE)[0]
