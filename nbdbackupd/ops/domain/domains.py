"""Reaching libvirt, and finding a domain there.

Also a transient one that has ended and that libvirt has forgotten.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdbackupd import log
from nbdbackupd.errors import BusyError, ConfigError, DomainNotFoundError, NbdbackupError
from nbdbackupd.model.host import Host
from nbdbackupd.repo.runs import boot_id
from nbdbackupd.source import kept, ssh
from nbdbackupd.virt import connection, instance, jobs
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain, EndedDomain, Ending

SETTLE_SECONDS: Final = 10.0
HOSTS: Final = "hosts"
ID_LENGTH: Final = 16
POLL_SECONDS: Final = 0.1


@contextmanager
def connect_by_ssh(host: Host) -> Iterator[tuple[Connection, Host]]:
    """Open the connection to the libvirt of another host, whose files are reached as well.

    What we keep of that host's domains lies apart from what is of this one's, and of others.
    Raises ConfigError, DomainError, SourceError.
    """
    password = _password(host.password_file)
    with (
        log.hidden(password),
        ssh.connected(
            host.uri, host.runtime_dir, host.ssh_config, user=host.user, password=password
        ) as opened,
    ):
        own = Path(HOSTS, opened.where.id[:ID_LENGTH])
        runtime_dir, state_dir = host.runtime_dir / own, host.state_dir / own
        yield opened, replace(host, runtime_dir=runtime_dir, state_dir=state_dir)


@contextmanager
def connect(host: Host, *, any_host: bool = False) -> Iterator[Connection]:
    """Open the connection to libvirt.

    Only who touches no file of a guest takes ``any_host``. Raises ConfigError if the password file
    can't be read, DomainError if libvirt can't be reached or is another host's.
    """
    password = _password(host.password_file)
    with (
        log.hidden(password),
        connection.open_connection(
            host.uri,
            user=host.user,
            password=password,
            runtime_dir=None if any_host else host.runtime_dir,
        ) as opened,
    ):
        yield opened


def _password(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        return file.read_text().rstrip("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"can't read the password file {file}: {err}") from err


def find(libvirt: Connection, name: str, runtime_dir: Path) -> Domain:
    """Find a domain by name or UUID; if libvirt does not know it, by what its hook has kept.

    That is for a transient domain that has ended here. One that was undefined, or that may live
    on elsewhere, is not found. Raises DomainNotFoundError, DomainError.
    """
    try:
        return _settled(Domain.find(libvirt, name))
    except DomainNotFoundError as err:
        known = kept.read(runtime_dir, name)
        if known is None:
            raise
        why_not = known.why_not()
        if why_not:
            fields = {**err.fields, "reason": why_not}
            raise DomainNotFoundError(f"{err.message}; {why_not}", **fields) from err
        ending = known.end.ending if known.end is not None else Ending.UNKNOWN
        return EndedDomain(libvirt, known.name, known.uuid, kept=known.xml, ending=ending)


def find_at_rest(libvirt: Connection, name: str, runtime_dir: Path) -> Domain:
    """The same for who is about to begin something. Raises BusyError if it is being migrated."""
    domain = find(libvirt, name, runtime_dir)
    if jobs.is_migrating(domain):
        raise BusyError(
            f"domain {domain.name} is being migrated: try again when that has ended",
            domain=domain.name,
        )
    return domain


def _settled(domain: Domain) -> Domain:
    """A transient domain that is not active comes or goes: wait until it has.

    Its hook is called, and may have started us, shortly before libvirt forgets it. Raises
    DomainNotFoundError.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while not domain.is_active() and not domain.is_persistent() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return domain


def instance_of(domain: Domain) -> str:
    """What tells this run of the guest from others: each start brings another; empty if not known.

    libvirt's numbers begin anew with the host.
    """
    where = domain.connection.where
    boot = boot_id() if where.is_here else where.boot
    try:
        number = instance.number(domain)
    except NbdbackupError:
        return ""
    return f"{boot} {number}" if boot and number >= 0 else ""
