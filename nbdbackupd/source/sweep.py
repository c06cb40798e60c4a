"""Clear away what a killed run has left: its job, its files, a guest that it held."""

import logging
from dataclasses import dataclass
from pathlib import Path

from nbdbackupd import events, rundir
from nbdbackupd.source import guard, quiesce, running, scratch
from nbdbackupd.virt import jobs
from nbdbackupd.virt.domain import Domain

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """What was found and removed; empty fields: nothing. ``foreign`` is a job left alone.

    ``guest`` says how a guest was let go, ``held`` why one was not.
    """

    job: str = ""
    foreign: str = ""
    guest: str = ""
    held: str = ""
    files: tuple[Path, ...] = ()

    def tell(self) -> None:
        """Log it. A guest that was held is no sign of a dead run: its agent may have been late."""
        removed = [self.job] * bool(self.job) + [str(file) for file in self.files]
        if removed:
            events.emit(LOG, events.DEAD_RUN_SWEPT, reason="; ".join(removed))
        if self.guest:
            events.emit(LOG, events.GUEST_RELEASED, reason=self.guest)
        if self.held:
            LOG.info("%s", self.held)


def sweep(domain: Domain, runtime_dir: Path, scratch_dir: Path) -> Swept:
    """End our own orphaned job and remove its files; other people's jobs are left alone.

    The caller holds the domain's lock: otherwise the job may be that of a run that lives. The dead
    run's guard is waited for. A domain that a killed run has started paused is not ended here
    (source/paused_start.py): it may be the caller's own by now. Raises BusyError if the guard takes
    too long, DomainError if the job can't be ended or the guest can't be released.
    """
    with guard.turn(runtime_dir):
        return _sweep(domain, runtime_dir, scratch_dir)


def _sweep(domain: Domain, runtime_dir: Path, scratch_dir: Path) -> Swept:
    guest = quiesce.release(domain, running.marker(runtime_dir))
    where = domain.connection.where
    socket = runtime_dir / rundir.NBD_SOCKET
    job = jobs.active_job(domain)
    is_own = job is not None and running.is_own_job(job, runtime_dir, domain)
    files = set(scratch.leftovers(scratch_dir, domain.uuid, where))
    if job is not None and is_own:
        # an earlier run may have had another scratch directory
        named = job.backup.scratch.values() if job.backup is not None else ()
        files |= {Path(name) for name in named if scratch.is_ours(Path(name), domain.uuid)}
        guard.wait_for_guards(runtime_dir)
        where.cut(socket)
        jobs.abort(domain)
    files.add(where.server_socket(socket))
    if where.is_here:
        files.add(rundir.beside(runtime_dir) / rundir.EXPORT_SOCKET)
    gone = tuple(file for file in sorted(files) if where.remove(file))
    where.leave(socket)
    return Swept(
        job=str(job) if is_own else "",
        foreign=str(job) if job is not None and not is_own else "",
        guest=guest.done,
        held=guest.problem,
        files=gone,
    )
