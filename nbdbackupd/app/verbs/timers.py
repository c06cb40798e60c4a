"""``nbdbackupctl timers``: what runs when, what ran, and how it ended."""

import argparse
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import Context
from nbdbackupd.errors import ConfigError

if TYPE_CHECKING:
    from nbdbackupd.app.systemd import Service, Timer

JSON_VERSION = 1
PATTERN = "nbdbackup*.timer"
DESCRIPTION = """\
Show the timers of this host's backups and verifications: when each runs next, when it ran last,
and how that ended.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A timer and what it starts."""

    timer: "Timer"
    service: "Service | None"

    @property
    def result(self) -> str:
        """How the last run ended: ``done``, ``failed (exit status 20)``, ``running``, or ``-``."""
        from nbdbackupd.app import notification

        service = self.service
        if service is None or service.started is None:
            return "-"
        if service.is_running:
            return "running"
        status = service.exit_status if service.result in ("success", "exit-code") else ""
        event, result, _ = notification.result_of(service.result, str(status))
        words = {"success": "done", "warning": "warning", "failure": "failed"}
        return words[event] + (f" ({result})" if result != "success" else "")


def register(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "timers", help="show what runs when, and how it ended", description=DESCRIPTION,
        parents=[shared], allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "domain", metavar="DOMAIN", nargs="*", help="only those of these domains (default: all)"
    )
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out. Raises ConfigError without systemd, ProcessError if it can't be asked."""
    from nbdbackupd.app import systemd
    from nbdbackupd.model import unitname

    if not systemd.is_booted():
        raise ConfigError(
            "systemd does not run this host, so there are no timers: let another scheduler call "
            "'nbdbackupctl run DOMAIN'"
        )
    found = systemd.timers(PATTERN)
    if args.domain:
        found = tuple(each for each in found if unitname.domain_of(each.unit) in args.domain)
    started = [each.activates for each in found if each.activates]
    services = {each.unit: each for each in systemd.services(*started)} if started else {}
    lines = [Line(timer=each, service=services.get(each.activates)) for each in found]
    context.show(_document(lines), _render(lines))
    return 0


def _document(lines: list[Line]) -> dict[str, Any]:
    return {
        "version": JSON_VERSION,
        "timers": [_entry(line) for line in lines],
    }


def _entry(line: Line) -> dict[str, Any]:
    from nbdbackupd.model import unitname

    service = line.service
    return {
        "unit": line.timer.unit,
        "domain": unitname.domain_of(line.timer.unit),
        "activates": line.timer.activates,
        "next": _utc(line.timer.next),
        "last": _utc(line.timer.last),
        "started": _utc(service.started if service else None),
        "ended": _utc(service.ended if service else None),
        "running": bool(service and service.is_running),
        "result": line.result,
        "exit_status": service.exit_status if service and service.ended else None,
    }


def _render(lines: list[Line]) -> str:
    from nbdbackupd.app import tables
    from nbdbackupd.model import unitname

    if not lines:
        return (
            "no timers: begin one with 'systemctl enable --now "
            '"$(systemd-escape --template nbdbackup@.timer NAME)"\', or with schedule.enable'
        )
    rows = [("DOMAIN", "WHAT", "NEXT", "LAST", "TOOK", "RESULT")]
    for line in lines:
        service = line.service
        took = "-"
        if service is not None and service.started and service.ended:
            took = _length((service.ended - service.started).total_seconds())
        rows.append((
            unitname.domain_of(line.timer.unit) or "-", _kind(line.timer.unit),
            _local(line.timer.next), _local(line.timer.last), took, line.result,
        ))  # fmt: skip
    return "\n".join(tables.render(rows, coloured=tables.wants_colour(sys.stdout, os.environ)))


def _kind(unit: str) -> str:
    kinds = {
        "nbdbackup": "backup",
        "nbdbackup-verify": "verify",
        "nbdbackup-boot-test": "boot test",
    }
    template = unit.partition("@")[0]
    return kinds.get(template, template)


def _length(seconds: float) -> str:
    from nbdbackupd.app.sizes import human_time

    return human_time(max(0.0, seconds))


def _local(moment: datetime | None) -> str:
    return f"{moment.astimezone():%a %Y-%m-%d %H:%M:%S %Z}" if moment is not None else "-"


def _utc(moment: datetime | None) -> str:
    if moment is None:
        return ""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
