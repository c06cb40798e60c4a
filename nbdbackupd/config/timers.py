"""What the configuration says about timers, as far as files tell; libvirt is not asked.

Files that choose domains by labels or UUID count for domains that libvirt has defined. With a file
that has an error, what stands elsewhere and what is sound in it still counts: a slip in one
domain's file must not take the timers of all others away.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from nbdbackupd.config.files import ConfigFile, Configuration
from nbdbackupd.config.inventory import Defined
from nbdbackupd.config.schema import MATCH
from nbdbackupd.model.domain import is_uuid
from nbdbackupd.model.retention import Pruning

CALENDAR: Final = "schedule.calendar"
RANDOM_DELAY: Final = "schedule.random_delay"
ENABLE: Final = "schedule.enable"
PRUNE: Final = "retention.prune"
RULES: Final = tuple(
    f"retention.{rule}"
    for rule in ("last", "within", "hourly", "daily", "weekly", "monthly", "yearly")
)
SCHEDULE: Final = (CALENDAR, RANDOM_DELAY, ENABLE, PRUNE, *RULES)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimerSettings:
    """A domain's timer; None where no file says anything, so that the unit's own value holds.

    ``calendar`` holds calendar events, none of them if the timer must never run;
    ``random_delay`` is in seconds. ``prunes``: what no rule wants is removed by a timer, too.
    """

    calendar: tuple[str, ...] | None = None
    random_delay: float | None = None
    enable: bool = False
    prunes: bool = False


def exact_names(configuration: Configuration) -> tuple[str, ...]:
    """The names of domains that files give letter for letter, each once, in order."""
    found = [
        name
        for file in _usable(configuration)
        if file.match is not None and not file.match.metadata
        for name in file.match.names
        if not is_uuid(name) and file.match.fits_name(name, "")
    ]
    return tuple(dict.fromkeys(found))


def matched_names(
    configuration: Configuration, inventory: Mapping[str, Defined]
) -> tuple[str, ...]:
    """The names of domains that a file of ``domains.d`` is for, each once.

    Those that files give letter for letter, defined or not, and of the defined ones those that fit.
    """
    files = [file for file in _usable(configuration) if file.match is not None]
    fitting = (
        name
        for name, domain in inventory.items()
        if any(_fits(each, name, domain) for each in files)
    )
    return tuple(dict.fromkeys((*exact_names(configuration), *fitting)))


def timer_for(
    name: str, configuration: Configuration, domain: Defined | None = None
) -> TimerSettings:
    """What the files say about a domain's timer; ``domain`` is what libvirt's file says of it."""
    values = sound_values(name, configuration, SCHEDULE, domain)
    return TimerSettings(
        calendar=values.get(CALENDAR),
        random_delay=values.get(RANDOM_DELAY),
        enable=values.get(ENABLE, False),
        prunes=any(values.get(rule) for rule in RULES)
        and values.get(PRUNE, Pruning.TIMER) is Pruning.TIMER,
    )


def sound_values(
    name: str,
    configuration: Configuration,
    paths: Collection[str],
    domain: Defined | None = None,
) -> dict[str, Any]:
    """What the files say of some settings for a domain, by path; without what has an error."""
    bad = {(each.file, each.path) for each in configuration.problems}
    values: dict[str, Any] = {}
    for file in _usable(configuration):
        if _fits(file, name, domain):
            # a list may have lost the event that was wrong, so all of it is dropped
            values |= {
                path: found.value
                for path, found in file.values.items()
                if path in paths and (found.file, path) not in bad
            }
    return values


def _usable(configuration: Configuration) -> list[ConfigFile]:
    """The files of which it is known which names they are for."""
    unclear = {each.file for each in configuration.problems if each.path.partition(".")[0] == MATCH}
    return [file for file in configuration.files if str(file.path) not in unclear]


def _fits(file: ConfigFile, name: str, domain: Defined | None) -> bool:
    """Whether a file is for a domain; one that wants labels is for none that is not defined."""
    if file.match is None:
        return True
    if domain is None:
        return not file.match.metadata and file.match.fits_name(name, "")
    return file.match.fits(name, domain.uuid, domain.labels)
