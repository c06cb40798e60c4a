"""The body of scripts/gen-config: files that are made from the configuration's schema."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from nbdbackupd.app.config import manpage, sample

TOP: Final = Path(__file__).resolve().parents[1]
CHECK: Final = "--check"


def generated() -> Mapping[Path, str]:
    """Each file and what must stand in it."""
    return {
        TOP / "etc/nbdbackup/nbdbackup.yaml": sample.render(),
        TOP / "docs/man/nbdbackup.yaml.5": manpage.render(),
    }


def stale() -> list[Path]:
    """The files that are missing or not what the schema says."""
    return [
        path
        for path, text in generated().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str]) -> int:
    """Write the files, or with ``--check`` tell which are stale; return the exit status."""
    if arguments not in ([], [CHECK]):
        print("usage: gen-config [--check]", file=sys.stderr)
        return 2
    found = stale()
    for path in found:
        if CHECK in arguments:
            print(f"{path.relative_to(TOP)} is not current: run scripts/gen-config")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(generated()[path], encoding="utf-8")
            print(f"wrote {path.relative_to(TOP)}")
    return 1 if found and CHECK in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
