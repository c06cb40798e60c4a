"""What a run may choose: set and level, when a new full is due, how the guest is held still.

A set is a directory that holds one chain, hence one full. A full is due when a calendar month or
week has turned since the newest set began, when that set is so many days old, or when its chain
is as long as it may be; and when there is no set, or only one that can't be continued.

Calendar days, ISO weeks and months are those of the host's local time. Ages are counted in
calendar days, not hours: a timer that fires some seconds earlier than it did a week ago, or across
a change to or from daylight saving time, must not put the full off by a day.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from nbdbackupd.errors import NoFullError
from nbdbackupd.model.chain import Level

FUTURE: Final = timedelta(days=1)
"""A set that began later than this from now was made by a clock that was wrong."""

NAME: Final = re.compile(r"[0-9]{4}-(?:[0-9]{2}|W[0-9]{2}|[0-9]{2}-[0-9]{2})(?:\.[0-9]+)?")


class Rotate(StrEnum):
    """The period whose turn begins a new set."""

    MONTHLY = "monthly"
    WEEKLY = "weekly"
    NEVER = "never"


class FreezePolicy(StrEnum):
    """How the guest is held still: frozen if that works, or necessarily, not at all, or paused."""

    AUTO = "auto"
    REQUIRE = "require"
    NEVER = "never"
    PAUSE = "pause"


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelPolicy:
    """When a new set begins: ``full_every`` is in days, None sets no limit."""

    rotate: Rotate = Rotate.MONTHLY
    full_every: int | None = None
    max_increments: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SetFacts:
    """A set that exists.

    ``began`` is when its full was made, with its zone set to local time; None without a full, as
    a run that failed leaves it. ``increments`` is the number of increments since. ``problem`` says
    why it can't be continued (damaged, of another domain), and is empty if it can.
    """

    name: str
    began: datetime | None = None
    increments: int = 0
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class NextRun:
    """The directory of the set, whether a chain begins there, the level, and why.

    A directory in which a chain begins may exist, if a run failed there. ``problem``: why the
    newest set can't be continued, or empty.
    """

    directory: str
    is_new: bool
    level: Level
    reason: str
    problem: str = ""


def next_run(
    policy: LevelPolicy,
    sets: Sequence[SetFacts],
    now: datetime,
    *,
    wanted: Level = Level.AUTO,
    taken: Collection[str] = (),
) -> NextRun:
    """Decide for a run at ``now``, which carries the local time's zone.

    ``wanted`` is the level that was asked for; ``AUTO`` leaves it to the policy. An increment or
    differential that was asked for goes into the newest set whatever the policy says. ``taken``
    are names in the directory that are no sets: a new set gets another one.

    Raises NoFullError for an increment or differential where no set can be continued.
    """
    newest = _newest(sets, now)
    due = _why_new(policy, newest, now)
    usable = newest if newest is not None and not newest.problem else None
    if wanted in (Level.INC, Level.DIFF) and usable is None:
        raise NoFullError(f"level {wanted} needs a full first: {due}; use level auto or full")
    if usable is not None and wanted in (Level.INC, Level.DIFF, Level.COPY):
        return NextRun(directory=usable.name, is_new=False, level=wanted, reason="asked for")
    if usable is not None and wanted is Level.AUTO and not due:
        goes_on = f"set {usable.name} goes on"
        return NextRun(directory=usable.name, is_new=False, level=Level.INC, reason=goes_on)
    full_or_bad = (each.name for each in sets if each.began is not None or each.problem)
    return NextRun(
        directory=_free(period(policy.rotate, now), {*taken, *full_or_bad}),
        is_new=True,
        level=Level.FULL if wanted is Level.AUTO else wanted,
        reason=due if wanted is Level.AUTO else "asked for",
        problem=due if newest is not None and newest.problem else "",
    )


def period(rotate: Rotate, moment: datetime) -> str:
    """The month (``2026-01``), ISO week (``2026-W01``) or, without rotation, day of a time.

    The ISO year of a week at the turn of the year may differ from the calendar's. Texts of one
    kind sort by time.
    """
    match rotate:
        case Rotate.MONTHLY:
            return f"{moment:%Y-%m}"
        case Rotate.WEEKLY:
            year, week, _ = moment.isocalendar()
            return f"{year:04}-W{week:02}"
        case Rotate.NEVER:
            return f"{moment:%Y-%m-%d}"


def is_set_name(name: str) -> bool:
    """Whether a directory's name is one that ``next_run`` gives to sets."""
    return NAME.fullmatch(name) is not None


def _newest(sets: Sequence[SetFacts], now: datetime) -> SetFacts | None:
    """The set that began last.

    One from the future is passed over: it would be the newest for years, never continued nor
    replaced, with a new full in each run.
    """
    ages = {each.name: _since(each.began, now) for each in sets if each.began is not None}
    begun = [each for each in sets if each.name in ages and ages[each.name] > -FUTURE]
    # of two that began in one second the one that _free named later
    return max(begun, key=lambda each: (-ages[each.name], len(each.name), each.name), default=None)


def _since(began: datetime, now: datetime) -> timedelta:
    """The time that has passed."""
    # of two times in one zone Python subtracts the clocks' faces, whatever happened in between
    return timedelta(seconds=now.timestamp() - began.timestamp())


def _why_new(policy: LevelPolicy, newest: SetFacts | None, now: datetime) -> str:
    """Why the newest set can't or must not be continued; empty if it goes on."""
    if newest is None or newest.began is None:
        return "there is no set yet"
    if newest.problem:
        return f"set {newest.name} can't be continued: {newest.problem}"
    turned = period(policy.rotate, now)
    # "later", not "other": a clock set back over the turn of a month is no new month
    if policy.rotate is not Rotate.NEVER and turned > period(policy.rotate, newest.began):
        return f"a new {'month' if policy.rotate is Rotate.MONTHLY else 'week'} has begun: {turned}"
    age = (now.date() - newest.began.date()).days
    if policy.full_every is not None and age >= policy.full_every:
        return f"the full of set {newest.name} is {age} days old, {policy.full_every} is the limit"
    if policy.max_increments is not None and newest.increments >= policy.max_increments:
        return (
            f"set {newest.name} holds {newest.increments} increments, "
            f"{policy.max_increments} is the limit"
        )
    return ""


def _free(name: str, taken: Collection[str]) -> str:
    """The name, or the first of ``name.2``, ``name.3``, … that is not taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}.{number}"
    return found
