"""Some threads that do one job together: the first error ends all of them and is raised."""

import threading
from collections.abc import Callable, Mapping
from typing import Final

from nbdbackupd import log

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
        except _StoppedError:
            pass
        except BaseException as err:  # noqa: BLE001 - raised again by run()
            self._fail(err)

    def _fail(self, err: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = err
        self._stop.set()
