"""What a verification is asked for, and what it found: problems, each with its place."""

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from nbdbackupd.errors import NbdbackupError
from nbdbackupd.plain import versioned

MAX_PER_FILE: Final = 20
"""Problems of one file that are told one by one; a file of garbage must not fill the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong. ``file`` is relative to the set, ``offset`` a byte in it.

    ``is_unread``: it could not be looked at, and may be sound.
    """

    message: str
    point: str = ""
    disk: str = ""
    file: str = ""
    offset: int | None = None
    is_unread: bool = False

    @property
    def text(self) -> str:
        """One line: file, offset, disk, point, message."""
        place = self.file
        if self.offset is not None:
            place += f" at byte {self.offset}"
        owner = ", ".join(
            f"{what} {name}" for what, name in (("disk", self.disk), ("point", self.point)) if name
        )
        return ": ".join(part for part in (place, owner, self.message) if part)

    def to_json(self) -> dict[str, Any]:
        """The problem as a JSON object."""
        return {
            "file": self.file,
            "offset": self.offset,
            "disk": self.disk,
            "point": self.point,
            "message": self.message,
        }


class Findings:
    """Collects problems, a bounded number for each file; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: list[Problem] = []
        self._counts: dict[str, int] = {}

    def add(self, problem: Problem) -> None:
        """Note a problem."""
        with self._lock:
            count = self._counts[problem.file] = self._counts.get(problem.file, 0) + 1
            if count <= MAX_PER_FILE or not problem.file:
                self._found.append(problem)

    def add_error(self, err: NbdbackupError | OSError, *, point: str, disk: str, file: str) -> None:
        """Note an error that says itself where in the file it is."""
        offset = None
        # a disk that can't give back what it holds has lost it; all else may be over tomorrow
        is_unread = isinstance(err, OSError) and err.errno != errno.EIO
        if isinstance(err, OSError):
            message = f"can't be read: {err.strerror}"
        else:
            message = err.message
            place = err.fields.get("offset")
            offset = place if isinstance(place, int) else None
        self.add(
            Problem(
                message=message,
                point=point,
                disk=disk,
                file=file,
                offset=offset,
                is_unread=is_unread,
            )
        )

    def of_point(self, ident: str) -> tuple[Problem, ...]:
        """What was found of a point so far, in the order of discovery."""
        with self._lock:
            return tuple(each for each in self._found if each.point == ident)

    def count(self, file: str) -> int:
        """How many problems of a file there are, the untold ones too."""
        with self._lock:
            return self._counts.get(file, 0)

    def problems(self) -> tuple[Problem, ...]:
        """All that is to be told: in the order of discovery, by file in the order of offsets."""
        order = {problem.file: number for number, problem in reversed([*enumerate(self._found)])}
        found = sorted(self._found, key=lambda each: (order[each.file], each.offset or 0))
        for file, count in self._counts.items():
            if file and count > MAX_PER_FILE:
                message = f"{count - MAX_PER_FILE} more problems in this file"
                found.append(Problem(message=message, file=file))
        return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyRequest:
    """Which set; ``point`` (an id) restricts to that point and what its disks are made of.

    ``only`` restricts to the files of these points alone, if there are any. ``state_dirs`` are
    where this host has noted which manifests it wrote; ``accept`` notes those anew that were
    changed since, if all is sound. ``clock`` tells the time, UTC, for what is
    noted of each point in the set; without it nothing is.
    """

    path: Path
    point: str = ""
    only: frozenset[str] = frozenset()
    workers: int = 2
    state_dirs: tuple[Path, ...] = ()
    accept: bool = False
    clock: Callable[[], datetime] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What was looked at, and what is wrong; ``checked_bytes`` of files.

    ``warnings`` tell of a peer's set what nothing vouches for, of points that this host wrote
    otherwise, and what is of no use. ``accepted`` are the ids of points whose manifests are noted
    anew. ``unnoted`` says why results are not noted in the set.
    """

    points: int
    files: int
    checked_bytes: int
    problems: tuple[Problem, ...]
    seconds: float
    warnings: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
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
            accepted=list(self.accepted),
            seconds=round(self.seconds, 3),
        )
