"""model/choice.py: which point is meant, in one set and among several."""

from dataclasses import replace
from datetime import datetime

import pytest

from nbdbackupd.errors import RepositoryError, UsageError
from nbdbackupd.model.chain import BackupSet
from nbdbackupd.model.choice import NEWEST, Choice
from tests.lib import points

AT = "2026-03-01T{}:00:00+00:00"


def made(*hours: str, first: str = "a") -> BackupSet:
    """A point for each hour, ``a1``, ``a2``, …; the clock may have gone back between them."""
    return BackupSet(
        tuple(
            replace(
                points.full_point(f"{first}{number}"), sequence=number, created=AT.format(hour),
                checkpoint=f"cp-{first}{number}",
            )
            for number, hour in enumerate(hours, 1)
        )
    )  # fmt: skip


def at(hour: str) -> Choice:
    return Choice(at=datetime.fromisoformat(AT.format(hour)))


def test_in_one_set() -> None:
    known = made("03", "05", "04")
    for choice, ident in (
        (NEWEST, "a3"),
        (Choice(point="latest"), "a3"),
        (Choice(point="a1"), "a1"),
        (Choice(until="cp-a2"), "a2"),
        (at("06"), "a2"),
        (at("04"), "a3"),
        (at("03"), "a1"),
    ):
        assert choice.find(known).id == ident, choice
        assert choice.is_named == (choice.point == "a1" or choice.until != "")


def test_among_sets_the_last_that_has_it() -> None:
    older, newer = made("03", "09"), made("05", "06", first="b")
    assert NEWEST.find(older, newer).id == "b2"
    assert NEWEST.find(older, made()).id == "a2"
    assert at("10").find(older, newer).id == "b2"
    assert at("04").find(older, newer).id == "a1"
    assert Choice(point="a2").find(older, newer).id == "a2"


def test_what_is_not_there() -> None:
    known = made("03", "05")
    for choice, why in (
        (Choice(point="a"), "more than one restore point with id 'a'; 'nbdbackupctl list'"),
        (Choice(point="x"), "no restore point with id 'x'; 'nbdbackupctl list' shows"),
        (Choice(until="x"), "no restore point made checkpoint 'x'; 'nbdbackupctl list' shows"),
        (at("02"), "no restore point is as old as 2026-03-01 .*; 'nbdbackupctl list' shows"),
    ):
        with pytest.raises(RepositoryError, match=why):
            choice.find(known)
    with pytest.raises(RepositoryError, match="no restore point;"):
        NEWEST.find(made())
    with pytest.raises(UsageError, match="only one of"):
        Choice(point="a1", until="cp-a1").find(known)
