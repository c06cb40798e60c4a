"""libvirt's event loop, in a thread of its own for as long as a connection is open.

Both the embedded driver (which refuses to open without a registered loop) and keepalive need
it. Measured with libvirt 9.0.0: the implementation can be registered once per process, before
the first open; the loop may be stopped and run again later.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import libvirt

STOP_TIMEOUT_SECONDS: Final = 5.0
ERROR_PAUSE_SECONDS: Final = 0.1
DISABLED: Final = -1


class _Loop:
    """The thread and the number of those who need it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._is_registered = False
        self._timer = DISABLED
        self._stop = threading.Event()
        self._thread = threading.Thread()

    def acquire(self) -> None:
        with self._lock:
            if not self._is_registered:
                libvirt.virEventRegisterDefaultImpl()
                self._is_registered = True
            if self._users == 0:
                self._start()
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._end()

    def _start(self) -> None:
        self._stop = threading.Event()
        # a timer that never fires by itself; changing it is what wakes the loop up
        self._timer = libvirt.virEventAddTimeout(DISABLED, _ignore, None)
        self._thread = threading.Thread(
            target=_run, args=(self._stop,), name="libvirt-events", daemon=True
        )
        self._thread.start()

    def _end(self) -> None:
        self._stop.set()
        libvirt.virEventUpdateTimeout(self._timer, 0)
        self._thread.join(STOP_TIMEOUT_SECONDS)
        libvirt.virEventRemoveTimeout(self._timer)


def _run(stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:
            stop.wait(ERROR_PAUSE_SECONDS)


def _ignore(_timer: int, _data: object) -> None:
    """Do nothing: the loop has been woken up, that is all."""


_LOOP = _Loop()


@contextmanager
def running() -> Iterator[None]:
    """Keep the loop running while the body runs; nests and may be used from several threads."""
    _LOOP.acquire()
    try:
        yield
    finally:
        _LOOP.release()
