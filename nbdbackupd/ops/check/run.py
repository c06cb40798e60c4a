"""What ``check`` looks at because ``run`` will need it: the configuration and what it names."""

import os
import shutil
from pathlib import Path
from typing import Final

from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.errors import ConfigError, NbdbackupError, ProcessError
from nbdbackupd.model.chain import Level
from nbdbackupd.model.finding import Area, Finding, Notes
from nbdbackupd.model.host import Host
from nbdbackupd.ops.backup import prepare
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.notify import notification
from nbdbackupd.systemd import units
from nbdbackupd.virt.domain import Domain

GUESTS: Final = "libvirt-guests.service"
DAEMONS: Final = ("libvirtd.service", "virtqemud.service")


def settings_of(domain: Domain, host: Host) -> DomainSettings | Finding:
    """The settings of a domain, or why no run will get as far as that."""
    try:
        return configured.settings_of_domain(domain, configured.read(host).require_sound())
    except ConfigError as err:
        return Finding.fail(
            Area.CONFIGURATION,
            f"no run begins: {err.message}",
            "fix the file; 'nbdbackupctl config check' shows all errors",
        )


def look(
    domain: Domain, settings: DomainSettings, host: Host
) -> tuple[Path | None, tuple[Finding, ...]]:
    """The set that the next run goes to, None if that can't be told, and all findings."""
    notes = Notes(Area.CONFIGURATION)
    directory = _plan(domain, settings, host, notes)
    _programs(settings, notes)
    _telling(settings, notes)
    if settings.on_shutdown:
        _end_of_host(notes)
    return directory, notes.done()


def _plan(domain: Domain, settings: DomainSettings, host: Host, notes: Notes) -> Path | None:
    try:
        planned = prepare.plan(domain, settings, host.now(), Level.AUTO)
    except NbdbackupError as err:
        if settings.commands_pre:
            notes.warn(err.message, "a program before the run (commands.pre) has to fix that")
        else:
            notes.fail(err.message)
        return None
    for problem in planned.warnings:
        notes.warn(problem)
    level = planned.next.level.value
    notes.ok(f"'run' will save into {planned.set}, {level}: {planned.next.reason}")
    return planned.set


def _programs(settings: DomainSettings, notes: Notes) -> None:
    """Those around a run: without one before it nothing is saved, after it the status is 3."""
    found = True
    for path, commands, add in (
        ("commands.pre", settings.commands_pre, notes.fail),
        ("commands.post", settings.commands_post, notes.warn),
    ):
        for words in commands:
            if not os.access(words[0], os.X_OK):
                found = False
                add(f"{path}: {words[0]} is not there, or can't be executed", "fix or install it")
    count = len(settings.commands_pre) + len(settings.commands_post)
    if found and count:
        notes.ok(f"the programs around a run are there: {count}")
    metrics = settings.monitoring_metrics_directory
    if metrics is not None and not metrics.is_dir():
        notes.warn(f"monitoring.metrics_directory: there is no directory {metrics}", "make it")


def _telling(settings: DomainSettings, notes: Notes) -> None:
    """Whether somebody will be told how a unit ends."""
    mail, command = settings.notification_mail, settings.notification_command
    if not mail and command is None:
        notes.ok("nobody is told of failures: see the section notification of the configuration")
    if mail and notification.sendmail() is None:
        notes.warn("no mail can be sent: there is no sendmail", "install a mail server's sendmail")
    elif mail:
        notes.ok(f"mail goes to {', '.join(mail)} through {notification.sendmail()}")
    if command is not None and not os.access(command[0], os.X_OK):
        notes.warn(
            f"notification.command: {command[0]} is not there, or can't be executed",
            "fix or install it",
        )


def _end_of_host(notes: Notes) -> None:
    """A-2: guests are shut down with the host, and then saved, only while libvirt is there."""
    if not units.is_booted() or shutil.which("systemctl") is None:
        return
    try:
        guests = units.properties(GUESTS, "LoadState", "ActiveState", "After")
        active = [
            each for each in DAEMONS if units.properties(each, "LoadState")["LoadState"] == "loaded"
        ]
    except ProcessError as err:
        notes.warn(f"how the host shuts guests down is not known: {err}")
        return
    if guests["LoadState"] != "loaded" or guests["ActiveState"] != "active":
        notes.warn(
            f"{GUESTS} is not active: guests are killed at the end of the host, and not saved then",
            f"'systemctl enable --now {GUESTS}'",
        )
        return
    missing = [each for each in active if each not in guests["After"].split()]
    if missing:
        notes.warn(
            f"at the end of the host {GUESTS} may be stopped beside {missing[0]}: guests are "
            "killed then, and not saved",
            f"'systemctl edit {GUESTS}', with After={missing[0]} in its section [Unit]",
        )
    else:
        notes.ok("guests are shut down with the host while libvirt is there, and saved at its boot")
