"""``verify --older-than --limit``: what was not verified for long, of one set or many.

What each set keeps of its last verifications decides; what is done is noted there at once, so that
one that is cut short has not been in vain.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from nbdbackupd.errors import RepositoryError, UsageError
from nbdbackupd.model.chain import BackupSet
from nbdbackupd.model.space import own_bytes
from nbdbackupd.ops.verify import verify
from nbdbackupd.ops.verify.findings import VerifyReport, VerifyRequest
from nbdbackupd.plain import versioned
from nbdbackupd.repo import foreign, verified
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.units import utc_time


@dataclass(frozen=True, kw_only=True, slots=True)
class AgedRequest:
    """Which sets; only points not verified for ``older_than`` seconds, at most ``limit`` bytes.

    One point is verified in any case, however large. ``clock`` tells the time, UTC.
    """

    paths: tuple[Path, ...]
    clock: Callable[[], datetime]
    older_than: float = 0.0
    limit: int | None = None
    workers: int = 2
    state_dirs: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class AgedReport:
    """What was verified, set by set; ``left`` points are due, too, and wait for the next time.

    ``unreadable`` names manifests that can't be used, of sets in which nothing was verified.
    """

    sets: tuple[tuple[Path, VerifyReport], ...]
    left: int
    left_bytes: int
    unreadable: tuple[str, ...] = ()

    @property
    def points(self) -> int:
        """How many were verified."""
        return sum(report.points for _, report in self.sets)

    @property
    def checked_bytes(self) -> int:
        """Bytes of files that were read."""
        return sum(report.checked_bytes for _, report in self.sets)

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each thing that is wrong, with its set."""
        found = (f"{path}: {each.text}" for path, report in self.sets for each in report.problems)
        return (*self.unreadable, *found)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What else is to be said; without notes the same is verified again the next time."""
        return tuple(
            text
            for _, report in self.sets
            for text in (*report.warnings, *filter(None, [report.unnoted]))
        )

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document."""
        return versioned(
            sound=not self.problems,
            points=self.points,
            checked_bytes=self.checked_bytes,
            left=self.left,
            left_bytes=self.left_bytes,
            unreadable=list(self.unreadable),
            sets=[{**report.to_json(), "set": str(path)} for path, report in self.sets],
        )


@dataclass(frozen=True, slots=True)
class _Due:
    """A point that waits, since ``last`` (empty: never verified); ``size`` is what it takes."""

    last: str
    created: str
    path: Path
    point: str
    size: int


def run(
    request: AgedRequest, *, progress: verify.Progress, cancelled: Callable[[], None]
) -> AgedReport:
    """Verify what has waited longest. Raises as ``verify.run``."""
    read = {path: _read(path) for path in request.paths}
    due = sorted(
        (each for path, (known, _) in read.items() for each in _due(path, known, request)),
        key=lambda each: (each.last, each.created, each.path, each.point),
    )
    taken = _within(due, request.limit)
    reports: dict[Path, VerifyReport] = {}
    for path in dict.fromkeys(each.path for each in taken):
        wanted = VerifyRequest(
            path=path,
            only=frozenset(each.point for each in taken if each.path == path),
            workers=request.workers,
            state_dirs=request.state_dirs,
            clock=request.clock,
        )
        reports[path] = verify.run(wanted, progress=progress, cancelled=cancelled)
    left = due[len(taken) :]
    return AgedReport(
        sets=tuple(reports.items()),
        left=len(left),
        left_bytes=sum(each.size for each in left),
        unreadable=tuple(
            f"{path}: {problem}"
            for path, (_, problems) in read.items()
            for problem in problems
            if path not in reports
        ),
    )


def _within(due: list[_Due], limit: int | None) -> list[_Due]:
    total = 0
    taken: list[_Due] = []
    for each in due:
        total += each.size
        if taken and limit is not None and total > limit:
            break
        taken.append(each)
    return taken


def _read(path: Path) -> tuple[BackupSet, tuple[str, ...]]:
    """The sound points of a set, and what is wrong with others.

    Raises UsageError for a set that keeps no notes, RepositoryError if there is none.
    """
    found = foreign.find(path)
    if found is not None:
        raise UsageError(
            f"{path} is a set of {found.program}, which keeps no notes: verify it without "
            f"--older-than and --limit, or import it"
        )
    known, problems = SetDirectory.open(path).load_sound()
    if not known.points and not problems:
        raise RepositoryError(f"{path} holds no restore point: is it a backup set?")
    return known, problems


def _due(path: Path, known: BackupSet, request: AgedRequest) -> Iterator[_Due]:
    """The points of a set that wait."""
    proofs = verified.read(path, known)
    now = request.clock()
    before = utc_time(now - timedelta(seconds=request.older_than))
    sizes = own_bytes(known.points)
    for point in known.points:
        proof = proofs.get(point.id)
        last = proof.verified if proof is not None else ""
        # a time in the future is no time
        if last > utc_time(now):
            last = ""
        if last <= before:
            yield _Due(last, point.created, path, point.id, sizes[point.id])
