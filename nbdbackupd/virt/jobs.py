"""libvirt's backup job of a domain: begin, watch, describe, end.

Measured with libvirt 9.0.0: a domain has at most one such job; beginning a second one waits 30
seconds for a lock before it fails, so look first. ``abortJob`` returns before the job is gone
(some 10 ms). The job and its NBD server survive us and libvirtd; the socket file stays behind
when QEMU dies in the middle. A job on a single disk (pull, commit, copy) is no job of the
domain: libvirt refuses to begin beside it, with an internal error that names the disk.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import methodcaller
from typing import Final, TypeVar
from weakref import WeakSet

import libvirt

from nbdbackupd.errors import BusyError, DomainError
from nbdbackupd.model.jobxml import BackupJob, parse_backup_job
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain

Result = TypeVar("Result")
ABORT_TIMEOUT_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.01
LOST_JOB_SECONDS: Final = 35.0
# a flag of virDomainBackupBegin, 0 where the Python module is older than libvirt 11.10
PRESERVE_GUEST: Final[int] = getattr(libvirt, "VIR_DOMAIN_BACKUP_BEGIN_PRESERVE_SHUTDOWN_DOMAIN", 0)
BLOCK_JOBS: Final = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL: "block pull",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: "block copy",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: "block commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: "active block commit",
}
_MIGRATING: Final = {
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION),
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY),
    (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_POSTCOPY),
}
# names of virDomainJobOperation
OPERATIONS: Final = (
    "unknown",
    "start",
    "save",
    "restore",
    "incoming migration",
    "outgoing migration",
    "snapshot",
    "snapshot revert",
    "dump",
    "backup",
    "snapshot delete",
)

MIGRATIONS: Final = frozenset({"incoming migration", "outgoing migration"})


@dataclass(frozen=True, slots=True)
class ActiveJob:
    """A job that runs on a domain; ``backup`` is set if it is a backup job."""

    operation: str
    backup: BackupJob | None = None

    def __str__(self) -> str:
        return str(self.backup) if self.backup is not None else f"a job: {self.operation}"


@dataclass(frozen=True, slots=True)
class JobStats:
    """``temp_used``: bytes of scratch space that are written; ``done`` of ``total`` are copied."""

    is_active: bool
    temp_used: int = 0
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a backup job has ended: with all copied, or with the ``error`` that libvirt tells."""

    is_whole: bool
    error: str


def active_job(domain: Domain) -> ActiveJob | None:
    """Return the job that runs on the domain, whoever began it, or None."""
    try:
        return _active_job(domain) if domain.is_active() else None
    except DomainError:
        if domain.is_active():
            raise
        # it has ended between two questions
        return None


def _active_job(domain: Domain) -> ActiveJob | None:
    if _ask(domain, lambda each: each.jobInfo())[0] == _NONE:
        return None
    found = _ask(domain, lambda each: each.jobStats())
    if found.get("type", _NONE) == _NONE:
        return None
    number = found.get(libvirt.VIR_DOMAIN_JOB_OPERATION, 0)
    if number != libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP:
        name = OPERATIONS[number] if number < len(OPERATIONS) else OPERATIONS[0]
        return ActiveJob(name)
    try:
        xml = domain.handle().backupGetXMLDesc()
    except libvirt.libvirtError as err:
        if err.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
            # it ended between the two questions
            return None
        raise DomainError(f"domain {domain.name}: can't read its backup job: {err}") from err
    return ActiveJob("backup", parse_backup_job(xml))


def is_arriving(domain: Domain) -> bool:
    """Tell whether a live migration brings the domain here, or takes its last step away from here.

    The hook's ``started`` comes when such a migration begins; until it has ended libvirt refuses
    to redefine checkpoints. Raises DomainError.
    """
    state, reason = domain.call("can't read its state", lambda each: each.state())
    return (state, reason) in _MIGRATING


def is_migrating(domain: Domain) -> bool:
    """Tell whether a migration brings the domain here or takes it away.

    Of one that is coming libvirt says little else: to ask for its job fails. Raises DomainError.
    """
    if not domain.is_active():
        return False
    if is_arriving(domain):
        return True
    job = active_job(domain)
    return job is not None and job.operation in MIGRATIONS


def _ask(domain: Domain, question: Callable[[libvirt.virDomain], Result]) -> Result:
    """Ask about the job that libvirt says is there.

    A libvirtd that was killed while a backup job began may come back with a job of which it knows
    nothing ("backup job data missing", seen with 9.0): for a moment, or until the guest ends. One
    of 11.3 fails to read the job of a guest that has shut down during it, for 30 s, until it sees
    that QEMU is gone (W-12). Raises BusyError if that does not pass.
    """
    deadline = time.monotonic() + LOST_JOB_SECONDS
    while True:
        try:
            return domain.call("can't read its job", question)
        except DomainError as err:
            if not _is_code(err, libvirt.VIR_ERR_INTERNAL_ERROR):
                raise
            if time.monotonic() > deadline:
                raise BusyError(
                    f"domain {domain.name} has a job that libvirt has lost track of: end it with "
                    f"'virsh domjobabort', or power the guest off and restart libvirtd",
                    domain=domain.name,
                ) from err
        time.sleep(POLL_SECONDS)


def block_jobs(domain: Domain, targets: Collection[str]) -> dict[str, str]:
    """Return what runs on single disks, whoever began it, by disk: ``block commit``, ….

    What a backup job does there is no job of its own: see ``active_job``. Measured with libvirt
    9.0: neither ``jobInfo`` nor ``jobStats`` shows these.
    """
    found: dict[str, str] = {}
    for target in targets:
        info = domain.call(
            f"can't read the block job of {target}", methodcaller("blockJobInfo", target)
        )
        if info and info.get("type", 0) != libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_BACKUP:
            found[target] = BLOCK_JOBS.get(info.get("type", 0), "block job")
    return found


def _is_code(err: DomainError, code: int) -> bool:
    cause = err.__cause__
    return isinstance(cause, libvirt.libvirtError) and cause.get_error_code() == code


def begin(
    domain: Domain,
    backup_xml: str,
    checkpoint_xml: str,
    *,
    flag: int = PRESERVE_GUEST,
    is_push: bool = False,
) -> bool:
    """Begin a job; an empty ``checkpoint_xml`` makes no checkpoint.

    ``is_push``: QEMU writes into images that are there. ``flag`` is one that libvirt may refuse:
    then the job begins without it. By default that is to keep QEMU alive if the guest shuts down
    during the job (libvirt 11.10, both ends).
    Returns whether it was granted. Raises CheckpointError (the base or a bitmap of it is
    missing or broken), BusyError, or another DomainError.
    """
    what = "can't begin the backup"
    base = libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL if is_push else 0
    if flag and domain.connection not in _REFUSED:
        try:
            domain.call(
                what, lambda each: each.backupBegin(backup_xml, checkpoint_xml or None, base | flag)
            )
        except DomainError as err:
            if not _is_code(err, libvirt.VIR_ERR_INVALID_ARG):
                raise
        else:
            return True
    domain.call(what, lambda each: each.backupBegin(backup_xml, checkpoint_xml or None, base))
    if flag:
        # the same request without the flag was fine: it was the flag that this libvirt minds
        _REFUSED.add(domain.connection)
    return False


def stats(domain: Domain) -> JobStats:
    """Return how the job is doing; a domain that went off has none."""
    if not domain.is_active():
        return JobStats(is_active=False)
    found = domain.call("can't read its job", lambda each: each.jobStats())
    return JobStats(
        is_active=found.get("type", _NONE) != _NONE,
        temp_used=found.get(libvirt.VIR_DOMAIN_JOB_DISK_TEMP_USED, 0),
        done=found.get(libvirt.VIR_DOMAIN_JOB_DISK_PROCESSED, 0),
        total=found.get(libvirt.VIR_DOMAIN_JOB_DISK_TOTAL, 0),
    )


def outcome(domain: Domain) -> Outcome | None:
    """How the last job has ended, told once; None if libvirt knows of none any more.

    It keeps that in memory alone, and forgets it when it is asked (measured with libvirt 9.0).
    Raises DomainError.
    """
    found = domain.call(
        "can't read how its job ended",
        lambda each: each.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED),
    )
    kind = found.get("type", _NONE)
    if kind == _NONE or found.get(libvirt.VIR_DOMAIN_JOB_OPERATION) != (
        libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
    ):
        return None
    is_whole = kind == libvirt.VIR_DOMAIN_JOB_COMPLETED
    is_whole = is_whole and bool(found.get(libvirt.VIR_DOMAIN_JOB_SUCCESS, False))
    return Outcome(is_whole, str(found.get(libvirt.VIR_DOMAIN_JOB_ERRMSG, "")))


def abort(domain: Domain) -> None:
    """End the domain's job and wait until it is gone; none is fine.

    libvirt then removes scratch files and socket. Raises DomainError if it stays.
    """
    if active_job(domain) is None:
        return
    try:
        domain.call("can't end its job", lambda each: each.abortJob())
    except DomainError:
        # it may have ended by itself, as with the guest
        if active_job(domain) is None:
            return
        raise
    deadline = time.monotonic() + ABORT_TIMEOUT_SECONDS
    while active_job(domain) is not None:
        if time.monotonic() > deadline:
            raise DomainError(
                f"domain {domain.name}: its job did not end within "
                f"{ABORT_TIMEOUT_SECONDS:g} s; try 'virsh domjobabort'",
                domain=domain.name,
            )
        time.sleep(POLL_SECONDS)


_NONE: Final = libvirt.VIR_DOMAIN_JOB_NONE
# connections whose libvirt does not know the flag
_REFUSED: Final[WeakSet[Connection]] = WeakSet()
