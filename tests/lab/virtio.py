"""The virtio devices of a guest without an operating system, driven over qtest.

QEMU's qtest protocol (``-qtest unix:…``, which works beside any accelerator) lets the lab write
into the guest's memory and to its ports as if the guest's processor did it.  So drivers of
devices can be here: what they ask for is carried out by the devices, as for any guest.

The processor has to leave memory and devices alone: ``HALT`` is a firmware that only halts it.
Nothing is remembered here but the connection: the state of the devices is in QEMU, that of the
rings in the guest's memory.  So a reset, or a start from saved state, needs no care.

Sources: Virtual I/O Device (VIRTIO) 1.1, 2.6 (split virtqueues), 4.1.4 (PCI, with
VIRTIO_PCI_CAP_PCI_CFG, which reaches all registers without a BAR); QEMU's ``system/qtest.c`` for
the protocol.
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
"""For one request; a disk may be throttled, or wait for a job."""
LINE_BYTES: Final = 16 << 10
"""What a line of qtest carries: QEMU takes time with the square of a line's length."""

# where things lie in the guest's memory: the rings of each slot of the bus, then data of requests
RINGS: Final = 1 << 20
SLOT_STEP: Final = 1 << 17
RING_STEP: Final = 1 << 14
DATA: Final = 8 << 20
# within a ring: descriptors, what is made available, what was used, buffers of the driver's own
AVAILABLE, USED, BUFFERS = 0x400, 0x800, 0x1000
RING_SIZE: Final = 32

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
NEXT, DEVICE_WRITES = 1, 2


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


class Ring:
    """A virtqueue: chains of buffers that are offered to the device, and come back used."""

    def __init__(self, qtest: Qtest, address: int) -> None:
        """A ring is nothing but its place in the guest's memory."""
        self._qtest = qtest
        self.address = address

    @property
    def buffers(self) -> int:
        """The address of 12 KiB for the driver's own use."""
        return self.address + BUFFERS

    def clear(self) -> None:
        """Begin anew; no interrupts are wanted."""
        self._qtest.fill(self.address, RING_STEP, 0)
        self._qtest.write(self.address + AVAILABLE, b"\x01")

    def offer(self, buffers: Sequence[tuple[int, int, int]], head: int = 0) -> int:
        """Make a chain of (address, length, flags) available, in descriptors from ``head`` on.

        Returns how many chains have been offered (modulo 65536).
        """
        last = head + len(buffers) - 1
        chain = b"".join(
            struct.pack("<QIHH", at, length, flags | (NEXT if n < last else 0), n + 1)
            for n, (at, length, flags) in enumerate(buffers, head)
        )
        self._qtest.write(self.address + 16 * head, chain)
        at = self.address + AVAILABLE
        made = int.from_bytes(self._qtest.read(at + 2, 2), "little")
        self._qtest.write(at + 4 + 2 * (made % RING_SIZE), struct.pack("<H", head))
        made = (made + 1) % (1 << 16)
        self._qtest.write(at + 2, struct.pack("<H", made))
        return made

    def used(self) -> int:
        """How many chains have come back (modulo 65536)."""
        return int.from_bytes(self._qtest.read(self.address + USED + 2, 2), "little")

    def came_back(self, number: int) -> tuple[int, int]:
        """The head of the chain that came back as that number, and how much was written."""
        at = self.address + USED + 4 + 8 * (number % RING_SIZE)
        found: tuple[int, int] = struct.unpack("<II", self._qtest.read(at, 8))
        return found

    def wait(self, made: int) -> None:
        """Wait until so many chains have come back; raises ``LabError``."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        for number in itertools.count():
            if self.used() == made:
                return
            if time.monotonic() > deadline:
                raise LabError(f"the device has not answered within {TIMEOUT_SECONDS} s")
            # most requests are over after some turns
            time.sleep(0 if number < 10 else 0.001)


class VirtioDevice:
    """The registers of a virtio device."""

    def __init__(self, qtest: Qtest, device: PciDevice, slot: int) -> None:
        """Find the registers; ``slot`` gives the rings their place in memory."""
        self.qtest = qtest
        self._device = device
        self._slot = slot
        self._areas: dict[int, tuple[int, int]] = {}  # kind -> capability, offset of the area
        at = device.read(CAPABILITIES, 1)
        while at:
            if device.read(at, 1) == VENDOR_CAPABILITY:
                self._areas[device.read(at + 3, 1)] = (at, device.read(at + 8))
            at = device.read(at + 1, 1)
        if not self._areas.keys() >= {COMMON, NOTIFY, WINDOW}:
            raise LabError("no virtio device that knows VIRTIO_PCI_CAP_PCI_CFG")
        self._step = device.read(self._areas[NOTIFY][0] + 16)  # notify_off_multiplier

    @property
    def is_ready(self) -> bool:
        """Say whether a driver is at work."""
        return bool(self._get(COMMON, DEVICE_STATUS, 1) & DRIVER_OK)

    def ring(self, number: int) -> Ring:
        """One of the queues; at most eight."""
        return Ring(self.qtest, RINGS + self._slot * SLOT_STEP + number * RING_STEP)

    def make_ready(self, features: int, queues: Sequence[int]) -> None:
        """Do what a driver does at its start (VIRTIO 1.1, 3.1.1); raises ``LabError``."""
        self._device.write(COMMAND, BUS_MASTER, 2)
        self._put(DEVICE_STATUS, 1, 0)
        self._put(DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER)
        offered = 0
        for half in (0, 1):
            self._put(FEATURE_SELECT, 4, half)
            offered |= self._get(COMMON, FEATURES, 4) << 32 * half
        wanted = VERSION_1 | features
        if offered & wanted != wanted:
            raise LabError(f"the device offers {offered:#x}, not all of {wanted:#x}")
        for half in (0, 1):
            self._put(DRIVER_SELECT, 4, half)
            self._put(DRIVER_FEATURES, 4, wanted >> 32 * half & 0xFFFFFFFF)
        self._put(DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        for number in queues:
            self._make_queue(number)
        self._put(DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def notify(self, queue: int) -> None:
        """Tell the device that something was made available."""
        self._set(NOTIFY, queue * self._step, 2, queue)

    def _make_queue(self, number: int) -> None:
        ring = self.ring(number)
        ring.clear()
        self._put(QUEUE_SELECT, 2, number)
        self._put(QUEUE_LENGTH, 2, RING_SIZE)
        for register, address in (
            (QUEUE_DESCRIPTORS, ring.address),
            (QUEUE_AVAILABLE, ring.address + AVAILABLE),
            (QUEUE_USED, ring.address + USED),
        ):
            self._put(register, 4, address)
            self._put(register + 4, 4, 0)
        self._put(QUEUE_ENABLE, 2, 1)

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


class Hardware:
    """The virtio devices of a running guest; several threads may use it, one at a time."""

    def __init__(self, path: Path) -> None:
        """Connect to the guest's qtest socket; raises ``LabError``."""
        self._qtest = Qtest(path)
        self.lock = threading.Lock()

    def close(self) -> None:
        """Disconnect; the guest goes on."""
        self._qtest.close()

    @contextlib.contextmanager
    def device(self, qdev: str, buses: Sequence[Mapping[str, Any]]) -> Iterator[VirtioDevice]:
        """Have a device, by its id in QEMU; ``buses`` is what ``query-pci`` says."""
        with self.lock:
            yield self._find(qdev, buses)

    def _find(self, qdev: str, buses: Sequence[Mapping[str, Any]]) -> VirtioDevice:
        for bus in buses:
            for found in bus["devices"]:
                if found["qdev_id"] == qdev:
                    device = PciDevice(self._qtest, 0, found["slot"], found["function"])
                    return VirtioDevice(self._qtest, device, found["slot"])
        raise LabError(f"no virtio device {qdev} on a bus")
