"""Calendar events as ``systemd-analyze`` judges them, where it is there."""

import re
import shutil
from functools import lru_cache
from typing import Final

from nbdbackupd import proc
from nbdbackupd.config import calendar
from nbdbackupd.errors import ProcessError

PROGRAM: Final = "systemd-analyze"
TIMEOUT_SECONDS: Final = 10.0
MAX_EVENTS: Final = 1000
"""So many are remembered: the files of many domains have few events."""

NEVER: Final = re.compile(r"^\s*Next elapse: never$", re.MULTILINE)


def is_over(event: str) -> bool:
    """Whether systemd says that an event never comes again; no if it can't be asked."""
    return NEVER.search(_asked(event)[0]) is not None


def fault(event: str) -> str:
    """What systemd finds wrong with an event; empty if nothing is, or if it can't be asked."""
    if "parse" not in _asked(event)[1].lower():
        return ""
    return f"not a calendar event for systemd: {event!r} {calendar.EXAMPLES}; see systemd.time(7)"


@lru_cache(maxsize=MAX_EVENTS)
def _asked(event: str) -> tuple[str, str]:
    """What the program says of an event, and its error; one of both is empty."""
    if shutil.which(PROGRAM) is None:
        return "", ""
    try:
        return proc.output([PROGRAM, "calendar", "--", event], timeout=TIMEOUT_SECONDS), ""
    except ProcessError as err:
        return "", str(err)
