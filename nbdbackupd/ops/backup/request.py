"""What a backup run is asked for and what it tells."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.model.chain import Layout, Level, RestorePoint
from nbdbackupd.ops.domain.images import ALONE, Sharing
from nbdbackupd.ops.sets import catalog
from nbdbackupd.plain import versioned
from nbdbackupd.virt.domain import Ending


@dataclass(frozen=True, kw_only=True, slots=True)
class BackupRequest:
    """What to save, where to and how; ``now`` is UTC.

    ``settings`` are those of the configuration, or the defaults, with what options and the host
    have decided. ``sharing`` is what is known of other hosts. ``only_off``: save nothing if the
    domain runs. ``ending``: how its guest ended before the host was booted, if that is known.
    ``retired``: the caller removes the checkpoints of the other sets in that directory.
    ``chain_name``: what tells the chain's checkpoints from others', if this run begins it; empty:
    the run's own mark. ``may_make_room``: make no point if it may not fit; the caller sees to that,
    and asks again.
    """

    domain: str
    directory: Path
    run_id: str
    now: datetime
    runtime_dir: Path
    program: str
    settings: DomainSettings
    sharing: Sharing = ALONE
    level: Level = Level.AUTO
    layout: Layout = Layout.STREAM
    by_nbdinfo: bool = False
    only_off: bool = False
    ending: Ending = Ending.UNKNOWN
    retired: Path | None = None
    chain_name: str = ""
    may_make_room: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BackupReport:
    """The published point, or why none was made (``skipped``); seconds in all and by disk.

    ``stored_bytes`` is what the point has added to its set.
    ``notes`` are what its user should know though nothing went wrong.
    ``is_current``: none was made because the newest one holds what there is to hold.
    ``is_short``: none was made because it may not fit.
    """

    point: RestorePoint | None
    skipped: str = ""
    stored_bytes: int = 0
    seconds: float = 0.0
    disk_seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    is_current: bool = False
    is_short: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the point's manifest warns of."""
        return self.point.warnings if self.point else ()

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        return versioned(
            result="saved" if self.point else "skipped",
            reason=self.skipped,
            seconds=round(self.seconds, 3),
            point=catalog.describe(self.point, self.stored_bytes) if self.point else None,
            notes=list(self.notes),
        )
