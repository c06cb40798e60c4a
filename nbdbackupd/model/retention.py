"""Which points of a domain stay: the rules that its owner set, and what is never removed.

The rules are asked in the order last, within, hourly, daily, weekly, monthly, yearly, and each
looks only at what those before it left. A rule of a period keeps the newest point of each slot (a
day, an ISO week) that no point kept so far lies in, so many of them; slots without a point don't
count. While the longest rule lacks points, the oldest one stays: it is on its way to that rule.

Protected points take no part in that. One that is known to be damaged stays where a rule wants it,
but fills no place: it never pushes out a sound one.

Hours, days, weeks and months are those of the zone that each point's time carries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from nbdbackupd.model.chain import Consistency
from nbdbackupd.model.policy import Rotate, period

FUTURE: Final = timedelta(hours=1)
"""A point that is dated later than this from now was made by a clock that was wrong, or is it now.
"""

NO_RULE: Final = "no rule of retention is set for it: give one, as 'retention: {daily: 7}'"


class Pruning(StrEnum):
    """When points leave without anybody's command."""

    TIMER = "timer"
    RUN = "run"
    NEVER = "never"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How many points of each kind stay; ``within`` is in seconds before the newest point.

    ``minimum`` is the number of newest sound points that stay whatever the rules say.
    """

    last: int = 0
    within: float = 0.0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    minimum: int = 1

    @property
    def are_set(self) -> bool:
        """Whether any rule is: without one everything stays."""
        return bool(self.within) or any(count for _, count, _ in self.periods)

    @property
    def periods(self) -> "tuple[tuple[str, int, Callable[[PointFacts], str]], ...]":
        """The rules that count, in their order: name, number, and the slot that a point is in."""
        return (
            ("last", self.last, lambda point: point.id),
            ("hourly", self.hourly, lambda point: f"{point.created:%Y-%m-%d %H:00 %z}"),
            ("daily", self.daily, lambda point: f"{point.created:%Y-%m-%d}"),
            ("weekly", self.weekly, lambda point: period(Rotate.WEEKLY, point.created)),
            ("monthly", self.monthly, lambda point: period(Rotate.MONTHLY, point.created)),
            ("yearly", self.yearly, lambda point: f"{point.created:%Y}"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PointFacts:
    """What the decision needs of a point.

    ``created`` carries the host's zone. ``protected`` says by what it is, ``pinned`` why else it
    can't leave; each is empty if there is nothing. ``is_sound``: nothing that it is made of is
    known to be damaged; ``is_verified``: all of that was proven once.
    """

    id: str
    created: datetime
    consistency: Consistency = Consistency.FILESYSTEM
    protected: str = ""
    pinned: str = ""
    is_sound: bool = True
    is_verified: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What keeps each point: ``reasons`` by id, none for one that is to leave.

    ``problem`` says why nothing may be removed all the same, and is empty if it may.
    """

    reasons: dict[str, tuple[str, ...]]
    problem: str = ""

    @property
    def doomed(self) -> frozenset[str]:
        """The ids of the points that are to leave; none if there is a problem."""
        if self.problem:
            return frozenset()
        return frozenset(ident for ident, why in self.reasons.items() if not why)


def decide(points: Sequence[PointFacts], rules: Rules, now: datetime) -> Decision:
    """What stays of a domain's points, which are given in the order in which they were made."""
    by_time = sorted(points, key=_moment)
    newest_first = by_time[::-1]
    reasons: dict[str, list[str]] = {point.id: [] for point in points}
    for point in points:
        reasons[point.id] += [f"protected {point.protected}".rstrip()] * bool(point.protected)
        reasons[point.id] += [point.pinned] * bool(point.pinned)
    for ident, reason in _by_rules([each for each in newest_first if not each.protected], rules):
        reasons[ident].append(reason)
    if points:
        reasons[points[-1].id].append("newest")
    for ident, reason in _floors(newest_first, rules.minimum):
        if not reasons[ident]:
            reasons[ident].append(reason)
    problem = _problem(points, now) if rules.are_set else NO_RULE
    return Decision({ident: tuple(why) for ident, why in reasons.items()}, problem)


def _problem(points: Sequence[PointFacts], now: datetime) -> str:
    # one that is protected takes no part in what the rules decide
    latest = max((each for each in points if not each.protected), key=_moment, default=None)
    if latest is not None and _moment(latest) > now.timestamp() + FUTURE.total_seconds():
        return (
            f"point {latest.id} is dated {latest.created:%Y-%m-%d %H:%M:%S %Z}, which is yet to "
            f"come: set this host's clock right, or 'nbdbackupctl protect' that point"
        )
    return ""


def _moment(point: PointFacts) -> float:
    # of two times in one zone Python compares the clocks' faces
    return point.created.timestamp()


def _floors(newest_first: Sequence[PointFacts], minimum: int) -> list[tuple[str, str]]:
    """What stays whatever the rules say, with the reason."""
    sound = [point for point in newest_first if point.is_sound]
    verified = [(each.id, "newest verified") for each in sound if each.is_verified]
    better = [
        (each.id, "newest that is more than crash consistent")
        for each in sound
        if each.consistency is not Consistency.CRASH
    ]
    return [*verified[:1], *better[:1], *((each.id, "minimum") for each in sound[:minimum])]


def _by_rules(newest_first: Sequence[PointFacts], rules: Rules) -> list[tuple[str, str]]:
    """What the rules keep, with the reason; see the module's text."""
    kept: dict[str, str] = {}
    passed: set[str] = set()
    short: PointFacts | None = None
    able = [each for each in newest_first if each.is_sound] or newest_first
    for name, number, slot_of in rules.periods:
        if number:
            taken = {slot_of(each) for each in newest_first if each.id in kept and each.is_sound}
            slots: dict[str, list[PointFacts]] = {}
            for point in newest_first:
                if point.id not in kept and point.id not in passed and slot_of(point) not in taken:
                    slots.setdefault(slot_of(point), []).append(point)
            left = number
            for slot, members in slots.items():
                if left == 0:
                    break
                best = next((each for each in members if each.is_sound), members[0])
                kept[best.id] = name if name == "last" else f"{name} {slot}"
                passed |= {each.id for each in members} - {best.id}
                left -= best.is_sound
            short = able[-1] if left and able else None
        if name == "last" and rules.within and newest_first:
            begin = _moment(newest_first[0]) - rules.within
            for point in newest_first:
                if _moment(point) >= begin:
                    kept.setdefault(point.id, "within")
    if short is not None:
        kept.setdefault(short.id, "oldest")
    return list(kept.items())
