"""SOURCE on the command line: the path of a set, or the name of a domain with sets."""

import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from nbdbackupd.app import configured
from nbdbackupd.app.context import Context

if TYPE_CHECKING:
    from nbdbackupd.ops.sets.lookup import DomainSets

HELP = "directory of the set, or name of a domain that the configured repository has sets of"


def domain_of(source: Path, context: Context) -> "DomainSets | None":
    """The sets of the domain that is named; None if it is a path.

    What exists is a path, and so is all that holds a slash, which no domain's name does; then no
    configuration is read. Raises ConfigError, RepositoryError if there is no such domain.
    """
    if os.path.lexists(source) or os.sep in str(source):
        return None
    from nbdbackupd.app.config.settings import global_settings
    from nbdbackupd.ops.sets import lookup

    configuration = configured.read(context).require_sound()
    # a file for some domains may have a repository of its own; labels would need libvirt
    paths = [global_settings(configuration).repository_path]
    paths += [
        file.values["repository.path"].value
        for file in configuration.files
        if "repository.path" in file.values
    ]
    return lookup.find(str(source), list(dict.fromkeys(paths)))


def set_of(
    source: Path,
    context: Context,
    *,
    point: str = "",
    until: str = "",
    at: datetime | None = None,
) -> Path:
    """The path of the set: as given, or of a domain the one that holds the point.

    Raises as ``domain_of``, and RepositoryError if no set of the domain holds such a point.
    """
    domain = domain_of(source, context)
    if domain is None:
        return source.absolute()
    return domain.choose(point=point, until=until, at=at)
