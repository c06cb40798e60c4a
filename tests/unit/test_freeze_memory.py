"""F-45: how long an agent is left alone that did not answer a freeze (G-2)."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nbdbackupd.model.freeze_memory import FreezeMemory, after
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.units import local_time

NOW = datetime(2026, 1, 31, 2, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("count", "hours"), [(1, 36), (2, 72), (3, 144), (4, 288), (5, 288), (10**9, 288), (0, 36)]
)
def test_longer_each_time_up_to_a_limit(count: int, hours: int) -> None:
    memory = FreezeMemory(count, NOW)
    assert memory.until - NOW == timedelta(hours=hours)
    assert f"the freeze of {local_time(NOW)}; " in memory.obstacle(NOW)
    assert f"from {local_time(memory.until)} on" in memory.obstacle(NOW)
    assert memory.obstacle(memory.until - timedelta(seconds=1))
    assert not memory.obstacle(memory.until)


def test_its_words_are_for_people_and_for_each_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of this host's zone; 'run' has no option --freeze, only the setting."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        text = FreezeMemory(1, NOW).obstacle(NOW)
    time.tzset()
    assert "the freeze of 2026-01-31 03:00:00 CET" in text
    assert "from 2026-02-01 15:00:00 CET on" in text
    assert "UTC" not in text
    assert "freeze.policy 'require'" in text


def test_a_clock_that_was_put_back_does_not_lengthen_it() -> None:
    assert not FreezeMemory(1, NOW).obstacle(NOW - timedelta(days=400))


def test_an_answer_ends_it() -> None:
    once = after(None, NOW, is_unanswered=True)
    assert once == FreezeMemory(1, NOW)
    assert after(once, NOW, is_unanswered=True) == FreezeMemory(2, NOW)
    assert after(once, NOW, is_unanswered=False) is None


def test_a_guest_that_was_started_anew_is_asked() -> None:
    memory = after(FreezeMemory(1, NOW, "boot 1"), NOW, is_unanswered=True, instance="boot 2")
    assert memory == FreezeMemory(2, NOW, "boot 2")
    assert memory.obstacle(NOW, "boot 2")
    assert not memory.obstacle(NOW, "boot 3")
    # what is not known is no reason to ask
    assert memory.obstacle(NOW, "")
    assert FreezeMemory(2, NOW).obstacle(NOW, "boot 3")


def test_a_memory_of_an_older_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "freeze").write_text(
        '{"version": 1, "count": 2, "last": "2026-01-31T02:00:00+00:00"}'
    )
    assert StateDirectory(tmp_path).freeze_memory("u") == FreezeMemory(2, NOW)


def test_kept_in_the_state_directory(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    assert state.freeze_memory("u") is None
    state.remember_freeze("u", FreezeMemory(3, NOW, "boot 1"))
    assert StateDirectory(tmp_path).freeze_memory("u") == FreezeMemory(3, NOW, "boot 1")
    assert state.freeze_memory("other") is None
    # it is no record of a chain
    assert state.records("u") == ()
    state.remember_freeze("u", None)
    state.remember_freeze("u", None)
    assert state.freeze_memory("u") is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"count": "1", "last": "x"}', '{"count": 1, "last": "2026-01-31T02:00:00"}'],
)
def test_what_cant_be_read_is_no_obstacle(tmp_path: Path, text: str) -> None:
    state = StateDirectory(tmp_path)
    state.remember_freeze("u", FreezeMemory(1, NOW))
    (tmp_path / "u" / "freeze").write_text(text)
    assert state.freeze_memory("u") is None
