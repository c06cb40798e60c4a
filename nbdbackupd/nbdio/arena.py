"""Buffers for asynchronous requests, allocated once and shared by all disks of a run.

libnbd's Python binding (measured with 1.14) never drops its reference to the buffer of an
``aio_pread`` or ``aio_pwrite``: a fresh ``nbd.Buffer`` for each request leaks 190 bytes and pins
the memory behind it. So there is one arena, and one ``nbd.Buffer`` for each slot and length.
"""

import mmap
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import nbd


class Arena:
    """``count`` slots of ``block`` bytes; memory grows by what is really touched.

    Several copies may share it. ``free`` are the slots that none has; ``working`` is how many
    threads of all copies are at work, and changes under ``lock`` alone.
    """

    def __init__(self, count: int, block: int) -> None:
        """Reserve the address space."""
        self.count = count
        self.block = block
        self.lock = threading.Lock()
        self.free = deque(range(count))
        self.working = 0
        self._turns: list[threading.Condition] = []
        memory = mmap.mmap(-1, count * block)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self._whole = memoryview(memory)
        self._buffers: dict[tuple[int, int, int], nbd.Buffer] = {}

    @property
    def share(self) -> int:
        """So many slots each of the copies may have that share them now."""
        return max(1, self.count // max(1, len(self._turns)))

    @contextmanager
    def turn(self) -> Iterator[threading.Condition]:
        """For one copy: what its threads wait on, with ``lock``."""
        with self.lock:
            self._turns.append(turn := threading.Condition(self.lock))
        try:
            yield turn
        finally:
            with self.lock:
                self._turns.remove(turn)
                self.wake()

    def wake(self) -> None:
        """Something is free again: one thread of each copy looks; to be called with ``lock``."""
        for each in self._turns:
            each.notify()

    def view(self, slot: int, length: int, start: int = 0) -> memoryview:
        """``length`` bytes of a slot, from ``start`` on."""
        begin = slot * self.block + start
        return self._whole[begin : begin + length]

    def buffer(self, slot: int, length: int, start: int = 0) -> "nbd.Buffer":
        """The same bytes as libnbd wants them."""
        key = (slot, length, start)
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = nbd.Buffer.from_buffer(self.view(*key))
        return buffer
