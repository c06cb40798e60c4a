"""What of a definition is of its host: found by the allow list, and taken away.

A definition comes out of a backup set, and whoever could write there could write anything into it:
a program that libvirt runs as root, an account for QEMU, a file that is given to QEMU's account
when the domain starts. So nothing is let through that is not in ``model.allowed`` or is a file or
a disk of what is restored. Sources: libvirt's "Domain XML format" page; the security drivers give
a domain's kernel, loader, ACPI tables and images to QEMU, whatever file that is.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final
from xml.etree import ElementTree as ET

from nbdbackupd.model import allowed, throwaway
from nbdbackupd.model.allowed import NAME, PLAIN, RULE, TEXT

TYPES: Final = ("kvm", "qemu", "hvf")
"""Domains that QEMU runs: the list says nothing of what other drivers of libvirt make of it."""

MEDIA: Final = ("cdrom", "floppy")
DUMPS: Final = {"coredump-destroy": "destroy", "coredump-restart": "restart"}
SCHEDULER: Final = "it may come before all that the host does"
FILLS: Final = "it fills the host's disk with dumps"
RANDOM: Final = ("/dev/urandom", "/dev/random", "/dev/hwrng")
NETWORKS: Final = ("network", "bridge", "user", "ethernet", "direct", "internal", "null")
CHARDEVS: Final = (
    "pty",
    "null",
    "vc",
    "stdio",
    "unix",
    "spicevmc",
    "spiceport",
    "qemu-vdagent",
    "dbus",
)
HOST_ATTRIBUTES: Final = (
    "path",
    "file",
    "dev",
    "dir",
    "socket",
    "rendernode",
    "logFile",
    "template",
)
SHOWN: Final = 8
MAX_SHOWN: Final = 80
MAX_VALUE: Final = 4096
_WORD: Final = re.compile(r"[\w .,:+*^()=|-]*", re.ASCII)
_NAME: Final = re.compile(r"[^/\x00-\x1f\x7f]*")
_TEXT: Final = re.compile(r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*")
_ZONE: Final = re.compile(r"[\w+-]+(?:/[\w+-]+)*", re.ASCII)
_QEMU: Final = re.compile(
    r"/usr/(?:s?bin|libexec|lib(?:64)?/qemu(?:-kvm)?)/(?:qemu-system-\w+|qemu-kvm|kvm|kvm-spice)"
    r"|/run/libvirt/nix-emulators/(?:qemu-system-\w+|qemu-kvm)",
    re.ASCII,
)
_FIRMWARE: Final = re.compile(
    r"(?:/usr/share/[\w.+-]*(?:OVMF|AAVMF|ovmf|edk2|qemu|efi|seabios|u-boot|opensbi|slof)[\w.+-]*"
    r"|/run/libvirt/nix-ovmf)(?:/\w[\w.+-]*)+",
    re.ASCII,
)
WHY: Final[Mapping[str, str]] = {
    "bootloader": "a program of the host",
    "bootloader_args": "words for a program of the host",
    "seclabel": "labels and accounts of the host",
    "cputune/emulatorsched": SCHEDULER,
    "cputune/iothreadsched": SCHEDULER,
    "cputune/vcpusched": SCHEDULER,
    "idmap": "accounts of the host",
    "blkiotune/device": "a device of the host",
    "os": "a file of the host",
    "devices/emulator": "no QEMU of the system",
    "devices/filesystem": "a directory of the host",
    "devices/hostdev": "a device of the host",
    "devices/lease": "a file of the host",
    "devices/pstore": "a file of the host",
    "devices/interface/script": "a program of the host, run as root",
    "devices/interface/downscript": "a program of the host, run as root",
    "devices/interface/portForward": "ports of the host",
    "devices/interface/backend": "devices and files of the host",
    "devices/interface/rom": "a file of the host",
    "devices/graphics": "a socket or a display of the host",
    "devices/disk": "an image that was not restored",
}
PREFIXES: Final = re.compile(r"\{http://libvirt\.org/schemas/domain/(\w+)/1\.0\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """One thing of a host that a definition names: ``where`` it is, ``what``, and ``why`` not."""

    where: str
    what: str
    why: str

    @property
    def text(self) -> str:
        """Its place and words, printable and short."""
        return f"{self.where} {self.what}".rstrip() + f" ({self.why})"


@dataclass(slots=True)
class Sieve:
    """Takes away what is foreign.

    ``ours`` are the paths of what is restored, ``name`` is the new domain's, ``emulator`` the one
    that libvirt has chosen for it, if there is one. Disks whose targets
    are in ``spared`` stay as they are; what they name is in ``kept`` afterwards, the rest in
    ``removed``.
    """

    ours: Collection[str]
    name: str
    emulator: str = ""
    spared: Collection[str] = ()
    removed: list[Foreign] = field(default_factory=list)
    kept: list[Foreign] = field(default_factory=list)

    def sift(self, root: ET.Element) -> None:
        """Leave in a ``<domain>`` only what the list allows."""
        self._attributes(root, "")
        self._children(root, "")

    def _children(self, parent: ET.Element, path: str) -> None:
        for child in list(parent):
            child.tail = None
            where = f"{path}/{child.tag}".removeprefix("/")
            if self._is_spared(child, where):
                self._tell(self.kept, where, _show(child), _why(where))
                continue
            why = self._refuse(child, where)
            if why:
                for each, place in _leaves(child, where):
                    self._tell(self.removed, place, _show(each), why)
                parent.remove(child)
                continue
            if where == "metadata":
                continue
            self._attributes(child, where)
            self._children(child, where)

    def _is_spared(self, child: ET.Element, where: str) -> bool:
        return where == "devices/disk" and _target(child) in self.spared

    def _refuse(self, child: ET.Element, where: str) -> str:
        """Why an element may not be at all, or nothing."""
        kinds = allowed.entry(where)
        if kinds is None:
            return _why(where)
        rule = _ELEMENTS.get(where)
        why = rule(self, child) if rule is not None else ""
        text = (child.text or "").strip()
        if why or not text or where == "metadata":
            return why
        if "#" not in kinds:
            # libvirt does not read it
            child.text = None
            return ""
        return "" if self._fits(kinds["#"], where, "#", child.text or "") else _why(where)

    def _attributes(self, element: ET.Element, where: str) -> None:
        kinds = allowed.entry(where) or {}
        for name, value in list(element.attrib.items()):
            kind = kinds.get(name)
            if kind is None or not self._fits(kind, where, name, value):
                self._tell(self.removed, where, f"{name}={_short(value)}", _why(where, name))
                del element.attrib[name]

    def _fits(self, kind: str, where: str, name: str, value: str) -> bool:
        if kind == RULE:
            return _VALUES[f"{where} {name}"](self, value)
        pattern = {PLAIN: _WORD, NAME: _NAME, TEXT: _TEXT}[kind]
        most = MAX_VALUE if kind != TEXT else 16 * MAX_VALUE
        if throwaway.NAME in value:
            return False
        return len(value) <= most and pattern.fullmatch(value) is not None

    def _tell(self, told: list[Foreign], where: str, what: str, why: str) -> None:
        place = PREFIXES.sub(r"\1:", where).removeprefix("devices/") or "domain"
        told.append(Foreign(where=_short(place, quote=False), what=what, why=why))


def is_of_a_system(emulator: str) -> bool:
    """Whether an emulator is one that a distribution installs."""
    return _QEMU.fullmatch(emulator) is not None


def is_firmware(path: str) -> bool:
    """Whether a path lies where systems have firmware for guests."""
    return _FIRMWARE.fullmatch(path) is not None


def _why(where: str, name: str = "") -> str:
    if "{" in where:
        return "words for QEMU or another hypervisor"
    parts = where.split("/")
    if name in HOST_ATTRIBUTES or parts[-1] == "log":
        return "a file or a device of the host"
    for count in range(len(parts), 0, -1):
        found = WHY.get("/".join(parts[:count]))
        if found:
            return found
    return WHY["seclabel"] if "seclabel" in parts else "not in the list of what is harmless"


def forget(root: ET.Element) -> None:
    """What libvirt itself makes up for each domain that runs: nobody misses it."""
    for label in root.findall("seclabel"):
        is_default = label.get("type") == "dynamic" and label.get("relabel", "yes") == "yes"
        if is_default and label.find("baselabel") is None:
            root.remove(label)
    for each in root.findall("devices/*"):
        if each.tag not in ("serial", "console", "parallel", "channel"):
            continue
        each.attrib.pop("tty", None)
        for source in each.findall("source"):
            path = source.get("path", "")
            if each.get("type") == "pty" or _is_libvirts_own(path):
                source.attrib.pop("path", None)
            if each.get("type") in ("pty", "unix") and source.get("mode", "bind") == "bind":
                source.attrib.pop("mode", None)


def _is_libvirts_own(path: str) -> bool:
    places = ("/var/lib/libvirt/qemu/channel/", "/run/libvirt/qemu/channel/")
    return path.startswith(places) and ".." not in path.split("/")


def _show(element: ET.Element) -> str:
    """The words of an element and those in it; what may be a path comes first."""
    words: list[tuple[bool, str]] = []
    for each in element.iter():
        found = [(f"{name}=", value) for name, value in each.items()]
        found += [("", text)] if (text := (each.text or "").strip()) else []
        words += [("/" not in text, f"{name}{_short(text)}") for name, text in found]
    told = [word for _, word in sorted(words, key=lambda each: each[0])]
    return " ".join((*told[:SHOWN], "…") if len(told) > SHOWN else told)


def _leaves(element: ET.Element, where: str) -> Iterator[tuple[ET.Element, str]]:
    """The elements that are told one by one: words for QEMU must not hide behind each other."""
    if "{" not in where or not len(element):
        yield element, where
        return
    for child in element:
        yield from _leaves(child, f"{where}/{child.tag}")


def _short(value: str, *, quote: bool = True) -> str:
    text = value if len(value) <= MAX_SHOWN else f"{value[: MAX_SHOWN - 1]}…"
    return repr(text) if quote or not text.isprintable() else text


def _target(disk: ET.Element) -> str:
    target = disk.find("target")
    return target.get("dev", "") if target is not None else ""


# What an element must be beyond the list: each tells why it may not, or nothing.


def _disk(sieve: Sieve, disk: ET.Element) -> str:
    sources = list(disk.iter("source"))
    fits = all(_is_ours(sieve, disk, source) for source in sources)
    return "" if fits and disk.find("backingStore/source") is None else _why("devices/disk")


def _is_ours(sieve: Sieve, disk: ET.Element, source: ET.Element) -> bool:
    match disk.get("type"):
        case "file":
            return source.get("file") in sieve.ours
        case "block":
            return source.get("dev") in sieve.ours
        case "network":
            hosts = source.findall("host")
            return bool(hosts) and all(
                host.get("transport") == "unix" and host.get("socket") in sieve.ours
                for host in hosts
            )
    return False


def _interface(_sieve: Sieve, card: ET.Element) -> str:
    if card.get("type") not in NETWORKS:
        return "a device, a socket or another program of the host"
    if card.get("type") == "direct" and card.find("source[@mode='passthrough']") is not None:
        return "it takes the host's own card"
    return ""


def _input(_sieve: Sieve, each: ET.Element) -> str:
    return "a device of the host" if each.get("type") in ("passthrough", "evdev") else ""


def _chardev(_sieve: Sieve, each: ET.Element) -> str:
    if each.get("type", "pty") not in CHARDEVS:
        return "a file, a socket, a port or a device of the host"
    own = each.get("type") != "unix" or all(
        source.get("mode", "bind") == "bind" and not source.get("path")
        for source in each.findall("source")
    )
    return "" if own else "a socket of the host"


def _redirected(_sieve: Sieve, each: ET.Element) -> str:
    return "" if each.get("type") == "spicevmc" else "a device or a port of the host"


def _smartcard(_sieve: Sieve, each: ET.Element) -> str:
    own = each.get("mode") == "passthrough" and each.get("type") == "spicevmc"
    return "" if own else "the host's smart card"


def _memory(_sieve: Sieve, each: ET.Element) -> str:
    return "a file or a device of the host" if each.find("source/path") is not None else ""


def _tpm(_sieve: Sieve, each: ET.Element) -> str:
    own = all(backend.get("type") == "emulator" for backend in each.findall("backend"))
    return "" if own else "a device or a socket of the host"


def _smbios(_sieve: Sieve, each: ET.Element) -> str:
    return "the host's serial numbers" if each.get("mode") == "host" else ""


def _sysinfo(_sieve: Sieve, entry: ET.Element) -> str:
    return "a file of the host" if "file" in entry.attrib else ""


def _crash(sieve: Sieve, each: ET.Element) -> str:
    text = (each.text or "").strip()
    if text in DUMPS:
        sieve.removed.append(Foreign(where="on_crash", what=repr(text), why=FILLS))
        each.text = DUMPS[text]
    return ""


def _watchdog(sieve: Sieve, each: ET.Element) -> str:
    if each.get("action") == "dump":
        sieve.removed.append(Foreign(where="watchdog", what="action='dump'", why=FILLS))
        each.set("action", "none")  # the guest goes on, as after a dump
    return ""


def _random(sieve: Sieve, backend: ET.Element) -> str:
    model = backend.get("model", "random")
    if model == "builtin" or (model == "random" and (backend.text or RANDOM[0]) in RANDOM):
        return ""
    sieve.removed.append(
        Foreign(where="rng", what=_show(backend), why="random numbers come from /dev/urandom")
    )
    backend.clear()
    backend.set("model", "random")
    backend.text = RANDOM[0]
    return ""


def _metadata(sieve: Sieve, each: ET.Element) -> str:
    """Who carries our own mark is not backed up."""
    for child in list(each):
        if throwaway.NAME in ET.tostring(child, encoding="unicode"):
            each.remove(child)
            sieve.removed.append(
                Foreign(where="metadata", what=_show(child), why="a mark of our own")
            )
    if throwaway.NAME in (each.text or ""):
        each.text = None
    return ""


def _audio(_sieve: Sieve, each: ET.Element) -> str:
    if each.get("type") == "file":
        each.set("type", "none")
    return ""


def _loader(_sieve: Sieve, each: ET.Element) -> str:
    if is_firmware(each.text or ""):
        # the system's, for all domains
        each.set("readonly", "yes")
    return ""


_ELEMENTS: Final[Mapping[str, Callable[[Sieve, ET.Element], str]]] = {
    "devices/disk": _disk,
    "devices/interface": _interface,
    "devices/input": _input,
    "devices/serial": _chardev,
    "devices/console": _chardev,
    "devices/parallel": _chardev,
    "devices/channel": _chardev,
    "devices/redirdev": _redirected,
    "devices/smartcard": _smartcard,
    "devices/memory": _memory,
    "devices/tpm": _tpm,
    "devices/rng/backend": _random,
    "devices/audio": _audio,
    "devices/watchdog": _watchdog,
    "os/smbios": _smbios,
    "os/loader": _loader,
    "sysinfo/entry": _sysinfo,
    "on_crash": _crash,
    "metadata": _metadata,
}


def _restored(sieve: Sieve, value: str) -> bool:
    return value in sieve.ours


def _fixed(*values: str) -> Callable[[Sieve, str], bool]:
    return lambda _sieve, value: value in values


_VALUES: Final[Mapping[str, Callable[[Sieve, str], bool]]] = {
    "clock timezone": lambda _sieve, value: _ZONE.fullmatch(value) is not None,
    "devices/disk/source file": _restored,
    "devices/disk/source dev": _restored,
    "devices/disk/source/host socket": _restored,
    "devices/tpm/backend/source path": _restored,
    "os/kernel #": _restored,
    "os/initrd #": _restored,
    "os/nvram #": _restored,
    "os/loader #": lambda sieve, value: value in sieve.ours or is_firmware(value),
    "devices/emulator #": lambda sieve, value: value == sieve.emulator or is_of_a_system(value),
    "os/nvram template": lambda _sieve, value: is_firmware(value),
    "devices/interface/backend tap": _fixed("/dev/net/tun"),
    "devices/interface/backend vhost": _fixed("/dev/vhost-net"),
    "devices/rng/backend #": _fixed(*RANDOM),
    "devices/shmem name": lambda sieve, value: (
        value.startswith(f"{sieve.name}-") and _NAME.fullmatch(value) is not None
    ),
    "resource/partition #": _fixed("/machine"),
}
