"""``check``: find out whether the next backup of a domain will work; nothing is changed.

What this host brings is looked at here, other areas by modules of their own. One that can't be
looked at is a finding, too, and the others go on.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from nbdbackupd import proc
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.errors import CheckpointError, ConfigError, NbdbackupError, ProcessError
from nbdbackupd.format import blocks
from nbdbackupd.model.chain import Codec, Compression, DigestKind, Level
from nbdbackupd.model.finding import Area, Finding, Notes, Severity, worst
from nbdbackupd.model.host import Host
from nbdbackupd.ops.backup import prepare
from nbdbackupd.ops.check import domain as check_domain
from nbdbackupd.ops.check import runs, sets
from nbdbackupd.ops.check.request import CheckRequest, OfLibvirt, OfQemu, Patient
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.domain import qemu as qemus
from nbdbackupd.ops.domain.qemu import Qemu
from nbdbackupd.ops.domain.survey import look
from nbdbackupd.ops.notify import notification
from nbdbackupd.plain import versioned
from nbdbackupd.source import hooked
from nbdbackupd.source.qemu_guest import QemuGuest
from nbdbackupd.systemd import units
from nbdbackupd.virt import checkpoints, features
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain, GuestState

SECONDS = 20.0
NEEDED = (
    # all the others are started through it
    "setpriv",
    "qemu-img",
    "qemu-nbd",
    "qemu-storage-daemon",
)
OPTIONAL = {"nbdinfo": "only --extents nbdinfo needs it"}
P = TypeVar("P", bound=Patient)
Areas = tuple[tuple[Area, tuple[Callable[[P, Notes], None], ...]], ...]


def programs(_: object, notes: Notes) -> None:
    """Whether each program can be run; its version is the first line that it prints."""
    for name in NEEDED:
        try:
            notes.ok(f"{name}: {_version(name)}")
        except ProcessError as err:
            notes.fail(err.message, f"install it: {proc.PACKAGES.get(name, 'util-linux')}")
    for name, use in OPTIONAL.items():
        try:
            notes.ok(f"{name}: {_version(name)}")
        except ProcessError:
            notes.ok(f"{name} is not there; {use}")


def _version(name: str) -> str:
    lines = proc.output([name, "--version"], timeout=SECONDS).split("\n")
    # "qemu-img version 7.2.9 (…)", "nbdinfo 1.14.2"
    return lines[0].removeprefix(name).strip().removeprefix("version").strip()


def libraries(_: object, notes: Notes) -> None:
    """Whether the Python libraries can be imported. Without libvirt's nobody gets here."""
    try:
        from nbdbackupd.nbdio import client

        notes.ok(f"libnbd: {client.libnbd_version()}")
    except ImportError as err:
        notes.fail(f"the Python library of libnbd can't be used: {err}", "install python3-libnbd")

    for kind in DigestKind:
        missing = blocks.lack(kind, None)
        if missing:
            notes.ok(f"only sets with digest: {kind} need it: {missing}")
        else:
            notes.ok(f"digests of kind {kind} can be made")
    for wanted in (Compression(Codec.LZ4, 1), Compression(Codec.ZSTD, 1)):
        missing = blocks.lack(DigestKind.SHA256, wanted)
        if missing:
            notes.ok(f"only sets with compression: {wanted.codec} need it: {missing}")
        else:
            notes.ok(f"blocks can be compressed with {wanted.codec}")


def connection(patient: OfLibvirt, notes: Notes) -> None:
    """Versions, and whether libvirt is on this host at all."""
    opened = patient.domain.connection
    found = features.versions(opened)
    notes.ok(f"libvirt {found.libvirt}, QEMU {found.qemu}, Python binding {found.binding}")
    hook = hooked.look(opened, patient.request.runtime_dir)
    if hook.is_installed:
        notes.warn(
            f"libvirt does not call our hook yet: {hook.why}",
            "until then no backup is made at a guest's end, and one of a domain that is off reads "
            "whole, or the same changes each time, so that no start is refused",
        )
    elif hook.is_removed:
        notes.warn(
            f"libvirt's hook does nothing: {hook.why}",
            "install the package nbdbackupd; until then no backup is made at a guest's end",
        )
    elif hook.why:
        notes.ok(f"no hook of libvirt's calls us: {hook.why}; guests are saved when that is asked")
    else:
        notes.ok("libvirt tells us when a domain starts or ends")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """All findings, area by area. ``state``: running, paused or off."""

    domain: str
    uuid: str
    state: str
    findings: tuple[Finding, ...]

    @property
    def severity(self) -> Severity:
        """The gravest of all findings."""
        return worst(self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        return versioned(
            domain=self.domain,
            uuid=self.uuid,
            state=self.state,
            severity=self.severity.value,
            findings=[each.to_json() for each in self.findings],
        )


def run(request: CheckRequest, connection: Connection) -> CheckReport:
    """Look at everything that a backup of the domain needs.

    Raises DomainError or BusyError if libvirt can't be asked at all, DomainNotFoundError.
    """
    domain = Domain.find(connection, request.domain)

    def changed(checkpoint: str) -> Mapping[str, int]:
        try:
            return checkpoints.sound_sizes(domain, checkpoint)
        except CheckpointError:
            # libvirt does not know it now; then all that is allocated is the bound
            return {}

    state = domain.state()
    patient = OfLibvirt(
        request=request,
        name=domain.name,
        uuid=domain.uuid,
        looked=look(domain),
        changed=changed,
        domain=domain,
    )
    return _report(patient, state, AREAS)


def run_of_qemu(request: CheckRequest, machine: DomainSettings, found: Qemu) -> CheckReport:
    """The same for a QEMU without libvirt, which ``machine`` tells how to reach."""

    def changed(checkpoint: str) -> Mapping[str, int]:
        drives = found.drives().items()
        bitmaps = ((name, drive.bitmap(checkpoint)) for name, drive in drives)
        return {name: each.dirty for name, each in bitmaps if each is not None and each.sound}

    guest = QemuGuest.of(found.name, found.machine, machine.agent)
    patient = OfQemu(
        request=request,
        name=found.name,
        uuid=found.uuid,
        looked=qemus.look(found),
        changed=changed,
        qemu=found,
        guest=guest,
    )
    return _report(patient, guest.state(), QEMU_AREAS)


def _report(patient: P, state: GuestState, areas: Areas[P]) -> CheckReport:
    findings: list[Finding] = []
    for area, functions in areas:
        notes = Notes(area)
        for function in functions:
            _examine(function, patient, notes)
        findings += notes.done()
    return CheckReport(
        domain=patient.name, uuid=patient.uuid, state=state.value, findings=tuple(findings)
    )


def _examine(function: Callable[[P, Notes], None], patient: P, notes: Notes) -> None:
    try:
        function(patient, notes)
    except NbdbackupError as err:
        notes.fail(err.message)
    except OSError as err:
        place = f"{os.fsdecode(err.filename)}: " if err.filename else ""
        notes.fail(f"{place}{err.strerror or err}")


QEMU_AREAS: Areas[OfQemu] = (
    (Area.HOST, (programs, libraries)),
    (Area.DISKS, (check_domain.disks,)),
    (Area.CHECKPOINTS, (sets.bitmaps_of,)),
    (Area.GUEST, (check_domain.agent_of,)),
    (Area.SCRATCH, (check_domain.scratch_space,)),
    (Area.TARGET, (sets.target,)),
    (Area.RUNS, (runs.jobs_of, runs.locks, runs.leftovers)),
)
"""A QEMU without libvirt gets all files opened: it needs no access to any."""

AREAS: Areas[OfLibvirt] = (
    (Area.HOST, (programs, libraries)),
    (Area.LIBVIRT, (connection, check_domain.features_of)),
    (Area.DISKS, (check_domain.disks,)),
    (Area.CHECKPOINTS, (sets.checkpoints,)),
    (Area.GUEST, (check_domain.agent,)),
    (Area.SCRATCH, (check_domain.scratch_space,)),
    (Area.TARGET, (sets.target,)),
    (Area.ACCESS, (check_domain.paths, check_domain.confinement)),
    (
        Area.RUNS,
        (
            runs.job,
            runs.locks,
            runs.hosts,
            runs.images_as_left,
            runs.leftovers,
        ),
    ),
)


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


def next_run(
    name: str, uuid: str, settings: DomainSettings, host: Host
) -> tuple[Path | None, tuple[Finding, ...]]:
    """The set that the next run goes to, None if that can't be told, and all findings."""
    notes = Notes(Area.CONFIGURATION)
    directory = _plan(name, uuid, settings, host, notes)
    missing = blocks.lack(settings.digest, settings.compression)
    if missing:
        notes.fail(f"no run begins: {missing}")
    _programs(settings, notes)
    _telling(settings, notes)
    if settings.on_shutdown:
        _end_of_host(notes)
    return directory, notes.done()


def _plan(name: str, uuid: str, settings: DomainSettings, host: Host, notes: Notes) -> Path | None:
    try:
        planned = prepare.plan(name, uuid, settings, host.now(), Level.AUTO)
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
