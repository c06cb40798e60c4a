"""Calendar events as systemd.time(7) has them, such as ``Mon..Fri 02:00``.

systemd alone knows them for certain, see ``analyze``; this is a plain check of their form.
"""

import functools
import re
from typing import Final

EXAMPLES: Final = "(examples: daily, 'Mon..Fri 22:30', '*-*-01 02:00')"

WORDS: Final = (
    *("minutely", "hourly", "daily", "monthly", "weekly"),
    *("yearly", "annually", "quarterly", "semiannually", "semi-annually"),
)
_NUMBER: Final = r"(?:\*|\d{1,4}(?:\.\d+)?(?:\.\.\d{1,4}(?:\.\d+)?)?)(?:/\d{1,4}(?:\.\d+)?)?"
_NUMBERS: Final = rf"{_NUMBER}(?:,{_NUMBER})*"
_DAY: Final = (
    r"(?:mon(?:day)?|tue(?:sday)?|wed(?:nesday)?|thu(?:rsday)?|fri(?:day)?|sat(?:urday)?"
    r"|sun(?:day)?)"
)
_DAYS: Final = rf"{_DAY}(?:(?:\.\.|-){_DAY})?(?:,{_DAY}(?:(?:\.\.|-){_DAY})?)*,?"
_DATE: Final = rf"(?:{_NUMBERS}-)?{_NUMBERS}[-~]{_NUMBERS}"
_TIME: Final = rf"{_NUMBERS}:{_NUMBERS}(?::{_NUMBERS})?"
_ZONE: Final = r"(?:UTC|[A-Za-z_]+(?:/[A-Za-z0-9_+-]+)+|[A-Z]{3,5})"


@functools.cache
def _event() -> re.Pattern[str]:
    """Made when it is needed: it takes as long as to import a few modules."""
    return re.compile(
        rf"(?:{'|'.join(WORDS)}|(?=\S)(?:{_DAYS}(?:\s+|$))?(?:{_DATE}(?:[\sT]+|$))?(?:{_TIME})?)"
        rf"(?:\s*(?<=\s){_ZONE})?",
        re.ASCII | re.IGNORECASE,
    )


def plain_fault(event: str) -> str:
    """What is wrong with an event as far as its form tells; empty if nothing is."""
    if _event().fullmatch(event.strip()):
        return ""
    return f"not a calendar event: {event!r} {EXAMPLES}; see systemd.time(7)"
