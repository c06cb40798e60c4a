"""Where the next backup of a domain goes, and the request for it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nbdbackupd import __version__
from nbdbackupd.config import settings as config_settings
from nbdbackupd.config.settings import DomainSettings
from nbdbackupd.model.chain import Level
from nbdbackupd.model.host import Host, new_run_id
from nbdbackupd.model.policy import NextRun
from nbdbackupd.ops.backup.request import BackupRequest
from nbdbackupd.ops.domain import mounted
from nbdbackupd.ops.sets import homes, sets
from nbdbackupd.virt.domain import Domain


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
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


def plan(domain: Domain, settings: DomainSettings, now: datetime, wanted: Level) -> Planned:
    """Choose set and level by the settings; nothing is created.

    Raises RepositoryError if the repository is not mounted or can't be read, NoFullError for a
    level that needs a full that is not there.
    """
    mounted.check(settings)
    directory = homes.home_of(settings.repository_path, domain.name, domain.uuid)
    chosen = sets.next_run(
        directory, domain.uuid, config_settings.level_policy(settings), now, wanted
    )
    return Planned(settings=settings, directory=directory, next=chosen)


def request(domain: str, directory: Path, host: Host, fields: Mapping[str, Any]) -> BackupRequest:
    """A request of now; ``fields`` may overrule what comes from the host."""
    moment = host.now()
    common: dict[str, Any] = {
        "scratch_dir": host.scratch_dir,
        "state_dir": host.state_dir,
        "workers": default_workers(),
    }
    return BackupRequest(
        domain=domain,
        directory=directory.absolute(),
        runtime_dir=host.runtime_dir,
        program=f"nbdbackupd {__version__}",
        run_id=new_run_id(moment),
        now=moment,
        **{**common, **{name: _absolute(value) for name, value in fields.items()}},
    )


def default_workers() -> int:
    """One thread for each processor, at most 8."""
    return min(8, os.cpu_count() or 2)


def _absolute(value: Any) -> Any:
    return value.absolute() if isinstance(value, Path) else value
