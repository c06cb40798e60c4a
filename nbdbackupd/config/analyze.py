"""Calendar events as ``systemd-analyze`` judges them, where it is there."""

import re
import shutil
from typing import Final

from nbdbackupd import proc
from nbdbackupd.config import calendar
from nbdbackupd.errors import ProcessError

PROGRAM: Final = "systemd-analyze"
TIMEOUT_SECONDS: Final = 10.0
NEVER: Final = re.compile(r"^\s*Next elapse: never$", re.MULTILINE)


def is_over(event: str) -> bool:
    """Whether systemd says that an event never comes again; no if it can't be asked."""
    if shutil.which(PROGRAM) is None:
        return False
    try:
        said = proc.output([PROGRAM, "calendar", "--", event], timeout=TIMEOUT_SECONDS)
    except ProcessError:
        return False
    return NEVER.search(said) is not None


def fault(event: str) -> str:
    """What systemd finds wrong with an event; empty if nothing is, or if it can't be asked."""
    if shutil.which(PROGRAM) is None:
        return ""
    try:
        proc.output([PROGRAM, "calendar", "--", event], timeout=TIMEOUT_SECONDS)
    except ProcessError as err:
        if "parse" not in str(err).lower():
            return ""
        return (
            f"not a calendar event for systemd: {event!r} {calendar.EXAMPLES}; see systemd.time(7)"
        )
    return ""
