"""Which points stay: golden histories in retention.txt, and what holds in each history there is.

``python -m tests.unit.test_retention`` writes the golden file anew; read what it changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdbackupd.model.chain import Consistency
from nbdbackupd.model.retention import NO_RULE, Decision, PointFacts, Rules, decide

GOLDEN = Path(__file__).with_name("retention.txt")
BERLIN = ZoneInfo("Europe/Berlin")
NIGHT = timedelta(days=1)
FULL_SET = Rules(last=2, hourly=3, daily=4, weekly=3, monthly=3, yearly=2)
YEAR = Rules(daily=7, weekly=4, monthly=12)
FLAWS: dict[str, dict[str, Any]] = {
    "crash": {"consistency": Consistency.CRASH},
    "damaged": {"is_sound": False},
    "verified": {"is_verified": True},
    "protected": {"protected": "by hand"},
    "pinned": {"pinned": "base of the next increment"},
}


def local(text: str, zone: ZoneInfo = BERLIN) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone)


def points(*words: str) -> list[PointFacts]:
    """``2026-01-31T02:00 crash damaged``: a time, and what is odd about the point."""
    found = []
    for text in words:
        moment, *flaws = text.split()
        more = {key: value for flaw in flaws for key, value in FLAWS[flaw].items()}
        found.append(PointFacts(id=moment, created=local(moment), **more))
    return found


def every(step: timedelta, begin: str, number: int) -> list[PointFacts]:
    """So many points; steps are hours that pass, whatever clocks show."""
    moments = (local(begin).astimezone(UTC) + step * each for each in range(number))
    shown = [each.astimezone(BERLIN) for each in moments]
    return [PointFacts(id=f"{each:%Y-%m-%dT%H:%M%z}", created=each) for each in shown]


@dataclass(frozen=True)
class Case:
    """A history that is judged at ``now``, or when its last point was made."""

    name: str
    rules: Rules
    points: list[PointFacts]
    now: datetime | None = None

    def decide(self) -> Decision:
        return decide(self.points, self.rules, self.now or self.points[-1].created)


HOURS = every(timedelta(hours=5), "2025-11-20T02:00", 60)
TWICE = points(*(f"2026-01-{day:02}T{hour}:00" for day in range(1, 7) for hour in ("02", "14")))
CASES = [
    Case("nothing set keeps all", Rules(), TWICE),
    Case("last counts points, not days", Rules(last=3), TWICE),
    Case("the newest of a day", Rules(daily=3), TWICE),
    Case("oldest stays until daily has seven", Rules(daily=7), TWICE),
    Case("within looks back from the newest", Rules(within=86400 * 2), TWICE),
    Case("last covers days, daily goes on", Rules(last=3, daily=2), TWICE),
    Case("within covers days, daily goes on", Rules(within=86400, daily=2), TWICE),
    Case("all rules, each five hours", FULL_SET, HOURS),
    Case("a year of nights", YEAR, every(NIGHT, "2025-01-01T02:00", 365)),
    Case("two years of nights", YEAR, every(NIGHT, "2024-01-01T02:00", 731)),
    Case("half a year of nights", YEAR, every(NIGHT, "2025-01-01T02:00", 180)),
    Case("gaps don't count", Rules(daily=3, weekly=2), points(
        "2025-06-01T02:00", "2025-06-02T02:00", "2025-09-14T02:00", "2025-12-24T02:00",
        "2026-03-01T02:00", "2026-03-02T02:00")),
    Case("ISO weeks at the turn of years", Rules(weekly=3), points(
        "2025-12-21T02:00", "2025-12-28T02:00", "2025-12-29T02:00", "2026-01-01T02:00",
        "2026-01-04T02:00", "2026-01-05T02:00")),
    Case("a day ends at local midnight", Rules(daily=2), points(
        "2026-06-30T23:59", "2026-07-01T00:00", "2026-07-01T23:59", "2026-07-02T00:01")),
    Case("the hour that comes twice", Rules(hourly=6),
         every(timedelta(minutes=30), "2026-10-25T01:00", 9)),
    Case("the hour that is left out", Rules(hourly=3),
         every(timedelta(minutes=30), "2026-03-29T00:30", 7)),
    Case("29 February", Rules(monthly=2, yearly=2), points(
        "2023-02-28T02:00", "2024-02-29T02:00", "2024-03-01T02:00", "2025-03-01T02:00")),
    Case("protected ones take no place", Rules(daily=2), points(
        "2026-01-01T02:00", "2026-01-02T02:00 protected", "2026-01-03T02:00",
        "2026-01-04T02:00 protected", "2026-01-05T02:00")),
    Case("pinned ones stay", Rules(last=1), points(
        "2026-01-01T02:00 pinned", "2026-01-02T02:00", "2026-01-03T02:00")),
    Case("damaged ones take no place", Rules(daily=2), points(
        "2026-01-01T02:00", "2026-01-02T02:00", "2026-01-02T14:00 damaged",
        "2026-01-03T02:00 damaged", "2026-01-04T02:00", "2026-01-05T02:00 damaged")),
    Case("the newest sound one stays", Rules(last=1, minimum=1), points(
        "2026-01-01T02:00", "2026-01-02T02:00", "2026-01-03T02:00 damaged")),
    Case("the newest verified one stays", Rules(last=2), points(
        "2026-01-01T02:00 verified", "2026-01-02T02:00 verified", "2026-01-03T02:00",
        "2026-01-04T02:00", "2026-01-05T02:00 damaged verified")),
    Case("a better consistency stays", Rules(last=2), points(
        "2026-01-01T02:00", "2026-01-02T02:00", "2026-01-03T02:00 crash", "2026-01-04T02:00 crash",
        "2026-01-05T02:00 crash")),
    Case("minimum counts sound ones", Rules(last=1, minimum=3), points(
        "2026-01-01T02:00", "2026-01-02T02:00", "2026-01-03T02:00", "2026-01-04T02:00 damaged",
        "2026-01-05T02:00")),
    Case("the clock was set back a year", Rules(daily=2), points(
        "2026-01-01T02:00", "2026-01-02T02:00", "2025-01-03T02:00", "2026-01-04T02:00",
        "2026-01-05T02:00"), local("2026-01-05T02:00")),
    Case("a point from the future stops all", Rules(daily=1), points(
        "2026-01-01T02:00", "2026-01-02T02:00", "2027-01-03T02:00"), local("2026-01-03T02:00")),
    Case("a protected point from the future stops nothing", Rules(daily=1), points(
        "2026-01-01T02:00", "2027-01-02T02:00 protected", "2026-01-03T02:00",
        "2026-01-04T02:00"), local("2026-01-04T02:00")),
    Case("the oldest is a sound one", Rules(daily=1, monthly=3), points(
        "2026-01-01T02:00 damaged", "2026-01-02T02:00", "2026-01-03T02:00", "2026-01-04T02:00")),
    Case("half an hour ahead is nothing", Rules(daily=1), points(
        "2026-01-01T02:00", "2026-01-02T02:00", "2026-01-03T02:30"), local("2026-01-03T02:00")),
]  # fmt: skip


def render(case: Case) -> str:
    decision = case.decide()
    rules = ", ".join(f"{name} {number}" for name, number, _ in case.rules.periods if number)
    rules += f", within {case.rules.within:.0f}" * bool(case.rules.within)
    lines = [f"== {case.name}: {rules.removeprefix(', ') or 'no rules'}"]
    lines += [f"! {decision.problem}"] * bool(decision.problem)
    # a year of what goes tells nothing
    shown = [each for each in case.points if decision.reasons[each.id] or len(case.points) < 100]
    lines += [f"{len(case.points)} points, {len(decision.doomed)} go"]
    for point in shown:
        why = decision.reasons[point.id]
        lines.append(f"{'+' if why else '-'} {point.id}  {', '.join(why)}".rstrip())
    return "\n".join(lines) + "\n"


def golden() -> str:
    return "\n".join(map(render, CASES))


def test_histories_are_as_they_were() -> None:
    assert golden() == GOLDEN.read_text()


def test_nothing_set_removes_nothing() -> None:
    decision = decide(TWICE, Rules(minimum=5), TWICE[-1].created)
    assert decision.problem == NO_RULE
    assert decision.doomed == frozenset()
    assert decide([], FULL_SET, local("2026-01-01T00:00")).reasons == {}


def histories() -> st.SearchStrategy[list[PointFacts]]:
    """Up to some years of runs, with gaps, clocks that jump, damage, and points by hand."""
    gap = st.sampled_from([0, 60, 3600, 86400, 86400, 86400, 86400, 90000, 86400 * 40, -86400 * 3])
    flag = st.sampled_from([False, False, False, True])
    consistency = st.sampled_from(list(Consistency))
    one = st.tuples(gap, consistency, st.booleans(), flag, flag, flag)
    return st.lists(one, min_size=1, max_size=60).map(lambda each: list(_told(each)))


def _told(runs: list[tuple[int, Consistency, bool, bool, bool, bool]]) -> Iterator[PointFacts]:
    moment = datetime(2024, 1, 1, 2, tzinfo=UTC)
    for number, (gap, consistency, sound, verified, protected, pinned) in enumerate(runs):
        moment += timedelta(seconds=gap)
        yield PointFacts(
            id=f"p{number}", created=moment.astimezone(BERLIN), consistency=consistency,
            is_sound=sound, is_verified=verified, protected="by hand" * protected,
            pinned="base" * pinned,
        )  # fmt: skip


def counts() -> st.SearchStrategy[int]:
    return st.integers(0, 8)


RULES = st.builds(
    Rules, last=counts(), hourly=counts(), daily=counts(), weekly=counts(), monthly=counts(),
    yearly=counts(), within=st.sampled_from([0.0, 0.0, 86400.0 * 2]), minimum=st.integers(1, 4),
)  # fmt: skip


@given(points=histories(), rules=RULES)
def test_what_must_stay_stays(points: list[PointFacts], rules: Rules) -> None:
    now = max(each.created for each in points)
    decision = decide(points, rules, now)
    kept = [each for each in points if each.id not in decision.doomed]
    assert [each.id for each in points] == list(decision.reasons)
    assert points[-1] in kept
    assert {each.id for each in points if each.protected or each.pinned} <= {e.id for e in kept}
    in_time = sorted(points, key=lambda each: each.created.timestamp())
    sound = [each for each in in_time if each.is_sound]
    assert all(each in kept for each in sound[-rules.minimum :])
    for wanted in (
        [each for each in sound if each.is_verified],
        [each for each in sound if each.consistency is not Consistency.CRASH],
    ):
        assert wanted == [] or any(
            each.created == wanted[-1].created and each in kept for each in wanted
        )
    if not rules.are_set:
        assert kept == points
    # as many days are kept as are wanted, or all that there are
    plain = [each for each in sound if not each.protected]
    days = {f"{each.created:%F}" for each in plain}
    assert len({f"{e.created:%F}" for e in plain if e in kept}) >= min(rules.daily, len(days))
    at_least = sum(number for _, number, _ in rules.periods)
    by_rule = [each for each in kept if each in plain and decision.reasons[each.id] != ("newest",)]
    extra = 3 + rules.minimum + sum(bool(each.pinned) for each in points)
    within = sum("within" in each for each in decision.reasons.values())
    assert not rules.are_set or len(by_rule) <= at_least + within + extra


@given(points=histories(), rules=RULES)
def test_what_was_kept_is_kept_when_the_rest_is_gone(
    points: list[PointFacts], rules: Rules
) -> None:
    """A prune takes no more when it is run again: reasons don't lean on points that go."""
    now = max(each.created for each in points)
    doomed = decide(points, rules, now).doomed
    left = [each for each in points if each.id not in doomed]
    assert decide(left, rules, now).doomed == frozenset()


@settings(max_examples=8)
@given(random=st.randoms(use_true_random=False))
def test_simulated_years(random: Random) -> None:
    """Nightly runs with gaps, pruned each night: never too few, never too many."""
    moment, kept = datetime(2024, 1, 1, 1, tzinfo=UTC), list[PointFacts]()
    begun: list[datetime] = []
    for number in range(450):
        moment += NIGHT * random.choice([1] * 20 + [2, 9])
        local_moment = moment.astimezone(BERLIN)
        begun.append(local_moment)
        kept.append(PointFacts(id=str(number), created=local_moment))
        decision = decide(kept, YEAR, moment)
        assert number < 20 or 2 * len(decision.doomed) <= len(kept)
        kept = [each for each in kept if each.id not in decision.doomed]
        assert len(kept) <= 7 + 4 + 12
        assert [each.created for each in kept][-7:] == begun[-7:]
        weeks = list(dict.fromkeys(each.isocalendar()[:2] for each in reversed(begun)))
        assert {each.created.isocalendar()[:2] for each in kept} >= set(weeks[:4])
    months = list(dict.fromkeys(f"{each:%Y-%m}" for each in reversed(begun)))
    assert {f"{each.created:%Y-%m}" for each in kept} >= set(months[:12])


def test_a_zone_decides_what_a_day_is() -> None:
    moments = [datetime(2026, 7, 1, hour, tzinfo=UTC) for hour in (20, 23)]
    for zone, number in ((BERLIN, 2), (ZoneInfo("America/New_York"), 1)):
        found = [PointFacts(id=f"{each:%H}", created=each.astimezone(zone)) for each in moments]
        # the newest and the oldest stay in any case, so a newer day stands before them
        later = PointFacts(id="later", created=datetime(2026, 7, 9, tzinfo=zone))
        early = PointFacts(id="early", created=datetime(2026, 6, 1, tzinfo=zone))
        decision = decide([early, *found, later], Rules(daily=3), later.created)
        assert sum(bool(decision.reasons[f"{each:%H}"]) for each in moments) == number


if __name__ == "__main__":
    GOLDEN.write_text(golden())
