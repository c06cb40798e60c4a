"""Where the next backup of a domain goes, and the request for it."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nbdbackupd import __version__
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.model.chain import Level
from nbdbackupd.model.host import Host, new_run_id
from nbdbackupd.model.policy import LevelPolicy, NextRun
from nbdbackupd.ops.backup.request import BackupRequest
from nbdbackupd.ops.domain import mounted
from nbdbackupd.ops.domain.images import Sharing
from nbdbackupd.ops.sets import homes, sets


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """Where the next run of a domain goes; ``directory`` holds its sets."""

    settings: DomainSettings
    directory: Path
    next: NextRun

    @property
    def set(self) -> Path:
        """The set's directory."""
        return self.directory / self.next.directory

    @property
    def warnings(self) -> tuple[str, ...]:
        """What must not pass unnoticed: a set that can't be continued."""
        return (self.next.problem,) if self.next.problem else ()


def plan(
    name: str, uuid: str, settings: DomainSettings, now: datetime, wanted: Level
) -> PlannedRun:
    """Choose set and level for a domain by its settings; nothing is created.

    Raises RepositoryError if the repository is not mounted or can't be read, NoFullError for a
    level that needs a full that is not there.
    """
    mounted.check(settings)
    directory = homes.home_of(settings.repository_path, name, uuid)
    chosen = sets.next_run(directory, uuid, level_policy(settings), now, wanted)
    return PlannedRun(settings=settings, directory=directory, next=chosen)


def level_policy(settings: DomainSettings) -> LevelPolicy:
    """When a new set begins."""
    return LevelPolicy(
        rotate=settings.level_rotate,
        full_every=settings.level_full_every,
        max_increments=settings.level_max_increments,
    )


def request(
    domain: str,
    directory: Path,
    host: Host,
    settings: DomainSettings,
    sharing: Sharing,
    **more: Any,
) -> BackupRequest:
    """A request of now. The host decides what no file and no option says; ``more`` are fields."""
    moment = host.now()
    decided: dict[str, Any] = {}
    if settings.is_default("scratch.directory"):
        decided["scratch_directory"] = host.scratch_dir
    if sharing.state_dir is not None:
        # the base is noted where all hosts look for it
        decided["checkpoint_directory"] = sharing.state_dir
    elif settings.is_default("checkpoint_directory"):
        decided["checkpoint_directory"] = host.state_dir
    return BackupRequest(
        domain=domain,
        directory=directory.absolute(),
        runtime_dir=host.runtime_dir,
        program=f"nbdbackupd {__version__}",
        run_id=new_run_id(moment),
        now=moment,
        settings=settings.given(**decided),
        sharing=sharing,
        **more,
    )
