"""Domains without a guest, for what is done to images while a domain is off.

libvirt's own test driver keeps them: its states and definitions are libvirt's, it only has no
QEMU. Nothing else of a host is needed.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from nbdbackupd.errors import NbdbackupError
from nbdbackupd.model.chain import ImageLayer
from nbdbackupd.source import lease
from nbdbackupd.source.lease import Lease
from nbdbackupd.source.offline import OfflineDisk, OfflineRequest
from nbdbackupd.virt.connection import open_connection
from nbdbackupd.virt.domain import Domain

URI = "test:///default"


@contextmanager
def test_domain(name: str, disks: dict[str, Path]) -> Iterator[Domain]:
    """A domain of libvirt's test driver that was shut down."""
    root = ET.Element("domain", type="test")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "memory").text = "1024"
    ET.SubElement(ET.SubElement(root, "os"), "type").text = "hvm"
    devices = ET.SubElement(root, "devices")
    for target, path in disks.items():
        disk = ET.SubElement(devices, "disk", type="file", device="disk")
        ET.SubElement(disk, "driver", name="qemu", type="qcow2")
        ET.SubElement(disk, "source", file=os.fspath(path))
        ET.SubElement(disk, "target", dev=target, bus="virtio")
    with open_connection(URI) as connection:
        handle = connection.current()[1].defineXML(ET.tostring(root, encoding="unicode"))
        try:
            handle.create()
            handle.shutdown()
            yield Domain.find(connection, name)
        finally:
            if handle.isActive():
                handle.destroy()
            handle.undefine()


class Off:
    """A domain that is off, its directory and lease, and requests for it."""

    def __init__(self, domain: Domain, runtime: Path, held: Lease) -> None:
        self.domain = domain
        self.runtime = runtime
        self.lease = held
        self.trouble: list[NbdbackupError] = []

    def request(self, *disks: OfflineDisk, **more: Any) -> OfflineRequest:
        """A request for these disks: since checkpoint ``cp.1``, with a new one ``cp.2``."""
        request = OfflineRequest(
            domain=self.domain,
            disks=disks,
            socket=self.runtime / self.domain.uuid / "s",
            lease=self.lease,
            on_trouble=self.trouble.append,
            cancelled=lambda: None,
            base_checkpoint="cp.1",
            new_checkpoint="cp.2",
            created=1700000000,
        )
        return replace(request, **more)

    @property
    def handle(self) -> libvirt.virDomain:
        """libvirt's object."""
        return self.domain.handle()


@contextmanager
def off(runtime: Path, name: str, disks: dict[str, Path]) -> Iterator[Off]:
    """A domain that is off, with a lease on it that this process holds."""
    with test_domain(name, disks) as domain:
        (runtime / domain.uuid).mkdir(parents=True)
        with lease.hold(
            runtime, domain=domain.name, uuid=domain.uuid, run_id="r1",
            is_active=domain.is_active, cancelled=lambda: None,
        ) as held:  # fmt: skip
            yield Off(domain, runtime, held)


def disk(
    target: str,
    layers: Sequence[Path],
    *,
    delta: int = 0,
    tracked: bool = True,
    format: str = "qcow2",
) -> OfflineDisk:
    """A disk of these images, top first; a delta of the first ``delta`` of them, or whole."""
    paths = [os.fspath(path) for path in layers]
    return OfflineDisk(
        target=target,
        layers=tuple(ImageLayer(path, format) for path in paths),
        delta=delta > 0,
        tracked=tracked,
        bitmap_layers=tuple(paths[:delta]),
    )
