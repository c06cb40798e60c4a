"""What a verification is asked for, and what it tells afterwards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdbackupd.ops.verify.findings import Problem
from nbdbackupd.plain import versioned


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyRequest:
    """Which set; ``point`` (an id) restricts to that point and what its disks are made of.

    ``state_dirs`` are where this host has noted which manifests it wrote.
    """

    path: Path
    point: str = ""
    workers: int = 2
    state_dirs: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What was looked at, and what is wrong; ``checked_bytes`` of files.

    ``warnings`` tell of a peer's set what nothing vouches for, of points that this host wrote
    otherwise, and what is of no use.
    """

    points: int
    files: int
    checked_bytes: int
    problems: tuple[Problem, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

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
