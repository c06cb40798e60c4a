"""What the configuration says for one domain, and what that means for a backup."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdbackupd.config import files as config_files
from nbdbackupd.config.files import ConfigFile, Configuration
from nbdbackupd.config.matching import is_uuid
from nbdbackupd.config.schema import BY_PATH, SETTINGS
from nbdbackupd.errors import ConfigError
from nbdbackupd.model.policy import FreezePolicy, LevelPolicy, Rotate

DEFAULT: Final = "default"
CREDENTIALS: Final = "CREDENTIALS_DIRECTORY"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a setting stands; ``file`` is empty for a default."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else DEFAULT


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainSettings:
    """All settings for a domain, named by their paths with ``_`` for the dots.

    Sizes in bytes (``limits_bandwidth``: per second), durations in seconds, None where the
    files say ``none``, ``never``, ``unlimited`` or ``auto``. ``origins`` tells by path where each
    stands; ``applied`` are the files that apply, in their order.
    """

    repository_path: Path
    repository_marker: str | None
    repository_mount_point: Path | None
    level_rotate: str
    level_full_every: int | None
    level_max_increments: int | None
    schedule_calendar: tuple[str, ...]
    schedule_random_delay: float
    schedule_enable: bool
    on_shutdown: bool
    disks_include: tuple[str, ...]
    disks_exclude: tuple[str, ...]
    disks_raw: bool
    compression: int | None
    freeze_policy: str
    freeze_mountpoints: tuple[Path, ...]
    scratch_directory: Path
    scratch_reserve: int
    checkpoint_directory: Path
    block_devices: str
    standby: bool
    start_paused: bool
    threshold: int | None
    strict: bool
    limits_bandwidth: int | None
    limits_workers: int | None
    limits_concurrent_runs: int
    limits_wait: float
    limits_timeout: float
    retention_last: int
    retention_hourly: int
    retention_daily: int
    retention_weekly: int
    retention_monthly: int
    retention_yearly: int
    commands_pre: tuple[tuple[str, ...], ...]
    commands_post: tuple[tuple[str, ...], ...]
    commands_timeout: float
    notification_events: tuple[str, ...]
    notification_mail: tuple[str, ...]
    notification_command: tuple[str, ...] | None
    monitoring_warning_age: float
    monitoring_critical_age: float
    monitoring_metrics_directory: Path | None
    libvirt_uri: str
    libvirt_user: str | None
    libvirt_password_file: Path | None
    libvirt_password_credential: str | None
    origins: Mapping[str, Origin]
    applied: tuple[Path, ...]

    def is_default(self, path: str) -> bool:
        """Whether no file says anything of a setting."""
        return not self.origins[path].file

    def get(self, path: str) -> Any:
        """The value of a setting by its path, such as ``level.rotate``."""
        return getattr(self, BY_PATH[path].field)


def settings_for(
    name: str, uuid: str, labels: Mapping[str, str], configuration: Configuration
) -> DomainSettings:
    """Merge all files that are for a domain: the later one wins, setting by setting.

    ``labels`` is what ``matching.labels_of`` found in its XML; they are needed only if
    ``needs_libvirt`` says so. A list replaces a list.

    Raises ConfigError if the configuration has a problem, or if files that are sound each
    contradict one another for this domain.
    """
    configuration.require_sound()
    return _merged(
        [
            file
            for file in configuration.files
            if file.match is None or file.match.fits(name, uuid, labels)
        ],
        name,
    )


def global_settings(configuration: Configuration) -> DomainSettings:
    """What holds for a domain that no file of ``domains.d`` is for.

    Raises ConfigError if the configuration has a problem.
    """
    configuration.require_sound()
    return _merged([file for file in configuration.files if file.match is None], "")


def needs_libvirt(name: str, configuration: Configuration) -> tuple[Path, ...]:
    """The files of which the name alone does not tell whether they are for a domain.

    If a UUID stands in place of the name, these are all files for single domains.
    """
    return tuple(
        file.path
        for file in configuration.files
        if file.match is not None
        and (
            is_uuid(name)
            or file.match.names_uuid
            or (file.match.metadata and file.match.fits_name(name, ""))
        )
    )


def _merged(files: Sequence[ConfigFile], name: str) -> DomainSettings:
    problems = config_files.contradictions(files)
    if problems:
        raise ConfigError(f"domain {name}: {problems[0]}")
    values: dict[str, Any] = {setting.field: setting.default for setting in SETTINGS}
    origins = {setting.path: Origin() for setting in SETTINGS}
    for file in files:
        for path, value in file.values.items():
            values[BY_PATH[path].field] = value.value
            origins[path] = Origin(value.file, value.line)
    return DomainSettings(**values, origins=origins, applied=tuple(file.path for file in files))


def request_fields(settings: DomainSettings) -> dict[str, Any]:
    """Fields of ``ops.backup_request.BackupRequest`` that the settings decide.

    Left out is what the command computes from the host or the user where no file says anything:
    the directories for scratch files and checkpoints, and the number of workers.
    """
    policy = FreezePolicy(settings.freeze_policy)
    freezes = policy in (FreezePolicy.AUTO, FreezePolicy.REQUIRE)
    found: dict[str, Any] = {
        "include": settings.disks_include,
        "exclude": settings.disks_exclude,
        "raw": settings.disks_raw,
        "compression": settings.compression,
        "freeze": policy,
        "mountpoints": tuple(map(str, settings.freeze_mountpoints)) if freezes else (),
        "start_paused": settings.start_paused,
        "scratch_reserve": settings.scratch_reserve,
        "threshold": settings.threshold,
        "strict": settings.strict,
        "wait_seconds": settings.limits_wait,
        "timeout_seconds": settings.limits_timeout,
        "limit_rate": settings.limits_bandwidth,
    }
    if not settings.is_default("scratch.directory"):
        found["scratch_dir"] = settings.scratch_directory
    if not settings.is_default("checkpoint_directory"):
        found["state_dir"] = settings.checkpoint_directory
    if settings.limits_workers is not None:
        found["workers"] = settings.limits_workers
    return found


def level_policy(settings: DomainSettings) -> LevelPolicy:
    """What ``model.policy.next_run`` needs of the settings."""
    return LevelPolicy(
        rotate=Rotate(settings.level_rotate),
        full_every=settings.level_full_every,
        max_increments=settings.level_max_increments,
    )


def password_file(settings: DomainSettings, credentials: Path | None) -> Path | None:
    """The file that holds the password for libvirt, or None if there is none.

    ``credentials`` is the directory where systemd has put those of the unit.

    Raises ConfigError for a credential where systemd has passed none.
    """
    if settings.libvirt_password_credential is None:
        return settings.libvirt_password_file
    if credentials is None:
        raise ConfigError(
            f"credential {settings.libvirt_password_credential} is not there: ${CREDENTIALS} is "
            f"not set; run within a unit that has LoadCredential=, or use libvirt.password_file"
        )
    return credentials / settings.libvirt_password_credential
