"""A block device that a restore fills in place.

There is no name that could come last, as a file's does. So the beginning comes last: until all the
rest is on the device, its first MiB holds a text that says so, in place of boot sector, partition
table, superblock or image header. Whatever ends the restore, nobody takes the device for a disk.

What it held before is no hole: zeroes are really written, or the device is told to zero.
"""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nbdbackupd.errors import BusyError, NoSpaceError, RepositoryError

HEAD: Final = 1 << 20
"""GPT, ext4, XFS, btrfs, LVM and NTFS all have what they are found by in here."""

BLKZEROOUT: Final = 0x127F
"""linux/fs.h; the device zeroes by itself if it can, else the kernel writes zeroes."""

GRAIN: Final = 64 << 10
"""Only whole ones are zeroed by the device. The kernel throws away what it has cached of the range,
and with pages that are shared with data just written that would be a race."""

STEP: Final = 64 << 20
"""Bytes zeroed in one call, which no signal ends."""

NO_ZEROES: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY})
LOCKED: Final = frozenset({errno.EAGAIN, errno.EACCES})
FLOCK: Final = struct.Struct("hhqqi4x")
QEMU_LOCKS: Final = ((100, 64), (200, 64))
"""The bytes of an image that QEMU locks, and their number (block/file-posix.c: what it uses, and
what it does not share); our lock on all of them excludes it."""


class Device:
    """An open block device; made by ``claimed``. ``size`` in bytes."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self._head = bytearray()
        self.is_begun = False

    def begin(self, text: str, head: int = HEAD) -> None:
        """Replace the first ``head`` bytes by ``text``, durably: the device is incomplete now.

        Raises OSError.
        """
        self.is_begun = True
        self._head = bytearray(min(head, self.size))
        marker = f"nbdbackup: this disk is incomplete. {text}\n".encode(errors="replace")
        self._put(memoryview(marker[: len(self._head)].ljust(len(self._head), b"\0")), 0)
        os.fsync(self.fd)

    def put(self, view: memoryview, offset: int) -> None:
        """Write bytes; those of the head are kept for ``finish``. Raises OSError."""
        if offset < len(self._head):
            length = min(len(view), len(self._head) - offset)
            self._head[offset : offset + length] = view[:length]
            view, offset = view[length:], offset + length
        self._put(view, offset)

    def zero(self, offset: int, length: int, check: Callable[[], None]) -> None:
        """Make a range read as zeroes; ``check`` is called now and then and may raise.

        Raises OSError.
        """
        end = offset + length
        if offset < len(self._head):
            low = min(end, len(self._head))
            self._head[offset:low] = bytes(low - offset)
            offset = low
        first, last = -(-offset // GRAIN) * GRAIN, end // GRAIN * GRAIN
        if first >= last:
            self._put(memoryview(bytes(max(0, end - offset))), offset)
            return
        self._put(memoryview(bytes(first - offset)), offset)
        for start in range(first, last, STEP):
            check()
            self._zero_out(start, min(STEP, last - start), check)
        self._put(memoryview(bytes(end - last)), last)

    def _zero_out(self, offset: int, length: int, check: Callable[[], None]) -> None:
        try:
            fcntl.ioctl(self.fd, BLKZEROOUT, struct.pack("QQ", offset, length))
        except OSError as err:
            if err.errno not in NO_ZEROES:
                raise
            empty = memoryview(bytes(min(length, HEAD)))
            for start in range(0, length, HEAD):
                check()
                self._put(empty[: min(HEAD, length - start)], offset + start)

    def finish(self) -> None:
        """Write the head, durably, when everything else is: the device is complete.

        Raises OSError.
        """
        os.fsync(self.fd)
        self._put(memoryview(self._head), 0)
        os.fsync(self.fd)
        self.is_begun = False

    def _put(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self.fd, view, offset)
            view = view[count:]
            offset += count


@contextmanager
def claimed(path: Path, size: int) -> Iterator[Device]:
    """Open a block device of at least ``size`` bytes, which nobody else uses, for writing.

    Raises BusyError if it is mounted, part of something else, or open in a QEMU; RepositoryError
    if it is no block device, NoSpaceError if it is too small, OSError.
    """
    try:
        # O_EXCL: the kernel refuses what is mounted, or below RAID, LVM or another claim
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        if err.errno == errno.EBUSY:
            raise BusyError(
                f"{path} is in use (mounted, swap, or part of another device): free it first"
            ) from err
        raise
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise RepositoryError(f"{path} is no block device")
        lock_like_qemu(fd, path)
        device = Device(path, fd)
        if device.size < size:
            raise NoSpaceError(
                f"{path} has {device.size} bytes, and the disk needs {size}: give a larger device"
            )
        yield device
    finally:
        os.close(fd)


def lock_like_qemu(fd: int, path: Path) -> None:
    """Keep every QEMU away from an image as long as ``fd`` is open.

    Raises BusyError if one has it open. A file system without such locks lets everything pass.
    """
    for start, length in QEMU_LOCKS:
        wanted = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
        except OSError as err:
            if err.errno in LOCKED:
                raise BusyError(f"{path} is in use by another program: end it first") from err
            if err.errno not in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
