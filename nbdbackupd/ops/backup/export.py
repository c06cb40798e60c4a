"""``export``: the disks of a running domain at one instant, for readers that are not ours."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from nbdbackupd import durable, rundir
from nbdbackupd import log as runlog
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.errors import CheckpointError, ConfigError, DomainError, NbdbackupError
from nbdbackupd.model.chain import Consistency, Level
from nbdbackupd.model.selection import ChosenDisk, How
from nbdbackupd.nbdio.client import DIRTY_PREFIX
from nbdbackupd.ops.checkpoints.checkpoints import OWNER as CHECKPOINTS
from nbdbackupd.ops.domain import domains
from nbdbackupd.ops.domain.survey import DiskFilter, Survey, survey_domain
from nbdbackupd.plain import versioned
from nbdbackupd.source import Snapshot, running, sweep
from nbdbackupd.source.relay import Relay, relayed
from nbdbackupd.virt import checkpoints
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain

log = logging.getLogger(__name__)
NO_BITMAPS: Final = "a raw image holds no bitmaps"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest:
    """What to offer where; no ``socket``: in the runtime directory.

    ``since``: the checkpoint of libvirt from which on changes are to be told. Of ``settings``
    those count that say which disks, how the guest is held, and where scratch space is.
    """

    domain: str
    runtime_dir: Path
    run_id: str
    settings: DomainSettings
    socket: Path | None = None
    since: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedDisk:
    """One disk; ``size`` in bytes.

    ``context`` is the NBD meta context that tells what changed; empty if there is none, for which
    ``reason`` may say why.
    """

    target: str
    size: int
    uri: str
    context: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What is offered on ``socket``, as of one instant."""

    domain: str
    socket: Path
    since: str
    consistency: Consistency
    disks: tuple[ExportedDisk, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return versioned(
            domain=self.domain,
            socket=os.fspath(self.socket),
            since=self.since,
            consistency=str(self.consistency),
            disks=[
                {
                    "target": disk.target,
                    "bytes": disk.size,
                    "uri": disk.uri,
                    "context": disk.context,
                    "reason": disk.reason,
                }
                for disk in self.disks
            ],
        )


class Trouble:
    """What has ended the job, told from any thread; readers are let go at once."""

    def __init__(self) -> None:
        self._error: NbdbackupError | None = None
        self.relay: Relay | None = None

    def note(self, error: NbdbackupError) -> None:
        """Keep the first."""
        self._error = self._error or error
        if self.relay is not None:
            self.relay.cut()

    def check(self) -> None:
        """Raise it."""
        if self._error is not None:
            raise self._error


@contextmanager
def exported(
    request: ExportRequest, connection: Connection
) -> Iterator[tuple[ExportReport, Trouble]]:
    """Begin a job and offer its exports while the body runs, which calls ``Trouble.check``.

    Ended on every way out, also that of SIGKILL, by the guard. Raises what a backup of a running
    domain does, CheckpointError if libvirt does not know the checkpoint.
    """
    domain = domains.find_at_rest(connection, request.domain, request.runtime_dir)
    with runlog.context(DOMAIN=domain.name, UUID=domain.uuid, RUN=request.run_id):
        directory = rundir.make_domain_dir(request.runtime_dir, domain.uuid)
        socket = request.socket or directory / rundir.EXPORT_SOCKET
        if fault := rundir.uri_fault(socket):
            raise ConfigError(f"{fault}: give another --socket")
        wait = durable.Wait(brief=CHECKPOINTS)
        with durable.Lock(directory / rundir.LOCK, owner=f"export of {domain.name}", wait=wait):
            own = rundir.socket_dir(request.runtime_dir, domain.uuid)
            sweep.sweep(domain, own, request.settings.scratch_directory).tell()
            if not domain.is_active():
                raise DomainError(
                    f"domain {domain.name} does not run: its images can be read as they are, "
                    f"with 'qemu-nbd -r'",
                    domain=domain.name,
                )
            with _offered(request, domain, own, socket) as offered:
                yield offered


@contextmanager
def _offered(
    request: ExportRequest, domain: Domain, own: Path, socket: Path
) -> Iterator[tuple[ExportReport, Trouble]]:
    if request.since and request.since not in checkpoints.names(domain):
        raise CheckpointError(
            f"domain {domain.name} has no checkpoint {request.since}: "
            f"'virsh checkpoint-list {domain.name}' shows what there is",
            domain=domain.name,
        )
    survey = _survey(request, domain)
    trouble = Trouble()
    settings = request.settings
    job = running.RunningRequest(
        domain=domain,
        disks=tuple(
            running.RunningDisk(target=each.target, delta=bool(request.since) and not _why(each))
            for each in survey.selection.chosen
        ),
        run_id=request.run_id,
        runtime_dir=own,
        scratch_dir=settings.scratch_directory,
        scratch_reserve=settings.scratch_reserve,
        on_trouble=trouble.note,
        base_checkpoint=request.since,
        freeze=settings.freeze_policy,
        freeze_mountpoints=tuple(map(str, settings.freeze_mountpoints)),
    )
    with running.open_running(job) as snapshot:
        for warning in snapshot.warnings:
            log.warning("%s", warning)
        reasons = {each.target: _why(each) for each in survey.selection.chosen if request.since}
        guards = [each.keeper for each in snapshot.exports.values() if each.keeper is not None]
        with relayed(socket, job.socket, guards[0]) as trouble.relay:
            # one that came before there was anything to let go
            trouble.check()
            yield _report(request, domain, socket, snapshot, reasons), trouble
            trouble.check()


def _survey(request: ExportRequest, domain: Domain) -> Survey:
    settings = request.settings
    wanted = DiskFilter(
        include=settings.disks_include, exclude=settings.disks_exclude, raw=True
    )  # fmt: skip
    survey = survey_domain(domain, wanted, Level.FULL if request.since else Level.COPY, None)
    for each in survey.selection.unsaved:
        log.warning("disk %s is not offered: it is %s", each.target, each.reason)
    return survey


def _why(disk: ChosenDisk) -> str:
    """Why changes of a disk can't be told by its nature."""
    return "" if disk.how is How.BITMAP else disk.why or NO_BITMAPS


def _report(
    request: ExportRequest,
    domain: Domain,
    socket: Path,
    snapshot: Snapshot,
    reasons: Mapping[str, str],
) -> ExportReport:
    for target, reason in snapshot.demoted.items():
        log.warning("disk %s is offered without its changes: %s", target, reason)
    reasons = {**reasons, **snapshot.demoted}
    return ExportReport(
        domain=domain.name,
        socket=socket,
        since=request.since,
        consistency=snapshot.consistency,
        disks=tuple(
            ExportedDisk(
                target=each.target,
                size=each.size,
                uri=f"nbd+unix:///{quote(each.name, safe='')}?socket={quote(os.fspath(socket))}",
                context=DIRTY_PREFIX + each.bitmap if each.bitmap else "",
                reason=reasons.get(each.target, ""),
            )
            for each in snapshot.exports.values()
        ),
    )
