"""Which set the next run takes, over turns of years, weeks and clocks."""

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackupd.errors import NoFullError
from nbdbackupd.model.chain import Level
from nbdbackupd.model.policy import (
    LevelPolicy,
    NextRun,
    Rotate,
    SetFacts,
    is_set_name,
    next_run,
    period,
)

BERLIN = ZoneInfo("Europe/Berlin")
NEVER = LevelPolicy(rotate=Rotate.NEVER)
MONTHLY = LevelPolicy(rotate=Rotate.MONTHLY)
WEEKLY = LevelPolicy(rotate=Rotate.WEEKLY)


def at(text: str, zone: ZoneInfo = BERLIN) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone)


def facts(name: str, began: str, increments: int = 0, problem: str = "") -> SetFacts:
    return SetFacts(name=name, began=at(began), increments=increments, problem=problem)


def place(run: NextRun) -> tuple[str, bool, Level]:
    return run.directory, run.is_new, run.level


def test_first_run() -> None:
    for policy, name in ((MONTHLY, "2026-01"), (WEEKLY, "2026-W05"), (NEVER, "2026-01-31")):
        found = next_run(policy, [], at("2026-01-31 23:59:59"))
        assert place(found) == (name, True, Level.FULL)
        assert found.reason == "there is no set yet"
        assert is_set_name(name)
        assert is_set_name(f"{name}.12")


@pytest.mark.parametrize(
    ("policy", "began", "now", "wanted"),
    [
        # months turn at local midnight, whatever UTC says
        (MONTHLY, "2026-01-01 00:00:00", "2026-01-31 23:59:59", ""),
        (MONTHLY, "2026-01-31 23:59:59", "2026-02-01 00:00:00", "2026-02"),
        (MONTHLY, "2025-12-31 02:00", "2026-01-01 02:00", "2026-01"),
        (MONTHLY, "2025-01-15 02:00", "2026-01-15 02:00", "2026-01"),
        # ISO weeks begin on Monday; 2026 begins in the middle of its first one
        (WEEKLY, "2025-12-28 02:00", "2025-12-29 02:00", "2026-W01"),
        (WEEKLY, "2025-12-29 02:00", "2026-01-04 23:59", ""),
        (WEEKLY, "2026-01-04 23:59", "2026-01-05 00:00", "2026-W02"),
        # 2026 has 53 weeks, the last one ends in 2027
        (WEEKLY, "2026-12-28 02:00", "2027-01-03 02:00", ""),
        (WEEKLY, "2027-01-03 02:00", "2027-01-04 02:00", "2027-W01"),
        # the same week number, a year later
        (WEEKLY, "2025-11-20 02:00", "2026-11-19 02:00", "2026-W47"),
        (NEVER, "2019-01-01 02:00", "2026-11-21 02:00", ""),
    ],
)
def test_turns(policy: LevelPolicy, began: str, now: str, wanted: str) -> None:
    found = next_run(policy, [facts("old", began)], at(now))
    assert place(found) == ((wanted, True, Level.FULL) if wanted else ("old", False, Level.INC))
    assert ("has begun" in found.reason) == bool(wanted)


@pytest.mark.parametrize(
    ("began", "now", "is_due"),
    [
        # some seconds earlier than a week ago
        ("2026-11-14 02:00:07", "2026-11-21 02:00:01", True),
        ("2026-11-15 00:00:01", "2026-11-21 23:59:59", False),
        # the hour of October 25 that comes twice, and that of March 29 that never comes
        ("2026-10-20 02:30", "2026-10-26 02:30", False),
        ("2026-10-20 02:30", "2026-10-27 02:29", True),
        ("2026-03-25 02:30", "2026-03-31 23:59", False),
        ("2026-03-25 23:59", "2026-04-01 00:00", True),
        ("2024-02-27 02:00", "2024-03-05 02:00", True),
        ("2024-02-28 02:00", "2024-03-05 02:00", False),
    ],
)
def test_ages_count_in_local_days(began: str, now: str, *, is_due: bool) -> None:
    policy = LevelPolicy(rotate=Rotate.NEVER, full_every=7)
    found = next_run(policy, [facts("2026-01-01", began)], at(now))
    assert found.is_new == is_due
    assert found.level is (Level.FULL if is_due else Level.INC)


def test_the_hour_that_comes_twice_keeps_its_order() -> None:
    first = SetFacts(name="z-first", began=at("2026-10-25 02:40"))
    second = SetFacts(name="a-second", began=at("2026-10-25 02:20").replace(fold=1))
    found = next_run(NEVER, [first, second], at("2026-10-25 02:25").replace(fold=1))
    assert place(found) == ("a-second", False, Level.INC)


def test_a_length_is_a_limit() -> None:
    policy = LevelPolicy(rotate=Rotate.MONTHLY, max_increments=3)
    for increments, wanted in ((2, ("2026-11", False)), (3, ("2026-11.2", True))):
        sets = [facts("2026-11", "2026-11-02 02:00", increments)]
        found = next_run(policy, sets, at("2026-11-21 02:00"))
        assert (found.directory, found.is_new) == wanted
    none = LevelPolicy(rotate=Rotate.NEVER, max_increments=0)
    found = next_run(none, [facts("2026-11-21", "2026-11-21 01:00")], at("2026-11-21 02:00"))
    assert place(found) == ("2026-11-21.2", True, Level.FULL)


def test_a_name_is_never_taken_twice() -> None:
    sets = [
        facts("2026-11", "2026-11-01 02:00", problem="its full is damaged"),
        facts("2026-11.2", "2026-11-02 02:00", problem="is of another domain"),
    ]
    found = next_run(MONTHLY, sets, at("2026-11-03 02:00"), taken=("2026-11.3", "notes"))
    assert place(found) == ("2026-11.4", True, Level.FULL)
    assert found.reason == "set 2026-11.2 can't be continued: is of another domain"


def test_a_set_without_a_full_is_used_again() -> None:
    empty = SetFacts(name="2026-12")
    old = facts("2026-11", "2026-11-01 02:00")
    now = at("2026-12-01 02:00")
    assert place(next_run(MONTHLY, [old, empty], now)) == ("2026-12", True, Level.FULL)
    assert place(next_run(MONTHLY, [empty], now)) == ("2026-12", True, Level.FULL)
    full = next_run(MONTHLY, [empty], now, wanted=Level.FULL)
    assert place(full) == ("2026-12", True, Level.FULL)
    bad = SetFacts(name="2026-12", problem="no manifest can be read")
    assert place(next_run(MONTHLY, [old, bad], now)) == ("2026-12.2", True, Level.FULL)


def test_a_clock_that_was_wrong() -> None:
    future = facts("2036-01", "2036-01-01 02:00")
    current = facts("2026-11", "2026-11-02 02:00")
    now = at("2026-11-21 02:00")
    assert place(next_run(MONTHLY, [future, current], now)) == ("2026-11", False, Level.INC)
    assert place(next_run(MONTHLY, [future], now)) == ("2026-11", True, Level.FULL)
    # a clock that is set back by seconds makes no new set, not even over the turn of a month
    for policy in (MONTHLY, WEEKLY, LevelPolicy(rotate=Rotate.NEVER, full_every=1)):
        just = facts("2027-02", "2027-02-01 00:00:01")
        found = next_run(policy, [just], at("2027-01-31 23:59:58"))
        assert place(found) == ("2027-02", False, Level.INC)


def test_levels_that_are_asked_for() -> None:
    sets = [facts("2026-10", "2026-10-05 02:00"), facts("2026-09", "2026-09-05 02:00")]
    now = at("2026-11-21 02:00")
    for level in (Level.INC, Level.DIFF, Level.COPY):
        assert place(next_run(MONTHLY, sets, now, wanted=level)) == ("2026-10", False, level)
    assert place(next_run(MONTHLY, sets, now, wanted=Level.FULL)) == ("2026-11", True, Level.FULL)
    assert place(next_run(MONTHLY, [], now, wanted=Level.COPY)) == ("2026-11", True, Level.COPY)
    for bad in ([], [facts("2026-10", "2026-10-05 02:00", problem="damaged")]):
        for level in (Level.INC, Level.DIFF):
            with pytest.raises(NoFullError, match="needs a full first"):
                next_run(MONTHLY, bad, now, wanted=level)


@given(st.dates(date(1990, 1, 1), date(2100, 1, 1)), st.integers(0, 800))
def test_periods_sort_by_time(day: date, later: int) -> None:
    first = datetime(day.year, day.month, day.day, tzinfo=UTC)
    second = first + timedelta(days=later)
    for rotate in Rotate:
        texts = period(rotate, first), period(rotate, second)
        assert list(texts) == sorted(texts)
        assert is_set_name(texts[0])


@given(
    st.sampled_from(list(Rotate)),
    st.none() | st.integers(1, 40),
    st.none() | st.integers(0, 9),
    st.lists(st.integers(0, 5000), min_size=1, max_size=60),
)
def test_a_history_keeps_the_policy(
    rotate: Rotate, full_every: int | None, most: int | None, minutes: list[int]
) -> None:
    """Run after run, each set stays within one period, age and length; names stay unique."""
    policy = LevelPolicy(rotate=rotate, full_every=full_every, max_increments=most)
    moment = datetime(2026, 12, 20, 23, 0, tzinfo=UTC)
    sets: dict[str, list[datetime]] = {}
    for each in minutes:
        moment += timedelta(minutes=each)
        now = moment.astimezone(BERLIN)
        known = [
            SetFacts(name=name, began=times[0], increments=len(times) - 1)
            for name, times in sets.items()
        ]
        found = next_run(policy, known, now)
        assert found.is_new == (found.directory not in sets)
        sets.setdefault(found.directory, []).append(now)
    for times in sets.values():
        assert most is None or len(times) <= most + 1
        assert full_every is None or (times[-1].date() - times[0].date()).days < full_every
        if rotate is not Rotate.NEVER:
            assert len({period(rotate, each) for each in times}) == 1
    for earlier, later in zip(list(sets.values()), list(sets.values())[1:], strict=False):
        assert earlier[-1] <= later[0]
        # no set begins without a reason
        turned = rotate is not Rotate.NEVER and period(rotate, earlier[0]) != period(
            rotate, later[0]
        )
        old = full_every is not None and (later[0].date() - earlier[0].date()).days >= full_every
        assert turned or old or (most is not None and len(earlier) == most + 1)


def test_of_two_sets_of_one_second_the_later_name_is_the_newer() -> None:
    began = datetime(2026, 1, 5, 12, tzinfo=UTC)
    names = ("2026-01.10", "2026-01", "2026-01.2")
    found = [SetFacts(name=name, began=began) for name in names]
    for sets in (found, found[::-1]):
        assert next_run(LevelPolicy(), sets, began).directory == "2026-01.10"
