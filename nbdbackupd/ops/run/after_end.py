"""Whether a guest's end is one after which the domain is to be saved."""

from typing import Final

from nbdbackupd.model import throwaway
from nbdbackupd.virt.domain import Domain, Ending

NOTHING: Final = {
    Ending.SAVED: "its state is saved, and it will go on from there",
    Ending.MIGRATED: "it was migrated to another host, which has it now",
    Ending.FAILED: "its start has failed, no guest has run",
    Ending.SNAPSHOT: "it was put back to a snapshot",
}
"""Ends of which libvirt says that nothing was finished. After a crash, or an end that libvirt
does not know, the bitmaps decide: a disk whose bitmap was not stored is read whole."""


def why_not(domain: Domain) -> str:
    """Why the domain is not to be saved after its end; empty if it is. Raises DomainError."""
    if throwaway.is_marked(domain.xml()):
        return "it is one of our own that is thrown away"
    if domain.is_active():
        return "it runs again"
    return NOTHING.get(domain.ending(), "")
