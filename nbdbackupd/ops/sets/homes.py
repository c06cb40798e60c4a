"""Directories of domains in a repository: which one is whose.

A directory has the domain's name and belongs to the UUID of its oldest point: names come again,
on another host that has the same repository, or for a domain that is made anew. Another domain of
that name has one beside it, with the beginning of its UUID.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.ops.sets.sets import DomainSet, sets_of
from nbdbackupd.repo import layout
from nbdbackupd.repo.set_directory import SetDirectory

MARK: Final = "@"
SHORT: Final = 8
LOST: Final = "lost+found"


def home_of(
    repository: Path, name: str, uuid: str, owner_of: Callable[[Path], str] | None = None
) -> Path:
    """The directory that a domain's runs go into; it may not exist yet.

    ``owner_of`` tells whose a directory is, if not by its sets.

    Raises FormatError for an empty name, RepositoryError if a directory can't be read.
    """
    label = layout.escape(name, layout.MAX_DOMAIN)
    for each in (label, f"{label}{MARK}{uuid[:SHORT]}"):
        home = repository / each
        whose = owner_of(home) if owner_of is not None else owner(sets_of(home))
        if whose in ("", uuid):
            return home
    return repository / f"{label}{MARK}{uuid}"


def owner(sets: tuple[DomainSet, ...]) -> str:
    """The UUID that the directory of these sets belongs to; nothing if it has nobody's yet.

    That of the oldest point, or else of a run that is making the first one.
    """
    points = [point for each in sets for point in each.known.points]
    if points:
        return min(points, key=lambda point: point.created).uuid
    # of a set whose manifests are lost nobody can tell what was only begun
    begun = [
        uuid
        for each in sets
        if not each.problems
        for uuid in SetDirectory.open(each.path).begun_for()
    ]
    return begun[0] if begun else ""


def homes_in(repository: Path) -> list[Path]:
    """The directories of domains, in the order of names; none where there is no repository.

    Raises RepositoryError if it can't be read.
    """
    with durable.translate_os_errors("read", repository):
        try:
            names = sorted(each.name for each in repository.iterdir())
        except FileNotFoundError:
            return []
        found = [repository / name for name in names if not name.startswith(".") and name != LOST]
        return [path for path in found if path.is_dir()]


def label_of(home: Path, sets: tuple[DomainSet, ...]) -> str:
    """The name that a directory of a domain has, without the mark of a UUID: ``layout.escape``d."""
    before, mark, after = home.name.rpartition(MARK)
    is_marked = mark and len(after) >= SHORT and any(each.uuid.startswith(after) for each in sets)
    return before if is_marked else home.name
