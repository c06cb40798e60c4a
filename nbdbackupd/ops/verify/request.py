"""What a verification is asked for, and what it tells afterwards."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nbdbackupd.ops.verify.findings import Problem
from nbdbackupd.plain import versioned


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyRequest:
    """Which set; ``point`` (an id) restricts to that point and what its disks are made of.

    ``only`` restricts to the files of these points alone, if there are any. ``state_dirs`` are
    where this host has noted which manifests it wrote. ``clock`` tells the time, UTC, for what is
    noted of each point in the set; without it nothing is.
    """

    path: Path
    point: str = ""
    only: frozenset[str] = frozenset()
    workers: int = 2
    state_dirs: tuple[Path, ...] = ()
    clock: Callable[[], datetime] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What was looked at, and what is wrong; ``checked_bytes`` of files.

    ``warnings`` tell of a peer's set what nothing vouches for, of points that this host wrote
    otherwise, and what is of no use. ``unnoted`` says why results are not noted in the set.
    """

    points: int
    files: int
    checked_bytes: int
    problems: tuple[Problem, ...]
    seconds: float
    warnings: tuple[str, ...] = ()
    unnoted: str = ""

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        return versioned(
            sound=not self.problems,
            points=self.points,
            files=self.files,
            checked_bytes=self.checked_bytes,
            problems=[problem.to_json() for problem in self.problems],
            warnings=list(self.warnings),
            seconds=round(self.seconds, 3),
        )
