"""The body of scripts/gen-events: files that are made from the table of events."""

import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from nbdbackupd import events
from nbdbackupd.events import ALL, CONTEXT, FIELDS, Event
from nbdbackupd.log import FIELD_PREFIX
from scripts.generated import TOP, main

CATALOG_WIDTH: Final = 78
PAGE_WIDTH: Final = 100

PRIORITIES: Final[Mapping[int, str]] = {
    events.CRITICAL: "critical",
    events.ERROR: "error",
    events.WARNING: "warning",
    events.NOTICE: "notice",
    events.INFO: "info",
}

INTRODUCTION: Final = """\
# Events

What nbdbackupd tells systemd's journal of, made by `scripts/gen-events` from
`nbdbackupd/events.py`: do not edit. Each event has an id that never changes; ask for it with
`journalctl MESSAGE_ID=…`, and let `journalctl -x` explain it. `nbdbackupctl log` shows the records
of a domain. Records that are no event have the fields of their run, too.

Where standard error is not the journal, the same texts are lines on standard error (warnings and
errors, more with `-v`), and in the run's log in the set's directory `logs`. Where it is the
journal, but Python's systemd package (`python3-systemd`) is missing, they are plain lines with a
priority: then there are no fields and no ids.
"""


def generated() -> Mapping[Path, str]:
    """Each file and what must stand in it."""
    return {
        TOP / "docs/reference/events.md": page(),
        TOP / "packaging/common/nbdbackup.catalog": catalog(),
    }


def catalog() -> str:
    """The catalogue, as systemd.io/CATALOG describes it."""
    return "\n".join(_entry(event) for event in ALL)


def _entry(event: Event) -> str:
    # the journal may lack a field of the text: a subject must be sensible all the same
    lines = [
        f"-- {event.id}",
        f"Subject: {_subject(event)}",
        "Defined-By: nbdbackupd",
        "Documentation: man:nbdbackupctl(1)",
    ]
    for text in (event.meaning, event.cure):
        lines += ["", *_wrapped(_with_fields(text), CATALOG_WIDTH)]
    return "\n".join(lines) + "\n"


def _subject(event: Event) -> str:
    words = event.name.replace("-", " ")
    return words[0].upper() + words[1:]


def _with_fields(text: str) -> str:
    return re.sub(r"\{(\w+)\}", rf"@{FIELD_PREFIX}\1@", text)


def page() -> str:
    """docs/reference/events.md."""
    lines = [INTRODUCTION, "## Fields", ""]
    lines += _wrapped(
        f"Each begins with `{FIELD_PREFIX}`. A field without a value is left out. "
        + ", ".join(f"`{name}`" for name in CONTEXT)
        + " come with every record of a run, as far as it knows them.",
        PAGE_WIDTH,
    )
    lines += ["", "| field | means |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in FIELDS.items()]
    lines += ["", "## Table", "", "| event | priority | id |", "|---|---|---|"]
    lines += [f"| {event.name} | {PRIORITIES[event.priority]} | `{event.id}` |" for event in ALL]
    for event in ALL:
        lines += ["", *_section(event)]
    return "\n".join(lines) + "\n"


def _section(event: Event) -> Iterator[str]:
    yield f"## {event.name}"
    fields = ", ".join(f"`{name}`" for name in event.fields)
    texts = (
        f"`{_marked(event.text)}`",
        f"{_plain(event.meaning)} {_plain(event.cure)}",
        f"Fields: {fields}.",
    )
    for text in texts:
        yield ""
        yield from _wrapped(text, PAGE_WIDTH)


def _marked(text: str) -> str:
    return re.sub(r"\{(\w+)\}", r"<\1>", text)


def _plain(text: str) -> str:
    """Commands in quotation marks and fields become code."""
    code = re.sub(r"'([^']+ [^']+)'", lambda found: f"`{_marked(found[1])}`", text)
    return re.sub(r"\{(\w+)\}", r"`\1`", code)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main("gen-events", generated(), sys.argv[1:]))
