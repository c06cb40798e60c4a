"""SOURCE on the command line: the path of a set, or the name of a domain with sets."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbdbackupd.app.context import Context
from nbdbackupd.config import schema
from nbdbackupd.errors import ConfigError, FormatError, RepositoryError, UsageError
from nbdbackupd.model.choice import NEWEST, Choice
from nbdbackupd.model.domain import is_uuid
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.sets import lookup
from nbdbackupd.ops.sets.lookup import DomainSets

if TYPE_CHECKING:
    from nbdbackupd.config.files import Configuration

log = logging.getLogger(__name__)
PATH = "repository.path"


def domain_of(source: Path, context: Context) -> DomainSets | None:
    """The sets of the domain that is named; None if it is a path.

    What exists is a path, and so is all that holds a slash, which no domain's name does; then no
    configuration is read. Raises ConfigError, which names the way without a configuration, and
    RepositoryError if there is no such domain.
    """
    if os.path.lexists(source) or os.sep in str(source):
        return None
    configuration = configured.read(context.host)
    try:
        paths = _all_repositories(configuration)
    except ConfigError as err:
        err.message += f"; {_way_out(str(source), configuration)}"
        raise
    absent = _absent(str(source), configuration)
    try:
        found = lookup.find(str(source), paths)
    except RepositoryError as err:
        if absent:
            err.message = f"no set of {source} can be seen: {absent}"
        raise
    if absent:
        log.warning("%s: what %s has is told, which may be older", absent, found.directory)
    return found


def domains_of(name: str, context: Context) -> tuple[DomainSets, ...]:
    """The sets of each domain that was saved under a name; none if nothing was.

    Raises ConfigError, and RepositoryError if nothing can be seen since a repository is not there.
    """
    from nbdbackupd.config.settings import settings_for
    from nbdbackupd.ops.domain import mounted

    configuration = configured.read(context.host)
    found = lookup.of_name(name, _all_repositories(configuration))
    if not found:
        mounted.check(settings_for(name, "", {}, configuration))
    return found


def repositories(context: Context) -> list[Path]:
    """All repositories that the configuration names.

    Raises ConfigError, RepositoryError if that of the host is not mounted.
    """
    from nbdbackupd.config.settings import global_settings
    from nbdbackupd.ops.domain import mounted

    configuration = configured.read(context.host)
    mounted.prove(global_settings(configuration))
    return _all_repositories(configuration)


def _all_repositories(configuration: "Configuration") -> list[Path]:
    """The one of the host, and those of files for some domains; labels would need libvirt."""
    from nbdbackupd.config.settings import global_settings

    repository = global_settings(configuration).repository_path
    return list(dict.fromkeys([repository, *_repositories(configuration)]))


def _absent(name: str, configuration: "Configuration") -> str:
    """Why the repository that a domain is saved to now can't be seen, or nothing.

    Labels would need libvirt: a file that needs them counts as if it were not there.
    """
    from nbdbackupd.config.settings import settings_for
    from nbdbackupd.ops.domain import mounted

    return "" if is_uuid(name) else mounted.why_absent(settings_for(name, "", {}, configuration))


def _repositories(configuration: "Configuration") -> list[Path]:
    """Those that files name which can be read."""
    return [file.values[PATH].value for file in configuration.files if PATH in file.values]


def _way_out(name: str, configuration: "Configuration") -> str:
    """How to name the set where the configuration can't say where it is.

    It is not looked for in any place but to be named: which one the broken file meant is unknown.
    """
    default: Path = schema.BY_PATH[PATH].default
    paths = list(dict.fromkeys([*_repositories(configuration), default]))
    try:
        found = str(lookup.find(name, paths).choose())
    except (RepositoryError, FormatError):
        found = f"a set of the repository, such as {default / name / 'NAME'}"
    return f"until that is fixed, give the path of the set in place of {name}: {found}"


def set_of(source: Path, context: Context, choice: Choice) -> Path:
    """The path of the set: as given, or of a domain the one that holds the point.

    Raises as ``domain_of``, and RepositoryError if no set of the domain holds such a point.
    """
    domain = domain_of(source, context)
    if domain is None:
        return source.absolute()
    return domain.choose(choice)


def sequence_of(source: Path | None, names: Sequence[str], context: Context) -> tuple[Path, ...]:
    """The stream files of ``--sequence``; with a set they are names of files in it.

    That is the peer's form, too. Raises as ``set_of``, and UsageError for files elsewhere.
    """
    if source is None or not names:
        return tuple(Path(name).absolute() for name in names)

    directory = set_of(source, context, NEWEST)
    found = tuple(directory / name for name in names)
    for path in found:
        if path.parent != directory:
            raise UsageError(
                f"{path} is no file of {directory}: give names of files in it, or no SOURCE"
            )
    return found
