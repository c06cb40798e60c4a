"""From options and settings to a request for a backup: explicit options win."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdbackupd import __version__
from nbdbackupd.app.arguments import Arguments
from nbdbackupd.errors import UsageError
from nbdbackupd.model.host import Host, new_run_id

if TYPE_CHECKING:
    from datetime import datetime

    from nbdbackupd.config.settings import DomainSettings
    from nbdbackupd.model.chain import Level
    from nbdbackupd.model.policy import NextRun
    from nbdbackupd.ops.backup.request import BackupRequest
    from nbdbackupd.virt.domain import Domain

UNSET: Final = argparse.SUPPRESS
"""The default of options that a setting can stand for: absent tells from given."""

FIELDS: Final = {
    "include": "include",
    "exclude": "exclude",
    "raw": "raw",
    "compress": "compression",
    "start_paused": "start_paused",
    "scratch_reserve": "scratch_reserve",
    "threshold": "threshold",
    "strict": "strict",
    "workers": "workers",
    "wait": "wait_seconds",
    "timeout": "timeout_seconds",
    "limit_rate": "limit_rate",
}
"""Options, by their names in ``Arguments``, and the fields of a request that they decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """Where the next run of a domain goes; ``directory`` holds its sets."""

    settings: "DomainSettings"
    directory: Path
    next: "NextRun"

    @property
    def set(self) -> Path:
        """The set's directory."""
        return self.directory / self.next.directory

    @property
    def warnings(self) -> tuple[str, ...]:
        """What must not pass unnoticed: a set that can't be continued."""
        return (self.next.problem,) if self.next.problem else ()


def plan(domain: "Domain", settings: "DomainSettings", now: "datetime", wanted: "Level") -> Planned:
    """Choose set and level by the settings; nothing is created.

    Raises RepositoryError if the repository is not mounted or can't be read, NoFullError for a
    level that needs a full that is not there.
    """
    from nbdbackupd.config import settings as app_settings
    from nbdbackupd.ops.sets import homes, sets

    app_settings.check_mounted(settings)
    directory = homes.home_of(settings.repository_path, domain.name, domain.uuid)
    chosen = sets.next_run(directory, domain.uuid, app_settings.level_policy(settings), now, wanted)
    return Planned(settings=settings, directory=directory, next=chosen)


def given(args: Arguments, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that options of ``backup`` decide; ``settings`` are those of ``request_fields``.

    Raises UsageError if options contradict one another.
    """
    found = {FIELDS[name]: value for name, value in vars(args).items() if name in FIELDS}
    if "include" in found or "exclude" in found:
        # the two belong together: a disk of one list may be in the setting of the other
        found = {"include": (), "exclude": (), **found}
    if args.type == "raw":
        if args.level != "copy" or found.get("compression") is not None:
            raise UsageError("--type raw needs '-l copy' and goes without --compress")
        found["compression"] = None
    return {**found, **_holding(args, settings)}


def _holding(args: Arguments, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the guest is held still at the instant."""
    from nbdbackupd.source.quiesce import FreezePolicy

    freeze = getattr(args, "freeze", None)
    mountpoints = getattr(args, "freeze_mountpoint", ())
    if getattr(args, "pause", False):
        if freeze == "require" or mountpoints:
            raise UsageError("--pause and freezing exclude one another")
        return {"pause": True, "freeze": FreezePolicy.NEVER, "mountpoints": ()}
    if freeze is None and not mountpoints:
        return {}
    if freeze is None:
        before = settings.get("freeze", FreezePolicy.AUTO)
        policy = FreezePolicy.AUTO if before is FreezePolicy.NEVER else before
    else:
        policy = FreezePolicy(freeze)
    chosen = mountpoints or settings.get("mountpoints", ())
    return {"pause": False, "freeze": policy, "mountpoints": chosen}


def request(domain: str, directory: Path, host: Host, fields: Mapping[str, Any]) -> "BackupRequest":
    """A request of now; ``fields`` may overrule what comes from the host."""
    from nbdbackupd.ops.backup.request import BackupRequest

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
