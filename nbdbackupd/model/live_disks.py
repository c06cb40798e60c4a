"""Disks that were attached to a running domain alone: its definition does not have them.

A point holds what ran. So a restored domain gets such a disk, too, as the running domain had it.
"""

import copy
from collections.abc import Collection
from typing import Final
from xml.etree import ElementTree as ET

from nbdbackupd.model import definition

RUNTIME: Final = ("alias", "backingStore", "mirror", "privateData", "boot")
"""What of a running domain's disk is of no use, or may contradict the definition."""


def missing(xml: str, targets: Collection[str]) -> tuple[str, ...]:
    """Those of ``targets`` that the definition does not have. Raises as ``complete``."""
    known = _disks(definition.parse(xml))
    return tuple(target for target in targets if target not in known)


def complete(xml: str, live: str, targets: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """The definition with the disks of ``targets`` that only ran, and a line for each of them.

    ``xml`` is the definition, ``live`` what the domain was while it ran. Raises what
    ``model.definition.parse`` raises.
    """
    root, ran = definition.parse(xml), definition.parse(live)
    devices, all_of_them = root.find("./devices"), _disks(ran)
    added = []
    for target in missing(xml, targets):
        if target not in all_of_them or devices is None:
            continue
        found = copy.deepcopy(all_of_them[target])
        for tag in RUNTIME:
            for each in found.findall(tag):
                found.remove(each)
        for source in found.findall("source"):
            source.attrib.pop("index", None)
        _place(found, devices, ran)
        devices.append(found)
        added.append(
            f"disk {target} was attached while the domain ran, and is added: the domain's "
            f"definition does not have it"
        )
    return (ET.tostring(root, encoding="unicode") if added else xml), tuple(added)


def _disks(root: ET.Element) -> dict[str, ET.Element]:
    found = {}
    for disk in root.findall("./devices/disk"):
        target = disk.find("target")
        if target is not None:
            found[target.get("dev", "")] = disk
    return found


def _place(disk: ET.Element, devices: ET.Element, ran: ET.Element) -> None:
    """Keep the disk's place on a controller, which comes with it; any other place is libvirt's."""
    address = disk.find("address")
    if address is None:
        return
    taken = [each.attrib for each in devices.findall("./disk/address")]
    if address.get("type") != "drive" or address.attrib in taken:
        disk.remove(address)
        return
    target = disk.find("target")
    bus = target.get("bus", "") if target is not None else ""
    index = address.get("controller", "0")
    path = f"controller[@type='{bus}'][@index='{index}']"
    if not bus.isalnum() or not index.isdecimal():
        disk.remove(address)
    elif devices.find(path) is None:
        controller = copy.deepcopy(ran.find(f"./devices/{path}"))
        if controller is None:
            disk.remove(address)
            return
        for tag in ("alias", "address"):
            for each in controller.findall(tag):
                controller.remove(each)
        devices.append(controller)
