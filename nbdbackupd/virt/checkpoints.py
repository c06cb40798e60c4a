"""libvirt's checkpoints of a domain.

Measured with libvirt 9.0.0 on a running domain: the XML with sizes has a ``size`` only for disks
whose bitmap is sound; it is gone after the bitmap was removed or lost with a killed QEMU. Asking
works while a backup job runs and while the guest is paused, and does not taint the domain. Of an
inactive domain libvirt tells no sizes ("domain is not running").
"""

from collections.abc import Collection
from enum import StrEnum

import libvirt

from nbdbackupd.errors import CheckpointError, DomainError
from nbdbackupd.model import jobxml
from nbdbackupd.virt.domain import Domain


class Deleted(StrEnum):
    """What ``delete`` did; after METADATA the images may still hold the bitmap."""

    ABSENT = "absent"
    ALL = "all"
    METADATA = "metadata"


def names(domain: Domain) -> list[str]:
    """Return the sorted names of all checkpoints of the domain, foreign ones included."""
    if domain.is_gone():
        return []
    found = domain.call("can't list its checkpoints", lambda each: each.listAllCheckpoints())
    return sorted(checkpoint.getName() for checkpoint in found)


def is_known(domain: Domain, name: str) -> bool:
    """Tell whether libvirt has a checkpoint of that name, without listing all of them."""
    if domain.is_gone():
        return False
    try:
        domain.call(
            f"can't look up checkpoint {name}", lambda each: each.checkpointLookupByName(name)
        )
    except CheckpointError:
        return False
    return True


def xml(domain: Domain, name: str) -> str:
    """Return a checkpoint's XML without the domain definition in it: enough to redefine.

    Raises CheckpointError if there is none of that name.
    """
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
    return domain.call(
        f"can't read checkpoint {name}",
        lambda each: each.checkpointLookupByName(name).getXMLDesc(flags),
    )


def sound_sizes(domain: Domain, name: str) -> dict[str, int]:
    """Return the bytes that changed since the checkpoint, for each disk that can tell.

    A disk that is missing in the result can't be read incrementally from this checkpoint.
    Raises CheckpointError if there is none of that name; DomainError if the domain is off.
    """
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE | libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
    text = domain.call(
        f"can't read the sizes of checkpoint {name}",
        lambda each: each.checkpointLookupByName(name).getXMLDesc(flags),
    )
    return jobxml.sound_sizes(text)


def redefine(domain: Domain, stored: str, targets: Collection[str]) -> None:
    """Make libvirt know a checkpoint again, for the disks ``targets``, from its stored XML.

    The bitmaps are not looked at (then one broken disk would refuse all): see ``sound_sizes``.
    Raises CheckpointError.
    """
    _redefine(domain, jobxml.redefinable(stored, targets))


def _redefine(domain: Domain, text: str) -> None:
    name = jobxml.checkpoint_name(text)
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
    try:
        domain.call(
            f"can't redefine checkpoint {name}",
            lambda each: each.checkpointCreateXML(text, flags),
        )
    except DomainError as err:
        raise CheckpointError(err.message, **err.fields) from err


def delete(domain: Domain, name: str) -> Deleted:
    """Delete a checkpoint and its bitmaps; none of that name is fine.

    Where a bitmap is lost libvirt deletes nothing: then those of the other disks are deleted
    and the rest is metadata. Of an inactive domain only the metadata can be deleted.
    Raises DomainError if libvirt keeps the checkpoint.
    """
    if not is_known(domain, name):
        return Deleted.ABSENT
    if not domain.is_active():
        forget(domain, name)
        return Deleted.METADATA
    try:
        _delete(domain, name, 0)
    except DomainError:
        return _delete_rest(domain, name)
    return Deleted.ALL


def _delete_rest(domain: Domain, name: str) -> Deleted:
    try:
        sound = sound_sizes(domain, name)
        if sound:
            redefine(domain, xml(domain, name), sound)
            _delete(domain, name, 0)
            return Deleted.ALL
    except DomainError:
        if not is_known(domain, name):
            return Deleted.ABSENT
    forget(domain, name)
    return Deleted.METADATA


def forget(domain: Domain, name: str) -> None:
    """Make libvirt forget a checkpoint; the images stay as they are. Raises DomainError."""
    _delete(domain, name, libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def _delete(domain: Domain, name: str, flags: int) -> None:
    domain.call(
        f"can't delete checkpoint {name}",
        lambda each: each.checkpointLookupByName(name).delete(flags),
    )
