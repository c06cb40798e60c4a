"""The sets of one domain, side by side in one directory: which there are, what they hold."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from nbdbackupd import durable
from nbdbackupd.errors import ChainBrokenError, FormatError, IntegrityError, one_line
from nbdbackupd.model import policy
from nbdbackupd.model.chain import BackupSet, Level
from nbdbackupd.model.host import moment_of
from nbdbackupd.model.policy import LevelPolicy, NextRun, SetFacts
from nbdbackupd.repo import generation, layout, verified
from nbdbackupd.repo.set_directory import SetDirectory

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainSet:
    """A set: what of it is sound (``known``), and a line for each point that is not."""

    path: Path
    known: BackupSet
    problems: tuple[str, ...] = ()

    @property
    def uuid(self) -> str:
        """The domain's UUID; empty if no point is sound."""
        return self.known.points[0].uuid if self.known.points else ""

    @property
    def began(self) -> datetime | None:
        """When its first full was made, in local time; None as long as it has none.

        Points that are merged into a newer full make the set no newer. Of a damaged set the
        oldest sound point counts, or else when the manifests last changed.
        """
        full = self.known.full
        if full is not None:
            first = moment_of(full.chain) if full.merged else None
            return first.astimezone() if first is not None else _local(full.created)
        if not self.problems:
            return None
        if self.known.points:
            return min(_local(point.created) for point in self.known.points)
        return datetime.fromtimestamp(_changed(self.path), UTC).astimezone()


def sets_of(directory: Path) -> tuple[DomainSet, ...]:
    """All sets in a directory, the one that began last at the end; those without a full first.

    A directory is a set if it holds manifests, or has the name that runs give to sets. Raises
    RepositoryError if something can't be read; a directory that is missing holds no sets.
    """
    with durable.translate_os_errors("read", directory):
        try:
            paths = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return ()
        found = [read_set(path) for path in paths if _is_set(path)]
        begun = [(each.began, each) for each in found]
    with_full = [(began.timestamp(), each) for began, each in begun if began is not None]
    with_full.sort(key=lambda each: (each[0], len(each[1].path.name), each[1].path.name))
    return (*(each for began, each in begun if began is None), *(each for _, each in with_full))


def next_run(
    directory: Path, uuid: str, rules: LevelPolicy, now: datetime, wanted: Level = Level.AUTO
) -> NextRun:
    """Which set below ``directory`` the domain's next run goes into, and at which level.

    Sets that are damaged are not continued, and those of another UUID not looked at. Raises
    NoFullError as ``policy.next_run`` does, RepositoryError if the directory or a set can't be
    read.
    """
    found = [
        each
        for each in sets_of(directory)
        if policy.is_set_name(each.path.name) and each.uuid in ("", uuid)
    ]
    facts = [_facts(each) for each in found]
    if facts and facts[-1].began is not None and not facts[-1].problem:
        facts[-1] = replace(facts[-1], problem=_why_unfit(found[-1]))
    local = now.astimezone()
    chosen = policy.next_run(rules, facts, local, wanted=wanted, taken=_others(directory, facts))
    durable.refuse_links(directory.parent, directory / chosen.directory)
    return chosen


def _facts(found: DomainSet) -> SetFacts:
    problem = found.problems[0] if found.problems else ""
    levels = [point.level for point in found.known.points]
    return SetFacts(
        name=found.path.name,
        began=found.began,
        increments=levels.count(Level.INC),
        problem=problem,
    )


def _why_unfit(found: DomainSet) -> str:
    """Why no increment may hang on a set: its files are not there, or known to be damaged."""
    try:
        SetDirectory.open(found.path).check_all()
    except (ChainBrokenError, FormatError) as err:
        return err.message
    head = found.known.head
    return verified.damage_of(found.path, found.known, head) if head is not None else ""


def _others(directory: Path, facts: Iterable[SetFacts]) -> frozenset[str]:
    """The names of what is no set."""
    with durable.translate_os_errors("read", directory):
        try:
            names = [each.name for each in directory.iterdir()]
        except FileNotFoundError:
            return frozenset()
    return frozenset(names) - {each.name for each in facts}


def _is_set(path: Path) -> bool:
    # a link to a set beside it is only another name of that
    if path.is_symlink() and (not path.exists() or path.resolve().parent == path.parent.resolve()):
        return False
    return path.is_dir() and (policy.is_set_name(path.name) or (path / layout.POINTS).is_dir())


def read_set(path: Path) -> DomainSet:
    """One set, or what is sound of it. Raises RepositoryError if it can't be read."""
    set_dir = SetDirectory.open(path)
    try:
        return DomainSet(path=path, known=set_dir.load())
    except (ChainBrokenError, FormatError) as err:
        known, problems = set_dir.load_sound()
        return DomainSet(path=path, known=known, problems=problems or (one_line(err),))


def _changed(path: Path) -> float:
    """When the manifests last changed, or where none can be found, the set."""
    try:
        return generation.directory(path).stat().st_mtime
    except (IntegrityError, FileNotFoundError):
        return path.stat().st_mtime


def _local(created: str) -> datetime:
    return datetime.fromisoformat(created).astimezone()
