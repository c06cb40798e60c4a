"""The XML of backup jobs and checkpoints; built by a library, so that no name can break out.

Sources: libvirt's "Backup XML format" and "Checkpoint XML format" pages.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree as ET

from nbdbackupd import documents
from nbdbackupd.errors import CheckpointError, DomainError

UNTRACKED = "no"
TRACKED = "bitmap"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobDisk:
    """A disk of a job to begin; an empty ``base`` reads it in full, else what changed since.

    ``bitmap`` is the name that the NBD export gives to the changes. ``scratch`` is the image that
    QEMU writes in push mode.
    """

    target: str
    scratch: str
    base: str = ""
    bitmap: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackupJob:
    """A job that runs: its server, and its scratch (push mode: target) files by disk."""

    mode: str
    socket: str = ""
    server: str = ""
    scratch: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"a backup job in {self.mode} mode"]
        if self.socket:
            parts.append(f"NBD socket {self.socket}")
        elif self.server:
            parts.append(f"NBD server {self.server}")
        parts += [f"{target} uses {path}" for target, path in self.scratch.items() if path]
        return ", ".join(parts)


def backup_xml(socket: str, disks: Sequence[JobDisk], others: Collection[str]) -> str:
    """Return the XML of a pull job on a Unix socket; ``others`` are disks that stay out of it."""
    root = ET.Element("domainbackup", mode="pull")
    ET.SubElement(root, "server", transport="unix", socket=socket)
    parent = ET.SubElement(root, "disks")
    for disk in disks:
        element = ET.SubElement(
            parent, "disk", name=disk.target, backup="yes", type="file", exportname=disk.target
        )
        if disk.base:
            element.set("backupmode", "incremental")
            element.set("incremental", disk.base)
            element.set("exportbitmap", disk.bitmap)
        else:
            element.set("backupmode", "full")
        ET.SubElement(element, "scratch", file=disk.scratch)
    for target in others:
        ET.SubElement(parent, "disk", name=target, backup="no")
    return ET.tostring(root, encoding="unicode")


def push_xml(disks: Sequence[JobDisk], others: Collection[str]) -> str:
    """Return the XML of a push job into qcow2 images that are there; ``others`` as above."""
    root = ET.Element("domainbackup", mode="push")
    parent = ET.SubElement(root, "disks")
    for disk in disks:
        element = ET.SubElement(parent, "disk", name=disk.target, backup="yes", type="file")
        element.set("backupmode", "incremental" if disk.base else "full")
        if disk.base:
            element.set("incremental", disk.base)
        ET.SubElement(element, "driver", type="qcow2")
        ET.SubElement(element, "target", file=disk.scratch)
    for target in others:
        ET.SubElement(parent, "disk", name=target, backup="no")
    return ET.tostring(root, encoding="unicode")


def checkpoint_xml(name: str, tracked: Collection[str], others: Collection[str]) -> str:
    """Return the XML of a new checkpoint; the bitmaps of ``tracked`` get its name."""
    root = ET.Element("domaincheckpoint")
    ET.SubElement(root, "name").text = name
    disks = ET.SubElement(root, "disks")
    for target in tracked:
        ET.SubElement(disks, "disk", name=target, checkpoint=TRACKED)
    for target in others:
        ET.SubElement(disks, "disk", name=target, checkpoint=UNTRACKED)
    return ET.tostring(root, encoding="unicode")


def parse_backup_job(xml: str) -> BackupJob:
    """Read what virDomainBackupGetXMLDesc says about a job.

    Raises DomainError if the text is something else.
    """
    root = documents.parse_xml(xml, "domainbackup", DomainError)
    server = root.find("server")
    attributes = dict(server.attrib) if server is not None else {}
    host = attributes.get("name", "")
    return BackupJob(
        mode=root.get("mode", "push"),
        socket=attributes.get("socket", ""),
        server=f"{host}:{attributes.get('port', '')}" if host else "",
        scratch={
            disk.get("name", ""): _file(disk)
            for disk in root.findall("./disks/disk")
            if disk.get("backup", "yes") == "yes"
        },
    )


def _file(disk: ET.Element) -> str:
    for tag in ("scratch", "target"):
        element = disk.find(tag)
        if element is not None:
            return element.get("file") or element.get("dev") or ""
    return ""


def checkpoint_name(xml: str) -> str:
    """Return the name in a checkpoint XML.

    Raises CheckpointError.
    """
    return documents.parse_xml(xml, "domaincheckpoint", CheckpointError).findtext("name", "")


def sound_sizes(xml: str) -> dict[str, int]:
    """Read a checkpoint XML with sizes: bytes that changed since then, by disk.

    libvirt gives a size only for a disk whose bitmaps, from this checkpoint to now, are all
    there and usable; a disk that is missing here can't be read incrementally from it.
    Raises CheckpointError.
    """
    root = documents.parse_xml(xml, "domaincheckpoint", CheckpointError)
    found: dict[str, int] = {}
    for disk in root.findall("./disks/disk"):
        size = disk.get("size")
        if disk.get("checkpoint") == TRACKED and size is not None and size.isdecimal():
            found[disk.get("name", "")] = int(size)
    return found


def redefinable(xml: str, targets: Collection[str]) -> str:
    """Make a checkpoint XML that libvirt takes for a redefinition of a stored one.

    It is built anew of the few words that are needed: the stored one comes out of a set. The old
    domain definition goes, since its UUID and disks must match otherwise, and libvirt would run its
    emulator. So do the parent, which libvirt may not know any more (bitmaps need none), and the
    disks beyond ``targets``. Raises CheckpointError if the text is none, or nothing would be left.
    """
    root = documents.parse_xml(xml, "domaincheckpoint", CheckpointError)
    name = root.findtext("name", "")
    made = ET.Element("domaincheckpoint")
    for tag, text in (
        ("name", name),
        ("description", root.findtext("description", "")),
        # required, and any number will do (measured)
        ("creationTime", root.findtext("creationTime", "1")),
    ):
        if text:
            ET.SubElement(made, tag).text = text
    disks = ET.SubElement(made, "disks")
    for disk in root.findall("./disks/disk"):
        if disk.get("name") in targets:
            words = {key: disk.get(key, "") for key in ("name", "checkpoint", "bitmap")}
            ET.SubElement(disks, "disk", {key: text for key, text in words.items() if text})
    if not any(disk.get("checkpoint") == TRACKED for disk in disks):
        raise CheckpointError(f"checkpoint {name} tracks none of the disks: {', '.join(targets)}")
    return ET.tostring(made, encoding="unicode")


def tracked(xml: str) -> dict[str, str]:
    """Return the bitmaps of a checkpoint XML: name by disk.

    Raises CheckpointError.
    """
    root = documents.parse_xml(xml, "domaincheckpoint", CheckpointError)
    name = root.findtext("name", "")
    return {
        disk.get("name", ""): disk.get("bitmap") or name
        for disk in root.findall("./disks/disk")
        if disk.get("checkpoint") == TRACKED
    }


def creation_time(xml: str) -> str:
    """Return when a checkpoint was made, in seconds since 1970 as text; empty if it is not told.

    Raises CheckpointError.
    """
    return (
        documents.parse_xml(xml, "domaincheckpoint", CheckpointError)
        .findtext("creationTime", "")
        .strip()
    )
