"""``check``: find out whether the next backup of a domain will work; nothing is changed.

Each area is looked at by a module of its own. One that can't be looked at is a finding, too, and
the others go on.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdbackupd.errors import NbdbackupError
from nbdbackupd.model.finding import Area, Finding, Notes, Severity, worst
from nbdbackupd.ops.check import access, host, runs, sets
from nbdbackupd.ops.check import domain as check_domain
from nbdbackupd.ops.check.request import CheckRequest, Patient
from nbdbackupd.ops.domain.survey import look
from nbdbackupd.plain import versioned
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain


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
    state = domain.state()
    patient = Patient(request=request, domain=domain, looked=look(domain))
    findings: list[Finding] = []
    for area, functions in AREAS:
        notes = Notes(area)
        for function in functions:
            _examine(function, patient, notes)
        findings += notes.done()
    return CheckReport(
        domain=domain.name, uuid=domain.uuid, state=state.value, findings=tuple(findings)
    )


def _examine(function: Callable[[Patient, Notes], None], patient: Patient, notes: Notes) -> None:
    try:
        function(patient, notes)
    except NbdbackupError as err:
        notes.fail(err.message)
    except OSError as err:
        place = f"{os.fsdecode(err.filename)}: " if err.filename else ""
        notes.fail(f"{place}{err.strerror or err}")


AREAS: tuple[tuple[Area, tuple[Callable[[Patient, Notes], None], ...]], ...] = (
    (Area.HOST, (host.programs, host.libraries)),
    (Area.LIBVIRT, (host.connection, check_domain.features_of)),
    (Area.DISKS, (check_domain.disks,)),
    (Area.CHECKPOINTS, (sets.checkpoints,)),
    (Area.GUEST, (check_domain.agent,)),
    (Area.SCRATCH, (access.scratch_space,)),
    (Area.TARGET, (sets.target,)),
    (Area.ACCESS, (access.paths, access.confinement)),
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
