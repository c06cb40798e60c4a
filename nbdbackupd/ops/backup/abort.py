"""``abort``: end a backup job that a dead run left behind."""

import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdbackupd import durable, rundir
from nbdbackupd import log as runlog
from nbdbackupd.errors import BusyError
from nbdbackupd.ops.checkpoints.checkpoints import OWNER as CHECKPOINTS
from nbdbackupd.ops.domain import domains
from nbdbackupd.ops.domain import qemu as qemus
from nbdbackupd.plain import versioned
from nbdbackupd.source import paused_start, standalone, sweep
from nbdbackupd.source.qemu_guest import QemuGuest
from nbdbackupd.virt import jobs
from nbdbackupd.virt.connection import Connection

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AbortRequest:
    """Whose job to end; ``any``: also one that is not ours.

    ``agent`` is the socket of a guest's agent where there is no libvirt.
    """

    domain: str
    runtime_dir: Path
    scratch_dir: Path
    any: bool = False
    agent: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AbortReport:
    """``ended`` describes the jobs that were ended, ``left`` a foreign one that was not.

    ``files`` are the scratch files and sockets that were removed, ``guest`` says what became of a
    guest that was held.
    """

    domain: str
    ended: tuple[str, ...] = ()
    left: str = ""
    files: tuple[str, ...] = ()
    guest: str = ""

    @property
    def message(self) -> str:
        """What was done, in lines for a reader."""
        lines = [f"ended {job}" for job in self.ended]
        if self.left:
            lines.append(f"left alone: {self.left}; --any ends it, too")
        lines += [f"removed {file}" for file in self.files]
        if self.guest:
            lines.append(self.guest)
        return "\n".join(lines) or f"domain {self.domain} has no backup job"

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return versioned(
            domain=self.domain,
            ended=list(self.ended),
            left=self.left,
            files=list(self.files),
            guest=self.guest,
        )


def run(request: AbortRequest, connection: Connection) -> AbortReport:
    """End our own leftover job, or any.

    Raises BusyError while a run of ours lives: that one is ended by a signal to it; and during a
    migration. DomainError if a job can't be ended.
    """
    domain = domains.find(connection, request.domain, request.runtime_dir)
    if jobs.is_migrating(domain):
        raise BusyError(
            f"domain {domain.name} is being migrated, which is not ended here: 'virsh domjobabort' "
            f"on the host that it leaves would",
            domain=domain.name,
        )
    directory = rundir.make_domain_dir(request.runtime_dir, domain.uuid)
    with (
        runlog.context(DOMAIN=domain.name, UUID=domain.uuid),
        # the check of the bitmaps after a start is short
        durable.Lock(
            directory / rundir.LOCK,
            owner=f"abort of {domain.name}",
            wait=durable.Wait(brief=CHECKPOINTS),
        ),
    ):
        own = rundir.socket_dir(request.runtime_dir, domain.uuid)
        swept = sweep.sweep(domain, own, request.scratch_dir)
        swept.tell()
        ended_guest = paused_start.release(domain, directory)
        if ended_guest:
            log.info("%s", ended_guest)
        ended = [swept.job] if swept.job else []
        left = swept.foreign
        if left and not request.any:
            log.info("left alone: %s", left)
        if left and request.any:
            jobs.abort(domain)
            ended.append(left)
            left = ""
    return AbortReport(
        domain=domain.name,
        ended=tuple(ended),
        left=left,
        files=tuple(os.fspath(file) for file in swept.files),
        guest="; ".join(text for text in (swept.guest, swept.held, ended_guest) if text),
    )


def run_of_qemu(request: AbortRequest, path: Path) -> AbortReport:
    """The same in a QEMU without libvirt, whose monitor is ``path``.

    Raises BusyError while a run of ours lives, or another program holds the monitor.
    """
    with qemus.connect(path, request.domain) as qemu, ExitStack() as stack:
        stack.enter_context(runlog.context(DOMAIN=qemu.name, UUID=qemu.uuid))
        directory = rundir.make_domain_dir(request.runtime_dir, qemu.uuid)
        owner = f"abort of {qemu.name}"
        stack.enter_context(durable.Lock(directory / rundir.LOCK, owner=owner))
        own = rundir.socket_dir(request.runtime_dir, qemu.uuid)
        held = QemuGuest.of(qemu.name, qemu.machine, request.agent)
        swept, guest = standalone.sweep(held, qemu.machine, own)
        others = [f"job {each}" for each in qemu.machine.jobs("")]
        if request.any:
            for each in qemu.machine.jobs(""):
                qemu.machine.end_job(each)
        elif others:
            log.info("left alone: %s", ", ".join(others))
    return AbortReport(
        domain=qemu.name,
        ended=(*swept, *(others if request.any else ())),
        left="" if request.any else ", ".join(others),
        guest=guest,
    )
