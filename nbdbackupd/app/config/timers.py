"""What the configuration says about timers, as far as names alone tell; libvirt is not asked.

Files that choose domains by labels or UUID do not count here. With a file that has an error, what
stands elsewhere and what is sound in it still counts: a slip in one domain's file must not take
the timers of all others away.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final

from nbdbackupd.app.config.files import ConfigFile, Configuration
from nbdbackupd.app.config.matching import is_uuid
from nbdbackupd.app.config.reading import Problem
from nbdbackupd.app.config.schema import MATCH

CALENDAR: Final = "schedule.calendar"
RANDOM_DELAY: Final = "schedule.random_delay"
ENABLE: Final = "schedule.enable"
SCHEDULE: Final = (CALENDAR, RANDOM_DELAY, ENABLE)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimerSettings:
    """A domain's timer; None where no file says anything, so that the unit's own value holds.

    ``calendar`` holds calendar events, none of them if the timer must never run;
    ``random_delay`` is in seconds.
    """

    calendar: tuple[str, ...] | None = None
    random_delay: float | None = None
    enable: bool = False


def exact_names(configuration: Configuration) -> tuple[str, ...]:
    """The names of domains that files give letter for letter, each once, in order."""
    found = [
        name
        for file in _usable(configuration)
        if file.match is not None
        for name in file.match.names
        if not is_uuid(name) and file.match.fits_name(name, "")
    ]
    return tuple(dict.fromkeys(found))


def timer_for(name: str, configuration: Configuration) -> TimerSettings:
    """What the files say about a domain's timer."""
    values = sound_values(name, configuration, SCHEDULE)
    return TimerSettings(
        calendar=values.get(CALENDAR), random_delay=values.get(RANDOM_DELAY),
        enable=values.get(ENABLE, False),
    )  # fmt: skip


def sound_values(name: str, configuration: Configuration, paths: Collection[str]) -> dict[str, Any]:
    """What the files say of some settings for a domain, by path; without what has an error."""
    bad = {(each.file, each.path) for each in configuration.problems}
    values: dict[str, Any] = {}
    for file in _usable(configuration):
        if file.match is None or file.match.fits_name(name, ""):
            # a list may have lost the event that was wrong, so all of it is dropped
            values |= {
                path: found.value
                for path, found in file.values.items()
                if path in paths and (found.file, path) not in bad
            }
    return values


def remarks(configuration: Configuration) -> tuple[Problem, ...]:
    """Settings that are sound and still have no effect on any timer, or not on all."""
    found: list[Problem] = []
    for file in configuration.files:
        match = file.match
        said = [path for path in SCHEDULE if path in file.values]
        if match is None or not said:
            continue
        if match.metadata or match.names_uuid:
            found += _remarks(
                file, said,
                "the generator of timers knows no labels and no UUIDs; choose domains by name, "
                "glob or regex",
            )  # fmt: skip
        elif ENABLE in said and file.values[ENABLE].value and not match.names:
            found += _remarks(
                file, [ENABLE],
                "a pattern names no domain; begin timers with 'systemctl enable', or give names",
            )  # fmt: skip
    return tuple(found)


def _remarks(file: ConfigFile, paths: Collection[str], message: str) -> Iterable[Problem]:
    for path in paths:
        yield Problem(file.values[path].file, file.values[path].line, path, message)


def _usable(configuration: Configuration) -> list[ConfigFile]:
    """The files of which it is known which names they are for."""
    unclear = {each.file for each in configuration.problems if each.path.partition(".")[0] == MATCH}
    return [
        file
        for file in configuration.files
        if str(file.path) not in unclear and not (file.match is not None and file.match.metadata)
    ]
