"""The mark of domains that are ours and are thrown away: those of ``boot`` and ``verify --boot``.

It is an element in their metadata, which libvirt keeps and tells its hook. Whoever decides what is
to be saved passes them over: hooks/qemu, ``status``, the generator of timers. The guest can't see
it. A domain that is to stay must not have it.
"""

from typing import Final
from xml.etree import ElementTree as ET

URI: Final = "urn:nbdbackup:throwaway:1"
NAME: Final = "nbdbackup-throwaway"
_TAG: Final = f"{{{URI}}}{NAME}"


def is_marked(xml: str) -> bool:
    """Whether a domain XML carries the mark.

    The element counts: libvirt keeps the declaration of its name space when the mark is taken off.
    """
    return f":{NAME}" in xml


def mark(root: ET.Element) -> None:
    """Put the mark into a definition."""
    unmark(root)
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ET.SubElement(root, "metadata")
    ET.SubElement(metadata, _TAG)


def unmark(root: ET.Element) -> None:
    """Take the mark out of a definition."""
    for metadata in root.findall("metadata"):
        for each in metadata.findall(_TAG):
            metadata.remove(each)
