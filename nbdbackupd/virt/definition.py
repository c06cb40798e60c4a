"""Defining a domain: what is there already, what this host can run, and the call itself."""

from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

import libvirt

from nbdbackupd import documents
from nbdbackupd.errors import DomainError, NotSupportedError
from nbdbackupd.model import definition, hostpaths
from nbdbackupd.model import definition_devices as devices
from nbdbackupd.model.hostpaths import PathUse, VolumeUse
from nbdbackupd.virt import fault
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain

UNKNOWN: Final = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG)


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What a host can run a definition with.

    ``emulator`` is the definition's own where the host has it (``has_emulator``), else the one
    that libvirt would choose; ``has_machine`` tells whether that knows the machine type.
    """

    emulator: str
    has_emulator: bool
    has_machine: bool


def find_taken(connection: Connection, name: str, uuid: str) -> tuple[str, str]:
    """Return the names of the domains that have this name, and this UUID; or empty.

    Raises DomainError.
    """
    _, handle = connection.current()
    return _name(handle, "lookupByName", name), _name(handle, "lookupByUUIDString", uuid)


def _name(handle: libvirt.virConnect, find: str, word: str) -> str:
    with fault.translate(f"can't look up domain {word}"):
        try:
            found: str = getattr(handle, find)(word).name()
        except libvirt.libvirtError as err:
            if err.get_error_code() not in UNKNOWN:
                raise
            return ""
    return found


def paths_in_use(connection: Connection) -> dict[str, tuple[PathUse, ...]]:
    """Return the paths that each domain names, running or not, with its snapshots.

    Of the images of a domain that is off, backing files are not known to libvirt. Raises
    DomainError; a volume whose pool is not there has no path, and is left out.
    """
    _, handle = connection.current()
    with fault.translate("can't list the domains"):
        domains = handle.listAllDomains()
    found: dict[str, tuple[PathUse, ...]] = {}
    for each in domains:
        try:
            texts = [each.XMLDesc(0)]
            if each.isActive() and each.isPersistent():
                texts.append(each.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
            texts += [one.getXMLDesc(0) for one in _snapshots(each)]
            name = each.name()
        except libvirt.libvirtError as err:
            if err.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                # undefined meanwhile
                continue
            raise DomainError(f"can't read the domains: {fault.line(err)}") from err
        uses = [resolve(handle, use) for text in texts for use in hostpaths.of_xml(text)]
        found[name] = tuple(dict.fromkeys(use for use in uses if use is not None))
    return found


def _snapshots(domain: libvirt.virDomain) -> list[libvirt.virDomainSnapshot]:
    try:
        return list(domain.listAllSnapshots())
    except libvirt.libvirtError as err:
        if err.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
            return []
        raise


def resolve(handle: libvirt.virConnect, use: PathUse | VolumeUse) -> PathUse | None:
    """Give a volume its path; None if libvirt does not know it."""
    if isinstance(use, PathUse):
        return use
    try:
        path = handle.storagePoolLookupByName(use.pool).storageVolLookupByName(use.volume).path()
    except libvirt.libvirtError:
        return None
    return use.at(path)


def resolve_all(
    connection: Connection, uses: tuple[PathUse | VolumeUse, ...]
) -> tuple[PathUse, ...]:
    """Give volumes their paths; those that libvirt does not know are left out."""
    _, handle = connection.current()
    found = (resolve(handle, use) for use in uses)
    return tuple(use for use in found if use is not None)


def look_at_host(connection: Connection, xml: str) -> Host:
    """Ask libvirt whether it has the emulator and the machine type of a definition.

    Raises NotSupportedError if it has no emulator for the architecture, or not the accelerator.
    """
    root = definition.parse(xml)
    kind = root.find("./os/type")
    architecture = kind.get("arch") if kind is not None else None
    machine = kind.get("machine") if kind is not None else None
    emulator = root.findtext("./devices/emulator") or None
    accelerator = root.get("type")
    _, handle = connection.current()
    given = _capabilities(handle, emulator, architecture, None, accelerator) if emulator else None
    if given is not None:
        path, has_emulator = given, True
    else:
        own = _capabilities(handle, None, architecture, None, accelerator)
        if own is None:
            raise NotSupportedError(
                f"libvirt at {connection.uri} can't run {architecture} guests of type "
                f"{accelerator}: install that QEMU, or see why {accelerator} does not work there"
            )
        path, has_emulator = own, emulator is None
    known = _capabilities(handle, path, architecture, machine, accelerator)
    return Host(emulator=path, has_emulator=has_emulator, has_machine=known is not None)


def _capabilities(
    handle: libvirt.virConnect,
    emulator: str | None,
    architecture: str | None,
    machine: str | None,
    accelerator: str | None,
) -> str | None:
    """Return the emulator that libvirt would take; None if it can't do that."""
    try:
        text = handle.getDomainCapabilities(emulator, architecture, machine, accelerator, 0)
    except libvirt.libvirtError:
        return None
    return documents.parse_xml(text, "domainCapabilities", DomainError).findtext("path", "")


def try_out(connection: Connection, xml: str) -> None:
    """Have libvirt work out QEMU's command line for a definition; nothing is made or changed.

    Host devices are left out: libvirt 9.0.0 can't tell how it will pass them through before it
    does so, and takes that for an error (measured). Drivers that know no such call let all pass.
    Raises NotSupportedError or DomainError for a definition that it would not take.
    """
    root = definition.parse(xml)
    for parent in root.findall("devices"):
        devices.remove(parent, "hostdev")
        for each in parent.findall("./interface[@type='hostdev']"):
            parent.remove(each)
    text = ET.tostring(root, encoding="unicode")
    _, handle = connection.current()
    with fault.translate("libvirt does not take the definition"):
        try:
            handle.domainXMLToNative("qemu-argv", text, 0)
        except libvirt.libvirtError as err:
            if err.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                raise


def define(connection: Connection, xml: str) -> tuple[Domain, bool]:
    """Define a domain; return it, and whether its XML fits libvirt's schema.

    Autostart is off. Raises DomainError or NotSupportedError if libvirt refuses.
    """
    _, handle = connection.current()
    with fault.translate("libvirt does not take the definition"):
        fits = True
        try:
            found = handle.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        except libvirt.libvirtError as err:
            if err.get_error_code() != libvirt.VIR_ERR_XML_INVALID_SCHEMA:
                raise
            fits = False
            found = handle.defineXMLFlags(xml, 0)
        if found.autostart():
            # a link of that name may have been left over
            found.setAutostart(False)
        return Domain(connection, found.name(), found.UUIDString()), fits


def redefine(connection: Connection, xml: str) -> None:
    """Change the definition of a domain that exists; whether it starts by itself stays.

    Raises DomainError or NotSupportedError if libvirt refuses.
    """
    _, handle = connection.current()
    with fault.translate("libvirt does not take the definition"):
        handle.defineXMLFlags(xml, 0)


def start(domain: Domain) -> None:
    """Start a domain. Raises DomainError, NotSupportedError or BusyError."""
    domain.call("can't be started", lambda each: each.create())
