"""A domain's definition for restored images: the point's own XML, made fit for another domain.

libvirt's XML of the point is changed only where it has to be: identity, images, firmware, and
what two domains must not share. Everything else (CPU, memory, buses, addresses) stays, since the
guest has been set up for it.
"""

import copy
import re
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from xml.etree import ElementTree as ET

from nbdbackupd import documents
from nbdbackupd.errors import DomainError, UsageError
from nbdbackupd.model import definition_devices as devices
from nbdbackupd.model import hostpaths, sifting, throwaway
from nbdbackupd.model.definition_devices import Entropy, Told
from nbdbackupd.model.domain import is_uuid
from nbdbackupd.model.hostpaths import PathUse, VolumeUse

KEEP: Final = "keep"
REMOVE: Final = "remove"
DOWN: Final = "down"
NONE: Final = "none"
SOURCE_ATTRIBUTE: Final = {"file": "file", "block": "dev"}
ONLY_QCOW2: Final = ("discard_no_unref",)
SINGLE: Final = (
    "name",
    "uuid",
    "genid",
    "os",
    "devices",
    "os/type",
    "os/loader",
    "os/nvram",
    "os/kernel",
    "os/initrd",
)
MEDIA: Final = ("cdrom", "floppy")
MACHINE_VERSION: Final = re.compile(r"-(?:rhel)?\d[\d.]*$")
NAME_BAD: Final = re.compile(r"[/\n\0]")
MOST_TOLD: Final = 100
"""Things of a host that are told one by one."""

Consent = Callable[[tuple[str, ...]], None]
"""Gets what a definition keeps of its host, a line each; raises to refuse."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewDisk:
    """What a disk's image is now.

    ``type`` is ``file``, ``block`` (``path`` is its path) or ``network``: then ``socket`` is the
    Unix socket of an NBD server and ``export`` the name of the export there.
    """

    format: str
    path: str = ""
    type: str = "file"
    socket: str = ""
    export: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """How a definition is to be changed.

    ``uuid`` None makes a new one. ``keep_identity`` keeps UUID and MAC addresses, and what is
    safe only if the original is gone: host devices, fixed ports, QEMU's own arguments. ``disks``
    are by target; others are taken away unless ``other_disks`` is ``keep``. ``media`` of CD and
    floppy drives: ``keep`` or ``remove`` (the empty drive stays). ``network``: ``keep``,
    ``down`` or ``none``. ``nvram``, ``loader``, ``kernel``, ``initrd``: new paths; None: the
    point holds none. ``own_loader``: the loader's path is a private copy. ``tpm`` is a new path
    for a TPM state with a path of its own, ``drop_tpm`` takes the TPM away. ``emulator`` and
    ``machine`` replace what this host does not have.
    """

    name: str
    uuid: str | None = None
    keep_identity: bool = False
    disks: Mapping[str, NewDisk] = field(default_factory=dict)
    other_disks: str = REMOVE
    media: str = REMOVE
    network: str = KEEP
    nvram: str | None = None
    loader: str | None = None
    own_loader: bool = False
    kernel: str | None = None
    initrd: str | None = None
    tpm: str | None = None
    drop_tpm: bool = False
    emulator: str | None = None
    machine: str | None = None
    trusted: bool = False

    @property
    def ours(self) -> frozenset[str]:
        """The paths of what is restored."""
        disks = self.disks.values()
        found = {path for disk in disks for path in (disk.path, disk.socket)}
        found |= {
            self.nvram or "",
            self.loader or "",
            self.kernel or "",
            self.initrd or "",
            self.tpm or "",
        }
        return frozenset(found - {""})


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    """A new definition.

    ``uses`` are the paths of the host that it needs. ``changes`` tell what was done as a matter
    of course, ``warnings`` what the guest will miss or the user has to look after. ``foreign`` is
    what named something of a host and was left out.
    """

    xml: str
    name: str
    uuid: str
    uses: tuple[PathUse | VolumeUse, ...]
    changes: tuple[str, ...]
    warnings: tuple[str, ...]
    foreign: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths that the definition names."""
        return tuple(use.path for use in self.uses if isinstance(use, PathUse))


def refuse(kept: tuple[str, ...]) -> None:
    """Keep nothing of a host. Raises UsageError."""
    raise UsageError(
        f"the definition would keep what is of its host: {'; '.join(kept)}: give "
        f"--trust-definition if you know who wrote it"
    )


def adapt(xml: str, changes: Changes, entropy: Entropy, consent: Consent = refuse) -> Adapted:
    """Change a domain XML; ``entropy`` gives random bytes for UUIDs and MAC addresses.

    ``consent`` is asked before anything of a host is kept, which only ``keep_identity``,
    ``trusted``, ``media`` and ``other_disks`` can ask for. Raises DomainError if the text is no
    domain XML, UsageError for a name that libvirt refuses, and what ``consent`` raises.
    """
    if not changes.name.strip() or NAME_BAD.search(changes.name):
        raise UsageError(f"{changes.name!r} can't be the name of a domain")
    root = parse(xml)
    if root.get("type", "kvm") not in sifting.TYPES and not changes.trusted:
        raise DomainError(
            f"a domain of type {root.get('type', '')[:40]!r} is not run by QEMU: what its "
            f"definition would do on this host is not known"
        )
    told = Told()
    devices.tidy(root)
    throwaway.unmark(root)
    identity = _identity(root, changes, entropy, told)
    _firmware(root, changes, told)
    _host(root, changes, told)
    _disks(root, changes, told)
    _tpm(root, changes, told)
    devices.interfaces(root, changes.network, None if changes.keep_identity else entropy, told)
    if not changes.keep_identity:
        devices.graphics(root, told)
        devices.chardevs(root, told)
        devices.host_devices(root, told, trusted=changes.trusted)
    foreign = _sift(root, changes, consent, told)
    if not changes.keep_identity:
        devices.labels(root, told)
        devices.command_line(root, told)
    return Adapted(
        xml=ET.tostring(root, encoding="unicode"),
        name=changes.name,
        uuid=identity,
        uses=hostpaths.of_domain(root),
        changes=tuple(told.changes),
        warnings=tuple(told.warnings),
        foreign=foreign,
    )


def _sift(root: ET.Element, changes: Changes, consent: Consent, told: Told) -> tuple[str, ...]:
    """Take away what is of a host, or have somebody agree to it; return what was taken away."""
    sifting.forget(root)
    keeps = changes.keep_identity or changes.trusted
    spared = [] if keeps else _spared(root, changes)
    sieve = sifting.Sieve(
        ours=changes.ours, name=changes.name, emulator=changes.emulator or "", spared=spared
    )
    # what the user wants to keep is only looked at
    sieve.sift(copy.deepcopy(root) if keeps else root)
    kept = _lines((*sieve.kept, *(sieve.removed if keeps else ())))
    if kept:
        consent(kept)
        told.changes += [f"kept: {line}" for line in kept]
    foreign = () if keeps else _lines(sieve.removed)
    told.warnings += [f"left out of the definition: {line}" for line in foreign]
    return foreign


def _spared(root: ET.Element, changes: Changes) -> list[str]:
    """The disks that are not restored and that the user wants to keep nevertheless."""
    found = []
    for disk in root.findall("./devices/disk"):
        is_medium = disk.get("device", "disk") in MEDIA
        if (changes.media if is_medium else changes.other_disks) == KEEP and (
            disk.find("source") is not None
        ):
            target = disk.find("target")
            found.append(target.get("dev", "") if target is not None else "")
    return [each for each in found if each not in changes.disks]


def _lines(found: Sequence[sifting.Foreign]) -> tuple[str, ...]:
    lines = tuple(each.text for each in found[:MOST_TOLD])
    more = len(found) - len(lines)
    return (*lines, f"and {more} more") if more else lines


def parse(xml: str) -> ET.Element:
    """The root of a domain XML; prefixes of namespaces are kept.

    Raises DomainError.
    """
    root = documents.parse_xml(xml, "domain", DomainError, prefixes=True)
    for path in SINGLE:
        if len(root.findall(path)) > 1:
            # libvirt writes no such thing, and reads both, or another one than we would change
            raise DomainError(f"domain XML is damaged: it has more than one {path}")
    return root


def machine_family(machine: str) -> str:
    """``pc-q35-7.2`` → ``q35``: libvirt's short name for the newest of its kind."""
    stem = MACHINE_VERSION.sub("", machine)
    return {"pc-q35": "q35", "pc-i440fx": "pc"}.get(stem, stem)


def new_uuid(entropy: Entropy) -> str:
    """A random UUID (RFC 9562, version 4)."""
    return str(uuid.UUID(bytes=entropy(16), version=4))


def _identity(root: ET.Element, changes: Changes, entropy: Entropy, told: Told) -> str:
    old = root.findtext("uuid", "")
    found = changes.uuid or (old if changes.keep_identity else "") or new_uuid(entropy)
    if not is_uuid(found):
        # it becomes the name of a directory, too
        raise DomainError(f"domain XML is damaged: {found[:80]!r} is no UUID")
    _set_text(root, "name", changes.name)
    _set_text(root, "uuid", found)
    for entry in root.findall("./sysinfo/system/entry[@name='uuid']"):
        # libvirt wants it to be the domain's
        entry.text = found
    if root.find("genid") is not None:
        # Windows has to learn that it is at an earlier time, whoever it is now
        _set_text(root, "genid", new_uuid(entropy))
        told.changes.append("the generation ID is new")
    if found != old:
        told.changes.append(f"the UUID is {found}")
    return found


def _set_text(root: ET.Element, tag: str, text: str) -> None:
    element = root.find(tag)
    if element is None:
        element = ET.Element(tag)
        root.insert(0, element)
    element.text = text


def _firmware(root: ET.Element, changes: Changes, told: Told) -> None:
    system = root.find("os")
    if system is None:
        return
    _nvram(system, changes, told)
    _loader(root, system, changes, told)
    for tag, path in (("kernel", changes.kernel), ("initrd", changes.initrd)):
        element = system.find(tag)
        if element is None or not (element.text or "").strip():
            continue
        if path is not None:
            element.text = path
        elif changes.keep_identity or changes.trusted:
            told.warnings.append(f"the point does not hold the {tag}: {element.text} is used")
        else:
            # a file of this host may be anything, and all three are of no use alone
            for part in ("kernel", "initrd", "cmdline"):
                devices.remove(system, part)
            told.warnings.append(
                f"the point does not hold the {tag}: the guest boots by its firmware, from a disk"
            )


def _loader(root: ET.Element, system: ET.Element, changes: Changes, told: Told) -> None:
    loader = system.find("loader")
    if loader is not None and changes.loader is not None:
        loader.text = changes.loader
    if not changes.own_loader or changes.loader is None:
        return
    if loader is None:
        # libvirt 9.0 chooses one at each start and does not write it down
        loader = ET.Element("loader", readonly="yes", type="pflash")
        if system.find("./firmware/feature[@name='secure-boot'][@enabled='yes']") is not None:
            loader.set("secure", "yes")
            _enable_smm(root)
        loader.text = changes.loader
        kind = system.find("type")
        system.insert(list(system).index(kind) + 1 if kind is not None else 0, loader)
    # libvirt knows descriptions of its own firmware only
    system.attrib.pop("firmware", None)
    devices.remove(system, "firmware")
    told.changes.append(f"the loader is the point's own copy, {changes.loader}")


def _enable_smm(root: ET.Element) -> None:
    """Secure boot is none without; libvirt switches it on only for firmware that it chooses."""
    features = root.find("features")
    if features is None:
        features = ET.SubElement(root, "features")
    smm = features.find("smm")
    if smm is None:
        smm = ET.SubElement(features, "smm")
    smm.set("state", "on")


def _nvram(system: ET.Element, changes: Changes, told: Told) -> None:
    nvram = system.find("nvram")
    if changes.nvram is None:
        if nvram is not None:
            # never that of the original
            nvram.text = None
            devices.remove(nvram, "source")
            nvram.attrib.pop("type", None)
            if not nvram.attrib:
                system.remove(nvram)
            told.warnings.append(
                "the point does not hold the NVRAM: the guest gets a new one, without its settings"
            )
        return
    if nvram is None:
        nvram = ET.SubElement(system, "nvram")
    devices.remove(nvram, "source")
    nvram.attrib.pop("type", None)
    nvram.text = changes.nvram


def _host(root: ET.Element, changes: Changes, told: Told) -> None:
    if changes.emulator is not None:
        element = root.find("./devices/emulator")
        if element is None:
            element = ET.Element("emulator")
            devices.devices_of(root).insert(0, element)
        told.changes.append(f"the emulator is {changes.emulator}, not {element.text}")
        element.text = changes.emulator
    kind = root.find("./os/type")
    if changes.machine is not None and kind is not None:
        told.warnings.append(
            f"machine type {kind.get('machine')} is not known here, it is {changes.machine} now: "
            f"the guest may find other hardware"
        )
        kind.set("machine", changes.machine)


def _disks(root: ET.Element, changes: Changes, told: Told) -> None:
    parent = root.find("devices")
    seen = set()
    for disk in parent.findall("disk") if parent is not None else []:
        target = disk.find("target")
        name = target.get("dev", "") if target is not None else ""
        new = changes.disks.get(name)
        if new is not None:
            seen.add(name)
            _give_image(disk, new)
        elif disk.get("device", "disk") in MEDIA:
            _medium(disk, name, changes.media, told)
        elif changes.other_disks == REMOVE and parent is not None:
            parent.remove(disk)
            told.warnings.append(f"disk {name} is not restored: it was removed from the definition")
        else:
            told.warnings.append(f"disk {name} is not restored: it is as in the original")
    unknown = sorted(set(changes.disks) - seen)
    if unknown:
        raise DomainError(f"the domain XML has no disk {', '.join(unknown)}")


def _give_image(disk: ET.Element, new: NewDisk) -> None:
    """Put the restored image into a ``<disk>``; nothing of the old image stays."""
    for tag in ("source", "backingStore", "mirror", "encryption", "auth"):
        devices.remove(disk, tag)
    disk.set("type", new.type)
    for name in ("sgio", "rawio"):
        disk.attrib.pop(name, None)
    if disk.get("device") == "lun":
        disk.set("device", "disk")
    driver = disk.find("driver")
    if driver is None:
        driver = ET.Element("driver")
        disk.insert(0, driver)
    driver.set("name", "qemu")
    driver.set("type", new.format)
    if new.format != "qcow2":
        devices.remove(driver, "metadata_cache")
        for name in ONLY_QCOW2:
            driver.attrib.pop(name, None)
    else:
        devices.remove(disk, "shareable")
    source = ET.Element("source")
    if new.type == "network":
        source.set("protocol", "nbd")
        source.set("name", new.export)
        ET.SubElement(source, "host", transport="unix", socket=new.socket)
    else:
        source.set(SOURCE_ATTRIBUTE[new.type], new.path)
    disk.insert(list(disk).index(driver) + 1, source)


def _medium(disk: ET.Element, name: str, media: str, told: Told) -> None:
    source = disk.find("source")
    if source is None:
        return
    if media == KEEP:
        source.attrib.pop("index", None)
        return
    for tag in ("source", "backingStore", "auth", "encryption"):
        devices.remove(disk, tag)
    disk.set("type", "file")
    driver = disk.find("driver")
    if driver is not None:
        driver.attrib.pop("type", None)
    told.changes.append(f"drive {name} is empty")


def _tpm(root: ET.Element, changes: Changes, told: Told) -> None:
    parent = root.find("devices")
    for tpm in parent.findall("tpm") if parent is not None else []:
        backend = tpm.find("backend")
        kind = backend.get("type", "") if backend is not None else ""
        if parent is None or backend is None:
            continue
        if changes.drop_tpm or (kind != "emulator" and not changes.keep_identity):
            parent.remove(tpm)
            told.warnings.append(f"the TPM ({kind}) was removed: what it sealed stays sealed")
            continue
        source = backend.find("source")
        if kind == "emulator" and source is not None:
            if changes.tpm is not None:
                source.set("path", changes.tpm)
            else:
                # libvirt's own place, by UUID
                backend.remove(source)
        if backend.find("encryption") is not None:
            told.warnings.append("the TPM's state is encrypted: libvirt needs its secret")


def without_layers(xml: str, targets: Collection[str]) -> str:
    """The definition without what it says of images below those of these disks.

    libvirt opens what the definition names, also below an image that says of itself that it stands
    on nothing. Raises what ``parse`` raises.
    """
    root = parse(xml)
    for disk in root.findall("./devices/disk"):
        target, below = disk.find("target"), disk.find("backingStore")
        if target is not None and target.get("dev") in targets and below is not None:
            disk.remove(below)
    return ET.tostring(root, encoding="unicode")
