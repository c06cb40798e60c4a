"""The configuration as verbs use it: read, connected to libvirt, merged for one domain."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from nbdbackupd.errors import ConfigError, DomainError
from nbdbackupd.model.host import DEFAULT_URI, Host

if TYPE_CHECKING:
    from nbdbackupd.config.files import Configuration
    from nbdbackupd.config.schema import DomainSettings
    from nbdbackupd.ops.domain.images import Sharing
    from nbdbackupd.virt.domain import Domain


def read(host: Host, *, event_fault: Callable[[str], str] | None = None) -> "Configuration":
    """Read all files of ``--config-dir`` or ``/etc/nbdbackup``; their problems are in the result.

    Files that are as they were a moment ago are not read again: verbs ask for each domain.
    ``event_fault`` is as of ``files.read_all``. Raises ConfigError if the directory was given and
    is none.
    """
    from nbdbackupd.config import files, schema

    directory = (host.config_dir or schema.DIRECTORY).absolute()
    if host.config_dir is not None and not directory.is_dir():
        raise ConfigError(f"no configuration directory {directory}: give an existing one")
    if event_fault is not None:
        return files.read_all(directory, event_fault=event_fault)
    return _read(directory, files.signature(directory))


@lru_cache(maxsize=1)
def _read(directory: Path, _: object) -> "Configuration":
    from nbdbackupd.config import files

    return files.read_all(directory)


def connected(configuration: "Configuration", host: Host) -> Host:
    """The context with the connection of the configuration where the command line has none.

    Raises ConfigError if the configuration has a problem, or lacks its credential.
    """
    from nbdbackupd.config.settings import global_settings, password_file

    settings = global_settings(configuration)
    return replace(
        host,
        uri=settings.libvirt_uri if host.uri == DEFAULT_URI else host.uri,
        user=host.user or settings.libvirt_user or "",
        password_file=host.password_file or password_file(settings, host.credentials),
    )


def settings_of(
    name: str, configuration: "Configuration", host: Host
) -> "tuple[str, str, DomainSettings]":
    """Name, UUID and settings of a domain; libvirt is asked only if they depend on it.

    The UUID is empty if it was not asked. Raises ConfigError, DomainError.
    """
    from nbdbackupd.config.settings import needs_libvirt, settings_for

    asking = needs_libvirt(name, configuration)
    if not asking:
        return name, "", settings_for(name, "", {}, configuration)
    from nbdbackupd.ops.domain import domains

    try:
        with domains.connect(connected(configuration, host), any_host=True) as connection:
            domain = domains.find(connection, name, host.runtime_dir)
            return domain.name, domain.uuid, settings_of_domain(domain, configuration)
    except DomainError as err:
        raise type(err)(
            f"which domains {asking[0]} is for depends on what libvirt knows: {err.message}",
            **err.fields,
        ) from err


def state_directory(name: str, host: Host) -> Path:
    """Where the bases of a domain's chains are noted, if the command line does not say it.

    As the configuration has it, where a file sets it, since ``run`` writes there. Raises
    ConfigError, DomainError.
    """
    if host.is_state_given:
        return host.state_dir
    _, _, settings = settings_of(name, read(host), host)
    if settings.is_default("checkpoint_directory"):
        return host.state_dir
    return settings.checkpoint_directory


def sharing_of(name: str, host: Host) -> "Sharing":
    """What is known of other hosts, for a verb that is told all else by its options.

    A configuration that can't be read is no reason to refuse; it may know of other hosts, though.
    """
    from nbdbackupd.ops.domain.images import SHARED, Sharing

    given = host.state_dir if host.is_state_given else None
    if given == host.own_state_dir:
        given = None
    try:
        _, _, settings = settings_of(name, read(host), host)
    except (ConfigError, DomainError):
        return Sharing(state_dir=given, devices=SHARED)
    found = sharing(settings)
    return replace(found, state_dir=given) if host.is_state_given else found


def state_directories(host: Host) -> tuple[Path, ...]:
    """All places where this host may have noted something; a configuration that fails names none.

    For what only reads, and has to do without: a restore on the worst day.
    """
    found = [host.state_dir]
    if host.is_state_given:
        return tuple(found)
    # where there is no PyYAML, there is no configuration either
    with contextlib.suppress(ConfigError, ImportError):
        found += [
            file.values["checkpoint_directory"].value
            for file in read(host).files
            if "checkpoint_directory" in file.values
        ]
    return tuple(dict.fromkeys(found))


def machine_of(name: str, host: Host, given: Mapping[str, Path]) -> "DomainSettings | None":
    """How a QEMU without libvirt is reached, as options say or a file; None of a domain.

    ``given`` are options: ``qmp``, ``agent``. Raises ConfigError if the file is there and the
    configuration has a problem.
    """
    from nbdbackupd.config import schema

    if "qmp" in given:
        return schema.defaults().given(**given)
    found = standalone(name, read(host))
    return found.given(**given) if found is not None else None


def standalone(name: str, configuration: "Configuration") -> "DomainSettings | None":
    """The settings of a machine that runs without libvirt as a file says; None of a domain.

    Raises ConfigError.
    """
    from nbdbackupd.config.settings import settings_for, standalone_names

    if name not in standalone_names(configuration):
        return None
    return settings_for(name, "", {}, configuration)


def settings_of_domain(domain: "Domain", configuration: "Configuration") -> "DomainSettings":
    """The settings of a domain that libvirt knows. Raises ConfigError, DomainError."""
    from nbdbackupd.config.settings import settings_for

    return settings_for(domain.name, domain.uuid, labels(domain), configuration)


def labels(domain: "Domain") -> Mapping[str, str]:
    """The labels of a domain; those of the running one win over those of its definition."""
    from nbdbackupd.config.matching import labels_of

    # a transient domain has no definition: libvirt then tells what it would be
    return {**labels_of(domain.xml(inactive=True)), **labels_of(domain.xml())}


def sharing(settings: "DomainSettings") -> "Sharing":
    """What the settings say of other hosts: a state directory that is set may be theirs, too."""
    from nbdbackupd.ops.domain.images import Sharing
    from nbdbackupd.ops.domain.survey import DiskFilter

    is_own = settings.is_default("checkpoint_directory")
    return Sharing(
        state_dir=None if is_own else settings.checkpoint_directory,
        devices=settings.block_devices,
        disks=DiskFilter(include=settings.disks_include, exclude=settings.disks_exclude),
    )
