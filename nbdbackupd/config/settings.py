"""What the configuration says for one domain."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdbackupd.config import files as config_files
from nbdbackupd.config import schema
from nbdbackupd.config.files import ConfigFile, Configuration
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.config.setting import Origin
from nbdbackupd.errors import ConfigError
from nbdbackupd.model.domain import is_uuid

CREDENTIALS: Final = "CREDENTIALS_DIRECTORY"


def settings_for(
    name: str, uuid: str, labels: Mapping[str, str], configuration: Configuration
) -> DomainSettings:
    """Merge all files that are for a domain: the later one wins, setting by setting.

    ``labels`` is what ``matching.labels_of`` found in its XML; they are needed only if
    ``needs_libvirt`` says so. A list replaces a list.

    Raises ConfigError if the configuration has a problem, or if files that are sound each
    contradict one another for this domain.
    """
    configuration.require_sound()
    return _merged(
        [
            file
            for file in configuration.files
            if file.match is None or file.match.fits(name, uuid, labels)
        ],
        name,
    )


def global_settings(configuration: Configuration) -> DomainSettings:
    """What holds for a domain that no file of ``domains.d`` is for.

    Raises ConfigError if the configuration has a problem.
    """
    configuration.require_sound()
    return _merged([file for file in configuration.files if file.match is None], "")


def needs_libvirt(name: str, configuration: Configuration) -> tuple[Path, ...]:
    """The files of which the name alone does not tell whether they are for a domain.

    If a UUID stands in place of the name, these are all files for single domains; none for a
    machine that libvirt does not have.
    """
    if name in standalone_names(configuration):
        return ()
    return tuple(
        file.path
        for file in configuration.files
        if file.match is not None
        and (
            is_uuid(name)
            or file.match.names_uuid
            or (file.match.metadata and file.match.fits_name(name, ""))
        )
    )


def standalone_names(configuration: Configuration) -> tuple[str, ...]:
    """The machines that run without libvirt, as files name them."""
    return tuple(
        file.match.sole_name
        for file in configuration.files
        if file.match is not None and "qmp" in file.values and file.values["qmp"].value is not None
    )


def _merged(files: Sequence[ConfigFile], name: str) -> DomainSettings:
    problems = config_files.contradictions(files)
    if problems:
        raise ConfigError(f"domain {name}: {problems[0]}")
    found = schema.defaults()
    said = {path: value for file in files for path, value in file.values.items()}
    return replace(
        found,
        values={**found.values, **{path: each.value for path, each in said.items()}},
        origins={**found.origins, **{path: Origin(e.file, e.line) for path, e in said.items()}},
        applied=tuple(file.path for file in files),
    )


def password_file(settings: DomainSettings, credentials: Path | None) -> Path | None:
    """The file that holds the password for libvirt, or None if there is none.

    ``credentials`` is the directory where systemd has put those of the unit.

    Raises ConfigError for a credential where systemd has passed none.
    """
    if settings.libvirt_password_credential is None:
        return settings.libvirt_password_file
    if credentials is None:
        raise ConfigError(
            f"credential {settings.libvirt_password_credential} is not there: ${CREDENTIALS} is "
            f"not set; run within a unit that has LoadCredential=, or use libvirt.password_file"
        )
    return credentials / settings.libvirt_password_credential
