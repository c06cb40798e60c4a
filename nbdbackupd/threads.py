"""Some threads that do one job together: the first error ends all of them and is raised."""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from nbdbackupd import log

J = TypeVar("J")
R = TypeVar("R")

TICK_SECONDS: Final = 0.1
"""How often the starting thread looks at the cancel callback."""


class _StoppedError(Exception):
    """Another thread failed; this one just ends."""


class Threads:
    """Threads with one fate; made for one ``run``."""

    def __init__(self, cancelled: Callable[[], None]) -> None:
        """``cancelled`` raises to end the job; it is called in the starting thread alone."""
        self._cancelled = cancelled
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def check(self) -> None:
        """To be called by the threads between two steps and while they wait; may raise."""
        if self._stop.is_set():
            raise _StoppedError

    def run(self, bodies: Mapping[str, Callable[[], None]]) -> None:
        """Run each body in a thread of that name and wait for all.

        Raises the first error of a thread or of ``cancelled``.
        """
        threads = [
            threading.Thread(name=name, target=log.carried(self._guarded), args=(body,))
            for name, body in bodies.items()
        ]
        started = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
        except BaseException as err:  # noqa: BLE001 - raised again below
            # no more threads (a limit of the host): those that run must not go on alone
            self._fail(err)
        for thread in started:
            while thread.is_alive():
                thread.join(TICK_SECONDS)
                if not self._stop.is_set():
                    self._guarded(self._cancelled)
        if self._failure is not None:
            raise self._failure

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except _StoppedError as err:
            # not ours: this is one of some threads that were stopped
            if not self._stop.is_set():
                self._fail(err)
        except BaseException as err:  # noqa: BLE001 - raised again by run()
            self._fail(err)

    def _fail(self, err: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = err
        self._stop.set()


def side_by_side(
    jobs: Sequence[J],
    count: int,
    work: Callable[[J, Callable[[], None]], R],
    cancelled: Callable[[], None],
) -> list[R]:
    """``work(job, check)`` for each job, begun in turn, ``count`` at a time; their results.

    ``check`` is what the work has to call between its steps. Raises as ``Threads.run``.
    """
    if min(count, len(jobs)) <= 1:
        return [work(job, cancelled) for job in jobs]
    waiting = deque(enumerate(jobs))
    done: dict[int, R] = {}
    threads = Threads(cancelled)

    def body() -> None:
        while True:
            try:
                place, job = waiting.popleft()
            except IndexError:
                return
            done[place] = work(job, threads.check)

    threads.run({f"job-{number}": body for number in range(min(count, len(jobs)))})
    return [done[place] for place in range(len(jobs))]
