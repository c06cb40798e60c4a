"""Devices of a restored definition: what a clone would share with the original becomes private.

Everything here changes a parsed ``<domain>`` in place and tells what it did: a *change* is a
matter of course (a new MAC address), a *warning* is something that the guest will miss or that
the user has to look after. Source of the elements: libvirt's "Domain XML format" page.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from xml.etree import ElementTree as ET

from nbdbackupd.model import domain as domain_model

Entropy = Callable[[int], bytes]
"""Gives so many random bytes."""

MAC_PREFIX: Final = bytes.fromhex("525400")
"""What libvirt gives to QEMU's interfaces."""

QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
OWN_CHARDEVS: Final = (
    "pty",
    "null",
    "vc",
    "stdio",
    "spicevmc",
    "spiceport",
    "qemu-vdagent",
    "dbus",
)
"""Kinds of character devices that end in the domain's own QEMU."""

GENERATED_TAP: Final = re.compile(r"(vnet|macvtap|macvlan|vif|tap)\d+")
HOST_INTERFACES: Final = ("hostdev", "vhostuser", "vdpa", "server", "client", "mcast", "udp")
HOST_INPUTS: Final = ("passthrough", "evdev")


@dataclass(slots=True)
class Told:
    """What was done, in the making."""

    changes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def remove(parent: ET.Element | None, tag: str) -> int:
    """Take all children of that tag away; return how many there were."""
    found = parent.findall(tag) if parent is not None else []
    for each in found:
        if parent is not None:
            parent.remove(each)
    return len(found)


def tidy(root: ET.Element) -> None:
    """Take away what libvirt made up for one run; the XML may be that of a running domain."""
    root.attrib.pop("id", None)
    for parent in list(root.iter()):
        for alias in parent.findall("alias"):
            if not alias.get("name", "").startswith("ua-"):
                parent.remove(alias)
    for label in root.findall("./seclabel"):
        for made in ("label", "imagelabel") if label.get("type") == "dynamic" else ():
            remove(label, made)
        if label.get("type") == "dynamic" and not len(label):
            root.remove(label)
    for channel in root.findall("./devices/channel/target"):
        channel.attrib.pop("state", None)
    for console in root.findall("./devices/console"):
        console.attrib.pop("tty", None)


def labels(root: ET.Element, told: Told) -> None:
    """A fixed label of SELinux or AppArmor would let the clone at what the original may touch."""
    for label in root.findall("./seclabel[@type='static']"):
        if label.get("model") != "dac":
            root.remove(label)
            told.warnings.append(
                f"the fixed {label.get('model', 'security')} label was removed: "
                f"libvirt chooses one of the domain's own"
            )


def interfaces(root: ET.Element, network: str, entropy: Entropy | None, told: Told) -> None:
    """Network cards: private ones; ``entropy`` None keeps their MAC addresses.

    ``network`` is ``keep``, ``down`` (the link) or ``none`` (no card at all).
    """
    devices = devices_of(root)
    found = devices.findall("interface")
    if network == "none":
        remove(devices, "interface")
        if found:
            told.changes.append(f"network cards removed: {len(found)}")
        return
    taken: set[str] = set()
    for each in found:
        _interface(devices, each, entropy, taken, told)
    if network == "down":
        left = devices.findall("interface")
        for each in left:
            remove(each, "link")
            ET.SubElement(each, "link", state="down")
        if left:
            told.changes.append("network cards have their link down")


def _interface(
    devices: ET.Element, each: ET.Element, entropy: Entropy | None, taken: set[str], told: Told
) -> None:
    mac = each.find("mac")
    name = mac.get("address", "") if mac is not None else ""
    kind = each.get("type", "")
    if entropy is None:
        # the very machine: it keeps what is its own, not what libvirt made up
        _forget_tap(each)
        return
    if kind in HOST_INTERFACES:
        devices.remove(each)
        told.warnings.append(f"network card {name} (type {kind}) was removed: it is the original's")
        return
    if mac is None:
        mac = ET.SubElement(each, "mac")
    mac.attrib.clear()
    fresh = new_mac(entropy, taken)
    mac.set("address", fresh)
    told.changes.append(f"network card {name or '(no MAC)'} has MAC address {fresh}")
    backend = each.find("backend")
    if backend is not None and backend.attrib.pop("logFile", ""):
        told.changes.append(f"network card {name}: its log file was removed")
    if remove(each, "portForward"):
        told.warnings.append(f"network card {name}: forwarded ports of the host were removed")
    _forget_tap(each)
    target = each.find("target")
    if target is not None and target.get("dev"):
        if target.get("managed") == "no":
            told.warnings.append(
                f"network card {name}: the host's device {target.get('dev')} has to be made for "
                f"the new domain; it was removed from the definition"
            )
        each.remove(target)
    parameters = each.find("./virtualport/parameters")
    if parameters is not None:
        for word in ("interfaceid", "instanceid"):
            parameters.attrib.pop(word, None)
    filters = each.findall("./filterref/parameter")
    if any(one.get("name", "").upper() in ("IP", "MAC", "IPV6") for one in filters):
        told.warnings.append(f"network card {name}: its filter names addresses of the original")


def _forget_tap(each: ET.Element) -> None:
    target = each.find("target")
    if target is not None and GENERATED_TAP.fullmatch(target.get("dev", "")):
        each.remove(target)
    source = each.find("source")
    if source is not None:
        source.attrib.pop("portid", None)


def new_mac(entropy: Entropy, taken: set[str]) -> str:
    """A MAC address that is not in ``taken``, which gets it."""
    while True:
        text = (MAC_PREFIX + entropy(3)).hex(":")
        if text not in taken:
            taken.add(text)
            return text


def graphics(root: ET.Element, told: Told) -> None:
    """Screens: ports and sockets are chosen by libvirt when the domain starts."""
    for each in root.findall("./devices/graphics"):
        fixed = []
        for name in ("port", "tlsPort", "websocket"):
            value = each.get(name)
            if value is not None and value != "-1":
                if each.get("autoport") != "yes" or name == "websocket":
                    fixed.append(value)
                each.set(name, "-1")
        if each.get("autoport") == "no":
            each.set("autoport", "yes")
        sockets = [each, *each.findall("listen")]
        fixed += [path for one in sockets if (path := one.attrib.pop("socket", ""))]
        if fixed:
            told.changes.append(
                f"graphics {each.get('type', '')}: {', '.join(fixed)} is chosen at start instead"
            )


def chardevs(root: ET.Element, told: Told) -> None:
    """Consoles and channels: no file, socket or port of the host that the original uses, too."""
    devices = devices_of(root)
    for tag in ("serial", "console", "parallel", "channel", "redirdev", "smartcard"):
        for each in devices.findall(tag):
            if remove(each, "log"):
                told.changes.append(f"{tag}: its log file was removed")
            kind = each.get("type", "pty" if tag in ("serial", "console") else "")
            if tag == "smartcard":
                if each.get("mode") == "passthrough" and kind == "spicevmc":
                    continue
                devices.remove(each)
                told.warnings.append("the smart card of the host was removed")
            elif tag == "redirdev":
                if kind != "spicevmc":
                    devices.remove(each)
                    told.warnings.append(f"USB redirection by {kind} was removed")
            elif kind == "pty":
                remove(each, "source")
            elif kind not in OWN_CHARDEVS:
                _private_chardev(devices, each, kind, told)


def _private_chardev(devices: ET.Element, each: ET.Element, kind: str, told: Told) -> None:
    target = each.find("target")
    is_virtio = target is not None and target.get("type") == "virtio"
    if each.tag == "channel" and not is_virtio:
        devices.remove(each)
        told.warnings.append(f"a channel of type {kind} was removed: it is the original's")
        return
    name = target.get("name", "") if target is not None else ""
    source = each.find("source")
    is_own_socket = kind == "unix" and (source is None or source.get("mode") == "bind")
    for part in ("source", "protocol"):
        remove(each, part)
    if is_virtio and (name == domain_model.AGENT_CHANNEL or is_own_socket):
        # libvirt makes a socket of the domain's own
        each.set("type", "unix")
        return
    each.set("type", "pty")
    told.changes.append(f"{each.tag} {name}".rstrip() + f" is a pty, not of type {kind}")


def host_devices(root: ET.Element, told: Told, *, trusted: bool = False) -> None:
    """What exists only once on a host: it stays with the original.

    ``trusted``: a directory of the host that is shared for reading stays.
    """
    devices = devices_of(root)
    for each in devices.findall("hostdev"):
        devices.remove(each)
        told.warnings.append(f"host device ({each.get('type', 'unknown')}) was removed")
    for each in devices.findall("input"):
        if each.get("type") in HOST_INPUTS:
            devices.remove(each)
            told.warnings.append(f"input device of the host ({each.get('type')}) was removed")
    if remove(devices, "lease"):
        told.warnings.append("leases were removed: they are the original's")
    for each in devices.findall("filesystem"):
        own = each.get("type", "mount") == "ram" or each.find("readonly") is not None
        if not trusted or not own or each.find("source[@socket]") is not None:
            devices.remove(each)
            target = each.find("target")
            tag = target.get("dir", "") if target is not None else ""
            told.warnings.append(f"shared directory {tag} was removed: it is the host's")
    _memory(root, devices, told)
    for each in devices.findall("rng"):
        backend = each.find("backend")
        if backend is not None and backend.get("model") == "egd":
            each.remove(backend)
            ET.SubElement(each, "backend", model="random").text = "/dev/urandom"
            told.changes.append("random numbers come from /dev/urandom, not from a server")
    for each in devices.findall("audio[@type='file']"):
        each.attrib.pop("path", None)
        each.set("type", "none")
        told.changes.append("sound is not written to a file")


def _memory(root: ET.Element, devices: ET.Element, told: Told) -> None:
    for each in devices.findall("shmem"):
        if each.find("server") is not None:
            devices.remove(each)
            told.warnings.append(
                f"shared memory {each.get('name', '')} was removed: it has a server"
            )
        else:
            name = f"{root.findtext('name', '')}-{each.get('name', '')}"
            told.changes.append(f"shared memory {each.get('name', '')} is {name}")
            each.set("name", name)
    for each in devices.findall("memory"):
        if each.find("./source/path") is not None:
            devices.remove(each)
            path = each.findtext("./source/path", "")
            told.warnings.append(f"memory device on {path} was removed: it is not in the backup")
    if remove(devices, "pstore"):
        told.warnings.append("the persistent store (pstore) was removed: it is not in the backup")
    for each in devices.findall("vsock/cid"):
        if each.get("auto") != "yes" or each.get("address"):
            each.attrib.clear()
            each.set("auto", "yes")
            told.changes.append("the vsock address is chosen at start")


def command_line(root: ET.Element, told: Told) -> None:
    """Words that the definition gives to QEMU by itself may name anything of the original's."""
    line = root.find(f"{{{QEMU_NAMESPACE}}}commandline")
    count = remove(line, f"{{{QEMU_NAMESPACE}}}arg")
    if count:
        told.warnings.append(
            f"{count} words that the definition gave to QEMU (qemu:commandline) were removed: "
            f"they may name files or ports of the original"
        )


def devices_of(root: ET.Element) -> ET.Element:
    """The ``<devices>`` of a domain."""
    found = root.find("devices")
    return found if found is not None else ET.SubElement(root, "devices")
