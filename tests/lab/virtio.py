"""What a guest without an operating system does with its virtio disks: a driver over qtest.

QEMU's qtest protocol (``-qtest unix:…``, which works beside any accelerator) lets the lab write
into the guest's memory and to its ports as if the guest's processor did it.  So this is a driver of
virtio-blk as a guest has one: requests go through a virtqueue and are carried out by the disk
device, in its iothread if it has one.  Bitmaps, backup jobs and throttling see them.

(``qemu-io -d`` of the human monitor aborts QEMU 7.2 where the disk is in an iothread.)

The processor has to leave memory and devices alone: ``HALT`` is a firmware that only halts it.
Nothing is remembered here but the connection: the state of the devices is in QEMU, that of the
rings in the guest's memory.  So a reset, or a start from saved state, needs no care.

Sources: Virtual I/O Device (VIRTIO) 1.1, 2.6 (split virtqueues), 4.1.4 (PCI, with
VIRTIO_PCI_CAP_PCI_CFG, which reaches all registers without a BAR), 5.2 (block device); QEMU's
``system/qtest.c`` for the protocol.
"""

import base64
import contextlib
import itertools
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.lab.command import LabError

HALT: Final = b"\xf4" * 0xFFF0 + b"\xfa\xf4\xeb\xfd".ljust(16, b"\xf4")
"""64 KiB of firmware: at the reset vector ``cli; 1: hlt; jmp 1b``."""

TIMEOUT_SECONDS: Final = 60.0
"""For one request; the disk may be throttled, or wait for a job."""
LINE_BYTES: Final = 16 << 10
"""What a line of qtest carries: QEMU takes time with the square of a line's length."""
SECTOR: Final = 512
MAX_BYTES: Final = 16 << 20
"""The most that one request carries; it has to lie in the guest's memory."""

# where things lie in the guest's memory, from 1 MiB: a ring for each slot of a bus, then data
RINGS: Final = 1 << 20
RING_STEP: Final = 1 << 16
DATA: Final = 8 << 20
# within a ring: descriptors, what is made available, what was used, header and status
AVAILABLE, USED, HEADER, STATUS = 0x1000, 0x2000, 0x3000, 0x3800
QUEUE_SIZE: Final = 64

# PCI
CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
COMMAND, CAPABILITIES, BRIDGE_BUSES = 0x04, 0x34, 0x18
BUS_MASTER: Final = 0x4
VENDOR_CAPABILITY: Final = 0x09

# VIRTIO_PCI_CAP_*, and offsets in the common configuration
COMMON, NOTIFY, WINDOW = 1, 2, 5
FEATURE_SELECT, FEATURES, DRIVER_SELECT, DRIVER_FEATURES = 0x00, 0x04, 0x08, 0x0C
DEVICE_STATUS, QUEUE_SELECT, QUEUE_LENGTH, QUEUE_ENABLE = 0x14, 0x16, 0x18, 0x1C
QUEUE_NOTIFY, QUEUE_DESCRIPTORS, QUEUE_AVAILABLE, QUEUE_USED = 0x1E, 0x20, 0x28, 0x30
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
VERSION_1: Final = 1 << 32
DISCARD_FEATURE, ZEROES_FEATURE = 1 << 13, 1 << 14

# VIRTIO_BLK_T_*
READ, WRITE, DISCARD, WRITE_ZEROES = 0, 1, 11, 13
UNMAP: Final = 1
NEXT, DEVICE_WRITES = 1, 2
SAID: Final = {1: "failed: input/output error", 2: "failed: not supported"}


class Qtest:
    """A connection to QEMU's qtest socket: memory and ports of the guest."""

    def __init__(self, path: Path) -> None:
        """Connect; raises ``LabError``."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_SECONDS)
        try:
            self._socket.connect(str(path))
        except OSError as err:
            self._socket.close()
            raise LabError(f"qtest {path}: {err}") from err
        self._lines = self._socket.makefile("rb")

    def close(self) -> None:
        """Disconnect; the guest goes on."""
        self._lines.close()
        self._socket.close()

    def ask(self, line: str) -> str:
        """Have a command carried out and return what comes after "OK"; raises ``LabError``."""
        try:
            self._socket.sendall(line.encode() + b"\n")
            reply = self._lines.readline().decode().strip()
        except OSError as err:
            raise LabError(f"qtest: {line[:40]}: {err}") from err
        word, _, rest = reply.partition(" ")
        if word != "OK":
            raise LabError(f"qtest: {line[:40]}: {reply or 'closed by QEMU'}")
        return rest

    def read(self, address: int, length: int) -> bytes:
        """Read the guest's memory."""
        return base64.b64decode(self.ask(f"b64read {address:#x} {length:#x}"))

    def write(self, address: int, data: bytes) -> None:
        """Write to the guest's memory."""
        for start in range(0, len(data), LINE_BYTES):
            piece = data[start : start + LINE_BYTES]
            text = base64.b64encode(piece).decode()
            self.ask(f"b64write {address + start:#x} {len(piece):#x} {text}")

    def fill(self, address: int, length: int, value: int) -> None:
        """Fill the guest's memory with one value."""
        self.ask(f"memset {address:#x} {length:#x} {value:#x}")


class PciDevice:
    """The configuration space of a device, by mechanism 1 (both kinds of machines have it)."""

    def __init__(self, qtest: Qtest, bus: int, slot: int, function: int) -> None:
        self._qtest = qtest
        self._place = 0x80000000 | bus << 16 | slot << 11 | function << 8

    def read(self, offset: int, width: int = 4) -> int:
        """Read a register of 1, 2 or 4 bytes."""
        letter = self._select(offset, width)
        return int(self._qtest.ask(f"in{letter} {CONFIG_DATA + offset % 4:#x}"), 16)

    def write(self, offset: int, value: int, width: int = 4) -> None:
        """Write a register of 1, 2 or 4 bytes."""
        letter = self._select(offset, width)
        self._qtest.ask(f"out{letter} {CONFIG_DATA + offset % 4:#x} {value:#x}")

    def _select(self, offset: int, width: int) -> str:
        self._qtest.ask(f"outl {CONFIG_ADDRESS:#x} {self._place | offset & ~3:#x}")
        return {1: "b", 2: "w", 4: "l"}[width]


class VirtioBlock:
    """One virtio-blk device, made ready when needed; a request is waited for at once."""

    def __init__(self, qtest: Qtest, device: PciDevice, ring: int) -> None:
        """Find the device's registers; ``ring`` is an address in the guest's memory."""
        self._qtest = qtest
        self._device = device
        self._ring = ring
        self._areas: dict[int, tuple[int, int]] = {}  # kind -> capability, offset of the area
        at = device.read(CAPABILITIES, 1)
        while at:
            if device.read(at, 1) == VENDOR_CAPABILITY:
                self._areas[device.read(at + 3, 1)] = (at, device.read(at + 8))
            at = device.read(at + 1, 1)
        if not self._areas.keys() >= {COMMON, NOTIFY, WINDOW}:
            raise LabError("no virtio device that knows VIRTIO_PCI_CAP_PCI_CFG")

    def write(self, offset: int, data: bytes | int, length: int) -> None:
        """Write data, or ``length`` times one value."""
        if isinstance(data, int):
            self._qtest.fill(DATA, length, data)
        else:
            self._qtest.write(DATA, data)
        self._request(WRITE, offset // SECTOR, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Send a write-zeroes request, with or without leave to deallocate."""
        self._range(WRITE_ZEROES, offset, length, UNMAP if unmap else 0)

    def discard(self, offset: int, length: int) -> None:
        """Send a discard request."""
        self._range(DISCARD, offset, length, 0)

    def _range(self, kind: int, offset: int, length: int, flags: int) -> None:
        segment = struct.pack("<QII", offset // SECTOR, length // SECTOR, flags)
        self._qtest.write(DATA, segment)
        self._request(kind, 0, len(segment))

    def _request(self, kind: int, sector: int, length: int) -> None:
        """Make the data at ``DATA`` the body of a request, and wait for its end."""
        if not self._get(COMMON, DEVICE_STATUS, 1) & DRIVER_OK:
            self._make_ready()
        ring = self._ring
        self._qtest.write(ring + HEADER, struct.pack("<IIQ", kind, 0, sector))
        self._qtest.write(ring + STATUS, b"\xff")
        chain = [
            (ring + HEADER, 16, NEXT, 1),
            (DATA, length, NEXT, 2),
            (ring + STATUS, 1, DEVICE_WRITES, 0),
        ]
        self._qtest.write(ring, b"".join(struct.pack("<QIHH", *each) for each in chain))
        (made,) = struct.unpack("<H", self._qtest.read(ring + AVAILABLE + 2, 2))
        self._qtest.write(ring + AVAILABLE + 4 + 2 * (made % QUEUE_SIZE), bytes(2))
        made = (made + 1) % (1 << 16)
        self._qtest.write(ring + AVAILABLE + 2, struct.pack("<H", made))
        self._set(NOTIFY, 0, 2, 0)
        self._wait(struct.pack("<H", made))

    def _wait(self, made: bytes) -> None:
        """Wait until the device has used what was made available; raises ``LabError``."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        for number in itertools.count():
            if self._qtest.read(self._ring + USED + 2, 2) == made:
                break
            if time.monotonic() > deadline:
                raise LabError(f"the disk has not answered within {TIMEOUT_SECONDS} s")
            # most requests are over after some turns
            time.sleep(0 if number < 10 else 0.001)
        (status,) = self._qtest.read(self._ring + STATUS, 1)
        if status:
            raise LabError(SAID.get(status, f"failed: status {status}"))

    def _make_ready(self) -> None:
        """Do what a driver does at its start (VIRTIO 1.1, 3.1.1)."""
        self._device.write(COMMAND, BUS_MASTER, 2)
        self._put(DEVICE_STATUS, 1, 0)
        self._put(DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER)
        offered = 0
        for half in (0, 1):
            self._put(FEATURE_SELECT, 4, half)
            offered |= self._get(COMMON, FEATURES, 4) << 32 * half
        wanted = VERSION_1 | DISCARD_FEATURE | ZEROES_FEATURE
        if offered & wanted != wanted:
            raise LabError(f"the disk offers {offered:#x}, not all of {wanted:#x}")
        for half in (0, 1):
            self._put(DRIVER_SELECT, 4, half)
            self._put(DRIVER_FEATURES, 4, wanted >> 32 * half & 0xFFFFFFFF)
        self._put(DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        self._qtest.fill(self._ring, RING_STEP, 0)
        self._qtest.write(self._ring + AVAILABLE, b"\x01")  # no interrupts
        self._put(QUEUE_SELECT, 2, 0)
        self._put(QUEUE_LENGTH, 2, QUEUE_SIZE)
        for register, address in (
            (QUEUE_DESCRIPTORS, self._ring),
            (QUEUE_AVAILABLE, self._ring + AVAILABLE),
            (QUEUE_USED, self._ring + USED),
        ):
            self._put(register, 4, address)
            self._put(register + 4, 4, 0)
        self._put(QUEUE_ENABLE, 2, 1)
        self._put(DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def _put(self, register: int, width: int, value: int) -> None:
        self._set(COMMON, register, width, value)

    def _get(self, area: int, register: int, width: int) -> int:
        return self._device.read(self._look_at(area, register, width), width)

    def _set(self, area: int, register: int, width: int, value: int) -> None:
        self._device.write(self._look_at(area, register, width), value, width)

    def _look_at(self, area: int, register: int, width: int) -> int:
        """Have the window show a register; return where in the configuration space that is."""
        window = self._areas[WINDOW][0]
        at, offset = self._areas[area]
        self._device.write(window + 4, self._device.read(at + 4, 1), 1)
        self._device.write(window + 8, offset + register)
        self._device.write(window + 12, width)
        return window + 16


class VirtioDisks:
    """All virtio disks of a guest; several threads may write."""

    def __init__(self, path: Path) -> None:
        """Connect to the guest's qtest socket; raises ``LabError``."""
        self._qtest = Qtest(path)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Disconnect; the guest goes on."""
        self._qtest.close()

    @contextlib.contextmanager
    def disk(self, qdev: str, buses: Sequence[Mapping[str, Any]]) -> Iterator[VirtioBlock]:
        """Have a disk, by its id in QEMU; ``buses`` is what ``query-pci`` says."""
        with self._lock:
            yield self._find(qdev, buses)

    def _find(self, qdev: str, buses: Sequence[Mapping[str, Any]]) -> VirtioBlock:
        for bus in buses:
            for found in bus["devices"]:
                if found["qdev_id"] == qdev:
                    device = PciDevice(self._qtest, 0, found["slot"], found["function"])
                    return VirtioBlock(self._qtest, device, RINGS + found["slot"] * RING_STEP)
        raise LabError(f"no virtio disk {qdev} on a bus")
