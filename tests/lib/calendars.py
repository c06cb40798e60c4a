"""Calendar events as people write them."""

from typing import Final

GOOD_EVENTS: Final = (
    "daily", "Weekly", "Mon..Fri 22:30", "*-*-01 02:00", "Sat,Sun 6:00", "*:0/15", "Mon", "12-01",
    "2026-*-01 00:00:00", "daily Europe/Berlin", "02:00 UTC", "*-*~03 4:00", "Mon *-05~07/1",
    "Thu,Fri 2012-*-1,5 11:12:13", "quarterly", "08:05:40.23",
)  # fmt: skip
BAD_EVENTS: Final = (
    "", "noon", "02", "every day", "Mon.. 02:00", "hourly 02:00", "02:00 x", "a\nb", "--help",
    "-*-* 2:00",
)  # fmt: skip
