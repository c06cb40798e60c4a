"""The libvirt definition of a lab guest."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET

from tests.lab.disks import DiskSpec

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class BootFiles:
    """A kernel and an initramfs to boot directly."""

    kernel: Path
    initrd: Path
    cmdline: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainSpec:
    """What ``domain_xml`` needs to know.

    ``monitor`` and ``qtest`` are the lab's own sockets, if any; ``firmware`` takes the place of
    the machine's.  The virtio disks share ``iothreads`` threads in turn.
    """

    name: str
    monitor: Path | None = None
    qtest: Path | None = None
    firmware: Path | None = None
    iothreads: int = 0
    disks: Sequence[tuple[DiskSpec, Path | None]]
    memory_mib: int = 64
    machine: str = "pc"
    uuid: str | None = None
    boot: BootFiles | None = None
    has_agent: bool = False
    console_log: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    extra_devices: str = ""  # XML elements


def domain_xml(spec: DomainSpec) -> str:
    """Return the definition of a TCG guest without network, display and USB."""
    ET.register_namespace("qemu", QEMU_NAMESPACE)
    domain = ET.Element("domain", type="qemu")
    _text(domain, "name", spec.name)
    if spec.uuid is not None:
        _text(domain, "uuid", spec.uuid)
    _text(domain, "memory", str(spec.memory_mib), unit="MiB")
    _text(domain, "vcpu", "1")
    if spec.iothreads:
        _text(domain, "iothreads", str(spec.iothreads))
    _add_os(domain, spec)
    # without ACPI the bus of a "pc" takes no new device
    ET.SubElement(ET.SubElement(domain, "features"), "acpi")
    devices = ET.SubElement(domain, "devices")
    _text(devices, "emulator", "/usr/bin/qemu-system-x86_64")
    for number, (disk, path) in enumerate(spec.disks):
        devices.append(disk_element(disk, path, iothread_of(number, spec.iothreads)))
    _add_devices(devices, spec)
    _add_command_line(domain, spec)
    return ET.tostring(domain, encoding="unicode")


def iothread_of(number: int, iothreads: int) -> int:
    """Return the thread, from 1, that the disk of a number from 0 has; 0 if there are none."""
    return number % iothreads + 1 if iothreads else 0


def disk_element(disk: DiskSpec, path: Path | None, iothread: int = 0) -> ET.Element:
    """Return the ``<disk>`` element of one disk; ``path`` None means an empty drive.

    A virtio disk is served by the ``iothread`` of that number, from 1.
    """
    kind = "block" if disk.block else "file"
    element = ET.Element("disk", type=kind, device=disk.device)
    driver = ET.SubElement(element, "driver", name="qemu", type=disk.format, discard="unmap")
    if disk.cache is not None:
        driver.set("cache", disk.cache)
    if iothread and disk.is_virtio:
        driver.set("iothread", str(iothread))
    if path is not None:
        attribute = "dev" if disk.block else "file"
        ET.SubElement(element, "source", {attribute: str(path)})
    ET.SubElement(element, "target", dev=disk.target, bus=disk.device_bus)
    if disk.serial is not None:
        _text(element, "serial", disk.serial)
    if disk.readonly or disk.device == "cdrom":
        ET.SubElement(element, "readonly")
    if disk.shareable:
        ET.SubElement(element, "shareable")
    ET.SubElement(element, "alias", name=disk.alias)
    return element


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text


def _add_os(domain: ET.Element, spec: DomainSpec) -> None:
    system = ET.SubElement(domain, "os")
    _text(system, "type", "hvm", arch="x86_64", machine=spec.machine)
    if spec.boot is not None:
        _text(system, "kernel", str(spec.boot.kernel))
        _text(system, "initrd", str(spec.boot.initrd))
        _text(system, "cmdline", spec.boot.cmdline)


def _add_devices(devices: ET.Element, spec: DomainSpec) -> None:
    if spec.has_agent:
        channel = ET.SubElement(devices, "channel", type="unix")
        ET.SubElement(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    if spec.console_log is not None:
        serial = ET.SubElement(devices, "serial", type="file")
        ET.SubElement(serial, "source", path=str(spec.console_log))
    ET.SubElement(devices, "controller", type="usb", model="none")
    ET.SubElement(devices, "memballoon", model="none")
    if spec.extra_devices:
        devices.extend(ET.fromstring(f"<devices>{spec.extra_devices}</devices>"))


def _add_command_line(domain: ET.Element, spec: DomainSpec) -> None:
    line = ET.SubElement(domain, f"{{{QEMU_NAMESPACE}}}commandline")
    words: list[str] = []
    if spec.monitor is not None:
        words += ["-qmp", _socket(spec.monitor)]
    if spec.qtest is not None:
        words += ["-qtest", _socket(spec.qtest), "-qtest-log", "none"]
    if spec.firmware is not None:
        words += ["-bios", str(spec.firmware)]
    for word in words:
        ET.SubElement(line, f"{{{QEMU_NAMESPACE}}}arg", value=word)
    for name, value in spec.environment.items():
        ET.SubElement(line, f"{{{QEMU_NAMESPACE}}}env", name=name, value=value)


def _socket(path: Path) -> str:
    # a comma in an option's value is written twice
    return f"unix:{str(path).replace(',', ',,')},server=on,wait=off"
