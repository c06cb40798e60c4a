"""``nbdbackupctl timers``: what runs when, what ran, and how it ended."""

import os
import sys
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nbdbackupd import plain
from nbdbackupd.app import tables
from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.errors import ConfigError
from nbdbackupd.model import unitname
from nbdbackupd.model.host import Host
from nbdbackupd.ops.notify import notification
from nbdbackupd.ops.status import record
from nbdbackupd.plain import versioned
from nbdbackupd.repo.runs import End
from nbdbackupd.systemd import units
from nbdbackupd.systemd.units import Service, Timer
from nbdbackupd.units import human_time, utc_time

PATTERN = "nbdbackup*.timer"
DESCRIPTION = """\
Show the timers of this host's backups and verifications: when each runs next, when it ran last,
and how that ended.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A timer and what it starts; ``end`` is what that noted itself of its last end."""

    timer: Timer
    service: Service | None
    end: End | None = None

    @property
    def result(self) -> str:
        """How the last run ended: ``done``, ``failed (exit status 20)``, ``running``, or ``-``."""
        service = self.service
        if service is not None and service.is_running:
            return "running"
        if self.end is not None and (service is None or service.started is None):
            # before the host's last boot, of which systemd knows nothing
            told = "" if self.end.status is None else f" (exit status {self.end.status})"
            if self.end.result == "failed":
                return f"failed{told}"
            return f"warning{told}" if self.end.status else "done"
        if service is None or service.started is None:
            return "-"
        event, result, _ = notification.result_of(service.result, str(service.exit_status))
        words = {"success": "done", "warning": "warning", "failure": "failed"}
        return words[event] + (f" ({result})" if result != "success" else "")

    @property
    def started(self) -> datetime | None:
        """When the run began that ``result`` is about, whoever started it.

        Of a run that nobody knows it is when the timer was due last.
        """
        if self.service is not None and (self.service.started or self.service.is_running):
            return self.service.started or self.timer.last
        return datetime.fromisoformat(self.end.begun) if self.end is not None else self.timer.last

    @property
    def seconds(self) -> float | None:
        """How long that run took; None if nobody knows it, or while it goes on."""
        service = self.service
        if service is not None and (service.started or service.is_running):
            if service.started is None or service.ended is None:
                return None
            return (service.ended - service.started).total_seconds()
        if self.end is None or not self.end.ended:
            return None
        begun, ended = map(datetime.fromisoformat, (self.end.begun, self.end.ended))
        return (ended - begun).total_seconds()

    @property
    def exit_status(self) -> int | None:
        """The last run's; None if nobody knows it, or while it goes on."""
        if self.service is not None and self.service.started:
            return self.service.exit_status if self.service.ended else None
        return self.end.status if self.end is not None else None


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("timers", DESCRIPTION)
    parser.add_argument(
        "domain", metavar="DOMAIN", nargs="*", help="only those of these domains (default: all)"
    )
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out. Raises ConfigError without systemd, ProcessError if it can't be asked."""
    if not units.is_booted():
        raise ConfigError(
            "systemd does not run this host, so there are no timers: let another scheduler call "
            "'nbdbackupctl run DOMAIN'"
        )
    found = units.timers(PATTERN)
    if args.domain:
        found = tuple(each for each in found if unitname.domain_of(each.unit) in args.domain)
    started = [each.activates for each in found if each.activates]
    services = {each.unit: each for each in units.services(*started)} if started else {}
    lines = [
        Line(timer=each, service=services.get(each.activates), end=_end(each, context.host))
        for each in found
    ]
    context.show(_document(lines), _render(lines), painted=True)
    return 0


def _end(timer: Timer, host: Host) -> End | None:
    """The newest end that a run noted, if it was one of this timer."""
    domain = unitname.domain_of(timer.unit)
    end = record.look(host, domain).end if domain else None
    return end if end is not None and end.unit == timer.activates else None


def _document(lines: list[Line]) -> dict[str, Any]:
    return versioned(timers=[_entry(line) for line in lines])


def _entry(line: Line) -> dict[str, Any]:
    service = line.service
    return {
        "unit": line.timer.unit,
        "domain": unitname.domain_of(line.timer.unit),
        "activates": line.timer.activates,
        "next": utc_time(line.timer.next),
        "last": utc_time(line.timer.last),
        "started": utc_time(service.started if service else None),
        "ended": utc_time(service.ended if service else None),
        "running": bool(service and service.is_running),
        "result": line.result,
        "reason": line.end.reason if line.end is not None else "",
        "exit_status": line.exit_status,
    }


def _render(lines: list[Line]) -> str:
    if not lines and not units.can_schedule():
        return "no timers: install the package nbdbackupd"
    if not lines:
        return (
            "no timers: begin one with 'systemctl enable --now "
            '"$(systemd-escape --template nbdbackup@.timer NAME)"\', or with schedule.enable'
        )
    rows = [("DOMAIN", "WHAT", "NEXT", "LAST", "TOOK", "RESULT")]
    for line in lines:
        took = "-" if line.seconds is None else _length(line.seconds)
        rows.append(
            (
                unitname.domain_of(line.timer.unit) or "-",
                _kind(line.timer.unit),
                _local(line.timer.next),
                _local(line.started),
                took,
                line.result,
            )
        )
    told = [
        f"{unitname.domain_of(line.timer.unit)}: {line.end.reason}"
        for line in lines
        if line.end is not None and line.end.reason and line.result not in ("done", "running")
    ]
    table = tables.render(rows, coloured=tables.wants_colour(sys.stdout, os.environ))
    return "\n".join([*table, *([""] if told else []), *map(plain.line, told)])


def _kind(unit: str) -> str:
    kinds = {
        "nbdbackup": "backup",
        "nbdbackup-verify": "verify",
        "nbdbackup-boot-test": "boot test",
        "nbdbackup-verify-all.timer": "verify all",
        "nbdbackup-prune": "prune",
        "nbdbackup-report.timer": "report",
    }
    template = unit.partition("@")[0]
    return kinds.get(template, template)


def _length(seconds: float) -> str:
    return human_time(max(0.0, seconds))


def _local(moment: datetime | None) -> str:
    return f"{moment.astimezone():%a %Y-%m-%d %H:%M:%S %Z}" if moment is not None else "-"
