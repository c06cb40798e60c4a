"""A run as the configuration says: what the units do for one domain."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from nbdbackupd import events, plain
from nbdbackupd import log as runlog
from nbdbackupd.config.files import Configuration
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.config.settings import global_settings, settings_for
from nbdbackupd.errors import (
    BusyError,
    DomainNotFoundError,
    ElsewhereError,
    GaveWayError,
    Interrupted,
    NbdbackupError,
    one_line,
)
from nbdbackupd.model import throwaway, unitname
from nbdbackupd.model.chain import Level
from nbdbackupd.model.domain import is_uuid
from nbdbackupd.model.host import Host
from nbdbackupd.model.retention import Pruning
from nbdbackupd.ops.backup import backup as backup_verb
from nbdbackupd.ops.backup import outcome, prepare, standalone
from nbdbackupd.ops.backup.prepare import PlannedRun
from nbdbackupd.ops.backup.request import BackupReport, BackupRequest
from nbdbackupd.ops.domain import configured, domains, endings, images, qemu
from nbdbackupd.ops.notify import kept as kept_notification
from nbdbackupd.ops.retention import prune, scope
from nbdbackupd.ops.run import around, retire
from nbdbackupd.ops.run.metrics import RunMetrics
from nbdbackupd.ops.run.request import Observer, RunReport, RunRequest
from nbdbackupd.ops.run.retire import RetireRequest
from nbdbackupd.ops.sets import homes, sets
from nbdbackupd.ops.status import gather
from nbdbackupd.ops.status.record import RunRecord
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.source import kept
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain, Ending

log = logging.getLogger(__name__)
PENDING: Final = "pending"
"""Where below the state directory the hook notes what it puts off to the next boot."""

SLOT_SECONDS: Final = 86400.0
"""A run that finds no place among the concurrent ones in a day has its next one waiting."""

AFTER_END_SECONDS: Final = 600.0
"""A run that the guest's end has broken off may still hold its locks: it cleans up."""

RETRY_SECONDS: Final = (300.0, 900.0, 2700.0)
"""Gaps between the tries of a run that gave way, or found somebody else at work."""

RETRY_WITHIN_SECONDS: Final = 43200.0
"""After so long a run is not tried again: its next one comes soon."""

POLL_SECONDS: Final = 0.5

INTERRUPTED_SECONDS: Final = 30.0
"""Programs after a run that was told to end: systemd kills soon."""

NOTHING: Final = {
    Ending.SAVED: "its state is saved, and it will go on from there",
    Ending.MIGRATED: "it was migrated to another host, which has it now",
    Ending.FAILED: "its start has failed, no guest has run",
    Ending.SNAPSHOT: "it was put back to a snapshot",
}
"""Ends of which libvirt says that nothing was finished. After a crash, or an end that libvirt
does not know, the bitmaps decide: a disk whose bitmap was not stored is read whole."""


def run(request: RunRequest, host: Host, observer: Observer, record: RunRecord) -> RunReport:
    """Save a domain as the configuration says, trying again if that is wished.

    Raises ConfigError, DomainNotFoundError (not after the guest's end), BusyError if there is no
    place or another run of the domain, ProcessError of a program before it, RepositoryError if
    the repository is not mounted, and what a backup raises.
    """
    begun = time.monotonic()
    gaps = iter(RETRY_SECONDS if request.retry else ())
    while True:
        try:
            report = _told(request, host, observer)
        except BusyError as err:
            if request.shutdown and isinstance(err, GaveWayError):
                # it runs again: its next end begins this anew, and so does its timer
                report = RunReport(
                    domain=request.domain, uuid="", result="skipped", reason=err.message
                )
                record.done(report.exit_code, None, report.reason, "")
                return report
            gap = next(gaps, None)
            if gap is None or time.monotonic() - begun > RETRY_WITHIN_SECONDS:
                record.failed(err)
                raise
            _wait(gap, err, request=request, host=host, observer=observer, record=record)
        except BaseException as err:
            record.failed(err)
            raise
        else:
            if report.result != "planned":
                directory = str(report.set or "")
                record.done(
                    report.exit_code, report.backup, report.reason, directory, report.problems
                )
            return report


def _wait(
    gap: float,
    err: BusyError,
    *,
    request: RunRequest,
    host: Host,
    observer: Observer,
    record: RunRecord,
) -> None:
    """Let those go first who come first; raises what ends the run meanwhile."""
    moment = host.now() + timedelta(seconds=gap)
    at = f"{moment.astimezone():%H:%M %Z}"
    record.failed(err, again=moment)
    with runlog.context(DOMAIN=request.domain):
        events.emit(log, events.BACKUP_AGAIN, reason=one_line(err), at=at)
    # what ends the wait counts for the next try, what was warned of does not
    observer.anew()
    observer.doing(f"tried again at {at}: {one_line(err)}")
    until = time.monotonic() + gap
    try:
        while (left := until - time.monotonic()) > 0:
            observer.cancelled()
            time.sleep(min(POLL_SECONDS, left))
    except BaseException as stop:
        record.failed(stop)
        raise


def _told(request: RunRequest, host: Host, observer: Observer) -> RunReport:
    """One try."""
    with ExitStack() as stack:
        stack.enter_context(runlog.context(DOMAIN=request.domain))
        if not request.dry_run:
            stack.enter_context(endings.Ending(log, outcome.event_of).told())
        report = _find_and_run(request, host, observer)
        if report.result == "skipped" and report.backup is None:
            events.emit(log, events.BACKUP_SKIPPED, reason=report.reason)
    return report


def _find_and_run(request: RunRequest, host: Host, observer: Observer) -> RunReport:
    configuration = configured.read(host).require_sound()
    standing = configured.standalone(request.domain, configuration)
    if standing is not None:
        return _run_standalone(request, host, observer, configuration, standing)
    host = configured.connected(configuration, host)
    with ExitStack() as stack:
        try:
            connection = stack.enter_context(domains.connect(host))
            domain = domains.find(connection, request.domain, host.runtime_dir)
        except DomainNotFoundError as err:
            if not request.shutdown:
                return _report_gone(request.domain, configuration, err)
            why = err.fields.get("reason", "its end was not seen by libvirt's hook")
            gone = f"libvirt no longer knows it: {why}"
            return RunReport(domain=request.domain, uuid="", result="skipped", reason=gone)
        except NbdbackupError as err:
            # libvirt is away, so there is only the name, and what holds for all domains
            _note_failure(request, host, configuration, err)
            raise
        settings = configured.settings_of_domain(domain, configuration)
        _keep_notification(request, host, configuration, domain.name, settings)
        one = _OfLibvirt(
            request=request,
            host=host,
            observer=observer,
            name=domain.name,
            uuid=domain.uuid,
            settings=settings,
            connection=connection,
            domain=domain,
        )
        why_not = one.why_not() if request.shutdown else ""
        if why_not:
            return one.report("skipped", why_not)
        left = one.left_to_others()
        if left is not None:
            return left
        if request.dry_run:
            return one.plan_only()
        report = one.recorded()
        _record_host(connection, configuration, settings, host.now())
        return report


def _run_standalone(
    request: RunRequest,
    host: Host,
    observer: Observer,
    configuration: Configuration,
    settings: DomainSettings,
) -> RunReport:
    """Save a QEMU without libvirt, which is not asked for anything."""
    _keep_notification(request, host, configuration, request.domain, settings)
    if request.shutdown:
        why = "it runs without libvirt, which alone tells of an end"
        return RunReport(domain=request.domain, uuid="", result="skipped", reason=why)
    try:
        # a monitor serves one program at a time: let go of it before a place is waited for
        with qemu.connect(settings.monitor, request.domain) as found:
            uuid = found.uuid
    except NbdbackupError as err:
        _note_failure(request, host, configuration, err)
        raise
    one = _OfQemu(
        request=request,
        host=host,
        observer=observer,
        name=request.domain,
        uuid=uuid,
        settings=settings,
    )
    return one.plan_only() if request.dry_run else one.recorded()


def _keep_notification(
    request: RunRequest,
    host: Host,
    configuration: Configuration,
    name: str,
    settings: DomainSettings,
) -> None:
    if not request.dry_run:
        kept_notification.keep(host.own_state_dir, name, settings)
        kept_notification.keep(host.own_state_dir, "", global_settings(configuration))


def _note_failure(
    request: RunRequest, host: Host, configuration: Configuration, err: NbdbackupError
) -> None:
    """Write the metrics of a run that found nobody."""
    if not (request.dry_run or is_uuid(request.domain)):
        directory = global_settings(configuration).monitoring_metrics_directory
        RunMetrics(directory, request.domain, host).failed(err)


def _report_gone(name: str, configuration: Configuration, err: DomainNotFoundError) -> RunReport:
    """That a domain has moved to another host is no failure of its timer on this one."""
    where = images.gone_to(name, configured.sharing(settings_for(name, "", {}, configuration)))
    if not where:
        raise err
    return RunReport(domain=name, uuid="", result="skipped", reason=where)


def _record_host(
    connection: Connection,
    configuration: Configuration,
    settings: DomainSettings,
    moment: datetime,
) -> None:
    """Write the metrics of the host, if that is configured: of domains that nobody protects."""
    if settings.monitoring_metrics_directory is None:
        return
    try:
        directory = settings.monitoring_metrics_directory
        gather.record_host(connection, configuration, directory, moment)
    except NbdbackupError as err:
        log.warning("the metrics of this host are not written: %s", err)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run(ABC):
    """One run of a domain that was found; of which kind, its subclass knows."""

    request: RunRequest
    host: Host
    observer: Observer
    name: str
    uuid: str
    settings: DomainSettings

    def report(self, result: str, reason: str, **more: Any) -> RunReport:
        return RunReport(domain=self.name, uuid=self.uuid, result=result, reason=reason, **more)

    def why_not(self) -> str:
        """Why nothing is to be done after the guest's end; empty if it is. Raises DomainError."""
        return ""

    def _elsewhere(self, err: ElsewhereError) -> RunReport:
        """That another host has it is no failure; that none has ever saved it is worth a word."""
        shared = configured.sharing(self.settings).state_dir
        if shared is None:
            return self.report("skipped", err.message)
        points = sorted(record.point for record in StateDirectory(shared).records(self.uuid))
        if points:
            return self.report("skipped", f"{err.message}; the newest point noted is {points[-1]}")
        problem = f"no host has noted a point of domain {self.name} in {shared}"
        return self.report("skipped", err.message, problems=(problem,))

    def plan(self) -> PlannedRun:
        return prepare.plan(self.name, self.uuid, self.settings, self.host.now(), Level.AUTO)

    def plan_only(self) -> RunReport:
        planned = self.plan()
        level = planned.next.level.value
        return self.report("planned", planned.next.reason, set=planned.set, level=level)

    def recorded(self) -> RunReport:
        """Run, and write the metrics of it, good or bad."""
        run_metrics = RunMetrics(self.settings.monitoring_metrics_directory, self.name, self.host)
        try:
            report = self.in_slot()
        except BaseException as err:
            run_metrics.failed(err)
            raise
        run_metrics.done(report.exit_code, report.set, report.backup)
        return report

    def in_slot(self) -> RunReport:
        """Wait for a place, then run, with the programs before and after."""
        self.observer.doing("waiting for a place among the concurrent runs")
        with around.slot(
            self.host.runtime_dir,
            self.settings.limits_concurrent_runs,
            owner=f"run of {self.name}",
            wait_seconds=SLOT_SECONDS if self.request.wait is None else self.request.wait,
            cancelled=self.observer.cancelled,
        ):
            # it may have taken hours
            why_not = self.why_not() if self.request.shutdown else ""
            if why_not:
                return self.report("skipped", why_not)
            with around.shutdown_delayed(f"backup of {plain.line(self.name)}"):
                return self.with_programs()

    def with_programs(self) -> RunReport:
        settings = self.settings
        about = {
            "NBDBACKUP_DOMAIN": self.name,
            "NBDBACKUP_UUID": self.uuid,
            "NBDBACKUP_DIRECTORY": self.directory(),
        }
        try:
            self.observer.doing("running the programs before the backup")
            around.run_each(
                settings.commands_pre,
                about,
                timeout=settings.commands_timeout,
                cancelled=self.observer.cancelled,
            )
            # they may have mounted the repository
            about["NBDBACKUP_DIRECTORY"] = self.directory()
            report = self.backup()
        except BaseException as err:
            about |= {"NBDBACKUP_RESULT": "failure", "NBDBACKUP_REASON": one_line(err)}
            expected = isinstance(err, NbdbackupError)
            limit = settings.commands_timeout if expected else INTERRUPTED_SECONDS
            for problem in self._after(about, min(limit, settings.commands_timeout)):
                log.warning("%s", problem)
            raise
        problems = self._after(about | _about(report), settings.commands_timeout)
        return RunReport(
            domain=report.domain,
            uuid=report.uuid,
            result=report.result,
            reason=report.reason,
            set=report.set,
            level=report.level,
            problems=(*report.problems, *problems),
            backup=report.backup,
        )

    def directory(self) -> str:
        """The directory of the domain's sets, or nothing while it can't be told."""
        repository = self.settings.repository_path
        try:
            return str(homes.home_of(repository, self.name, self.uuid))
        except NbdbackupError as err:
            log.info("the domain's directory in %s is not known yet: %s", repository, err.message)
            return ""

    def _after(self, about: Mapping[str, str], timeout: float) -> tuple[str, ...]:
        self.observer.doing("running the programs after the backup")
        return around.run_all(
            self.settings.commands_post, about, timeout=timeout, waiting=self.observer.alive
        )

    def backup(self) -> RunReport:
        """Choose the set, make the point, drop what older sets have left at libvirt."""
        # only now: a program before the run may have mounted the repository
        planned = self.plan()
        self.observer.doing(f"saving into {planned.set}: {planned.next.reason}")
        log.info("set %s, level %s: %s", planned.set, planned.next.level, planned.next.reason)
        order, problems = self._order(planned), planned.warnings
        try:
            made = self._save(order)
            if made.is_short:
                problems += self._prune(planned)
                made = self._save(replace(order, may_make_room=False))
        except ElsewhereError as err:
            return self._elsewhere(err)
        if made.point is None:
            return self.report("skipped", made.skipped, set=planned.set, backup=made)
        if made.point.makes_base:
            problems += self._retire(planned, order, made.point.chain)
        if self.settings.retention_prune is Pruning.RUN:
            problems += self._prune(planned)
        return self.report(
            "saved",
            planned.next.reason,
            set=planned.set,
            level=made.point.level.value,
            problems=problems,
            backup=made,
        )

    @abstractmethod
    def _save(self, order: BackupRequest) -> BackupReport:
        """Make the point. Raises as ``backup``."""

    @abstractmethod
    def _drop(self, dropped: RetireRequest) -> tuple[str, ...]:
        """Let go of older sets' checkpoints; returns what went wrong."""

    def _order(self, planned: PlannedRun) -> BackupRequest:
        """Level auto: should another run have begun the set meanwhile, this one goes on with it."""
        settings, more = self.settings, {}
        if self.request.shutdown:
            settings = settings.given(
                # nothing changed since the last point: that one is already of this state
                threshold=max(1, settings.threshold or 0),
                limits_wait=max(AFTER_END_SECONDS, settings.limits_wait),
            )
            more = {"only_off": True, "ending": self._put_off()}
        if self.request.wait is not None:
            settings = settings.given(limits_wait=self.request.wait)
        return prepare.request(
            self.uuid,
            planned.set,
            self.host,
            settings,
            configured.sharing(self.settings),
            retired=planned.directory,
            may_make_room=settings.retention_make_room,
            **more,
        )

    def _put_off(self) -> Ending:
        """How the guest ended, if that was before the host's last boot."""
        directory = self.host.own_state_dir / PENDING
        return kept.put_off(directory / unitname.escape(self.name))

    def _retire(self, planned: PlannedRun, order: BackupRequest, chain: str) -> tuple[str, ...]:
        dropped = RetireRequest(
            uuid=self.uuid,
            directory=planned.directory,
            chain=chain,
            runtime_dir=order.runtime_dir,
            state_dir=order.settings.checkpoint_directory,
            run_id=order.run_id,
            has_begun=planned.next.is_new,
            sharing=order.sharing,
        )
        self.observer.doing("dropping checkpoints of older sets")
        try:
            return self._drop(dropped)
        except Interrupted:
            # the point is made, which is what counts; the next run does the rest
            log.info("told to end: checkpoints of older sets are left to the next run")
            return ()

    def _prune(self, planned: PlannedRun) -> tuple[str, ...]:
        """Remove what no rule wants; a line for each problem. The point is made in any case."""
        self.observer.doing("removing what no rule of retention wants")
        try:
            found = sets.sets_of(planned.directory)
            own = tuple(each for each in found if each.uuid in ("", self.uuid))
            order = scope.of_domain(self.name, planned.directory, own, self.settings, self.host)
            return prune.prune(
                order,
                progress=lambda disk, done, size: self.observer.progress(disk, done, size, done),
                cancelled=self.observer.cancelled,
            ).warnings
        except Interrupted:
            log.info("told to end: old points are left to the next run")
            return ()
        except NbdbackupError as err:
            return (f"old points are not removed: {err.message}",)


@dataclass(frozen=True, kw_only=True, slots=True)
class _OfLibvirt(_Run):
    """A run of a domain of libvirt."""

    connection: Connection
    domain: Domain

    def why_not(self) -> str:
        """Why nothing is to be done after the guest's end; empty if it is. Raises DomainError."""
        if not self.settings.on_shutdown:
            return "on_shutdown is off in its configuration"
        if self.settings.start_paused:
            # its end would be the end of a guest, too, and start the next run
            return "start_paused is on in its configuration: it is saved by schedule only"
        if throwaway.is_marked(self.domain.xml()):
            return "it is one of our own that is thrown away"
        if self.domain.is_active():
            return "it runs again"
        return NOTHING.get(self.domain.ending(), "")

    def left_to_others(self) -> RunReport | None:
        """What to report if another host saves the domain; None if this one does.

        Nothing is touched. Raises BusyError, RepositoryError, DomainError.
        """
        if self.domain.is_active():
            return None
        if self.settings.standby:
            return self.report("skipped", "it is off here, and this host only stands by for it")
        try:
            found = images.prove(self.domain, configured.sharing(self.settings))
        except ElsewhereError as err:
            return self._elsewhere(err)
        if found.saver is None:
            return None
        saver = found.saver
        return self.report(
            "skipped", f"host {saver.name} has saved what its end left, as point {saver.saved}"
        )

    def _save(self, order: BackupRequest) -> BackupReport:
        return backup_verb.run(
            order,
            self.connection,
            progress=self.observer.progress,
            cancelled=self.observer.cancelled,
        )

    def _drop(self, dropped: RetireRequest) -> tuple[str, ...]:
        return retire.retire(dropped, self.connection, self.observer.cancelled)


@dataclass(frozen=True, kw_only=True, slots=True)
class _OfQemu(_Run):
    """A run of a QEMU without libvirt."""

    def _save(self, order: BackupRequest) -> BackupReport:
        return standalone.run(
            replace(order, domain=self.name),
            progress=self.observer.progress,
            cancelled=self.observer.cancelled,
        )

    def _drop(self, dropped: RetireRequest) -> tuple[str, ...]:
        return retire.retire_of_qemu(dropped, self.settings.monitor, self.name)


def _about(report: RunReport) -> dict[str, str]:
    """What programs after a run that did not fail are told of it."""
    result = {"saved": "success", "skipped": "skipped"}[report.result]
    point = report.backup.point if report.backup is not None else None
    return {
        "NBDBACKUP_RESULT": "warning" if report.warnings else result,
        "NBDBACKUP_REASON": report.reason,
        "NBDBACKUP_SET": str(report.set),
        "NBDBACKUP_LEVEL": report.level,
        "NBDBACKUP_POINT": point.id if point is not None else "",
    }
