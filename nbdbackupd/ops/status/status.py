"""``status``: the newest point of each domain, and how well the domain is protected."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from nbdbackupd import plain, rundir
from nbdbackupd.errors import FormatError, NbdbackupError, one_line
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.model.health import Facts, Health, Limits, Verdict, age_text, judge
from nbdbackupd.model.space import own_bytes
from nbdbackupd.ops.domain.locks import holder
from nbdbackupd.ops.retention.history import Unwanted
from nbdbackupd.ops.sets import holdings
from nbdbackupd.ops.sets.holdings import Holdings
from nbdbackupd.ops.sets.sets import DomainSet, sets_of
from nbdbackupd.ops.sets.sizes import FileSystem
from nbdbackupd.plain import versioned
from nbdbackupd.repo import boot_tests, layout
from nbdbackupd.repo.boot_tests import BootTest
from nbdbackupd.repo.runs import End
from nbdbackupd.units import human_size, utc_time

NAGIOS: Final = {Health.OK: 0, Health.WARNING: 1, Health.CRITICAL: 2, Health.UNKNOWN: 3}
SHOWN: Final = 3
NOTHING: Final = Holdings()
NO_UNWANTED: Final = Unwanted()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """What the sets of a domain hold.

    ``set`` is the one with the newest point, ``size`` what that point has added to it, and
    ``points`` the number of its points; ``all`` is about all ``sets``, which are of domains with
    these ``uuids`` (more than one: of an older version). ``problem`` says why they
    can't be read (``is_denied``: this account may not), ``damage`` what is damaged in one.
    ``test`` is the last boot test of one of its points.
    """

    directory: Path
    set: str = ""
    newest: RestorePoint | None = None
    size: int = 0
    points: int = 0
    all: Holdings = NOTHING
    sets: tuple[DomainSet, ...] = ()
    uuids: tuple[str, ...] = ()
    problem: str = ""
    is_denied: bool = False
    damage: str = ""
    test: BootTest | None = None

    @property
    def concerns(self) -> tuple[str, ...]:
        """What the newest point lacks, and a boot test that has failed."""
        found = self.newest.warnings if self.newest is not None else ()
        if self.test is None or self.test.passed:
            return found
        return (*found, f"point {self.test.point} did not come up: {self.test.reason}")

    @property
    def instant(self) -> datetime | None:
        """When the newest point was made."""
        return datetime.fromisoformat(self.newest.created) if self.newest is not None else None


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveRun:
    """A run that lives: its unit, or nothing; since when; and what it does now, in words."""

    unit: str
    begun: str
    doing: str

    @property
    def text(self) -> str:
        """In one line."""
        since = datetime.fromisoformat(self.begun).astimezone()
        return f"{self.doing} ({self.unit or 'by hand'}, since {since:%H:%M})"


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainStatus:
    """One domain.

    ``busy`` names who works on it now, ``runs`` are those that live; ``next`` is its next run on
    schedule, ``is_covered``: it is saved by itself, and ``last_run`` how the newest one ended.
    ``unwanted`` is what a prune would remove.
    """

    name: str
    stored: Stored
    verdict: Verdict
    is_covered: bool
    limits: Limits
    next: datetime | None = None
    busy: str = ""
    last_run: End | None = None
    runs: tuple[LiveRun, ...] = ()
    unwanted: Unwanted = NO_UNWANTED

    def describe(self, now: datetime) -> dict[str, Any]:
        """As a JSON object."""
        point, instant = self.stored.newest, self.stored.instant
        return {
            "domain": self.name,
            "health": self.verdict.health.value,
            "reasons": list(self.verdict.reasons),
            "protected": self.is_covered,
            "set": str(self.stored.directory / self.stored.set) if self.stored.set else "",
            "point": point.id if point is not None else "",
            "created": point.created if point is not None else "",
            "age": (now - instant).total_seconds() if instant is not None else None,
            "level": point.level.value if point is not None else "",
            "stored_bytes": self.stored.size,
            "points": self.stored.points,
            "all_points": self.stored.all.points,
            "all_bytes": self.stored.all.stored_bytes,
            "verified": self.stored.all.verified,
            "verified_points": self.stored.all.verified_points,
            "damaged_points": len(self.stored.all.damage),
            "unwanted_points": self.unwanted.points,
            "unwanted_bytes": self.unwanted.size,
            "boot_test": self.stored.test.to_json() if self.stored.test is not None else None,
            "next_run": utc_time(self.next),
            "busy": self.busy,
            "last_run": self.last_run.to_json() if self.last_run is not None else None,
            "runs": [asdict(each) for each in self.runs],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusReport:
    """All domains at a moment; ``notes`` tell what could not be asked.

    ``inventory`` names those that are this host's, None if libvirt could not be asked;
    ``file_systems`` are those of the repositories.
    """

    moment: datetime
    domains: tuple[DomainStatus, ...]
    notes: tuple[str, ...] = ()
    inventory: tuple[str, ...] | None = None
    file_systems: tuple[FileSystem, ...] = ()

    @property
    def health(self) -> Health:
        """The worst of all domains; unknown if there are none because somebody was not asked."""
        found = [each.verdict.health for each in self.domains]
        none = Health.UNKNOWN if self.notes else Health.OK
        return max(found, key=lambda each: each.rank, default=none)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1; sizes in bytes, ages in seconds."""
        return versioned(
            health=self.health.value,
            moment=utc_time(self.moment),
            notes=list(self.notes),
            file_systems=[each.space() for each in self.file_systems],
            domains=[each.describe(self.moment) for each in self.domains],
        )


def stored(directory: Path, uuid: str = "", *more: Path) -> Stored:
    """Read the sets of a domain; what fails is in the result, so that one can't hide the others.

    With ``uuid`` those of another one are left out, and what ``more`` directories have of it
    counts: an older version put all domains of a name into one.
    """
    try:
        sets = [each for each in sets_of(directory) if not uuid or each.uuid in ("", uuid)]
        older = [each for one in more for each in sets_of(one) if each.uuid == uuid]
        sets = [*older, *sets]
    except NbdbackupError as err:
        return Stored(
            directory=directory,
            problem=one_line(err),
            is_denied=isinstance(err.__cause__, PermissionError),
        )
    # of two that were made in the same second, the set that began last
    with_points = [each for each in reversed(sets) if each.known.points]
    found = max(with_points, key=lambda each: each.known.newest.created, default=None)
    damage = next((f"{each.path.name}: {each.problems[0]}" for each in sets if each.problems), "")
    held = holdings.look(sets)
    damage = damage or next(iter(held.damage), "")
    if found is None:
        return Stored(directory=directory, damage=damage)
    return Stored(
        directory=found.path.parent,
        set=found.path.name,
        newest=found.known.newest,
        size=own_bytes(found.known.points)[found.known.newest.id],
        points=len(found.known.points),
        all=held,
        sets=tuple(sets),
        uuids=tuple(sorted({each.uuid for each in sets if each.uuid})),
        damage=damage,
        test=_last_test(found),
    )


def _last_test(found: DomainSet) -> BootTest | None:
    points = {point.id for point in found.known.points}
    tests = (each for each in boot_tests.read(found.path).values() if each.point in points)
    return max(tests, key=lambda each: each.tested, default=None)


def names_in(repository: Path) -> dict[str, Path]:
    """The domains that have sets in a repository, with their directories.

    A name that was too long for a file's is taken from the points. What can't be read has none.
    """
    try:
        folders = sorted(path for path in repository.iterdir() if path.is_dir())
    except OSError:
        return {}
    found = {}
    for folder in folders:
        if folder.name.startswith(".") or folder.name == "lost+found":
            continue
        try:
            name = layout.unescape(folder.name)
        except FormatError:
            newest = stored(folder).newest
            name = newest.domain if newest is not None else folder.name
        if any(folder.glob(f"*/{layout.POINTS}")):
            found[name] = folder
    return found


def busy(runtime_dir: Path, uuid: str) -> str:
    """Who works on a domain now, or nothing."""
    return holder(rundir.domain_dir(runtime_dir, uuid) / rundir.LOCK) if uuid else ""


def status_of(
    name: str, found: Stored, facts: Facts, limits: Limits, now: datetime, **more: Any
) -> DomainStatus:
    """Judge a domain; ``more`` are ``next``, ``busy``, ``last_run`` and ``runs``."""
    return DomainStatus(
        name=name,
        stored=found,
        verdict=judge(facts, limits, now),
        is_covered=facts.is_covered and not facts.unscheduled,
        limits=limits,
        **more,
    )


def nagios(report: StatusReport) -> tuple[str, int]:
    """One line with performance data, and the exit status, by the guidelines for plugins."""
    bad = [each for each in report.domains if each.verdict.health is not Health.OK]
    bad.sort(key=lambda each: (-each.verdict.health.rank, each.name))
    word = report.health.value.upper()
    number = len(report.domains)
    all_of_them = f"{number} domain{'s' * (number != 1)}"
    if bad:
        told = "; ".join(f"{each.name}: {each.verdict.reasons[0]}" for each in bad[:SHOWN])
        more = f"; {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        text = f"{len(bad)} of {all_of_them}: {told}{more}"
    else:
        text = all_of_them
    if report.notes:
        text += f" ({'; '.join(report.notes)})"
    data = " ".join(_performance(report))
    if any(each.stored.is_denied for each in report.domains):
        # the plugin's account, and nothing of the backups (W-10)
        return f"NBDBACKUP UNKNOWN - {_plain(text)}; run as root | {data}", NAGIOS[Health.UNKNOWN]
    return f"NBDBACKUP {word} - {_plain(text)} | {data}", NAGIOS[report.health]


def _performance(report: StatusReport) -> list[str]:
    unprotected = sum(not each.is_covered for each in report.domains)
    found = [f"domains={len(report.domains)};;;0", f"unprotected={unprotected};;;0"]
    for each in report.domains:
        instant = each.stored.instant
        if instant is not None:
            age = max(0, int((report.moment - instant).total_seconds()))
            label = _plain(each.name).replace("'", "''").replace("=", "_")
            limits = f"{each.limits.warning:.0f};{each.limits.critical:.0f}"
            found.append(f"'{label} age'={age}s;{limits};0")
            if held := each.stored.all.verified:
                since = max(0, int((report.moment - datetime.fromisoformat(held)).total_seconds()))
                found.append(f"'{label} verified'={since}s;;;0")
    return found


def rows(domains: Sequence[DomainStatus], now: datetime) -> list[tuple[str, ...]]:
    """The cells of a table, its head first; the last is the health."""
    found: list[tuple[str, ...]] = [
        ("DOMAIN", "LAST POINT", "AGE", "LEVEL", "SIZE", "TOTAL", "VERIFIED", "NEXT RUN", "HEALTH")
    ]
    for each in domains:
        point, instant = each.stored.newest, each.stored.instant
        if point is None or instant is None:
            cells: tuple[str, ...] = ("-",) * 6
        else:
            age = age_text((now - instant).total_seconds())
            local = instant.astimezone().strftime("%Y-%m-%d %H:%M %Z")
            cells = (local, age, point.level.value, human_size(each.stored.size))
            cells = (*cells, human_size(each.stored.all.stored_bytes), _since(each.stored.all, now))
        next_run = each.next.astimezone().strftime("%Y-%m-%d %H:%M %Z") if each.next else "-"
        found.append((each.name, *cells, next_run, each.verdict.health.value))
    return found


def _since(held: Holdings, now: datetime) -> str:
    """How long ago something was verified, or that nothing ever was."""
    if not held.verified:
        return "-"
    age = (now - datetime.fromisoformat(held.verified)).total_seconds()
    return age_text(age)


def _plain(text: str) -> str:
    """Without what would end the text of a plugin."""
    return plain.line(text).replace("|", "?")
