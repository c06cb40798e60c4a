"""Copies of single disks of a running domain (``virDomainBlockCopy``), and their pivot.

Measured with libvirt 9.0.0 and QEMU 7.2: a transient domain's disk whose chain ends at an NBD
server is copied whole into an existing image (flag REUSE_EXT), holes stay holes; ``cur`` equals
``end`` for a moment before the job is synchronous, so that only ``ready`` in the XML counts; the
pivot returns when it is done, and the disk then has no backing image.
"""

from xml.etree import ElementTree as ET

import libvirt

from nbdbackupd.model import bootxml
from nbdbackupd.model.bootxml import LiveDisk
from nbdbackupd.virt.domain import Domain


def begin(domain: Domain, target: str, path: str, form: str, *, bandwidth: int = 0) -> None:
    """Begin to copy a disk into an image that exists and has its size.

    ``bandwidth`` in bytes per second, 0 for no limit. Raises DomainError, BusyError.
    """
    disk = ET.Element("disk", type="file")
    ET.SubElement(disk, "driver", name="qemu", type=form)
    ET.SubElement(disk, "source", file=path)
    xml = ET.tostring(disk, encoding="unicode")
    limits = {libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: bandwidth} if bandwidth else {}
    flags = libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
    domain.call(
        f"can't copy disk {target}", lambda each: each.blockCopy(target, xml, limits, flags)
    )


def limit(domain: Domain, target: str, bandwidth: int) -> None:
    """Have a copy that goes on take ``bandwidth`` bytes per second, 0 for no limit.

    Raises DomainError.
    """
    flag = libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
    domain.call(
        f"can't limit the copy of disk {target}",
        lambda each: each.blockJobSetSpeed(target, bandwidth, flag),
    )


def disks(domain: Domain) -> dict[str, LiveDisk]:
    """What each disk stands on now, by target. Raises DomainError."""
    return {each.target: each for each in bootxml.live_disks(domain.xml())}


def done(domain: Domain, target: str) -> tuple[int, int] | None:
    """How far the copy of a disk is: bytes done and in all; None if there is no job.

    Raises DomainError.
    """
    info = domain.call(
        f"can't ask for the copy of {target}", lambda each: each.blockJobInfo(target)
    )
    return (info["cur"], info["end"]) if info else None


def pivot(domain: Domain, target: str) -> None:
    """Have the guest use the copy from now on. Raises DomainError."""
    flag = libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT
    domain.call(
        f"can't change disk {target} over to its copy",
        lambda each: each.blockJobAbort(target, flag),
    )
