"""One guest of a lab: its life, its disks, what it writes.

The guest has no operating system.  "The guest writes" means that the lab tells QEMU, over a
second monitor of its own, to send a request through the guest's own disk device (``qemu-io -d``
of the human monitor): bitmaps, backup jobs and throttling see it as the guest's.  That works in
parallel to any libvirt client and while a backup runs.

``qemu-io`` on a disk with an iothread aborts QEMU 7.2.  So the guest of such disks is a driver
over qtest (``tests.lab.virtio_block``), to the same effect.  While it is paused, its disks are in
QEMU's main thread, and ``qemu-io`` serves again.  A guest that boots has its own driver: it writes
itself.
"""

import contextlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

from tests.lab import disks as disk_images
from tests.lab.command import LabError, run
from tests.lab.disks import MIB, DiskSpec
from tests.lab.domain_xml import BootFiles, DomainSpec, disk_element, domain_xml, iothread_of
from tests.lab.process import (
    KILL_TIMEOUT_SECONDS,
    NOTICE_TIMEOUT_SECONDS,
    ProcessHandle,
    open_pid_file,
    wait_until,
)
from tests.lab.qmp import Monitor
from tests.lab.virsh import Virsh
from tests.lab.virtio import HALT, Hardware, VirtioDevice
from tests.lab.virtio_agent import SERIAL, Agent, AgentThread
from tests.lab.virtio_block import MAX_BYTES, VirtioBlock

# the largest request that QEMU's block layer takes is just below 2 GiB
MAX_ZERO_BYTES: Final = 1024 * MIB
# for data, qemu-io allocates a buffer of the request's size
MAX_DATA_BYTES: Final = 64 * MIB
REPLY_TIMEOUT_SECONDS: Final = 10.0
FAILURE = re.compile(r"failed|error|invalid|cannot|not found|not supported|No such", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestPlaces:
    """Where libvirt and the lab keep a guest's files."""

    monitor: Path  # socket of the lab's own QMP monitor
    qtest: Path  # socket for what the guest's processor would do
    pid_file: Path
    log: Path  # QEMU's stdout and stderr
    images: Path  # directory for images without a path of their own


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestOptions:
    """Settings of a guest beyond name and disks."""

    memory_mib: int = 64
    machine: str = "pc"
    iothreads: int | None = None  # shared by the virtio disks, in turn; default: the lab's
    uuid: str | None = None
    boot: BootFiles | None = None
    boots_its_disk: bool = False  # the boot sector writes, not the lab
    has_agent: bool = False
    agent: Agent | None = None  # one that needs no system, with ``has_agent``
    console_log: Path | None = None
    extra_devices: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


class Guest:
    """A defined domain; made by a lab's ``guest()``, removed with the lab."""

    def __init__(
        self,
        virsh: Virsh,
        name: str,
        disks: Sequence[DiskSpec],
        places: GuestPlaces,
        options: GuestOptions,
    ) -> None:
        """Make missing images and define the domain; raises ``LabError``."""
        self.virsh = virsh
        self.name = name
        self.places = places
        self.options = options
        self.iothreads = options.iothreads or 0
        self.disks: dict[str, DiskSpec] = {}
        self._plugged: set[str] = set()
        self._paths: dict[str, Path | None] = {}
        self._monitor: Monitor | None = None
        self._hardware: Hardware | None = None
        self._agent: AgentThread | None = None
        self._process: ProcessHandle | None = None
        for disk in disks:
            self._adopt(disk)
        self.define()

    # -- life

    def define(self) -> None:
        """Define the domain (again) from the disks that it has now; raises ``LabError``."""
        options = self.options
        firmware = self.places.images / "halt.bin" if self._has_driver else None
        if firmware is not None:
            firmware.write_bytes(HALT)
        spec = DomainSpec(
            name=self.name,
            monitor=self.places.monitor,
            qtest=self.places.qtest if self._has_driver else None,
            firmware=firmware,
            iothreads=self.iothreads,
            disks=[
                (disk, self._paths[target])
                for target, disk in self.disks.items()
                if target not in self._plugged
            ],
            memory_mib=options.memory_mib,
            machine=options.machine,
            uuid=options.uuid,
            boot=options.boot,
            has_agent=options.has_agent,
            console_log=options.console_log,
            environment={**line_buffering(), **options.environment},
            extra_devices=options.extra_devices,
        )
        xml = self.places.images / f"define-{self.places.monitor.stem}.xml"
        xml.write_text(domain_xml(spec), "utf-8", "surrogateescape")
        self.virsh("define", xml)

    def start(self) -> None:
        """Start the domain; raises ``LabError``."""
        self._forget_process()
        self.virsh("start", "--domain", self.name)
        self._process = open_pid_file(self.places.pid_file)
        if self._process is None:
            raise LabError(f"{self.name}: no QEMU after the start")
        if self.options.agent is not None:
            self.options.agent.is_frozen = False
        self._start_agent()

    def stop(self) -> None:
        """End QEMU in order, as a guest's power-off does: bitmaps are stored in the images."""
        process = self.process()
        # QEMU may close the monitor before its answer is out
        with contextlib.suppress(LabError):
            self.qmp("quit")
        if not process.wait(KILL_TIMEOUT_SECONDS):
            raise LabError(f"{self.name}: QEMU did not quit")
        self._forget_process()
        self.wait_shut_off()

    def destroy(self) -> None:
        """Have libvirt end the guest; a guest that is off is fine."""
        process = self._process
        try:
            self.virsh("destroy", "--domain", self.name)
        except LabError as err:
            # an embedded libvirt that is still attaching to the guest ends it, too, but then
            # its own call finds it gone
            if "domain is not running" not in str(err):
                raise
        if process is not None and not process.wait(KILL_TIMEOUT_SECONDS):
            raise LabError(f"{self.name}: QEMU survived destroy")
        self._forget_process()

    def kill9(self) -> None:
        """Kill QEMU as a host crash would: bitmaps are not stored.

        Libvirt is not told: its next client still sees "running" for a moment.
        """
        self.process().kill()
        self._forget_process()

    def wait_shut_off(self) -> None:
        """Wait until libvirt, too, has noticed that QEMU is gone; raises ``LabError``."""

        def is_shut_off() -> bool:
            return self.virsh("domstate", "--domain", self.name).strip() == "shut off"

        wait_until(is_shut_off, f"end of {self.name} in libvirt", NOTICE_TIMEOUT_SECONDS)

    def close(self) -> None:
        """Kill what runs and let go of everything; for the lab's own clean-up."""
        process = self._process or open_pid_file(self.places.pid_file)
        if process is not None:
            self._process = process
            process.kill()
        self._forget_process()

    def undefine(self) -> None:
        """Remove the domain's definition and its checkpoint metadata."""
        self.virsh("undefine", "--checkpoints-metadata", "--domain", self.name)

    def is_running(self) -> bool:
        """Say whether QEMU is there (also when paused)."""
        return self._process is not None and self._process.is_running()

    def process(self) -> ProcessHandle:
        """Return QEMU's process; raises ``LabError`` when the guest is off."""
        if self._process is None:
            raise LabError(f"{self.name}: not running")
        return self._process

    def adopt_process(self) -> None:
        """Take up a QEMU that another program started for this domain."""
        self._forget_process()
        self._process = open_pid_file(self.places.pid_file)
        if self._process is not None:
            self._start_agent()

    def pause(self) -> None:
        """Stop the guest's CPU; QEMU also drains and flushes its disks."""
        self.qmp("stop")

    def resume(self) -> None:
        """Let a paused guest run on."""
        self.qmp("cont")

    def is_paused(self) -> bool:
        """Say whether the CPU stands still."""
        return not self.qmp("query-status")["running"]

    # -- monitor

    def qmp(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run a QMP command on the lab's own monitor; raises ``LabError``."""
        if self._monitor is None:
            self._monitor = Monitor(self.places.monitor)
        return self._monitor.execute(command, arguments)

    def bitmaps(self, target: str) -> dict[str, dict[str, Any]]:
        """Return the dirty bitmaps of the disk's top image by name, as QEMU reports them."""
        inserted = self.block_device(target)["inserted"]
        return {
            bitmap["name"]: bitmap
            for node in self.qmp("query-named-block-nodes")
            if node["file"] == inserted["file"] and node["drv"] == inserted["image"]["format"]
            for bitmap in node.get("dirty-bitmaps", [])
            if "name" in bitmap
        }

    def block_jobs(self) -> list[dict[str, Any]]:
        """Return QEMU's running block jobs."""
        jobs: list[dict[str, Any]] = self.qmp("query-block-jobs")
        return jobs

    def abort_job(self) -> None:
        """Have libvirt end the domain's job and see it gone; raises ``LabError``."""
        self.virsh.client(self.name, KILL_TIMEOUT_SECONDS, "abort-job")

    def block_device(self, target: str) -> dict[str, Any]:
        """Return the ``query-block`` entry of a disk; raises ``LabError``."""
        alias = f"ua-{target}"
        for device in self.qmp("query-block"):
            if alias in device.get("qdev", "").split("/"):
                entry: dict[str, Any] = device
                return entry
        raise LabError(f"{self.name}: QEMU has no disk {target}")

    @contextlib.contextmanager
    def device(self, qdev: str) -> Iterator[VirtioDevice]:
        """Have a virtio device as the guest's driver does, by its id; raises ``LabError``."""
        if self._hardware is None:
            self._hardware = Hardware(self.places.qtest)
        try:
            with self._hardware.device(qdev, self.qmp("query-pci")) as device:
                yield device
        except LabError as err:
            raise LabError(f"{self.name}: {qdev}: {err}") from err

    # -- what the guest writes

    def write(self, target: str, offset: int, length: int, pattern: int) -> None:
        """Write ``length`` bytes of value ``pattern`` at ``offset``; raises ``LabError``."""
        with self._driven(target) as disk:
            for start, size in _pieces(offset, length, MAX_BYTES if disk else MAX_DATA_BYTES):
                if disk:
                    disk.write(start, pattern, size)
                else:
                    self._io(target, f"write -P {pattern:#x} {start} {size}", "wrote", start, size)

    def write_file(self, target: str, offset: int, source: Path) -> None:
        """Write a host file's content (a multiple of 512, at most 1 GiB) at ``offset``."""
        size = source.stat().st_size
        with self._driven(target) as disk:
            if disk:
                with source.open("rb") as file:
                    for start, length in _pieces(offset, size, MAX_BYTES):
                        disk.write(start, file.read(length), length)
            elif " " in str(source):
                raise LabError(f"qemu-io cannot quote a path: {source}")
            else:
                self._io(target, f"write -s {source} {offset} {size}", "wrote", offset, size)

    def write_zeroes(self, target: str, offset: int, length: int, *, unmap: bool) -> None:
        """Send a write-zeroes request, with or without leave to deallocate."""
        flags = "-z -u" if unmap else "-z"
        with self._driven(target) as disk:
            for start, size in _pieces(offset, length, MAX_ZERO_BYTES):
                if disk:
                    disk.write_zeroes(start, size, unmap=unmap)
                else:
                    self._io(target, f"write {flags} {start} {size}", "wrote", start, size)

    def discard(self, target: str, offset: int, length: int) -> None:
        """Send a discard request; a qcow2 disk reads as zeroes there afterwards."""
        with self._driven(target) as disk:
            for start, size in _pieces(offset, length, MAX_ZERO_BYTES):
                if disk:
                    disk.discard(start, size)
                else:
                    self._io(target, f"discard {start} {size}", "discard", start, size)

    def random_ops(self, rng: random.Random, count: int, *, align: int = 512) -> None:
        """Do ``count`` random operations all over the writable disks.

        Data, explicit zero bytes, zero writes with and without unmap, discards; sizes from one
        sector to 1 MiB, half of them aligned to 64 KiB, since whole clusters behave apart.
        """
        targets = [target for target, disk in self.disks.items() if disk.is_writable]
        for _ in range(count):
            target = rng.choice(targets)
            size = self.disk_size(target)
            unit = rng.choice([align, max(align, 64 * 1024)])
            length = min(unit * rng.randint(1, max(1, MIB // unit)), size)
            offset = rng.randrange(0, (size - length) // unit + 1) * unit
            self._random_op(rng, target, offset, length)

    def _random_op(self, rng: random.Random, target: str, offset: int, length: int) -> None:
        match rng.choice(["data", "data", "bytes", "zero", "unmap", "discard"]):
            case "data":
                self.write(target, offset, length, rng.randint(1, 255))
            case "bytes":
                self.write(target, offset, length, 0)
            case "zero":
                self.write_zeroes(target, offset, length, unmap=False)
            case "unmap":
                self.write_zeroes(target, offset, length, unmap=True)
            case _:
                self.discard(target, offset, length)

    # -- disks

    def image(self, target: str) -> Path:
        """Return the path of the disk's top image (an external snapshot moves it)."""
        if self.is_running():
            return Path(self.block_device(target)["inserted"]["file"])
        path = self._paths[target]
        if path is None:
            raise LabError(f"{self.name}: drive {target} is empty")
        return path

    def use_image(self, target: str, path: Path) -> None:
        """Give a disk another image from the next ``define`` and start on."""
        self._paths[target] = path

    def take_over(self, other: "Guest") -> None:
        """Become what another host's guest is, for ``define`` or ``adopt_process``."""
        self.disks = dict(other.disks)
        self._paths = dict(other._paths)
        self.iothreads = other.iothreads

    def disk_size(self, target: str) -> int:
        """Return the size in bytes that the guest sees."""
        return int(self.block_device(target)["inserted"]["image"]["virtual-size"])

    def attach(self, disk: DiskSpec, *, keep: bool = True) -> None:
        """Plug a disk in while the guest runs; unless ``keep``, it is not in the definition.

        Such a one is to be forgotten by ``unplug`` when the guest has ended.
        """
        self._adopt(disk)
        if not keep:
            self._plugged.add(disk.target)
        xml = self.places.images / f"attach-{self.places.monitor.stem}-{disk.target}.xml"
        iothread = iothread_of(len(self.disks) - 1, self.iothreads)
        xml.write_bytes(ET.tostring(disk_element(disk, self._paths[disk.target], iothread)))
        where = ["--live", "--config"] if keep else ["--live"]
        self.virsh("attach-device", *where, "--domain", self.name, "--file", xml)

    def unplug(self) -> set[str]:
        """Forget the disks that were plugged into the guest that has ended; return which."""
        gone, self._plugged = self._plugged, set()
        for target in gone:
            del self.disks[target], self._paths[target]
        return gone

    def reference(self, target: str, into: Path) -> Path:
        """Copy the disk as the guest sees it now to a raw file, without the product.

        A running guest is paused meanwhile, which flushes its disks.  Returns ``into``.
        """
        running = self.is_running()
        was_paused = running and self.is_paused()
        if running:
            self.pause()
        try:
            image = self.image(target)
            argv: list[str | Path] = ["qemu-img", "convert", "-U"]
            if self.disks[target].format == "raw":
                argv += ["-f", "raw"]
            run([*argv, "-O", "raw", image, into], timeout_seconds=600)
        finally:
            if running and not was_paused:
                self.resume()
        return into

    def _adopt(self, disk: DiskSpec) -> None:
        path = disk.path
        if path is None and disk.device == "disk":
            # the monitor's name is short and unique; the domain's may hold anything
            stem = self.places.monitor.stem
            path = self.places.images / f"{stem}-{disk.target}.{disk.format}"
        if path is not None and not path.exists():
            disk_images.create_image(disk, path)
        self.disks[disk.target] = disk
        self._paths[disk.target] = path

    # -- below

    @property
    def _has_driver(self) -> bool:
        """Say whether the lab, and no system in the guest, drives the disks."""
        is_needed = self.iothreads > 0 or self.options.agent is not None
        return is_needed and self.options.boot is None and not self.options.boots_its_disk

    @contextlib.contextmanager
    def _driven(self, target: str) -> Iterator[VirtioBlock | None]:
        """Have the disk's device, or None where ``qemu-io`` may write; raises ``LabError``."""
        if not (self.iothreads and self.disks[target].is_virtio) or self.is_paused():
            yield None
            return
        if not self._has_driver:
            raise LabError(f"{self.name}: {target}: only the system in the guest can write to it")
        # /machine/peripheral/ID/virtio-backend
        with self.device(Path(self.block_device(target)["qdev"]).parent.name) as device:
            yield VirtioBlock(device)

    def _io_line(self, target: str, command: str) -> str:
        return f'qemu-io -d {self.block_device(target)["qdev"]} "{command}"'

    def _io(self, target: str, command: str, verb: str, offset: int, length: int) -> None:
        """Run one qemu-io command in QEMU and find its confirmation.

        The monitor's answer is always empty: qemu-io prints to QEMU's stdout, which is the log.
        """
        done = f"{verb} {length}/{length} bytes at offset {offset}\n"
        with self.places.log.open("rb") as log:
            log.seek(0, 2)
            answer = self.qmp(
                "human-monitor-command", {"command-line": self._io_line(target, command)}
            )
            said = [str(answer)]

            def is_answered() -> bool:
                said[0] += log.read().decode("utf-8", "replace")
                return done in said[0] or FAILURE.search(said[0]) is not None

            wait_until(is_answered, f"reply to {command!r} in {log.name}", REPLY_TIMEOUT_SECONDS)
        if done not in said[0]:
            raise LabError(f"{self.name}: {target}: {command}: {said[0].strip()}")

    def _start_agent(self) -> None:
        """Bring the agent into the guest, if it has one without a system."""
        if self.options.agent is None:
            return
        with self.device(SERIAL) as device:
            assert self._hardware is not None
            self._agent = AgentThread(self.options.agent, self._hardware, device)
        self._agent.start()

    def _forget_process(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        if self._hardware is not None:
            self._hardware.close()
            self._hardware = None
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self._process is not None:
            self._process.close()
            self._process = None


def line_buffering() -> dict[str, str]:
    """Return the environment that makes QEMU print line by line into its log.

    Into a file, stdout is buffered by the block, so ``qemu-io`` answers would come much later.
    """
    wanted = {"_STDBUF_O", "LD_PRELOAD"}
    lines = run(["stdbuf", "-oL", "env"]).splitlines()
    pairs = (line.partition("=") for line in lines)
    return {name: value for name, _, value in pairs if name in wanted}


def _pieces(offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    end = offset + length
    return [(start, min(limit, end - start)) for start in range(offset, end, limit)]
