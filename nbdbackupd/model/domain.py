"""What a libvirt domain XML says about the things that a backup needs; nothing else of it.

Source: libvirt's "Domain XML format" page. The parser takes live and inactive XML alike, ignores
what it does not know, and never trusts a name: targets and paths are plain text here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from xml.etree import ElementTree as ET

from nbdbackupd import documents
from nbdbackupd.errors import DomainError
from nbdbackupd.model.chain import ImageLayer

AGENT_CHANNEL = "org.qemu.guest_agent.0"
# ways a <source> element names what lies behind a disk, by disk type
SOURCE_ATTRIBUTES = ("file", "dev", "dir", "name", "volume", "path")


class Agent(StrEnum):
    """The guest agent's channel; only a live XML tells ``connected``."""

    ABSENT = "absent"
    DISCONNECTED = "disconnected"
    CONNECTED = "connected"


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """One ``<disk>``. ``layers`` is its backing chain as far as the XML knows it, top first.

    ``source`` is the top image: a path, ``pool/volume`` for a volume, the image's name for a
    network disk (its server, if it has none), empty for an empty drive. ``format`` is the
    driver's, since that is how the guest sees the bytes: libvirt reads a disk without one as raw,
    and probing the image would let the guest choose.
    """

    target: str
    device: str = "disk"
    type: str = "file"
    format: str = "raw"
    source: str = ""
    serial: str = ""
    readonly: bool = False
    transient: bool = False
    shareable: bool = False
    data_file: str = ""
    layers: tuple[ImageLayer, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """The parts of a domain's definition that a backup reads. Paths are as in the XML.

    ``has_iothreads``: a disk may be served by a thread of its own in QEMU. ``firmware`` (``efi``)
    tells that libvirt chooses loader and NVRAM by itself.
    """

    name: str
    uuid: str
    disks: tuple[Disk, ...] = ()
    loader: str = ""
    nvram: str = ""
    firmware: str = ""
    kernel: str = ""
    initrd: str = ""
    has_tpm: bool = False
    tpm_source: str = ""
    agent: Agent = Agent.ABSENT
    owner: tuple[int, int] | None = None
    has_iothreads: bool = False

    def disk(self, target: str) -> Disk:
        """Return the disk of that target name.

        Raises DomainError if the domain has none.
        """
        for disk in self.disks:
            if disk.target == target:
                return disk
        raise DomainError(f"domain {self.name} has no disk {target}", domain=self.name)


def is_uuid(text: str) -> bool:
    """Whether a text has the form of a UUID with dashes."""
    return re.fullmatch(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text) is not None


def parse_domain(xml: str) -> Domain:
    """Read a domain XML.

    ``owner`` is the (uid, gid) of the QEMU process where the XML carries a numeric DAC label,
    as a live XML does. Raises DomainError if the text is no domain XML.
    """
    root = documents.parse_xml(xml, "domain", DomainError)
    backend = root.find("./devices/tpm/backend[@type='emulator']")
    return Domain(
        name=root.findtext("name", ""),
        uuid=root.findtext("uuid", ""),
        disks=tuple(
            _parse_disk(element)
            for element in root.findall("./devices/disk")
            if element.find("target") is not None
        ),
        loader=root.findtext("./os/loader", "").strip(),
        nvram=_nvram(root),
        firmware=_attribute(root, "os", "firmware"),
        kernel=root.findtext("./os/kernel", ""),
        initrd=root.findtext("./os/initrd", ""),
        has_tpm=backend is not None,
        tpm_source=_attribute(backend, "source", "path") if backend is not None else "",
        agent=_agent(root),
        owner=_owner(root),
        has_iothreads=_has_iothreads(root),
    )


def _parse_disk(element: ET.Element) -> Disk:
    type_ = element.get("type", "file")
    format_ = _attribute(element, "driver", "type") or "raw"
    source = element.find("source")
    path = _source_text(source) or _source_place(source)
    layers = [ImageLayer(path, format_)] if path else []
    layer = element.find("backingStore")
    while layer is not None:
        below = _source_text(layer.find("source"))
        if below:
            layers.append(ImageLayer(below, _attribute(layer, "format", "type") or "raw"))
        layer = layer.find("backingStore")
    return Disk(
        target=_attribute(element, "target", "dev"),
        device=element.get("device", "disk"),
        type=type_,
        format=format_,
        source=path,
        serial=element.findtext("serial", ""),
        readonly=element.find("readonly") is not None,
        transient=element.find("transient") is not None,
        shareable=element.find("shareable") is not None,
        data_file=_source_text(element.find("./source/dataStore/source")),
        layers=tuple(layers),
    )


def _source_text(source: ET.Element | None) -> str:
    if source is None:
        return ""
    if source.get("volume") is not None:
        return f"{source.get('pool', '')}/{source.get('volume')}"
    return next((source.get(name, "") for name in SOURCE_ATTRIBUTES if source.get(name)), "")


def _source_place(source: ET.Element | None) -> str:
    """What lies behind a disk whose source has no name: a server's default export, an NVMe device.

    Such a disk is no empty drive (W-2).
    """
    if source is None:
        return ""
    protocol, host, address = source.get("protocol"), source.find("host"), source.find("address")
    if protocol:
        known = host.attrib if host is not None else {}
        place = known.get("name") or known.get("socket", "")
        return f"{protocol}://{place}:{known.get('port', '')}"
    if address is not None:
        return " ".join(f"{name}={value}" for name, value in sorted(address.attrib.items()))
    return ""


def _attribute(parent: ET.Element, tag: str, name: str) -> str:
    child = parent.find(tag)
    return child.get(name, "") if child is not None else ""


def _nvram(root: ET.Element) -> str:
    # since libvirt 8.5: <nvram type='file'><source file='...'/></nvram>
    nested = _source_text(root.find("./os/nvram/source"))
    return nested or root.findtext("./os/nvram", "").strip()


def _agent(root: ET.Element) -> Agent:
    for channel in root.findall("./devices/channel/target"):
        if channel.get("name") == AGENT_CHANNEL:
            connected = channel.get("state") == "connected"
            return Agent.CONNECTED if connected else Agent.DISCONNECTED
    return Agent.ABSENT


def _has_iothreads(root: ET.Element) -> bool:
    """Tell whether there are any, whoever uses them now: a disk or its controller may be next."""
    words = ("./iothreads", "./iothreadids/iothread", "./devices/*/driver[@iothread]")
    found = [element for word in words for element in root.findall(word)]
    return any(element.tag != "iothreads" or element.text != "0" for element in found)


def _owner(root: ET.Element) -> tuple[int, int] | None:
    for label in root.findall("./seclabel[@model='dac']"):
        owner = parse_dac_label(label.findtext("label", ""))
        if owner is not None:
            return owner
    return None


def parse_dac_label(label: str) -> tuple[int, int] | None:
    """Read ``+64055:+64055`` (libvirt's numeric form of a DAC label), or None for names."""
    user, colon, group = label.partition(":")
    if not colon or not user.startswith("+") or not group.startswith("+"):
        return None
    try:
        return int(user), int(group)
    except ValueError:
        return None


def same_image(recorded: tuple[ImageLayer, ...], current: tuple[ImageLayer, ...]) -> bool:
    """Tell whether a disk still is the one that was recorded.

    Both chains are top first. Taking an external snapshot puts a new image on top of the
    recorded one; committing takes the recorded top away and leaves one that was below it. Hence
    the recorded top must be part of the current chain or the current top part of the recorded
    one. A layer that merely both share further down (a template) proves nothing.
    """
    if not recorded or not current:
        return False
    return any(_same_layer(recorded[0], layer) for layer in current) or any(
        _same_layer(layer, current[0]) for layer in recorded
    )


def _same_layer(one: ImageLayer, other: ImageLayer) -> bool:
    """Files: same inode, and same path or same file system. Everything else: same path.

    The device number of a file system may change with a reboot and the path with a rename, but
    not both and the inode: a copy or a newly made image has another inode. ``one`` is the
    recorded layer, and an imported one has no inode: then the path must do.
    """
    if one.inode:
        return one.inode == other.inode and (one.path == other.path or one.device == other.device)
    return bool(one.path) and one.path == other.path


def bitmap_layers(
    recorded: tuple[ImageLayer, ...], current: tuple[ImageLayer, ...]
) -> tuple[ImageLayer, ...]:
    """The images, top first, that each must hold the bitmap of a point for its delta to be whole.

    Both chains are of one disk, see ``same_image``. A disk whose point was recorded with top
    image T and that has got overlays since then keeps a part of the delta in each layer from
    today's top down to T. If T was committed into the layer below, that one holds all of it.
    libvirt 9.0 looks at the top alone and reports a short delta without an error if a lower part
    is gone (measured).
    """
    if not recorded or not current:
        return ()
    for number, layer in enumerate(current):
        if _same_layer(recorded[0], layer):
            return current[: number + 1]
    return current[:1]


def unsound_bitmap(
    layers: tuple[ImageLayer, ...], bitmaps: Mapping[str, Mapping[str, bool]], name: str
) -> str:
    """Why bitmap ``name`` can't be used in one of these layers, or nothing.

    ``bitmaps`` tells, by path, the bitmaps of each image and whether they are sound.
    """
    for layer in layers:
        found = bitmaps.get(layer.path, {}).get(name)
        if found is None:
            return f"image {layer.path} has lost bitmap {name}"
        if not found:
            return f"bitmap {name} in image {layer.path} is inconsistent"
    return ""
