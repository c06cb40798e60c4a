"""Sizes and times as people read them."""

import argparse
import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from nbdbackupd.app import arguments
from nbdbackupd.units import local_time


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_times_are_local_and_name_their_zone() -> None:
    """W-9: one clock for people, in lists, ids' neighbours and messages alike."""
    assert local_time("2026-01-31T23:59:59Z") == "2026-02-01 00:59:59 CET"
    assert local_time("2026-07-01T10:00:00Z") == "2026-07-01 12:00:00 CEST"
    assert local_time(datetime.fromisoformat("2026-07-01T10:00:00+02:00")).endswith("10:00:00 CEST")
    assert local_time("no time\x1b") == "no time\x1b"


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59Z", "0001-01-01T00:00:00+14:00"])
def test_the_calendar_ends(text: str) -> None:
    """Each is a time, and none here: a set may say it, and so may somebody who looks for one."""
    assert local_time(text) == text
    with pytest.raises(argparse.ArgumentTypeError, match="not a time"):
        arguments.moment(text)
