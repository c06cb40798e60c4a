"""``list --sizes``: what sets take, or all sets of each domain, and what is free beside them."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdbackupd import durable, plain
from nbdbackupd.errors import RepositoryError
from nbdbackupd.model.chain import Level, RestorePoint
from nbdbackupd.model.space import own_bytes
from nbdbackupd.ops.sets import catalog
from nbdbackupd.ops.sets.homes import homes_in
from nbdbackupd.ops.sets.sets import sets_of
from nbdbackupd.plain import versioned
from nbdbackupd.units import human_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A set, or a domain's directory. Bytes of files, those of manifests and notes left out.

    ``full``, ``increments`` and ``others`` (differentials, copies) are what it takes in all.
    """

    path: str
    points: int
    full: int = 0
    increments: int = 0
    others: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.full + self.increments + self.others

    def describe(self) -> dict[str, Any]:
        """As a JSON object; sizes in bytes."""
        return {
            "path": self.path,
            "points": self.points,
            "full": self.full,
            "increments": self.increments,
            "others": self.others,
            "total": self.total,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSystem:
    """Where they lie; bytes in all, and those that may still be written."""

    path: str
    size: int
    free: int

    def __str__(self) -> str:
        return f"{human_size(self.free)} of {human_size(self.size)} are free in {self.path}"

    def space(self) -> dict[str, Any]:
        """As a JSON object; sizes in bytes."""
        return {"path": self.path, "size": self.size, "free": self.free}


@dataclass(frozen=True, kw_only=True, slots=True)
class SizesReport:
    """What was measured; ``problems``: what is damaged or can't be read, and does not count."""

    sizes: tuple[Size, ...]
    file_systems: tuple[FileSystem, ...]
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1; sizes in bytes."""
        return versioned(
            total=sum(each.total for each in self.sizes),
            sizes=[each.describe() for each in self.sizes],
            file_systems=[each.space() for each in self.file_systems],
            problems=list(self.problems),
        )


def of_sets(paths: Iterable[Path]) -> SizesReport:
    """Measure sets, whoever wrote them. Raises RepositoryError if one is none."""
    reports = [catalog.list_points(path) for path in paths]
    return SizesReport(
        sizes=tuple(_size(each.path, [each.points]) for each in reports),
        file_systems=file_systems(each.path for each in reports),
        problems=tuple(problem for each in reports for problem in each.problems),
    )


def of_repositories(paths: Iterable[Path]) -> SizesReport:
    """Measure all domains of repositories. Raises RepositoryError if one can't be read."""
    found, problems = [], []
    places = list(paths)
    for home in (home for place in places for home in homes_in(place)):
        try:
            sets = sets_of(home)
        except RepositoryError as err:
            # that of one domain does not hide the others
            problems.append(err.message)
            continue
        found.append(_size(home, [each.known.points for each in sets]))
        problems += [f"{each.path}: {problem}" for each in sets for problem in each.problems]
    return SizesReport(
        sizes=tuple(each for each in found if each.points),
        file_systems=file_systems(each for each in places if each.is_dir()),
        problems=tuple(problems),
    )


def _size(path: Path, sets: Iterable[tuple[RestorePoint, ...]]) -> Size:
    bytes_of = dict.fromkeys(Level, 0)
    count = 0
    for points in sets:
        own = own_bytes(points)
        for point in points:
            bytes_of[point.level] += own[point.id]
        count += len(points)
    return Size(
        path=os.fspath(path),
        points=count,
        full=bytes_of[Level.FULL],
        increments=bytes_of[Level.INC],
        others=bytes_of[Level.DIFF] + bytes_of[Level.COPY],
    )


def file_systems(paths: Iterable[Path]) -> tuple[FileSystem, ...]:
    """Where paths lie, each once, by the first of the paths in it. Raises RepositoryError."""
    found: dict[int, FileSystem] = {}
    for path in paths:
        with durable.translate_os_errors("look at", path):
            room, device = shutil.disk_usage(path), path.stat().st_dev
        found.setdefault(device, FileSystem(path=os.fspath(path), size=room.total, free=room.free))
    return tuple(found.values())


def rows(report: SizesReport) -> list[tuple[str, ...]]:
    """The cells of a table, its head first and the sum last."""
    total = Size(
        path="all",
        points=sum(each.points for each in report.sizes),
        full=sum(each.full for each in report.sizes),
        increments=sum(each.increments for each in report.sizes),
        others=sum(each.others for each in report.sizes),
    )
    measured = [*report.sizes, *([total] if len(report.sizes) > 1 else [])]
    return [
        ("PATH", "POINTS", "FULL", "INCREMENTS", "OTHERS", "TOTAL"),
        *(
            (
                plain.line(each.path),
                str(each.points),
                *map(human_size, (each.full, each.increments, each.others, each.total)),
            )
            for each in measured
        ),
    ]
