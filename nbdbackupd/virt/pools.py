"""Volumes of a storage pool: made, found and removed by libvirt."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

import libvirt

from nbdbackupd import documents
from nbdbackupd.errors import DomainError, NotSupportedError
from nbdbackupd.virt import fault
from nbdbackupd.virt.connection import Connection

IN_DIRECTORY: Final = frozenset({"dir", "fs", "netfs"})
ON_DEVICES: Final = frozenset({"logical"})
BUSY: Final = "asynchronous jobs running"
BUSY_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class NewVolume:
    """A volume to make: ``size`` is the disk's, in bytes."""

    name: str
    size: int
    format: str


class Pool:
    """A storage pool that is active, whose volumes lie below ``directory``.

    All methods may be used from any thread.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        """Find the pool.

        Raises DomainError if there is none, or it is not active; NotSupportedError for a kind
        in which we can't fill volumes.
        """
        self.name = name
        self._connection = connection
        self._lock = threading.Lock()
        with fault.translate(f"can't use storage pool {name}"):
            pool = self._pool()
            root = documents.parse_xml(pool.XMLDesc(0), "pool", DomainError)
            is_active = pool.isActive()
        if not is_active:
            raise DomainError(
                f"storage pool {name} is not active: start it with 'virsh pool-start {name}'"
            )
        self.kind = root.get("type", "")
        self.directory = root.findtext("./target/path", "")
        if self.kind not in IN_DIRECTORY | ON_DEVICES:
            raise NotSupportedError(
                f"storage pool {name} is of type {self.kind}: disks can only be restored to one "
                f"of type {', '.join(sorted(IN_DIRECTORY | ON_DEVICES))}"
            )

    @property
    def on_devices(self) -> bool:
        """Whether its volumes are block devices, so that their content is the disk itself."""
        return self.kind in ON_DEVICES

    def has(self, name: str) -> bool:
        """Tell whether there is a volume of that name. Raises DomainError."""
        with self._refreshed() as pool:
            return name in pool.listVolumes()

    def create(self, volume: NewVolume) -> str:
        """Make a volume and return its path; it is sparse where it is a file.

        Raises DomainError.
        """
        root = ET.Element("volume")
        ET.SubElement(root, "name").text = volume.name
        ET.SubElement(root, "capacity", unit="bytes").text = str(volume.size)
        if not self.on_devices:
            ET.SubElement(root, "allocation", unit="bytes").text = "0"
            target = ET.SubElement(root, "target")
            ET.SubElement(target, "format", type=volume.format)
        with fault.translate(f"can't make volume {volume.name} in storage pool {self.name}"):
            with self._lock:
                made = self._pool().createXML(ET.tostring(root, encoding="unicode"), 0)
            return made.path()

    def delete(self, name: str) -> None:
        """Remove a volume. Raises DomainError."""
        with self._refreshed() as pool:
            pool.storageVolLookupByName(name).delete(0)

    def refresh(self) -> None:
        """Have libvirt look at the volumes anew. Raises DomainError."""
        with self._refreshed():
            pass

    @contextmanager
    def _refreshed(self) -> Iterator[libvirt.virStoragePool]:
        with fault.translate(f"storage pool {self.name} fails"), self._lock:
            pool = self._pool()
            deadline = time.monotonic() + BUSY_SECONDS
            while not _is_refreshed(pool, deadline):
                time.sleep(POLL_SECONDS)
            yield pool

    def _pool(self) -> libvirt.virStoragePool:
        _, handle = self._connection.current()
        return handle.storagePoolLookupByName(self.name)


def _is_refreshed(pool: libvirt.virStoragePool, deadline: float) -> bool:
    """Refresh; False while libvirt makes a volume for anybody: it refuses then (9.0, measured)."""
    try:
        pool.refresh(0)
    except libvirt.libvirtError as err:
        if BUSY not in fault.line(err) or time.monotonic() > deadline:
            raise
        return False
    return True
