"""Which events of the table were told: by what was logged, or by the text that was printed."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from nbdbackupd import events, log


def told(text: str) -> set[str]:
    """The names of the events whose text a line of this output or log is."""
    lines = text.splitlines()
    return {
        event.name for event in events.ALL if any(_pattern(event).search(line) for line in lines)
    }


@contextmanager
def heard() -> Iterator[list[str]]:
    """The names of the events that this process logs while the block runs, as they come."""
    names = {event.id: event.name for event in events.ALL}
    found: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            identity = record.__dict__.get(log.MESSAGE_ID)
            if identity is not None:
                found.append(names[identity])

    root, ear = logging.getLogger(log.ROOT), Ear()
    level = root.level
    root.addHandler(ear)
    root.setLevel(logging.INFO)
    try:
        yield found
    finally:
        root.removeHandler(ear)
        root.setLevel(level)


def _pattern(event: events.Event) -> re.Pattern[str]:
    """Its text with something in the place of each field, perhaps after a time and a level."""
    parts = re.split(r"\{\w+\}", event.text)
    return re.compile(r"(^|\s)" + ".+".join(map(re.escape, parts)) + "$")
