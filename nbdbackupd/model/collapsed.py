"""A definition whose disks stand on no other images any more."""

from collections.abc import Collection
from xml.etree import ElementTree as ET

from nbdbackupd.model import definition


def without_layers(xml: str, targets: Collection[str]) -> str:
    """The definition without what it says of images below those of these disks.

    libvirt opens what the definition names, also below an image that says of itself that it stands
    on nothing. Raises what ``model.definition.parse`` raises.
    """
    root = definition.parse(xml)
    for disk in root.findall("./devices/disk"):
        target, below = disk.find("target"), disk.find("backingStore")
        if target is not None and target.get("dev") in targets and below is not None:
            disk.remove(below)
    return ET.tostring(root, encoding="unicode")
