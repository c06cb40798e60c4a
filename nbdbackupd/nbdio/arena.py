"""Buffers for asynchronous requests, allocated once and used for every disk of a run.

libnbd's Python binding (measured with 1.14) never drops its reference to the buffer of an
``aio_pread`` or ``aio_pwrite``: a fresh ``nbd.Buffer`` for each request leaks 190 bytes and pins
the memory behind it. So there is one arena, and one ``nbd.Buffer`` for each slot and length.
"""

import mmap

import nbd


class Arena:
    """``count`` slots of ``block`` bytes; memory grows by what is really touched."""

    def __init__(self, count: int, block: int) -> None:
        """Reserve the address space."""
        self.count = count
        self.block = block
        memory = mmap.mmap(-1, count * block)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self._whole = memoryview(memory)
        self._buffers: dict[tuple[int, int, int], nbd.Buffer] = {}

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
