"""Finding a domain, also a transient one that has ended and that libvirt has forgotten."""

from pathlib import Path

from nbdbackupd.errors import DomainNotFoundError
from nbdbackupd.source import kept
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain, Ending
from nbdbackupd.virt.ended import EndedDomain


def find(connection: Connection, name: str, runtime_dir: Path) -> Domain:
    """Find a domain by name or UUID; if libvirt does not know it, by what its hook has kept.

    That is for a transient domain that has ended here. One that was undefined, or that may live
    on elsewhere, is not found. Raises DomainNotFoundError, DomainError.
    """
    try:
        return Domain.find(connection, name)
    except DomainNotFoundError as err:
        known = kept.read(runtime_dir, name)
        if known is None:
            raise
        why_not = known.why_not()
        if why_not:
            fields = {**err.fields, "reason": why_not}
            raise DomainNotFoundError(f"{err.message}; {why_not}", **fields) from err
        ending = known.end.ending if known.end is not None else Ending.UNKNOWN
        return EndedDomain(connection, known.name, known.uuid, kept=known.xml, ending=ending)
