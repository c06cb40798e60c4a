"""What a guest without an operating system does with its disks: a driver of virtio-blk.

Requests go through a virtqueue and are carried out by the disk device, in its iothread if it has
one.  Bitmaps, backup jobs and throttling see them.  (``qemu-io -d`` of the human monitor aborts
QEMU 7.2 where the disk is in an iothread.)

Source: Virtual I/O Device (VIRTIO) 1.1, 5.2.
"""

import struct
from typing import Final

from tests.lab.command import LabError
from tests.lab.virtio import DATA, DEVICE_WRITES, VirtioDevice

MAX_BYTES: Final = 16 << 20
"""The most that one request carries; it has to lie in the guest's memory."""
SECTOR: Final = 512
DISCARD_FEATURE, ZEROES_FEATURE = 1 << 13, 1 << 14
# VIRTIO_BLK_T_*
WRITE, DISCARD, WRITE_ZEROES = 1, 11, 13
UNMAP: Final = 1
HEADER_BYTES: Final = 16
SAID: Final = {1: "failed: input/output error", 2: "failed: not supported"}


class VirtioBlock:
    """One disk, made ready when needed; a request is waited for at once."""

    def __init__(self, device: VirtioDevice) -> None:
        """Drive a device."""
        self._device = device
        self._ring = device.ring(0)

    def write(self, offset: int, data: bytes | int, length: int) -> None:
        """Write data, or ``length`` times one value."""
        if isinstance(data, int):
            self._device.qtest.fill(DATA, length, data)
        else:
            self._device.qtest.write(DATA, data)
        self._request(WRITE, offset // SECTOR, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Send a write-zeroes request, with or without leave to deallocate."""
        self._range(WRITE_ZEROES, offset, length, UNMAP if unmap else 0)

    def discard(self, offset: int, length: int) -> None:
        """Send a discard request."""
        self._range(DISCARD, offset, length, 0)

    def _range(self, kind: int, offset: int, length: int, flags: int) -> None:
        segment = struct.pack("<QII", offset // SECTOR, length // SECTOR, flags)
        self._device.qtest.write(DATA, segment)
        self._request(kind, 0, len(segment))

    def _request(self, kind: int, sector: int, length: int) -> None:
        """Make the data at ``DATA`` the body of a request and wait for it; raises ``LabError``."""
        if not self._device.is_ready:
            self._device.make_ready(DISCARD_FEATURE | ZEROES_FEATURE, [0])
        header = self._ring.buffers
        status = header + HEADER_BYTES
        head = struct.pack("<IIQ", kind, 0, sector)
        self._device.qtest.write(header, head + b"\xff")
        body = (DATA, length, 0)
        made = self._ring.offer([(header, HEADER_BYTES, 0), body, (status, 1, DEVICE_WRITES)])
        self._device.notify(0)
        self._ring.wait(made)
        (found,) = self._device.qtest.read(status, 1)
        if found:
            raise LabError(SAID.get(found, f"failed: status {found}"))
