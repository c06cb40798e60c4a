"""Sets by the name of their domain: where they are in the repositories, and which one is meant."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import plain
from nbdbackupd.errors import FormatError, NbdbackupError, RepositoryError, UsageError
from nbdbackupd.model.choice import NEWEST, Choice
from nbdbackupd.model.domain import is_uuid
from nbdbackupd.ops.sets.homes import MARK, homes_in, label_of, owner
from nbdbackupd.ops.sets.sets import DomainSet, sets_of
from nbdbackupd.repo import layout
from nbdbackupd.units import local_time

SHOWN: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainSets:
    """All sets of a domain, the one that began last at the end."""

    name: str
    directory: Path
    sets: tuple[DomainSet, ...]

    def choose(self, choice: Choice = NEWEST) -> Path:
        """The set that holds the point which is meant, the newest of them.

        Raises as ``Choice.find``.
        """
        try:
            point = choice.find(*(each.known for each in self.sets))
        except RepositoryError as err:
            sets = "1 set" if len(self.sets) == 1 else f"{len(self.sets)} sets"
            where = f"domain {self.name}, {sets} in {self.directory}"
            err.message = f"{where}: {err.message}"
            if problems := [line for each in self.sets for line in each.problems]:
                err.message += f"; damaged: {problems[0]}"
            raise
        return next(each.path for each in reversed(self.sets) if point in each.known.points)


def find(name: str, repositories: Sequence[Path]) -> DomainSets:
    """The sets of a domain, given by its name or UUID, in the repositories.

    A UUID is that of the points, as the domain itself may be gone. Raises UsageError if the name
    means two domains, with the UUIDs of both; RepositoryError if there is none, with the nearest
    names, or if it is in more than one place, or if a repository can't be read.
    """
    homes = [home for repository in repositories for home in homes_in(repository)]
    found = _named(name, homes) if name else []
    if not found and is_uuid(name):
        found = _of_uuid(name.lower(), homes)
    if not found:
        raise RepositoryError(_nobody(name, repositories, homes))
    if len({each.uuid for each in found}) > 1:
        raise UsageError(_which(name, found))
    # beside one another they are of one name, and only older ones of it are in the first
    if len({each.label for each in found}) > 1 or len({each.home.parent for each in found}) > 1:
        places = ", ".join(str(each.home) for each in found)
        raise RepositoryError(f"domain {name} has sets in more than one place: {places}; give one")
    return _together(name, found)


def every(
    repositories: Sequence[Path], *, tell: Callable[[NbdbackupError], None] | None = None
) -> tuple[DomainSets, ...]:
    """The sets of each domain that has points in the repositories, be they damaged.

    With ``tell`` domains that can't be read are left out, each with a call; else, and for a
    repository, raises RepositoryError.
    """
    found, broken = [], set[tuple[Path, str]]()
    for repository in repositories:
        for home in homes_in(repository):
            try:
                found += _split(home)
            except RepositoryError as err:
                if tell is None:
                    raise
                tell(err)
                # what lies beside it under the same name may be older
                broken |= {(repository, home.name), (repository, home.name.rpartition(MARK)[0])}
    return _joined(each for each in found if (each.home.parent, each.label) not in broken)


def of_name(name: str, repositories: Sequence[Path]) -> tuple[DomainSets, ...]:
    """The sets of each domain that has points under a name, be they damaged; or none.

    Raises RepositoryError if they can't be read.
    """
    return _joined(_named(name, [home for each in repositories for home in homes_in(each)]))


def _joined(found: Iterable["_Found"]) -> tuple[DomainSets, ...]:
    domains: dict[tuple[Path, str, str], list[_Found]] = {}
    for each in found:
        domains.setdefault((each.home.parent, each.label, each.uuid), []).append(each)
    return tuple(
        _together(_name(key[1]), some)
        for key, some in domains.items()
        if key[2] or any(one.problems for each in some for one in each.sets)
    )


def every_set(repositories: Sequence[Path]) -> tuple[Path, ...]:
    """All sets of all domains, those without a point left out.

    Raises RepositoryError if a repository can't be read.
    """
    homes = [home for repository in repositories for home in homes_in(repository)]
    return tuple(
        each.path for home in homes for each in sets_of(home) if each.known.points or each.problems
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """The sets of one UUID in a directory; sets without points count as of its owner."""

    home: Path
    label: str
    uuid: str
    sets: tuple[DomainSet, ...]


def _named(name: str, homes: Sequence[Path]) -> list[_Found]:
    wanted = layout.escape(name, layout.MAX_DOMAIN)
    exact = [home for home in homes if home.name == wanted]
    # a file system may have stored it in other letters
    same = exact or [
        home
        for home in homes
        if layout.is_same(home.name, wanted) and home.samefile(home.parent / wanted)
    ]
    beside = [home for home in homes if home.name.startswith(f"{wanted}{MARK}")]
    found = [each for home in (*same, *beside) for each in _split(home)]
    return [each for each in found if each.home in same or each.label == wanted]


def _of_uuid(uuid: str, homes: Sequence[Path]) -> list[_Found]:
    try:
        return [each for home in homes for each in _split(home) if each.uuid == uuid]
    except RepositoryError as err:
        # it may hold the newest
        raise RepositoryError(
            f"{err.message}; until then give the name of domain {uuid}, or the path of a set"
        ) from err


def _split(home: Path) -> list[_Found]:
    """What a directory holds, by UUID."""
    sets = sets_of(home)
    label, mine = label_of(home, sets), owner(sets)
    uuids = dict.fromkeys(each.uuid or mine for each in sets) or {mine: None}
    return [
        _Found(
            home=home,
            label=label,
            uuid=uuid,
            sets=tuple(each for each in sets if (each.uuid or mine) == uuid),
        )
        for uuid in uuids
    ]


def _together(name: str, found: Sequence[_Found]) -> DomainSets:
    sets = sorted((one for each in found for one in each.sets), key=_began)
    return DomainSets(name=name, directory=found[-1].home, sets=tuple(sets))


def _began(found: DomainSet) -> tuple[bool, float]:
    return found.began is not None, found.began.timestamp() if found.began is not None else 0.0


def _which(name: str, found: Sequence[_Found]) -> str:
    told = []
    for each in found:
        points = [point for one in each.sets for point in one.known.points]
        newest = max((point.created for point in points), default="")
        when = f"newest point {local_time(newest)}" if newest else "no points"
        told.append(f"{each.uuid or 'unknown'} ({each.home}, {when})")
    return f"{name} means more than one domain, so give a UUID: {'; '.join(told)}"


def _nobody(name: str, repositories: Sequence[Path], homes: Sequence[Path]) -> str:
    names = sorted({_name(home.name) for home in homes})
    near = difflib.get_close_matches(name, names, n=SHOWN, cutoff=0.5)
    places = ", ".join(map(str, repositories))
    text = f"{name} is neither a directory nor a domain with sets in {places}"
    if near:
        return f"{text}; did you mean {' or '.join(near)}?"
    if names and len(names) <= SHOWN:
        return f"{text}, which holds {', '.join(names)}"
    return f"{text}; give the path of a set, or fix repository.path"


def _name(label: str) -> str:
    """The domain's name, or what a long one was cut to."""
    try:
        text = layout.unescape(label)
    except FormatError:
        return label
    return plain.line(text)
