"""What a prune is about: the sets of a domain, its rules, and whether its repository is there."""

import os
from pathlib import Path
from typing import Any

from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.errors import IntegrityError, RepositoryError
from nbdbackupd.model.host import Host
from nbdbackupd.ops.domain import mounted
from nbdbackupd.ops.retention import history
from nbdbackupd.ops.retention.prune import PruneRequest
from nbdbackupd.ops.sets import homes
from nbdbackupd.ops.sets.lookup import DomainSets
from nbdbackupd.ops.sets.sets import DomainSet, read_set, sets_of


def request(path: Path, domain: DomainSets | None, host: Host, **more: Any) -> PruneRequest:
    """What to prune: a domain, or with None the set at a path; ``more`` are fields.

    Raises ConfigError, DomainError if the settings depend on libvirt and it can't be asked, and
    RepositoryError for what is no set of ours or a repository that is not mounted.
    """
    if domain is not None:
        newest, home, sets = _newest(domain.sets, domain.directory), domain.directory, domain.sets
        settings = history.settings_of(newest, host)
        mounted.check(settings)
    else:
        # a link in the domain's directory is another name of a set
        found = read_set(Path(os.path.realpath(path)))
        newest, home, sets = _newest((found,), found.path), found.path, (found,)
        settings = history.settings_of(newest, host)
        point = newest.known.newest
        theirs = homes.home_of(settings.repository_path, point.domain, point.uuid)
        if theirs.is_dir() and theirs.samefile(found.path.parent):
            # its points are judged beside those of the others
            more["only"] = theirs / found.path.name
            home = theirs
            sets = tuple(each for each in sets_of(home) if each.uuid in ("", found.uuid))
    return of_domain(newest.known.newest.domain, home, sets, settings, host, **more)


def of_domain(
    name: str,
    home: Path,
    sets: tuple[DomainSet, ...],
    settings: DomainSettings,
    host: Host,
    **more: Any,
) -> PruneRequest:
    """The request for a domain whose sets and settings are known; ``more`` are fields."""
    return PruneRequest(
        domain=name,
        directory=home,
        sets=sets,
        rules=history.rules_of(settings),
        now=host.now(),
        runtime_dir=host.runtime_dir,
        state_dirs=history.state_dirs_of(settings, host),
        bandwidth=settings.limits_bandwidth,
        **more,
    )


def _newest(sets: tuple[DomainSet, ...], place: Path) -> DomainSet:
    newest = history.newest_of(sets)
    if newest is not None:
        return newest
    if problems := [line for each in sets for line in each.problems]:
        raise IntegrityError(f"{place} holds no sound restore point: {problems[0]}")
    raise RepositoryError(
        f"{place} holds no restore points of ours; 'nbdbackupctl import' takes over those of "
        f"virtnbdbackup and qmpbackup"
    )
