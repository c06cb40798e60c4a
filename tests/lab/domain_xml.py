"""The libvirt definition of a lab guest."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET

from tests.lab.disks import DiskSpec

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
DEFAULT_BUS = {"disk": "virtio", "cdrom": "ide", "floppy": "fdc"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BootFiles:
    """A kernel and an initramfs to boot directly."""

    kernel: Path
    initrd: Path
    cmdline: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainSpec:
    """What ``domain_xml`` needs to know; ``monitor`` is the lab's own QMP socket, if any."""

    name: str
    monitor: Path | None = None
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
    _add_os(domain, spec)
    # without ACPI the bus of a "pc" takes no new device
    ET.SubElement(ET.SubElement(domain, "features"), "acpi")
    devices = ET.SubElement(domain, "devices")
    _text(devices, "emulator", "/usr/bin/qemu-system-x86_64")
    for disk, path in spec.disks:
        devices.append(disk_element(disk, path))
    _add_devices(devices, spec)
    _add_command_line(domain, spec)
    return ET.tostring(domain, encoding="unicode")


def disk_element(disk: DiskSpec, path: Path | None) -> ET.Element:
    """Return the ``<disk>`` element of one disk; ``path`` None means an empty drive."""
    kind = "block" if disk.block else "file"
    element = ET.Element("disk", type=kind, device=disk.device)
    driver = ET.SubElement(element, "driver", name="qemu", type=disk.format, discard="unmap")
    if disk.cache is not None:
        driver.set("cache", disk.cache)
    if path is not None:
        attribute = "dev" if disk.block else "file"
        ET.SubElement(element, "source", {attribute: str(path)})
    bus = disk.bus or DEFAULT_BUS[disk.device]
    ET.SubElement(element, "target", dev=disk.target, bus=bus)
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
    if spec.monitor is not None:
        # a comma in an option's value is written twice
        socket = str(spec.monitor).replace(",", ",,")
        for word in ("-qmp", f"unix:{socket},server=on,wait=off"):
            ET.SubElement(line, f"{{{QEMU_NAMESPACE}}}arg", value=word)
    for name, value in spec.environment.items():
        ET.SubElement(line, f"{{{QEMU_NAMESPACE}}}env", name=name, value=value)
