"""Filling a fresh qcow2 image without a server in between.

Every byte that goes through an NBD socket is copied twice more. A fresh image needs none of that:
it has no snapshots, no backing file and no other user, so where a cluster goes is ours to choose.
``qemu-img`` makes the image, and with it the header and its features; then its tables are laid
out anew, each as long as it could ever get, one after the other::

    header | refcount table | L1 table | refcount blocks | L2 tables | data

All but the data is mostly holes. Because the L2 tables and the refcount blocks lie side by side,
the entry of any cluster has a fixed place, and an entry that is written twice is the same both
times: threads need a lock only to give a chunk of the guest's disk its place. Chunks are placed in
the order in which they come, so that the file is not much longer than its data.

A block device gets the same layout. What it held before is no hole, so its tables and each chunk
are zeroed first, and its header comes last: until then nobody takes it for an image.

Source of the format: QEMU, docs/interop/qcow2.txt.
"""

import array
import errno
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from nbdbackupd.errors import FormatError

MAGIC: Final = b"QFI\xfb"
HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQI")
L1_OFFSET_AT: Final = 40
REFCOUNT_FIELDS_AT: Final = 48
COMPRESSION_TYPE: Final = 1 << 3
"""The one incompatible feature bit that changes nothing for clusters that are not compressed."""

REFCOUNT_ORDER: Final = 4
COPIED: Final = 1 << 63
"""Marks an entry whose cluster has a refcount of exactly one."""

CHUNK: Final = 2 << 20
ONE: Final = b"\0\1"
NOWHERE: Final = 0
GROUP: Final = 64
"""Chunks whose places are kept together: memory grows with the data, not with the disk's size."""


def can_fill(path: Path) -> bool:
    """Whether this image, fresh from qemu-img, is of the plain kind that ``Filler`` writes.

    Not so: extended L2 entries, refcounts of other than 16 bits, an external data file,
    encryption. Raises OSError.
    """
    with path.open("rb") as file:
        raw = file.read(HEADER.size)
    return len(raw) == HEADER.size and _is_plain(raw)


def _is_plain(raw: bytes) -> bool:
    head = HEADER.unpack(raw)
    magic, version, backing, crypt = head[0], head[1], head[2], head[6]
    if magic != MAGIC or version not in (2, 3) or backing or crypt:
        return False
    incompatible, order = head[13], head[16]
    return version == 2 or (not incompatible & ~COMPRESSION_TYPE and order == REFCOUNT_ORDER)


class Filler:
    """An image being filled; a context manager. ``write`` may be called from many threads."""

    def __init__(self, path: Path) -> None:
        """Take over an image that reads as zeroes and for which ``can_fill`` is true.

        Raises FormatError if it is of another kind, OSError.
        """
        if not can_fill(path):
            raise FormatError("not a fresh plain qcow2 image", file=path)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            with path.open("rb") as file:
                head = file.read(HEADER.size)
            self._lay_out(head)
            os.ftruncate(self._fd, self._cluster)  # keeps the header, whose extensions follow it
            os.ftruncate(self._fd, self._end)
            self._begin()
        except BaseException:
            os.close(self._fd)
            raise

    def _begin(self) -> None:
        self._put(L1_OFFSET_AT, struct.pack(">Q", self._l1_at))
        self._put(
            REFCOUNT_FIELDS_AT, struct.pack(">QI", self._table_at, self._table // self._cluster)
        )
        self._count(0, self._blocks_at // self._cluster)

    def _lay_out(self, header: bytes) -> None:
        head = HEADER.unpack(header)
        self._cluster = 1 << head[4]
        self._size: int = head[5]
        cluster = self._cluster
        self._chunk = max(CHUNK, cluster)
        chunks = -(-self._size // self._chunk)
        self._l2_entries = cluster // 8
        self._per_block = cluster // len(ONE)
        l2_tables = -(-self._size // (cluster * self._l2_entries))
        l1 = -(-8 * l2_tables // cluster)
        blocks = table = 1
        while True:  # the refcounts count themselves: grows to a fixed point
            total = 1 + table + l1 + blocks + l2_tables + chunks * (self._chunk // cluster)
            wanted = -(-total // self._per_block)
            if wanted <= blocks and -(-8 * blocks // cluster) <= table:
                break
            blocks = max(blocks, wanted)
            table = max(table, -(-8 * blocks // cluster))
        self._table_at = cluster
        self._l1_at = self._table_at + table * cluster
        self._blocks_at = self._l1_at + l1 * cluster
        self._l2_at = self._blocks_at + blocks * cluster
        self._data_at = self._end = self._l2_at + l2_tables * cluster
        self._lock = threading.Lock()
        self._places: dict[int, array.array[int]] = {}
        self._has_l2 = bytearray(l2_tables)
        self._has_block = bytearray(blocks)
        self._table = table * cluster

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def finish(self) -> None:
        """Make the file end with a whole chunk, and wait until it is on the device."""
        os.ftruncate(self._fd, self._end)
        os.fsync(self._fd)

    def write(self, view: memoryview, offset: int) -> None:
        """Write guest bytes at ``offset``; each guest byte at most once.

        Raises OSError, and ValueError beyond the image's end.
        """
        if offset + len(view) > self._size:
            raise ValueError("write beyond the end of the image")
        while view:
            number, within = divmod(offset, self._chunk)
            length = min(len(view), self._chunk - within)
            place = self._place(number) + within
            self._put(place, view[:length])
            self._map(offset, length, place)
            offset += length
            view = view[length:]

    def _place(self, number: int) -> int:
        """Where a chunk of the guest's disk lies in the file."""
        with self._lock:
            group, member = divmod(number, GROUP)
            places = self._places.get(group)
            if places is None:
                places = self._places[group] = array.array("Q", bytes(8 * GROUP))
            if places[member] == NOWHERE:
                left = -(-(self._size - number * self._chunk) // self._cluster) * self._cluster
                self._prepare(self._end, min(self._chunk, left))
                places[member] = self._end
                self._end += self._chunk
            return places[member]

    def _prepare(self, place: int, length: int) -> None:
        """Make a part of the file read as zeroes that is to be used; past a file's end it does."""

    def _map(self, offset: int, length: int, place: int) -> None:
        """Enter the clusters that hold the guest range into its L2 tables and the refcounts."""
        cluster = self._cluster
        first, last = offset // cluster, (offset + length - 1) // cluster
        host = place - offset % cluster
        count = last - first + 1
        entries = [COPIED | (host + number * cluster) for number in range(count)]
        self._put(self._l2_at + 8 * first, struct.pack(f">{count}Q", *entries))
        self._count(host // cluster, count)
        for table in range(first // self._l2_entries, last // self._l2_entries + 1):
            with self._lock:
                is_new, self._has_l2[table] = not self._has_l2[table], 1
            if is_new:
                at = self._l2_at + table * cluster
                self._put(self._l1_at + 8 * table, struct.pack(">Q", COPIED | at))
                self._count(at // cluster, 1)

    def _count(self, first: int, count: int) -> None:
        """Set the refcounts of clusters of the file to one, and see that their blocks exist."""
        self._put(self._blocks_at + len(ONE) * first, ONE * count)
        last = first + count - 1
        for block in range(first // self._per_block, last // self._per_block + 1):
            with self._lock:
                is_new, self._has_block[block] = not self._has_block[block], 1
            if is_new:
                at = self._blocks_at + block * self._cluster
                self._put(self._table_at + 8 * block, struct.pack(">Q", at))
                self._count(at // self._cluster, 1)

    def _put(self, place: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view, place)
            view = view[count:]
            place += count


class DeviceFiller(Filler):
    """A block device being filled as an image; ``head`` are its first bytes, for its owner."""

    def __init__(
        self, fd: int, template: Path, zero: Callable[[int, int], None], room: int
    ) -> None:
        """``fd`` is the device, open for writing, and stays the caller's.

        ``template`` is an empty image of the wanted options and size, for which ``can_fill`` is
        true. ``zero(offset, length)`` makes a part of the device read as zeroes; ``room`` is the
        device's size in bytes. Raises FormatError, OSError.
        """
        if not can_fill(template):
            raise FormatError("not a fresh plain qcow2 image", file=template)
        with template.open("rb") as file:
            header = file.read(HEADER.size)
            self._lay_out(header)
            file.seek(0)
            self.head = bytearray(file.read(self._cluster).ljust(self._cluster, b"\0"))
        self._fd = os.dup(fd)
        self._zero = zero
        self._room = room
        try:
            self._prepare(self._cluster, self._end - self._cluster)
            self._begin()
        except BaseException:
            os.close(self._fd)
            raise

    def finish(self) -> None:
        """Wait until all but ``head``, which the caller writes, is on the device."""
        os.fsync(self._fd)

    def _prepare(self, place: int, length: int) -> None:
        if place + length > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._zero(place, length)

    def _put(self, place: int, data: bytes | memoryview) -> None:
        if place >= self._cluster:
            super()._put(place, data)
            return
        self.head[place : place + len(data)] = data
