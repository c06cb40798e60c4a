"""``nbdbackupctl notify``: tell people how a unit ended; systemd calls it, see OnFailure=."""

import logging
import os
import platform
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from nbdbackupd import events, plain
from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.config import schema, timers
from nbdbackupd.config.files import Configuration
from nbdbackupd.config.settings import global_settings
from nbdbackupd.errors import ConfigError, DomainError, NbdbackupError, ProcessError
from nbdbackupd.model import unitname
from nbdbackupd.model.host import Host
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.notify import kept, notification
from nbdbackupd.ops.notify.kept import PATHS, Recipients
from nbdbackupd.ops.notify.notification import Notice, Text
from nbdbackupd.ops.status import record
from nbdbackupd.plain import versioned
from nbdbackupd.repo.runs import End
from nbdbackupd.systemd import units
from nbdbackupd.systemd.units import Service
from nbdbackupd.units import local_time

log = logging.getLogger(__name__)

LINES: Final = 40
LAST_RESORT: Final = ("root",)
"""Whom to mail to if no file says it that can be read, and none ever did."""

DONE: Final = "done-"
"""Before the unit's name in the instance that OnSuccess= starts.

Were it the one of OnFailure=, too, systemd would log "multiple trigger source candidates" (W-9).
"""

KINDS: Final = {
    "nbdbackup": "backup of domain",
    "nbdbackup-offline": "backup after the end of domain",
    "nbdbackup-checkpoints": "reconciliation of domain",
    "nbdbackup-verify": "verification of domain",
    "nbdbackup-boot-test": "boot test of domain",
    "nbdbackup-prune": "removal of old backups of domain",
}
DESCRIPTION = """\
Tell by mail or by a program how a unit ended, and what it said last, as the section notification
of the configuration wants it. systemd calls this verb when a run has ended. Without systemd's
variables the unit is asked how it ended last. Whom to tell is kept for the time when the
configuration can't be read; if it never could, root is told by mail.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("notify", DESCRIPTION)
    parser.add_argument(
        "unit",
        metavar="UNIT",
        type=lambda text: text.removeprefix(DONE),
        help="name of the unit, escaped as systemd does",
    )
    parser.add_argument("--print", action="store_true", help="print the text instead of sending it")
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out.

    Raises ConfigError, or ProcessError if one of the ways failed; the other one is tried, too.
    """
    try:
        return _tell(args, context)
    except NbdbackupError as err:
        if not args.print:
            events.mark_told(err)
            events.emit(log, events.NOTIFY_FAILED, unit=args.unit, reason=err)
        raise


def _tell(args: Arguments, context: Context) -> int:
    configuration = configured.read(context.host)
    notice = _notice(args.unit, configuration, context.host)
    recipients = _recipients(notice.domain, configuration, context)
    directory = context.host.config_dir or schema.DIRECTORY
    text = _without_secrets(notification.render(notice, directory), recipients, context)
    told: list[str] = []
    if not args.print and notice.event in recipients.events:
        told = _deliver(text, notice, recipients, context.host)
    document = versioned(
        unit=notice.unit,
        domain=notice.domain,
        event=notice.event,
        reason=notice.reason,
        subject=text.subject,
        body=text.body,
        told=told,
    )
    shown = f"{text.subject}\n\n{text.body}".rstrip("\n") if args.print else ""
    context.show(document, shown)
    return 0


def _notice(unit: str, configuration: Configuration, host: Host) -> Notice:
    service, remarks = None, []
    try:
        service = next(iter(units.services(unit)), None)
    except ProcessError as err:
        remarks.append(f"How the unit stands is not known: {err}")
    invocation, result, status = _how_it_ended(unit, service)
    lines: tuple[str, ...] = ()
    try:
        lines = units.journal(unit, invocation, LINES)
    except ProcessError as err:
        remarks.append(f"The journal can't be read: {err}")
    domain = unitname.domain_of(unit)
    end = _record(unit, domain, service, (result, status), host)
    problem = str(configuration.problems[0]) if configuration.problems else ""
    # once is enough
    if problem and (end is None or problem not in end.reason):
        remarks.append(f"The configuration has an error: {problem}")
    if not result and end is not None:
        # systemd has not seen it: it was before the host's last boot
        result, status = "exit-code", "" if end.status is None else str(end.status)
    event, shown, meaning = notification.result_of(result, status)
    kind = KINDS.get(unit.partition("@")[0], "") if domain else ""
    return Notice(
        event=event,
        unit=unit,
        domain=plain.line(domain),
        host=platform.node() or "this host",
        what=f"{kind} {plain.line(domain)}" if kind else f"unit {unit}",
        result=shown,
        meaning=meaning,
        started=_time(service.started if service else None),
        ended=_time(service.ended if service else None),
        lines=lines,
        remark="\n".join(remarks),
        reason=plain.line(end.reason) if end is not None else "",
    )


def _record(
    unit: str, domain: str, service: Service | None, told: tuple[str, str], host: Host
) -> End | None:
    """What the run noted of its end itself, or what is noted now that it could not."""
    if not domain:
        return None
    record.settle(host, domain, record.why_killed(*told))
    end = record.look(host, domain).end
    if end is None or end.unit != unit:
        return None
    # the unit may have failed before the run began
    started = service.started if service is not None else None
    is_older = started is not None and datetime.fromisoformat(end.begun) < started
    return None if is_older else end


def _how_it_ended(unit: str, service: Service | None) -> tuple[str, str, str]:
    """Invocation, result and status: of the run that systemd calls about, or else the last one."""
    if os.environ.get("MONITOR_UNIT") == unit:
        names = ("MONITOR_INVOCATION_ID", "MONITOR_SERVICE_RESULT", "MONITOR_EXIT_STATUS")
        first, second, third = (os.environ.get(name, "") for name in names)
        return first, second, third
    if service is None:
        return "", "", ""
    # the status of a program that a signal ended is the signal's number
    status = service.exit_status if service.result in ("success", "exit-code") else ""
    return service.invocation, service.result, str(status)


def _recipients(domain: str, configuration: Configuration, context: Context) -> Recipients:
    """As the files say. What can't be read of them is as it last could, or else root is told."""
    with suppress(ConfigError, DomainError, ImportError):
        configuration.require_sound()
        found = global_settings(configuration)
        if domain:
            _, _, found = configured.settings_of(domain, configuration, context.host)
        kept.keep(context.host.own_state_dir, domain, found)
        return Recipients.of({path: found.get(path) for path in PATHS})
    known = kept.kept(context.host.own_state_dir, domain)
    values = {path: schema.BY_PATH[path].default for path in PATHS}
    if known is not None:
        values |= dict(zip(PATHS, (known.events, known.mail, known.command), strict=False))
        values["libvirt.password_file"] = known.password_file
    elif configuration.problems:
        values["notification.mail"] = LAST_RESORT
    return Recipients.of(values | timers.sound_values(domain, configuration, PATHS))


def _without_secrets(text: Text, recipients: Recipients, context: Context) -> Text:
    """The text without the password for libvirt, wherever that came from."""
    files = [context.host.password_file, recipients.password_file]
    subject, body = text.subject, text.body
    for file in files:
        with suppress(OSError, UnicodeDecodeError):
            secret = Path(file).read_text().rstrip("\n") if file else ""
            if secret:
                subject = subject.replace(secret, "********")
                body = body.replace(secret, "********")
    return Text(subject=subject, body=body)


def _deliver(text: Text, notice: Notice, recipients: Recipients, host: Host) -> list[str]:
    told, failed = [], []
    if recipients.mail:
        try:
            notification.send_mail(text, recipients.mail, host.now())
            told.append("mail")
        except NbdbackupError as err:
            failed.append(err)
    if recipients.command is not None:
        try:
            notification.run_command(recipients.command, text, notice)
            told.append("command")
        except NbdbackupError as err:
            failed.append(err)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise ProcessError("; ".join(map(str, failed)))
    return told


def _time(moment: datetime | None) -> str:
    """In the host's own time, with its zone."""
    return local_time(moment) if moment is not None else ""
