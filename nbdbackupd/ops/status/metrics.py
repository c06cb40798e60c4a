"""Metrics for Prometheus, as files for the textfile collector of its node exporter.

Each domain has a file of its own, so that runs need no lock; ``nbdbackup.prom`` is for the host.
A file is replaced as a whole. After a run that failed, what the last good one was is carried over
from the file that is there. With the host's file those go that are of domains it no longer has.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import FormatError
from nbdbackupd.model.chain import DiskMode, Level, RestorePoint
from nbdbackupd.ops.sets.holdings import Holdings
from nbdbackupd.ops.sets.sizes import FileSystem
from nbdbackupd.repo import layout

MODE: Final = 0o644  # the exporter has an account of its own
MAX_SIZE: Final = 64 << 10
PREFIX: Final = "nbdbackup"
SETS: Final = "nbdbackup_sets"

DOMAIN_METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "last_run_timestamp_seconds": ("gauge", "When the last run ended."),
    "last_run_duration_seconds": ("gauge", "How long the last run took."),
    "last_run_exit_status": ("gauge", "Exit status of the last run; 3 means done with warnings."),
    "last_run_success": ("gauge", "Whether the last run did what it should, 1 or 0."),
    "last_success_timestamp_seconds": ("gauge", "When the last good run ended."),
    "last_point_timestamp_seconds": ("gauge", "The instant that the newest point holds."),
    "last_point_duration_seconds": ("gauge", "How long the run took that made the newest point."),
    "last_point_stored_bytes": ("gauge", "What the newest point has added to its set."),
    "last_point_data_bytes": ("gauge", "Guest bytes that the newest point holds as data."),
    "last_point_full": ("gauge", "Whether the newest point is a full, 1 or 0."),
    "last_point_demoted_disks": ("gauge", "Disks that the newest increment had to read whole."),
    "chain_points": ("gauge", "Restore points in the set of the newest point."),
    "runs_total": ("counter", "Runs since this file was made."),
    "failed_runs_total": ("counter", "Runs that made no point and should have."),
    "demotions_total": ("counter", "Disks that increments had to read whole."),
}
"""Type and meaning of each metric of a domain, without the prefix."""

SET_METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "stored_bytes": ("gauge", "What the files of all points of the domain take."),
    "points": ("gauge", "Restore points of the domain."),
    "verified_points": ("gauge", "Points that were proven once with all they are made of."),
    "damaged_points": ("gauge", "Points in whose files the last verification found damage."),
    "last_verified_timestamp_seconds": ("gauge", "When a point of the domain was proven last."),
}
"""What the sets of a domain hold, in a file of their own: a run and a verification write it."""

HOST_METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "domains": ("gauge", "Domains that libvirt knows."),
    "unprotected_domains": ("gauge", "Domains that neither the configuration nor a timer covers."),
    "host_timestamp_seconds": ("gauge", "When the domains of this host were counted."),
}

REPOSITORY_METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "repository_size_bytes": ("gauge", "Size of the file system that a repository lies in."),
    "repository_free_bytes": ("gauge", "What may still be written there."),
}

_SAMPLE: Final = re.compile(rf'{PREFIX}_(\w+)\{{domain="(?:[^"\\]|\\.)*"\}} (\S+)')


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """How a run ended.

    ``seconds`` is its duration. ``succeeded``: it made a point, or rightly made none; ``point`` is
    the one that it made, or None, ``stored_bytes`` what it takes, and ``chain_points`` the number
    of points in its set.
    """

    domain: str
    ended: datetime
    seconds: float
    exit_status: int
    succeeded: bool
    point: RestorePoint | None = None
    stored_bytes: int = 0
    chain_points: int = 0


def record(directory: Path, facts: RunFacts) -> Path:
    """Write a domain's file after a run, good or bad, and return its path.

    Raises RepositoryError or NoSpaceError if it can't be written (the directory must exist),
    FormatError for an empty name. The run itself is no worse for it.
    """
    path = domain_file(directory, facts.domain)
    values = known_values(path)
    _count(values, "runs_total", 1)
    _count(values, "failed_runs_total", 0 if facts.succeeded else 1)
    values |= {
        "last_run_timestamp_seconds": facts.ended.timestamp(),
        "last_run_duration_seconds": facts.seconds,
        "last_run_exit_status": facts.exit_status,
        "last_run_success": int(facts.succeeded),
    }
    if facts.succeeded:
        values["last_success_timestamp_seconds"] = facts.ended.timestamp()
    _count(values, "demotions_total", 0 if facts.point is None else demoted(facts.point))
    if facts.point is not None:
        values |= _of_point(facts.point, facts)
    _write(path, DOMAIN_METRICS, values, {"domain": facts.domain})
    return path


def record_sets(directory: Path, domain: str, held: Holdings) -> Path:
    """Write the file of what a domain's sets hold and return its path. Raises as ``record``."""
    path = sets_file(directory, domain)
    values: dict[str, float] = {
        "stored_bytes": held.stored_bytes,
        "points": held.points,
        "verified_points": held.verified_points,
        "damaged_points": len(held.damage),
    }
    if held.verified:
        moment = datetime.fromisoformat(held.verified)
        values["last_verified_timestamp_seconds"] = moment.timestamp()
    _write(path, SET_METRICS, values, {"domain": domain})
    return path


def record_host(directory: Path, *, domains: int, unprotected: int, moment: datetime) -> Path:
    """Write the host's file and return its path. Raises RepositoryError or NoSpaceError."""
    path = directory / f"{PREFIX}.prom"
    values = {
        "domains": float(domains),
        "unprotected_domains": float(unprotected),
        "host_timestamp_seconds": moment.timestamp(),
    }
    _write(path, HOST_METRICS, values, {})
    return path


def record_repositories(directory: Path, found: Iterable[FileSystem]) -> Path:
    """Write how large the repositories' file systems are, and what is free; return the path.

    Raises as ``record_host``.
    """
    path = directory / f"{PREFIX}_repositories.prom"
    places = list(found)
    lines = []
    for name, (kind, meaning) in REPOSITORY_METRICS.items():
        full = f"{PREFIX}_{name}"
        lines += [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}"]
        for each in places:
            value = each.size if name == "repository_size_bytes" else each.free
            lines.append(f'{full}{{path="{_escaped(each.path)}"}} {value}')
    _write_lines(path, lines)
    return path


def forget_others(directory: Path, known: Collection[str]) -> tuple[Path, ...]:
    """Remove the files of domains that this host no longer has; ``known`` are those that stay.

    Raises RepositoryError.
    """
    kept = {of(directory, name) for name in known for of in (domain_file, sets_file)}
    found = [path for prefix in (PREFIX, SETS) for path in directory.glob(f"{prefix}-*.prom")]
    gone = [path for path in sorted(found) if path not in kept]
    for path in gone:
        with durable.translate_os_errors("remove", path):
            path.unlink(missing_ok=True)
    return tuple(gone)


def domain_file(directory: Path, domain: str) -> Path:
    """Where a domain's metrics are. Raises FormatError for an empty name."""
    return directory / f"{PREFIX}-{layout.escape(domain, layout.MAX_DOMAIN)}.prom"


def sets_file(directory: Path, domain: str) -> Path:
    """Where the metrics of a domain's sets are. Raises FormatError for an empty name."""
    return directory / f"{SETS}-{layout.escape(domain, layout.MAX_DOMAIN)}.prom"


def demoted(point: RestorePoint) -> int:
    """The number of disks that an increment holds whole although it should hold their changes.

    Raw images are none of these: their changes are never known.
    """
    if point.level not in (Level.INC, Level.DIFF):
        return 0
    return sum(disk.mode is DiskMode.FULL and disk.format != "raw" for disk in point.disks)


def known_values(path: Path) -> dict[str, float]:
    """What a domain's file says, as far as it can be read; nothing if there is none."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SIZE).decode(errors="replace")
    except OSError:
        return {}
    found: dict[str, float] = {}
    for line in text.split("\n"):
        sample = _SAMPLE.fullmatch(line)
        if sample is None or sample[1] not in DOMAIN_METRICS:
            continue
        try:
            value = float(sample[2])
        except ValueError:
            continue
        if math.isfinite(value):
            found[sample[1]] = value
    return found


def _of_point(point: RestorePoint, facts: RunFacts) -> dict[str, float]:
    try:
        created = datetime.fromisoformat(point.created).timestamp()
    except ValueError as err:
        raise FormatError(f"restore point {point.id} has no valid time: {point.created}") from err
    return {
        "last_point_timestamp_seconds": created,
        "last_point_duration_seconds": facts.seconds,
        "last_point_stored_bytes": facts.stored_bytes,
        "last_point_data_bytes": sum(disk.data_bytes for disk in point.disks),
        "last_point_full": int(point.level is Level.FULL),
        "last_point_demoted_disks": demoted(point),
        "chain_points": facts.chain_points,
    }


def _count(values: dict[str, float], name: str, more: int) -> None:
    values[name] = values.get(name, 0.0) + more


def _write(
    path: Path,
    metrics: Mapping[str, tuple[str, str]],
    values: Mapping[str, float],
    labels: Mapping[str, str],
) -> None:
    shown = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
    braces = f"{{{shown}}}" if shown else ""
    lines = []
    for name, (kind, meaning) in metrics.items():
        if name in values:
            full = f"{PREFIX}_{name}"
            lines += [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}"]
            lines.append(f"{full}{braces} {_number(values[name])}")
    _write_lines(path, lines)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with durable.translate_os_errors("write", path):
        durable.write_atomic(path, "".join(f"{line}\n" for line in lines).encode(), MODE)


def _escaped(text: str) -> str:
    clean = text.encode(errors="replace").decode()
    return clean.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    """All digits that matter, never in a short form that loses some."""
    return str(int(value)) if value == int(value) else repr(float(value))
