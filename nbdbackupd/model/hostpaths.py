"""Which files of its host a domain uses, and whether two domains would get in each other's way.

Source: libvirt's "Domain XML format" page. Sharing for reading (a template below two overlays, an
ISO image, firmware) does no harm; a file that one of two domains writes to belongs to that one.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final
from xml.etree import ElementTree as ET

from nbdbackupd import documents
from nbdbackupd.errors import DomainError

FILES: Final = ("file", "dev", "dir")
SHARED_SPECIAL: Final = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/hwrng")


@dataclass(frozen=True, kw_only=True, slots=True)
class PathUse:
    """A path of a domain: ``what`` it is there ("disk vda", "nvram"), and if it is only read.

    ``format`` is that of a disk's top image, as the definition says: nothing else may be believed,
    since a guest can write any header into a raw image. ``optional``: the domain starts without it.
    """

    path: str
    what: str
    readonly: bool = False
    format: str = field(default="", compare=False)
    optional: bool = field(default=False, compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class VolumeUse:
    """A volume of a storage pool: its path is known to libvirt alone."""

    pool: str
    volume: str
    what: str
    readonly: bool = False
    format: str = field(default="", compare=False)
    optional: bool = field(default=False, compare=False)

    def at(self, path: str) -> PathUse:
        """The same with its path."""
        return PathUse(
            path=path,
            what=self.what,
            readonly=self.readonly,
            format=self.format,
            optional=self.optional,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Conflict:
    """A path of a new definition that domain ``domain`` uses as ``what``, one of them writing."""

    use: PathUse
    domain: str
    what: str


def of_domain(root: ET.Element) -> tuple[PathUse | VolumeUse, ...]:
    """All paths that a ``<domain>`` names, backing chains included as far as it tells them."""
    return (*_of_os(root), *_of_disks(root), *_of_devices(root))


def of_xml(xml: str) -> tuple[PathUse | VolumeUse, ...]:
    """All paths that the XML of a domain or of a snapshot names.

    Raises DomainError if it can't be parsed.
    """
    root = documents.parse_xml(xml, "", DomainError)
    if root.tag == "domainsnapshot":
        return tuple(_of_snapshot(root))
    return of_domain(root)


def clashes(
    uses: Iterable[PathUse], others: Mapping[str, Iterable[PathUse]], same: Mapping[str, str]
) -> tuple[Conflict, ...]:
    """What the new definition can't use, since a domain of ``others`` (by name) does.

    ``same`` maps a path to a text that all paths of one file have in common (device and inode);
    a path that it does not hold stands for itself.
    """
    taken: dict[str, list[tuple[str, PathUse]]] = {}
    for domain, theirs in others.items():
        for each in theirs:
            taken.setdefault(same.get(each.path, each.path), []).append((domain, each))
    found = []
    for use in uses:
        for domain, each in taken.get(same.get(use.path, use.path), ()):
            if not (use.readonly and each.readonly):
                found.append(Conflict(use=use, domain=domain, what=each.what))
                break
    return tuple(found)


def _of_os(root: ET.Element) -> Iterator[PathUse]:
    loader = root.find("./os/loader")
    if loader is not None:
        yield from _text(loader, "loader", readonly=loader.get("readonly", "yes") != "no")
    for tag in ("kernel", "initrd", "dtb"):
        for element in root.findall(f"./os/{tag}"):
            yield from _text(element, tag, readonly=True)
    for element in root.findall("./os/acpi/table"):
        yield from _text(element, "ACPI table", readonly=True)
    for nvram in root.findall("./os/nvram"):
        yield from _text(nvram, "nvram", readonly=False)
        for source in nvram.findall("source"):
            yield from _plain(_of_source(source, "nvram", readonly=False))


def _of_disks(root: ET.Element) -> Iterator[PathUse | VolumeUse]:
    for disk in root.findall("./devices/disk"):
        target = disk.find("target")
        name = target.get("dev", "") if target is not None else ""
        device = disk.get("device", "disk")
        what = f"{'disk' if device in ('disk', 'lun') else device} {name}"
        readonly = device == "cdrom" or disk.find("readonly") is not None
        driver = disk.find("driver")
        kind = driver.get("type", "raw") if driver is not None else "raw"
        for source in disk.findall("source"):
            # libvirt starts without such a medium: only of drives, see its page on the domain XML
            optional = source.get("startupPolicy") == "optional"
            for use in _of_source(source, what, readonly=readonly):
                yield replace(use, format=kind, optional=optional)
        for source in disk.iterfind(".//dataStore/source"):
            yield from _of_source(source, f"{what}, data file", readonly=readonly)
        for source in disk.findall("./mirror/source"):
            yield from _of_source(source, f"{what}, mirror", readonly=False)
        for layer in disk.iter("backingStore"):
            for source in layer.findall("source"):
                yield from _of_source(source, f"{what}, backing file", readonly=True)


def _of_devices(root: ET.Element) -> Iterator[PathUse | VolumeUse]:
    for each in root.findall("./devices/filesystem"):
        if each.get("type", "mount") in ("mount", "bind", "file", "block"):
            readonly = each.find("readonly") is not None
            for source in each.findall("source"):
                yield from _of_source(source, "filesystem", readonly=readonly)
    for tag in ("serial", "console", "parallel", "channel"):
        for each in root.findall(f"./devices/{tag}"):
            if each.get("type") in ("file", "unix", "pipe", "dev"):
                yield from _attribute(each.find("source"), "path", tag)
            yield from _attribute(each.find("log"), "file", f"log of {tag}")
    for path in root.findall("./devices/memory/source/path"):
        yield from _text(path, "memory device", readonly=False)
    for path in root.findall("./devices/pstore/path"):
        yield from _text(path, "pstore", readonly=False)
    for each in root.findall("./devices/audio[@type='file']"):
        yield from _attribute(each, "path", "audio")
    for each in root.findall("./devices/tpm/backend"):
        yield from _attribute(each.find("source"), "path", "TPM state")
        yield from _attribute(each.find("device"), "path", "TPM")
    for each in root.findall("./devices/lease/target"):
        yield from _attribute(each, "path", "lease")


def _of_snapshot(root: ET.Element) -> Iterator[PathUse | VolumeUse]:
    """Of a snapshot: what a return to it needs (all of it for reading), and where memory lies."""
    for inner in (*root.findall("./domain"), *root.findall("./inactiveDomain")):
        for use in of_domain(inner):
            yield replace(use, what=f"{use.what} of a snapshot")
    for source in root.findall("./disks/disk/source"):
        yield from _of_source(source, "disk of a snapshot", readonly=False)
    yield from _attribute(root.find("./memory"), "file", "memory of a snapshot")


def _of_source(source: ET.Element, what: str, *, readonly: bool) -> Iterator[PathUse | VolumeUse]:
    volume = source.get("volume")
    if volume:
        yield VolumeUse(pool=source.get("pool", ""), volume=volume, what=what, readonly=readonly)
        return
    for name in FILES:
        path = source.get(name, "")
        if path.startswith("/"):
            yield PathUse(path=path, what=what, readonly=readonly)


def _plain(uses: Iterable[PathUse | VolumeUse]) -> Iterator[PathUse]:
    return (use for use in uses if isinstance(use, PathUse))


def _text(element: ET.Element, what: str, *, readonly: bool) -> Iterator[PathUse]:
    path = (element.text or "").strip()
    if path.startswith("/"):
        yield PathUse(path=path, what=what, readonly=readonly)


def _attribute(element: ET.Element | None, name: str, what: str) -> Iterator[PathUse]:
    path = element.get(name, "") if element is not None else ""
    if path.startswith("/") and path not in SHARED_SPECIAL:
        yield PathUse(path=path, what=what)
