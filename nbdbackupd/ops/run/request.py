"""What a scheduled run is asked, who looks on, and what it tells."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdbackupd import log as runlog
from nbdbackupd.errors import WARNED
from nbdbackupd.ops.backup.request import BackupReport
from nbdbackupd.plain import versioned


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """Which domain; ``shutdown``: its guest has just ended; ``wait`` in seconds, None: defaults.

    ``retry``: try again where others come first.
    """

    domain: str
    shutdown: bool = False
    retry: bool = False
    dry_run: bool = False
    wait: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Observer:
    """Who looks on: ``cancelled`` raises to end the run, ``doing`` gets what is begun.

    ``alive`` is called where a run waits that can't be ended any more, ``anew`` when it is tried
    again.
    """

    progress: Callable[[str, int, int, int], None]
    cancelled: Callable[[], None]
    doing: Callable[[str], None]
    alive: Callable[[], None]
    anew: Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What became of a run; ``reason``: why this set and level, or why nothing was saved.

    ``set`` is None if none was chosen, ``backup`` if none was tried. ``problems`` are those
    beside the point: of programs, of checkpoints that were to be dropped.
    """

    domain: str
    uuid: str
    result: str
    reason: str = ""
    set: Path | None = None
    level: str = ""
    problems: tuple[str, ...] = ()
    backup: BackupReport | None = field(default=None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of the point, and the problems."""
        return (*(self.backup.warnings if self.backup is not None else ()), *self.problems)

    @property
    def exit_code(self) -> int:
        """The exit status of such a run."""
        return WARNED if self.warnings or runlog.warned() else 0

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        return versioned(
            domain=self.domain,
            uuid=self.uuid,
            result=self.result,
            reason=self.reason,
            set=str(self.set) if self.set is not None else "",
            level=self.level,
            problems=list(self.problems),
            backup=self.backup.to_json() if self.backup is not None else None,
        )
