"""The body of scripts/gen-changelog: CHANGELOG.md, read and written as packages want it."""

import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from scripts.generated import TOP, main

SOURCE: Final = TOP / "CHANGELOG.md"
DEBIAN: Final = TOP / "packaging/debian/changelog"
SPEC: Final = TOP / "packaging/rpm/nbdbackupd.spec"
WHO: Final = "nbdbackupd maintainers <nbdbackupd@users.noreply.github.com>"
UNRELEASED: Final = "## [Unreleased]"
HEADING: Final = re.compile(r"## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)")
SECTION: Final = "%changelog\n"
WIDTH: Final = 78


@dataclass(frozen=True, slots=True)
class Release:
    """One version: the day it was made (UTC), and what is new in it."""

    version: str
    day: datetime
    entries: tuple[str, ...]


def releases(text: str) -> tuple[Release, ...]:
    """All versions that were released, newest first. Raises ValueError for a heading of no form."""
    found = []
    for part in re.split(r"(?m)^(?=## )", text)[1:]:
        heading, _, body = part.partition("\n")
        if heading == UNRELEASED:
            continue
        form = HEADING.fullmatch(heading)
        if form is None:
            raise ValueError(f"{SOURCE.name}: {heading!r} is not '## [VERSION] - YYYY-MM-DD'")
        entries = [" ".join(each.split()) for each in re.split(r"(?m)^- ", body)[1:]]
        # a heading of the next kind of change follows the last entry of one
        plain = (each.partition(" ### ")[0].replace("`", "") for each in entries)
        day = datetime.fromisoformat(form[2]).replace(hour=12, tzinfo=UTC)
        found.append(Release(version=form[1], day=day, entries=tuple(plain)))
    return tuple(found)


def generated() -> dict[Path, str]:
    """What the packages' files are to hold."""
    every = releases(SOURCE.read_text(encoding="utf-8"))
    spec = SPEC.read_text(encoding="utf-8").partition(SECTION)[0]
    spec = re.sub(r"(?m)^(Version: *).*$", rf"\g<1>{every[0].version}", spec)
    return {
        DEBIAN: "\n".join("\n".join(_debian(each)) for each in every),
        SPEC: spec + SECTION + "\n".join("\n".join(_rpm(each)) for each in every),
    }


def _debian(release: Release) -> Iterator[str]:
    """An entry as in deb-changelog(5)."""
    yield f"nbdbackupd ({release.version}) unstable; urgency=medium"
    yield ""
    yield from _wrapped(release, "  * ", "    ")
    yield ""
    yield f" -- {WHO}  {release.day:%a, %d %b %Y %H:%M:%S %z}"
    yield ""


def _rpm(release: Release) -> Iterator[str]:
    yield f"* {release.day:%a %b %d %Y} {WHO} - {release.version}-1"
    yield from _wrapped(release, "- ", "  ")
    yield ""


def _wrapped(release: Release, first: str, rest: str) -> Iterator[str]:
    for entry in release.entries:
        # rpm expands macros here, too
        text = entry.replace("%", "%%") if first == "- " else entry
        yield from textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest)


if __name__ == "__main__":
    sys.exit(main("gen-changelog", generated(), sys.argv[1:]))
