"""Sets by the name of their domain: where they are in the repositories, and which one is meant."""

import difflib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import FormatError, RepositoryError
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.model.units import local_time
from nbdbackupd.ops.sets.sets import DomainSet, sets_of
from nbdbackupd.repo import layout

LATEST: Final = "latest"
SHOWN: Final = 3
UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainSets:
    """All sets of a domain, the one that began last at the end."""

    name: str
    directory: Path
    sets: tuple[DomainSet, ...]

    def choose(self, *, point: str = "", until: str = "", at: datetime | None = None) -> Path:
        """The set that holds the point which is meant; without a wish, the newest with points.

        ``point`` is an id, the beginning of one, or ``latest``; ``until`` the checkpoint that the
        point made; ``at``: the newest set with a point that is not younger, a time without a zone
        is local. Raises RepositoryError if there is no such set, or more than one point begins so.
        """
        if point and point != LATEST:
            return self._by_id(point)
        if until:
            none = f"no restore point made checkpoint {until!r}"
            return self._newest(lambda found: found.checkpoint == until, none)
        if at is not None:
            moment = at.astimezone()
            none = f"no restore point is as old as {local_time(at)}"
            return self._newest(lambda found: datetime.fromisoformat(found.created) <= moment, none)
        return self._newest(lambda _: True, "no restore point")

    def _by_id(self, ident: str) -> Path:
        ids = [point.id for each in self.sets for point in each.known.points]
        if ident not in ids and sum(each.startswith(ident) for each in ids) > 1:
            raise RepositoryError(
                f"domain {self.name}: more than one restore point with id {ident!r}; "
                f"'nbdbackupctl list' shows them"
            )
        whole = ident in ids
        return self._newest(
            lambda found: found.id == ident if whole else found.id.startswith(ident),
            f"no restore point with id {ident!r}",
        )

    def _newest(self, fits: Callable[[RestorePoint], bool], none: str) -> Path:
        for each in reversed(self.sets):
            if any(map(fits, each.known.points)):
                return each.path
        raise RepositoryError(
            f"domain {self.name}: {none} among the {len(self.sets)} sets in {self.directory}"
        )


def find(name: str, repositories: Sequence[Path]) -> DomainSets:
    """The sets of a domain, given by its name or UUID, in the repositories.

    A UUID is that of the points, as the domain itself may be gone. Raises RepositoryError if
    there is none, with the nearest names, or if it is in more than one place, or if a repository
    can't be read.
    """
    homes = [home for repository in repositories for home in _homes(repository)]
    wanted = layout.escape(name, layout.MAX_DOMAIN) if name else ""
    found = [home for home in homes if home.name == wanted]
    if not found and UUID.fullmatch(name):
        found = [home for home in homes if _is_of(home, name.lower())]
    if len(found) > 1:
        places = ", ".join(map(str, found))
        raise RepositoryError(f"domain {name} has sets in more than one place: {places}; give one")
    if not found:
        raise RepositoryError(_nobody(name, repositories, homes))
    return DomainSets(name=name, directory=found[0], sets=sets_of(found[0]))


def _homes(repository: Path) -> list[Path]:
    """The directories of domains; none where there is no repository."""
    with durable.translate_os_errors("read", repository):
        try:
            names = sorted(os.listdir(repository))  # noqa: PTH208 - names are enough
        except FileNotFoundError:
            return []
        paths = [repository / name for name in names if not name.startswith(".")]
        return [path for path in paths if path.is_dir()]


def _is_of(home: Path, uuid: str) -> bool:
    points = [point for each in sets_of(home) for point in each.known.points]
    return bool(points) and points[-1].uuid == uuid


def _nobody(name: str, repositories: Sequence[Path], homes: Sequence[Path]) -> str:
    names = sorted({_name(home) for home in homes})
    near = difflib.get_close_matches(name, names, n=SHOWN, cutoff=0.5)
    places = ", ".join(map(str, repositories))
    text = f"{name} is neither a directory nor a domain with sets in {places}"
    if near:
        return f"{text}; did you mean {' or '.join(near)}?"
    if names and len(names) <= SHOWN:
        return f"{text}, which holds {', '.join(names)}"
    return f"{text}; give the path of a set, or mend repository.path"


def _name(home: Path) -> str:
    """The domain's name, or what a long one was cut to."""
    try:
        text = layout.unescape(home.name)
    except FormatError:
        return home.name
    return "".join(char if char.isprintable() else "?" for char in text)
