"""Threads with one fate."""

import functools
import threading
import time
from collections.abc import Callable

import pytest

from nbdbackupd.threads import Threads, side_by_side


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


def test_the_stop_of_outer_threads_ends_inner_ones() -> None:
    """Once, an inner group took it for its own, and went on to its end."""
    outer = Threads(never)
    inner_runs = threading.Event()

    def nested() -> None:
        inner = Threads(outer.check)

        def wait() -> None:
            inner_runs.set()
            wait_for_the_others(inner)

        inner.run({"inner": wait})

    def fail() -> None:
        assert inner_runs.wait(10)
        raise ValueError("first")

    before = threading.active_count()
    with pytest.raises(ValueError, match="first"):
        outer.run({"nested": nested, "fails": fail})
    assert threading.active_count() == before


@pytest.mark.parametrize("count", [1, 3, 20])
def test_jobs_side_by_side(count: int) -> None:
    going, most = [0], [0]
    lock = threading.Lock()

    def work(job: int, check: Callable[[], None]) -> int:
        with lock:
            going[0] += 1
            most[0] = max(most[0], going[0])
        time.sleep(0.02)
        check()
        with lock:
            going[0] -= 1
        return job * job

    jobs = range(10)
    assert side_by_side(jobs, count, work, never) == [job * job for job in jobs]
    assert most[0] <= count
    assert side_by_side([], count, work, never) == []


def test_one_of_several_jobs_fails() -> None:
    begun: list[int] = []

    def work(job: int, check: Callable[[], None]) -> None:
        begun.append(job)
        if job == 1:
            raise ValueError("second")
        while True:
            check()
            time.sleep(0.01)

    with pytest.raises(ValueError, match="second"):
        side_by_side(range(10), 2, work, never)
    assert sorted(begun) == [0, 1]
