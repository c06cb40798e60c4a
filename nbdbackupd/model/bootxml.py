"""The definition of a domain that runs on a restore point: overlays on images over NBD.

Measured with libvirt 9.0.0 and QEMU 7.2: a transient domain takes a ``<backingStore>`` of type
network with a Unix socket, and QEMU opens the connection anew when it is lost, at the next request.
libvirt 9.0 drops ``<reconnect delay>``, so a request that finds no server fails at once: the
``stop`` policy holds the guest then, and lets it go on when the server is back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from nbdbackupd import documents
from nbdbackupd.errors import DomainError
from nbdbackupd.model import throwaway

KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class MappedDisk:
    """A disk of the new domain: a qcow2 ``overlay`` on the raw image that a ``socket`` serves."""

    overlay: str
    socket: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveDisk:
    """What a disk of a running domain stands on now.

    ``path`` is its top image, ``is_mapped`` tells whether anything below is read over NBD.
    ``mirror`` is the image that a copy goes to, ``is_ready`` whether that one is equal.
    """

    target: str
    path: str
    is_mapped: bool
    mirror: str = ""
    is_ready: bool = False


def over_map(
    xml: str,
    disks: Mapping[str, MappedDisk],
    *,
    console: str = "",
    memory: int = 0,
) -> str:
    """Put the disks of a definition onto their overlays, and mark it as one to be thrown away.

    ``console`` is a file that the first serial port is logged to; a guest without one gets one.
    ``memory`` in bytes replaces the guest's own if it is not 0. Raises
    DomainError for a text that is no domain XML, lacks one of the disks, or can't be given other
    memory.
    """
    root = _parse(xml)
    found = {_target(each): each for each in root.findall("./devices/disk")}
    for target, mapped in disks.items():
        if target not in found:
            raise DomainError(f"the domain XML of the restore point has no disk {target}")
        _replace_image(found[target], mapped)
    if console:
        _log_console(root, console)
    if memory:
        _set_memory(root, memory)
    throwaway.mark(root)
    return ET.tostring(root, encoding="unicode")


def live_disks(xml: str) -> tuple[LiveDisk, ...]:
    """What the disks of a live XML stand on; drives without a medium are left out.

    Raises DomainError.
    """
    return tuple(_live(each) for each in _parse(xml).findall("./devices/disk") if _path(each))


def _parse(xml: str) -> ET.Element:
    return documents.parse_xml(xml, "domain", DomainError)


def _target(disk: ET.Element) -> str:
    found = disk.find("target")
    return found.get("dev", "") if found is not None else ""


def _path(element: ET.Element) -> str:
    source = element.find("source")
    return (source.get("file") or source.get("dev") or "") if source is not None else ""


def _live(disk: ET.Element) -> LiveDisk:
    mirror = disk.find("mirror")
    return LiveDisk(
        target=_target(disk),
        path=_path(disk),
        is_mapped=any(each.get("type") == "network" for each in disk.iter("backingStore")),
        mirror=_path(mirror) if mirror is not None else "",
        is_ready=mirror is not None and mirror.get("ready") == "yes",
    )


def _replace_image(disk: ET.Element, mapped: MappedDisk) -> None:
    for tag in ("driver", "source", "backingStore", "mirror", "shareable", "transient"):
        for each in disk.findall(tag):
            disk.remove(each)
    disk.set("type", "file")
    disk.attrib.pop("snapshot", None)
    disk.attrib.pop("sgio", None)
    if disk.get("device") == "lun":
        disk.set("device", "disk")
    driver = ET.Element("driver", name="qemu", type="qcow2", discard="unmap")
    if disk.find("readonly") is None:
        driver.set("error_policy", "stop")
    driver.set("rerror_policy", "stop")
    source = ET.Element("source", file=mapped.overlay)
    below = ET.Element("backingStore", type="network")
    ET.SubElement(below, "format", type="raw")
    server = ET.SubElement(below, "source", protocol="nbd")
    ET.SubElement(server, "host", transport="unix", socket=mapped.socket)
    ET.SubElement(below, "backingStore")
    for place, each in enumerate((driver, source, below)):
        disk.insert(place, each)


def _log_console(root: ET.Element, path: str) -> None:
    serial = root.find("./devices/serial")
    if serial is None:
        # a console of type serial that stands alone is the first port
        serial = next(
            (
                each
                for each in root.findall("./devices/console")
                if _attribute(each, "target", "type") in ("", "serial")
            ),
            None,
        )
    if serial is None:
        serial = ET.SubElement(_devices(root), "serial", type="pty")
    for each in serial.findall("log"):
        serial.remove(each)
    serial.insert(0, ET.Element("log", file=path, append="off"))


def _attribute(parent: ET.Element, tag: str, name: str) -> str:
    child = parent.find(tag)
    return child.get(name, "") if child is not None else ""


def _devices(root: ET.Element) -> ET.Element:
    found = root.find("devices")
    return found if found is not None else ET.SubElement(root, "devices")


def _set_memory(root: ET.Element, memory: int) -> None:
    if root.find("./cpu/numa") is not None or root.find("maxMemory") is not None:
        raise DomainError(
            "this domain's memory is laid out by hand (NUMA, slots): leave it as it is"
        )
    for tag in ("memory", "currentMemory"):
        for each in root.findall(tag):
            root.remove(each)
    for tag in ("currentMemory", "memory"):
        element = ET.Element(tag, unit="KiB")
        element.text = str(-(-memory // KIB))
        root.insert(0, element)
