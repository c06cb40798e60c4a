"""libvirt's own schema of a domain, taken apart: every element, attribute and text that may be.

RELAX NG (https://relaxng.org/spec-20011203.html), the few patterns of it that libvirt uses. What
comes again below itself (a chain of backing images) is followed once.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

INSTALLED: Final = Path("/usr/share/libvirt/schemas")
TOP: Final = "domain.rng"
TEXT: Final = "#"
DEEPEST: Final = 14
NUMBERS: Final = (
    "unsignedInt", "unsignedLong", "unsignedShort", "positiveInteger", "int", "integer", "long",
    "short", "dateTime",
)  # fmt: skip
# what a pattern of libvirt's does not let hold a slash
WORDS: Final = (
    "UUID", "aliasName", "addr-family", "bridgeMode", "ccidSlot", "ccwCssidRange", "ccwDevnoRange",
    "ccwSsidRange", "cpuset", "diskTargetDev", "driveBus", "driveController", "driveSCSITarget",
    "driveSCSIUnit", "driveTarget", "driveUnit", "featureName", "hexuint", "pciFunc", "pciSlot",
    "spaprvioReg", "timeDelta", "uint16", "uint24", "uint32", "uint8", "uniMacAddr", "unit",
    "usbAddr", "usbClass", "usbId", "usbIdDefault", "usbPort", "usbVersion", "virtioserialPort",
    "wwn",
)  # fmt: skip
R: Final = "{http://relaxng.org/ns/structure/1.0}"


@dataclass(frozen=True, order=True)
class Place:
    """An attribute of an element, or its text; ``free`` if more than words and numbers fit."""

    path: tuple[str, ...]
    name: str
    free: bool

    def __str__(self) -> str:
        return f"{'/'.join(self.path)} {self.name}"


class Schema:
    """The schema in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._defined: dict[str, list[ET.Element]] = {}
        self._spaces: dict[int, str] = {}
        self._loaded: set[str] = set()
        self._load(TOP)

    def _load(self, name: str) -> None:
        if name not in self._loaded:
            self._loaded.add(name)
            root = ET.parse(self._directory / name).getroot()
            self._grammar(root, root.get("ns", ""))

    def _grammar(self, parent: ET.Element, space: str) -> None:
        for each in parent:
            match each.tag.removeprefix(R):
                case "include":
                    self._load(each.get("href", ""))
                case "div":
                    self._grammar(each, space)
                case "define" | "start":
                    self._spaces[id(each)] = space
                    self._defined.setdefault(each.get("name", "#start"), []).append(each)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """All places, in order; elements without anything have none."""
        found: dict[tuple[tuple[str, ...], str], bool] = {}
        for start in self._defined["#start"]:
            for path, name, free in self._walk(start, (), ()):
                found[path, name] = found.get((path, name), False) or free
        return tuple(sorted(Place(path, name, free) for (path, name), free in found.items()))

    def _walk(
        self, parent: ET.Element, path: tuple[str, ...], stack: tuple[str, ...], space: str = ""
    ) -> Iterator[tuple[tuple[str, ...], str, bool]]:
        for each in parent:
            match each.tag.removeprefix(R):
                case "element":
                    for name in _names(each, space):
                        if len(path) < DEEPEST and path.count(name) < 2:
                            inner = each.get("ns", space)
                            yield from self._walk(each, (*path, name), stack, inner)
                case "attribute":
                    kinds = set(self._kinds(each, ())) or {True}
                    for name in _names(each, ""):
                        yield path, name, any(kinds)
                case "ref":
                    name = each.get("name", "")
                    if stack.count(name) < 2:
                        for one in self._defined.get(name, ()):
                            there = self._spaces[id(one)]
                            yield from self._walk(one, path, (*stack, name), there)
                case "value" | "data" | "text":
                    if path:
                        yield path, TEXT, _is_free(each, stack[-1] if stack else "")
                case "name" | "anyName" | "except" | "param":
                    pass
                case _:
                    yield from self._walk(each, path, stack, each.get("ns", space))

    def _kinds(self, parent: ET.Element, stack: tuple[str, ...]) -> Iterator[bool]:
        for each in parent:
            match each.tag.removeprefix(R):
                case "value" | "data" | "text":
                    yield _is_free(each, stack[-1] if stack else "")
                case "ref":
                    name = each.get("name", "")
                    for one in self._defined.get(name, ()) if name not in stack else ():
                        yield from self._kinds(one, (*stack, name))
                case "element" | "attribute" | "name" | "anyName":
                    pass
                case _:
                    yield from self._kinds(each, stack)


def _is_free(pattern: ET.Element, name: str) -> bool:
    kind = pattern.tag.removeprefix(R)
    return kind == "text" or (
        kind == "data" and pattern.get("type") not in NUMBERS and name not in WORDS
    )


def _names(pattern: ET.Element, space: str) -> list[str]:
    if pattern.get("name"):
        return [_qualified(pattern.get("ns", space), pattern.get("name", ""))]
    names = list(pattern[0].iter(f"{R}name"))
    found = [_qualified(each.get("ns", space), each.text or "") for each in names]
    return found or ["{urn:any}any"]


def _qualified(space: str, name: str) -> str:
    return f"{{{space}}}{name}" if space else name


# what a device needs to be looked at, and not to be refused as a whole
CHARDEV: Final = ("pty", "unix", "spicevmc", "spiceport", "dbus", "file", "tcp")
CONTEXTS: Final[dict[str, list[dict[str, str]]]] = {
    "disk": [{"type": "file", "device": "disk"}, {"type": "network", "device": "cdrom"}],
    "interface": [{"type": kind} for kind in ("network", "user", "ethernet", "direct", "bridge")],
    "serial": [{"type": kind} for kind in CHARDEV],
    "console": [{"type": kind} for kind in CHARDEV],
    "parallel": [{"type": kind} for kind in CHARDEV],
    "channel": [{"type": kind} for kind in CHARDEV],
    "input": [{"type": "tablet"}],
    "redirdev": [{"type": "spicevmc"}],
    "smartcard": [{"mode": "passthrough", "type": "spicevmc"}],
    "backend": [{"type": "emulator"}, {"model": "random"}],
    "audio": [{"type": "pulseaudio"}, {"type": "file"}],
}


def instances(place: Place, value: str) -> Iterator[str]:
    """Small domain XMLs that have a value at a place; a disk is ``vda``."""
    tags = place.path[1:]
    choices = [CONTEXTS.get(tag, [{}]) for tag in tags]
    for attributes in itertools.product(*choices):
        root = ET.Element("domain", type="qemu")
        parent = root
        for tag, given in zip(tags, attributes, strict=True):
            if tag == "backend" and ("type" in given) is (parent.tag != "tpm"):
                given = {}  # noqa: PLW2901 - of another device
            parent = ET.SubElement(parent, tag, given)
            if tag == "disk":
                ET.SubElement(parent, "target", dev="vda" if given["device"] == "disk" else "sda")
        if place.name == TEXT:
            parent.text = value
        else:
            parent.set(place.name, value)
        yield ET.tostring(root, encoding="unicode")
