"""Files that are made from tables of the program: writing them, and telling which are stale."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

TOP: Final = Path(__file__).resolve().parents[1]
CHECK: Final = "--check"


def stale(files: Mapping[Path, str]) -> list[Path]:
    """Those of ``files`` that are missing or do not hold the text that they are to hold."""
    return [
        path
        for path, text in files.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main(program: str, files: Mapping[Path, str], arguments: list[str]) -> int:
    """Write the files, or with ``--check`` tell which are stale; return the exit status."""
    if arguments not in ([], [CHECK]):
        print(f"usage: {program} [{CHECK}]", file=sys.stderr)
        return 2
    found = stale(files)
    for path in found:
        if CHECK in arguments:
            print(f"{path.relative_to(TOP)} is not current: run scripts/{program}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
            print(f"wrote {path.relative_to(TOP)}")
    return 1 if found and CHECK in arguments else 0
