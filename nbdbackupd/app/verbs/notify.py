"""``nbdbackupctl notify``: tell people how a unit ended; systemd calls it, see OnFailure=."""

import argparse
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdbackupd.app import configured
from nbdbackupd.app import context as app_context
from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import Context
from nbdbackupd.errors import ConfigError, DomainError, NbdbackupError, ProcessError
from nbdbackupd.model.units import local_time

if TYPE_CHECKING:
    from nbdbackupd.app.config.files import Configuration
    from nbdbackupd.app.notification import Notice, Text
    from nbdbackupd.app.systemd import Service

JSON_VERSION = 1
LINES: Final = 40
SETTINGS: Final = ("notification.events", "notification.mail", "notification.command")
KINDS: Final = {
    "nbdbackup": "backup of domain",
    "nbdbackup-offline": "backup after the end of domain",
    "nbdbackup-checkpoints": "reconciliation of domain",
    "nbdbackup-verify": "verification of domain",
    "nbdbackup-boot-test": "boot test of domain",
}
DESCRIPTION = """\
Tell by mail or by a program how a unit ended, and what it said last, as the section notification
of the configuration wants it. systemd calls this verb when a run has ended. Without systemd's
variables the unit is asked how it ended last.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wishes:
    """Whom to tell of what."""

    events: tuple[str, ...]
    mail: tuple[str, ...]
    command: tuple[str, ...] | None


def register(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "notify", help="tell how a unit ended", description=DESCRIPTION, parents=[shared],
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("unit", metavar="UNIT", help="name of the unit, escaped as systemd does")
    parser.add_argument("--print", action="store_true", help="print the text instead of sending it")
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out.

    Raises ConfigError, or ProcessError if one of the ways failed; the other one is tried, too.
    """
    from nbdbackupd.app import notification
    from nbdbackupd.app.config import schema

    configuration = configured.read(context)
    notice = _notice(args.unit, configuration)
    wishes = _wishes(notice.domain, configuration, context)
    directory = context.config_dir or schema.DIRECTORY
    text = _without_secrets(notification.render(notice, directory), configuration, context)
    told: list[str] = []
    if not args.print and notice.event in wishes.events:
        told = _deliver(text, notice, wishes)
    document = {
        "version": JSON_VERSION,
        "unit": notice.unit,
        "domain": notice.domain,
        "event": notice.event,
        "subject": text.subject,
        "body": text.body,
        "told": told,
    }
    shown = f"{text.subject}\n\n{text.body}".rstrip("\n") if args.print else ""
    context.show(document, shown)
    return 0


def _notice(unit: str, configuration: "Configuration") -> "Notice":
    from nbdbackupd.app import notification, systemd
    from nbdbackupd.app.notification import Notice
    from nbdbackupd.model import unitname

    service, remarks = None, []
    try:
        service = next(iter(systemd.services(unit)), None)
    except ProcessError as err:
        remarks.append(f"How the unit stands is not known: {err}")
    invocation, result, status = _how_it_ended(unit, service)
    lines: tuple[str, ...] = ()
    try:
        lines = systemd.journal(unit, invocation, LINES)
    except ProcessError as err:
        remarks.append(f"The journal can't be read: {err}")
    if configuration.problems:
        remarks.append(f"The configuration has an error: {configuration.problems[0]}")
    event, shown, meaning = notification.result_of(result, status)
    domain = unitname.domain_of(unit)
    kind = KINDS.get(unit.partition("@")[0], "") if domain else ""
    return Notice(
        event=event,
        unit=unit,
        domain=_printable(domain),
        host=platform.node() or "this host",
        what=f"{kind} {_printable(domain)}" if kind else f"unit {unit}",
        result=shown,
        meaning=meaning,
        started=_time(service.started if service else None),
        ended=_time(service.ended if service else None),
        lines=lines,
        remark="\n".join(remarks),
    )


def _how_it_ended(unit: str, service: "Service | None") -> tuple[str, str, str]:
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


def _wishes(domain: str, configuration: "Configuration", context: Context) -> _Wishes:
    """As the files say; as far as they can be read, for a broken one is what must be told, too."""
    from nbdbackupd.app.config import schema, timers

    values: dict[str, Any] = {}
    with suppress(ConfigError, DomainError, ImportError):
        if domain:
            _, _, found = configured.settings_of(domain, configuration.require_sound(), context)
            values = {path: found.get(path) for path in SETTINGS}
    if not values:
        defaults = {path: schema.BY_PATH[path].default for path in SETTINGS}
        values = defaults | timers.sound_values(domain, configuration, SETTINGS)
    events, mail, command = (values[path] for path in SETTINGS)
    return _Wishes(events=events, mail=mail, command=command)


def _without_secrets(text: "Text", configuration: "Configuration", context: Context) -> "Text":
    """The text without the password for libvirt, wherever that came from."""
    from nbdbackupd.app.config import timers
    from nbdbackupd.app.notification import Text

    path = timers.sound_values("", configuration, ["libvirt.password_file"])
    files = [context.password_file, path.get("libvirt.password_file")]
    subject, body = text.subject, text.body
    for file in files:
        with suppress(OSError, UnicodeDecodeError):
            secret = Path(file).read_text().rstrip("\n") if file else ""
            if secret:
                subject = subject.replace(secret, "********")
                body = body.replace(secret, "********")
    return Text(subject=subject, body=body)


def _deliver(text: "Text", notice: "Notice", wishes: _Wishes) -> list[str]:
    from nbdbackupd.app import notification

    told, failed = [], []
    if wishes.mail:
        try:
            notification.send_mail(text, wishes.mail, app_context.now())
            told.append("mail")
        except NbdbackupError as err:
            failed.append(err)
    if wishes.command is not None:
        try:
            notification.run_command(wishes.command, text, notice)
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


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
