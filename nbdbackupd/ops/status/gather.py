"""What is known of all domains: from libvirt, the configuration, the repositories and systemd."""

import difflib
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdbackupd import rundir
from nbdbackupd.config import inventory
from nbdbackupd.config import timers as config_timers
from nbdbackupd.config.files import Configuration
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.config.settings import (
    global_settings,
    needs_libvirt,
    settings_for,
    standalone_names,
)
from nbdbackupd.errors import (
    DomainError,
    DomainNotFoundError,
    NbdbackupError,
    ProcessError,
    RepositoryError,
    UsageError,
    one_line,
)
from nbdbackupd.model import throwaway, unitname
from nbdbackupd.model.domain import is_uuid
from nbdbackupd.model.freeze_memory import once_let_go
from nbdbackupd.model.health import Facts, Limits
from nbdbackupd.model.host import Host
from nbdbackupd.model.unitname import RUNNER
from nbdbackupd.ops.domain import configured, mounted
from nbdbackupd.ops.notify import notification
from nbdbackupd.ops.retention.history import Unwanted
from nbdbackupd.ops.sets import homes, sizes
from nbdbackupd.ops.sets.homes import MARK
from nbdbackupd.ops.sets.sizes import FileSystem
from nbdbackupd.ops.status import metrics, record
from nbdbackupd.ops.status import status as report
from nbdbackupd.ops.status.status import DomainStatus, StatusReport, Stored
from nbdbackupd.ops.status.summaries import Summaries
from nbdbackupd.repo import layout
from nbdbackupd.repo.runs import Seen
from nbdbackupd.systemd import units as systemd
from nbdbackupd.systemd.units import Service, Timer

if TYPE_CHECKING:
    from nbdbackupd.source.hooked import Hook
    from nbdbackupd.virt.connection import Connection


INSTALL: Final = "install the package nbdbackupd"


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """Timers and runs by the names of their units; nothing if systemd could not be asked."""

    is_known: bool = False
    timers: dict[str, Timer] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """What is known before the sets are read.

    ``domains`` are libvirt's, with UUID and settings, None if it could not be asked; ``folders``
    the directories of domains in the repositories, and the UUID where it matters: of those that
    libvirt knows, and of others that have such a name, which has their mark. ``is_silent``:
    libvirt tells us of no end of a guest.
    """

    configuration: Configuration
    summaries: Summaries
    domains: dict[str, tuple[str, DomainSettings]] | None
    is_silent: bool
    units: Units
    folders: dict[str, tuple[Path, str]]
    warning: float | None
    critical: float | None

    def limits(self, settings: DomainSettings) -> Limits:
        """How old a domain's newest point may be."""
        warning, critical = self.warning, self.critical
        return Limits(
            warning=settings.monitoring_warning_age if warning is None else warning,
            critical=settings.monitoring_critical_age if critical is None else critical,
        )

    def inventory(self) -> tuple[str, ...] | None:
        """The domains that are this host's; None if libvirt was not asked."""
        if self.domains is None:
            return None
        return _inventory(self.configuration, self.units, self.domains)

    def names(self) -> list[str]:
        """All domains that anybody knows, in the order of names."""
        loaded = (unitname.domain_of(unit) for unit in self.units.timers)
        found = {
            *config_timers.exact_names(self.configuration),
            *self.folders,
            *(self.domains or ()),
        }
        return sorted(found | {each for each in loaded if each and not is_uuid(each)})


def gather(
    names: Sequence[str],
    host: Host,
    *,
    warning: float | None = None,
    critical: float | None = None,
) -> StatusReport:
    """Look at these domains, or at all.

    ``warning`` and ``critical`` are ages in seconds that overrule those of the configuration.
    Raises ConfigError if the configuration has a problem, DomainNotFoundError for a name that
    nobody knows. What can't be asked is told in the report's notes.
    """
    configuration = configured.read(host).require_sound()
    notes: list[str] = []
    domains, is_silent = _ask_libvirt(configuration, host, notes)
    if domains is not None:
        domains |= _standalone(configuration)
    summaries = Summaries(host.own_state_dir)
    known = _Known(
        configuration=configuration,
        summaries=summaries,
        domains=domains,
        is_silent=is_silent,
        units=ask_systemd(notes),
        folders=_folders(configuration, domains, summaries),
        warning=warning,
        critical=critical,
    )
    every = known.names()
    _require(names, every, known)
    moment = host.now()
    chosen = [name for name in every if name in names] if names else every
    found = StatusReport(
        moment=moment,
        inventory=known.inventory(),
        domains=tuple(_look(name, known, host, notes) for name in chosen),
        file_systems=_room(configuration, notes),
        notes=tuple(dict.fromkeys(notes)),
    )
    summaries.save(is_all=not names)
    return found


def _require(names: Iterable[str], every: Sequence[str], known: _Known) -> None:
    """Raises UsageError for a name of two domains, DomainNotFoundError for one of none."""
    for name in names:
        same = [each for each in known.folders if each.rpartition(MARK)[0] == name]
        if same and name in known.folders and name not in (known.domains or {}):
            raise UsageError(
                f"{name} means more than one domain: give {' or '.join([name, *same])} as 'status' "
                f"without a name shows them, or a UUID to other verbs"
            )
        if name not in every:
            near = difflib.get_close_matches(name, every, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise DomainNotFoundError(
                f"no domain {name}: neither libvirt, nor the configuration, nor a repository "
                f"knows it{hint}"
            )


def record_host(
    connection: "Connection", configuration: Configuration, directory: Path, moment: datetime
) -> None:
    """Count the domains, and those that nobody protects, and write the host's metrics.

    Raises DomainError, RepositoryError, NoSpaceError.
    """
    units = ask_systemd([])
    domains = _domains_of(connection, configuration) | _standalone(configuration)
    covered = []
    for name, (uuid, settings) in domains.items():
        timer = _timer(units, name, uuid)
        covered.append(
            _is_covered(settings, timer, configuration)
            and not _unscheduled(name, settings, units, timer, configuration)
        )
    metrics.record_host(
        directory,
        domains=len(covered),
        unprotected=covered.count(False),
        moment=moment,
    )
    metrics.forget_others(directory, _inventory(configuration, units, domains))


def _inventory(
    configuration: Configuration, units: Units, domains: Iterable[str]
) -> tuple[str, ...]:
    """The domains that are this host's: libvirt knows them, a file names them, or a timer."""
    loaded = filter(None, map(unitname.domain_of, units.timers))
    return tuple(dict.fromkeys((*domains, *config_timers.exact_names(configuration), *loaded)))


def ask_systemd(notes: list[str]) -> Units:
    """The timers and services of our runs; a note if systemd can't be asked."""
    if not systemd.is_booted():
        notes.append("systemd does not run this host: no schedules")
        return Units()
    try:
        timers = systemd.timers(f"{RUNNER}@*.timer")
        services = systemd.services(f"{RUNNER}@*.service")
    except ProcessError as err:
        notes.append(f"systemd can't be asked: {err}")
        return Units()
    return Units(
        is_known=True,
        timers={each.unit: each for each in timers},
        services={each.unit: each for each in services},
    )


def failure_of(service: Service | None, seen: Seen, found: Stored) -> str:
    """How a unit failed without a word of the run itself; empty if it did not, or not since."""
    if service is None or service.active != "failed" or service.ended is None:
        return ""
    known = datetime.fromisoformat(seen.end.begun) if seen.end is not None else None
    if any(each is not None and each > service.ended for each in (known, found.instant)):
        return ""
    if seen.end is not None and seen.end.unit == service.unit and seen.end.ended:
        return ""
    event, result, meaning = notification.result_of(service.result, str(service.exit_status))
    if event != "failure":
        return ""
    return f"the last run failed: {result}" + (f" ({meaning})" if meaning else "")


def _ask_libvirt(
    configuration: Configuration, host: Host, notes: list[str]
) -> tuple[dict[str, tuple[str, DomainSettings]] | None, bool]:
    """What libvirt knows, see ``_Known``, and whether it is silent about ends of guests."""
    try:
        from nbdbackupd.ops.domain import domains
        from nbdbackupd.source import hooked

        reached = configured.connected(configuration, host)
        with domains.connect(reached, any_host=True) as connection:
            notes += waiting(connection)
            found = _domains_of(connection, configuration)
            hook = hooked.look(connection, host.runtime_dir)
            wanted = any(settings.on_shutdown for _, settings in found.values())
            notes += _of_hook(hook, is_wanted=wanted)
            return found, hook.is_silent
    except ImportError:
        why = "python3-libvirt is not installed"
    except DomainError as err:
        why = err.message
    if _does_without(configuration):
        return {}, False
    notes.append(f"libvirt can't be asked: {why}")
    return None, False


def _does_without(configuration: Configuration) -> bool:
    """Whether all that this host has are machines without libvirt, so that it need not be there."""
    if not standalone_names(configuration):
        return False
    is_unnamed = global_settings(configuration).is_default("libvirt.uri")
    return is_unnamed and not inventory.has_any()


def _standalone(configuration: Configuration) -> dict[str, tuple[str, DomainSettings]]:
    """The settings of each machine without libvirt, by name; its sets tell its UUID."""
    return {
        name: ("", settings_for(name, "", {}, configuration))
        for name in standalone_names(configuration)
    }


def _of_hook(hook: "Hook", *, is_wanted: bool) -> list[str]:
    """A note if libvirt does not tell us what happens to its domains, though that is wanted."""
    if hook.is_installed:
        return [f"libvirt does not call our hook yet: {hook.why}"]
    if hook.is_removed:
        return [f"libvirt's hook does nothing: {hook.why}; install it again, or purge it"]
    if hook.is_missing and is_wanted:
        return [f"libvirt calls no hook of ours: {hook.why}; {INSTALL}"]
    return []


def waiting(connection: "Connection") -> list[str]:
    """A note for each domain whose guest has shut down and waits for the end of its backup.

    Raises DomainError.
    """
    from nbdbackupd.virt.domain import Domain

    found = []
    for name, uuid in connection.domains():
        with suppress(DomainNotFoundError):  # undefined meanwhile
            if Domain(connection, name, uuid).is_kept():
                found.append(
                    f"the guest of {name} has shut down and waits for the end of its backup: "
                    f"{shlex.join(['virsh', 'resume', name])} boots it at once"
                )
    return found


def _domains_of(
    connection: "Connection", configuration: Configuration
) -> dict[str, tuple[str, DomainSettings]]:
    """UUID and settings of each domain that libvirt knows, by name; of our own none."""
    from nbdbackupd.virt.domain import Domain

    found: dict[str, tuple[str, DomainSettings]] = {}
    for name, uuid in connection.domains():
        domain = Domain(connection, name, uuid)
        try:
            if throwaway.is_marked(domain.xml()):
                continue
            found[name] = uuid, configured.settings_of_domain(domain, configuration)
        except DomainNotFoundError:
            continue  # undefined meanwhile
    return found


def _timer(units: Units, name: str, uuid: str) -> Timer | None:
    """The timer whose instance is the domain's name, or its UUID."""
    wanted = [unitname.unit(unitname.RUNNER, each, "timer") for each in (name, uuid) if each]
    return next((units.timers[unit] for unit in wanted if unit in units.timers), None)


def _is_covered(
    settings: DomainSettings, timer: Timer | None, configuration: Configuration
) -> bool:
    """Whether a timer, the end of its guest, or a file that is not for all, is for a domain."""
    return timer is not None or settings.on_shutdown or _is_chosen(settings, configuration)


def _is_chosen(settings: DomainSettings, configuration: Configuration) -> bool:
    """Whether a file that is not for all domains is for a domain."""
    mains = {file.path for file in configuration.files if file.match is None}
    return any(path not in mains for path in settings.applied)


def _unscheduled(
    name: str,
    settings: DomainSettings,
    units: Units,
    timer: Timer | None,
    configuration: Configuration,
) -> str:
    """Why a domain is not saved although the configuration is for it; empty if it is.

    What the end of the guest saves needs no timer, unless a file of the domain wants one.
    """
    if not units.is_known or settings.schedule_calendar == ():
        return ""
    service = units.services.get(timer.activates) if timer is not None else None
    if timer is not None and (timer.next is not None or (service and service.is_running)):
        return ""
    unit = unitname.unit(unitname.RUNNER, name, "timer")
    if settings.schedule_enable and _is_chosen(settings, configuration):
        why = "not scheduled although schedule.enable is set, no timer is active: "
        if not systemd.can_schedule():
            return f"{why}{INSTALL}"
        return (
            f"{why}'systemctl start nbdbackup-timers', or 'systemctl enable --now "
            f"{shlex.quote(unit)}'"
        )
    if settings.on_shutdown:
        return ""
    if not systemd.can_schedule():
        return f"not scheduled, no timer is active: {INSTALL}"
    return (
        f"not scheduled, no timer is active: 'systemctl enable --now {shlex.quote(unit)}', or set "
        "schedule.enable and 'systemctl start nbdbackup-timers'"
    )


def _repositories(configuration: Configuration) -> list[Path]:
    path = "repository.path"
    more = (file.values[path].value for file in configuration.files if path in file.values)
    return list(dict.fromkeys([global_settings(configuration).repository_path, *more]))


def _room(configuration: Configuration, notes: list[str]) -> tuple[FileSystem, ...]:
    """The file systems of the repositories that are there; a note if they can't be asked."""
    try:
        return sizes.file_systems(each for each in _repositories(configuration) if each.is_dir())
    except (RepositoryError, OSError) as err:
        notes.append(one_line(err))
        return ()


def _folders(
    configuration: Configuration,
    domains: dict[str, tuple[str, DomainSettings]] | None,
    summaries: Summaries,
) -> dict[str, tuple[Path, str]]:
    """The directories of domains: of those that libvirt knows by name, else by their own."""
    found: dict[str, tuple[Path, str]] = {}
    for name, (uuid, settings) in (domains or {}).items():
        with suppress(NbdbackupError):
            home = homes.home_of(settings.repository_path, name, uuid, summaries.owner)
            if home.exists():
                found[name] = home, uuid
    taken = {home for home, _ in found.values()}
    for repository in _repositories(configuration):
        for name, folder in report.names_in(repository).items():
            if folder in taken:
                continue
            uuid, known = "", (domains or {}).get(name, ("",))[0]
            if name in found or known:
                with suppress(NbdbackupError):
                    uuid = summaries.owner(folder)
            is_other = uuid not in ("", known)
            shown = f"{name}{homes.MARK}{uuid[: homes.SHORT]}" if is_other else name
            taken.add(found.setdefault(shown, (folder, uuid))[0])
    return found


def _look(name: str, known: _Known, host: Host, notes: list[str]) -> DomainStatus:

    uuid, settings = _settings(name, known, notes)
    timer = _timer(known.units, name, uuid)
    service = known.units.services.get(timer.activates) if timer is not None else None
    if service is None:
        unit = unitname.unit(unitname.RUNNER, name, "service")
        service = known.units.services.get(unit)
    found, wanted = _stored(name, settings, known, host)
    newest = found.newest
    seen = record.look(host, name, uuid)
    is_known = None if known.domains is None else name in known.domains
    if settings.qmp is not None:
        is_known = True
    is_covered = _is_covered(settings, timer, known.configuration)
    facts = Facts(
        newest=found.instant,
        problem=found.problem,
        damage=found.damage,
        warnings=_concerns(found, host, uuid) or _warned(seen, found),
        failure=record.failure_text(seen, found.instant) or failure_of(service, seen, found),
        is_covered=is_covered,
        unscheduled=(
            _unscheduled(name, settings, known.units, timer, known.configuration)
            if is_covered and is_known
            else ""
        ),
        # what a standby has not saved another host has
        is_wanted=settings.schedule_calendar != () and not settings.standby,
        is_known=is_known,
        is_unheard=known.is_silent and bool(is_known) and settings.on_shutdown,
    )
    return report.status_of(
        name,
        found,
        facts,
        known.limits(settings),
        host.now(),
        next=timer.next if timer is not None else None,
        busy=report.busy(host.runtime_dir, uuid or (newest.uuid if newest is not None else "")),
        last_run=seen.end,
        runs=tuple(
            report.LiveRun(
                unit=run.unit, begun=run.begun, doing=record.doing(run, host) or "begins"
            )
            for run in seen.alive
        ),
        unwanted=wanted,
    )


def _concerns(found: Stored, host: Host, uuid: str) -> tuple[str, ...]:
    """What the newest point lacks; that its guest may be frozen only as long as it may be.

    Without ``uuid`` nothing is known of the guest: it may be that of another host.
    """
    held = rundir.domain_dir(host.runtime_dir, uuid) / rundir.HELD
    try:
        is_let_go = bool(uuid) and not held.exists()
    except OSError:
        # this account can't see it
        is_let_go = False
    return tuple(map(once_let_go, found.concerns)) if is_let_go else found.concerns


def _warned(seen: Seen, found: Stored) -> tuple[str, ...]:
    """What the run warned of that made the newest point."""
    end, newest = seen.end, found.newest
    if end is None or newest is None or not end.status or end.point != newest.id:
        return ()
    return (f"the run of the newest point ended with a warning: {end.reason or 'see its log'}",)


def _settings(name: str, known: _Known, notes: list[str]) -> tuple[str, DomainSettings]:
    if known.domains is not None and name in known.domains:
        return known.domains[name]
    if known.domains is None and needs_libvirt(name, known.configuration):
        notes.append("without libvirt, files that choose domains by labels or UUID are left out")
    return "", settings_for(name, "", {}, known.configuration)


def _stored(
    name: str, settings: DomainSettings, known: _Known, host: Host
) -> tuple[Stored, Unwanted]:

    # sets of a domain that files no longer send here are still where they are
    default = settings.repository_path / layout.escape(name, layout.MAX_DOMAIN)
    asked = known.domains[name][0] if known.domains and name in known.domains else ""
    directory, uuid = known.folders.get(name, (default, asked))
    more = [default] if asked and default != directory else []
    try:
        mounted.check(settings)
    except RepositoryError as err:
        return report.Stored(directory=directory, problem=one_line(err)), Unwanted()
    return known.summaries.look(directory, uuid, more, settings, host)
