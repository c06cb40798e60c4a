"""Threads with one fate."""

import functools
import threading
import time

import pytest

from nbdbackupd.threads import Threads


def never() -> None:
    """Nothing cancels."""


def wait_for_the_others(threads: Threads) -> None:
    while True:
        threads.check()
        time.sleep(0.01)


def test_all_bodies_run() -> None:
    ran: list[int] = []
    Threads(never).run({f"t{number}": functools.partial(ran.append, number) for number in range(5)})
    assert sorted(ran) == [0, 1, 2, 3, 4]


def test_first_error_ends_all() -> None:
    threads = Threads(never)

    def fail() -> None:
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        threads.run({"waits": lambda: wait_for_the_others(threads), "fails": fail})


def test_cancelling_ends_all() -> None:
    begun = time.monotonic()

    def cancelled() -> None:
        if time.monotonic() - begun > 0.2:
            raise KeyboardInterrupt

    threads = Threads(cancelled)
    with pytest.raises(KeyboardInterrupt):
        threads.run({"one": lambda: wait_for_the_others(threads)})


def test_a_thread_that_cannot_start_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    threads = Threads(never)
    before = threading.active_count()

    def limited(thread: threading.Thread) -> None:
        if thread.name == "two":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start"):
        threads.run(
            {name: lambda: wait_for_the_others(threads) for name in ("one", "two", "three")}
        )
    assert threading.active_count() == before
