"""A running domain as a source: libvirt's backup job.

In pull mode QEMU serves the disks on a Unix socket. In push mode it writes them, or what changed,
into qcow2 images that are made here: the source's names are those of scratch files, so that who
finds a job or a file knows whose it is.
"""

import contextlib
import functools
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final

from nbdbackupd import durable, events, rundir
from nbdbackupd.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DomainError,
    FreezeError,
    NbdbackupError,
    NotSupportedError,
    SourceError,
)
from nbdbackupd.model import jobxml
from nbdbackupd.model.chain import Consistency
from nbdbackupd.model.jobxml import JobDisk
from nbdbackupd.model.policy import FreezePolicy
from nbdbackupd.source import Export, Snapshot, push, quiesce, scratch
from nbdbackupd.source.guard import (
    BEGUN,
    MOST_DISKS,
    THAW,
    Charge,
    Guard,
    guarded,
)
from nbdbackupd.source.quiesce import Moment, Quiet
from nbdbackupd.virt import checkpoints, instance, jobs
from nbdbackupd.virt.domain import Domain
from nbdbackupd.where import Where

LOG = logging.getLogger(__name__)
CLOSE_SECONDS: Final = 30.0
"""How long QEMU may take to close the connections after the job's end; 10 ms were measured."""


FORGIVING: Final = (10, 0)
"""A QEMU that survives clients that leave first, of a disk with an iothread (10.0.13: measured)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningDisk:
    """A disk to read. ``delta``: since the base; ``tracked``: the new checkpoint covers it.

    ``backing`` is the file name that the image of a delta in push mode has below it.
    """

    target: str
    delta: bool = False
    tracked: bool = True
    backing: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningRequest:
    """What ``open_running`` needs; sizes in bytes, times in seconds.

    All paths are of this host, but for those of ``scratch_dir``, which is of the domain's.

    ``base_xml`` is the stored XML of ``base_checkpoint``, in case libvirt has lost it. An empty
    ``new_checkpoint`` makes none. ``scratch_reserve``: the job is ended when less is free in
    ``scratch_dir``; twice as much must be free to begin. ``runtime_dir`` is the domain's own;
    it is given to the user that QEMU runs as. ``on_trouble`` is called from another thread.
    ``at_rest``: the domain was started paused for this run (source/paused_start.py), and this is
    what its disks are as long as the guest has not run; nothing is frozen then.
    ``freeze_obstacle`` is why it had better not be frozen; ``on_freeze`` is called after a freeze
    was tried: whether the agent has let a deadline pass. ``is_push``: QEMU writes images into
    ``scratch_dir``, which is there and is not watched: a job that finds no space ends alone.
    """

    domain: Domain
    disks: tuple[RunningDisk, ...]
    run_id: str
    runtime_dir: Path
    scratch_dir: Path
    scratch_reserve: int
    on_trouble: Callable[[NbdbackupError], None]
    base_checkpoint: str = ""
    base_xml: str = ""
    new_checkpoint: str = ""
    freeze: FreezePolicy = FreezePolicy.AUTO
    freeze_mountpoints: tuple[str, ...] = ()
    freeze_seconds: float = 30.0
    freeze_obstacle: str = ""
    was_frozen: bool = False
    at_rest: Consistency | None = None
    on_freeze: Callable[[bool], None] = lambda _is_unanswered: None
    is_push: bool = False

    @property
    def socket(self) -> Path:
        """The NBD server's socket, or what leads there."""
        return self.runtime_dir / rundir.NBD_SOCKET

    @property
    def where(self) -> Where:
        """The domain's host."""
        return self.domain.connection.where


@contextlib.contextmanager
def open_running(request: RunningRequest) -> Iterator[Snapshot]:
    """Begin a job and yield its exports; end the job and remove its files on every path out.

    A guard (source/guard.py) does that if we are killed, and goes on with what we can't end.
    A disk whose bitmap is lost or broken is read in full in the same job (``demoted``). The
    new checkpoint exists when the body runs; deleting it when the run fails is the caller's.
    Raises BusyError if the domain has a job, ConfigError, ScratchSpaceError, FreezeError,
    DomainError; also on leaving, if the job can't be ended and the body did not fail itself, and
    SourceError if it was ended by another.
    """
    _check(request)
    has_iothreads = _has_iothreads(request)
    free = 0
    if not request.is_push:
        free = scratch.prepare(request.scratch_dir, request.scratch_reserve, request.where)
    _prepare_runtime_dir(request)
    with contextlib.ExitStack() as stack:
        # it starts beside what comes next
        guard = stack.enter_context(guarded(_charge(request), is_holding=has_iothreads))
        # before the job begins, so that no interruption can come between
        stack.callback(_remove_files, request)
        stack.push(_JobEnd(request, guard))
        plan, demoted = _plan(request)
        moment, plan, lost = _begin(request, plan, guard)
        guard.note(BEGUN)
        snapshot = _snapshot(request, plan, {**demoted, **lost}, moment, guard)
        if request.is_push:
            yield replace(
                snapshot, finish=functools.partial(push.finish, request.domain, request.scratch_dir)
            )
            return
        stack.enter_context(scratch.watch(_watched(request, guard, free)))
        yield snapshot
        _check_job(request)


def _watched(request: RunningRequest, guard: Guard, free: int) -> scratch.Watched:
    return scratch.Watched(
        directory=request.scratch_dir,
        reserve=request.scratch_reserve,
        on_trouble=request.on_trouble,
        look=scratch.looker(request.domain, request.scratch_dir, free),
        end_job=lambda: _end_job(request.domain, guard),
        seen_by_guest=functools.partial(scratch.seen_by_guest, request.domain),
        watch_job=functools.partial(scratch.watch_job, request.domain, request.on_trouble),
    )


def _check_job(request: RunningRequest) -> None:
    """Raise SourceError unless the job is still ours: what was read after its end is no snapshot.

    QEMU stops to keep what a guest overwrites when the job ends, which may be before the export
    of it is closed.
    """
    domain = request.domain
    job = jobs.active_job(domain)
    if job is None or not is_own_job(job, request.runtime_dir, domain):
        raise scratch.why_gone(domain)


def _has_iothreads(request: RunningRequest) -> bool:
    """Whether connections must stay open. Raises NotSupportedError if these would be too many."""
    has_any = request.domain.definition().has_iothreads
    if has_any and len(request.disks) > MOST_DISKS:
        raise NotSupportedError(
            f"domain {request.domain.name} has iothreads, and {len(request.disks)} disks to save: "
            f"no more than {MOST_DISKS} at a time; save them in two sets, with disks.include or "
            f"'backup --include'",
            domain=request.domain.name,
        )
    if has_any and not request.where.is_here:
        version = instance.qemu_version(request.domain)
        if version < FORGIVING:
            raise NotSupportedError(
                f"domain {request.domain.name} has iothreads, and its QEMU {version[0]}."
                f"{version[1]} would end with its guest if the connection by ssh were lost: run "
                f"nbdbackupctl on {request.where.name}, or give it QEMU {FORGIVING[0]} or later",
                domain=request.domain.name,
            )
    return has_any


def marker(runtime_dir: Path) -> Path:
    """The file that tells of a guest that is held: where QEMU can't put a link in its place."""
    return rundir.beside(runtime_dir) / rundir.HELD


def _charge(request: RunningRequest) -> Charge:
    connection = request.domain.connection
    address = connection.address
    return Charge(
        uri=address.uri,
        user=address.user,
        password=address.password,
        domain=request.domain.name,
        uuid=request.domain.uuid,
        run_id=request.run_id,
        pid=os.getpid(),
        runtime_dir=os.fspath(request.runtime_dir.absolute()),
        scratch_dir=os.fspath(request.scratch_dir),
        scratch_reserve=request.scratch_reserve,
        scratch=tuple(os.fspath(_scratch_file(request, disk.target)) for disk in request.disks),
        is_reachable=not connection.is_embedded,
        host=request.where.id,
        ssh_config=request.where.config,
        ssh_dir=os.fspath(request.where.runtime_dir),
    )


def _scratch_file(request: RunningRequest, target: str) -> Path:
    return scratch.path(request.scratch_dir, request.domain.uuid, request.run_id, target)


def _check(request: RunningRequest) -> None:
    domain = request.domain
    if fault := rundir.socket_fault(request.socket):
        raise ConfigError(f"{fault}: give a shorter --runtime-dir")
    if not domain.is_active():
        raise DomainError(f"domain {domain.name} does not run", domain=domain.name)
    job = jobs.active_job(domain)
    if job is not None:
        raise BusyError(
            f"domain {domain.name} is busy with {job}; wait, or end a backup job "
            f"with 'nbdbackupctl abort --any {domain.name}'",
            domain=domain.name,
        )
    _check_block_jobs(request)


def _check_block_jobs(request: RunningRequest) -> None:
    """Raise BusyError if a job runs on a disk; libvirt's own refusal would be an internal error."""
    domain = request.domain
    for target, job in jobs.block_jobs(domain, [disk.target for disk in request.disks]).items():
        raise BusyError(
            f"domain {domain.name} is busy with a job on disk {target}: {job}; wait for it, or end "
            f"it with 'virsh blockjob {domain.name} {target}' and --abort or --pivot",
            domain=domain.name,
            disk=target,
        )


def _prepare_runtime_dir(request: RunningRequest) -> None:
    """Let QEMU create its socket where nobody else but root gets in."""
    directory = request.runtime_dir
    owner = request.domain.owner()
    try:
        directory.mkdir(mode=rundir.CLOSED, parents=True, exist_ok=True)
        if directory.stat().st_mode & stat.S_IWOTH:
            raise ConfigError(f"runtime directory {directory} is writable for everybody")
        directory.chmod(rundir.CLOSED)
        if owner is not None and os.geteuid() == 0 and request.where.is_here:
            durable.admit(directory, *owner)
        # QEMU replaces a dead socket, but a file of another kind would stop it
        request.socket.unlink(missing_ok=True)
    except OSError as err:
        raise ConfigError(f"runtime directory {directory} can't be used: {err.strerror}") from err
    try:
        request.where.lead(request.socket, owner)
    except NbdbackupError:
        with contextlib.suppress(NbdbackupError):
            request.where.leave(request.socket)
        raise


def _plan(request: RunningRequest) -> tuple[tuple[JobDisk, ...], dict[str, str]]:
    """Decide for each disk whether its changes can be read; give the reason where not."""
    deltas = [disk.target for disk in request.disks if disk.delta]
    reasons = _demotions(request, deltas) if deltas else {}
    plan = tuple(
        JobDisk(
            target=disk.target,
            scratch=os.fspath(_scratch_file(request, disk.target)),
            base=request.base_checkpoint if disk.delta and disk.target not in reasons else "",
            bitmap=f"changes-{disk.target}",
        )
        for disk in request.disks
    )
    return plan, reasons


def _demotions(request: RunningRequest, deltas: list[str]) -> dict[str, str]:
    base = request.base_checkpoint
    try:
        sound = changed_bytes(request.domain, base, request.base_xml, deltas)
    except CheckpointError as err:
        return dict.fromkeys(deltas, err.message)
    return {target: unsound(base) for target in deltas if target not in sound}


def changed_bytes(
    domain: Domain, base: str, stored: str, targets: Collection[str]
) -> dict[str, int]:
    """Return the bytes that changed since checkpoint ``base``, for each disk that can tell.

    A checkpoint that libvirt has lost is redefined from its ``stored`` XML first. So is one of
    which a disk beyond ``targets`` can't tell: of an overlay that has grown, libvirt 9.0 can't
    merge the bitmaps, and then tells of no disk at all (measured). One that libvirt had lost and of
    which no disk can tell is not kept: it would be in the way of undefining the domain. Raises
    CheckpointError if that is not possible.
    """
    if base in checkpoints.names(domain):
        return _changed_bytes(domain, base, stored, targets)
    if not stored:
        raise CheckpointError(f"libvirt does not know checkpoint {base}")
    checkpoints.redefine(domain, stored, targets)
    sizes = _changed_bytes(domain, base, stored, targets)
    if sizes:
        events.emit(
            LOG, events.CHECKPOINT_REDEFINED, checkpoint=base, reason="libvirt did not know it"
        )
    else:
        checkpoints.forget(domain, base)
    return sizes


def _changed_bytes(
    domain: Domain, base: str, stored: str, targets: Collection[str]
) -> dict[str, int]:
    try:
        return checkpoints.sound_sizes(domain, base)
    except DomainError as err:
        if not stored:
            raise
        LOG.info("checkpoint %s, disks %s alone: %s", base, ", ".join(targets), err)
    checkpoints.redefine(domain, stored, targets)
    return checkpoints.sound_sizes(domain, base)


def unsound(base: str) -> str:
    """Say why a disk that ``changed_bytes`` leaves out can't be read incrementally."""
    return f"its bitmap of checkpoint {base} is missing or inconsistent"


def _begin(
    request: RunningRequest, plan: tuple[JobDisk, ...], guard: Guard
) -> tuple[Moment, tuple[JobDisk, ...], dict[str, str]]:
    """Begin at a quiet moment; once more in full if libvirt takes offence at the base."""
    lost: dict[str, str] = {}
    _make_images(request, plan)
    with _still(request, guard) as moment:
        try:
            _begin_job(request, plan)
        except CheckpointError as err:
            lost = {disk.target: err.message for disk in plan if disk.base}
            if not lost:
                raise
            plan = tuple(replace(disk, base="") for disk in plan)
            _make_images(request, plan)
            _begin_job(request, plan)
    return moment, plan, lost


@contextlib.contextmanager
def _still(request: RunningRequest, guard: Guard) -> Iterator[Moment]:
    """Hold the guest still; one that has never run is stiller than any freeze makes it."""
    domain = request.domain
    if request.at_rest is None or not instance.never_ran(domain):
        quiet = Quiet(
            marker=marker(request.runtime_dir),
            run_id=request.run_id,
            on_held=lambda: guard.note(THAW),
            on_freeze=request.on_freeze,
            obstacle=request.freeze_obstacle,
            was_frozen=request.was_frozen,
            freeze=request.freeze,
            mountpoints=request.freeze_mountpoints,
            seconds=request.freeze_seconds,
        )
        with quiesce.quiet(domain, quiet) as moment:
            yield moment
        return
    moment = Moment(consistency=request.at_rest)
    yield moment
    if not instance.never_ran(domain):
        moment.consistency = Consistency.CRASH
        text = "the guest was resumed while the job began"
        if request.freeze is FreezePolicy.REQUIRE:
            raise FreezeError(f"domain {domain.name} was not frozen: {text}", domain=domain.name)
        moment.warnings.append(f"not frozen: {text}")


def _make_images(request: RunningRequest, plan: tuple[JobDisk, ...]) -> None:
    """In push mode, for what libvirt is asked to do now."""
    if request.is_push:
        backings = {disk.target: disk.backing for disk in request.disks}
        push.make_images(request.domain, plan, backings)


def _begin_job(request: RunningRequest, plan: tuple[JobDisk, ...]) -> None:
    """Begin the job; raises CheckpointError, DomainError, ConfigError."""
    known = [disk.target for disk in request.domain.definition().disks]
    chosen = [disk.target for disk in plan]
    others = [target for target in known if target not in chosen]
    server = os.fspath(request.where.server_socket(request.socket))
    backup = (jobxml.push_xml if request.is_push else functools.partial(jobxml.backup_xml, server))(
        plan, others
    )
    checkpoint = ""
    tracked = [disk.target for disk in request.disks if disk.tracked]
    if request.new_checkpoint and tracked:
        checkpoint = jobxml.checkpoint_xml(
            request.new_checkpoint, tracked, [each for each in known if each not in tracked]
        )
    try:
        jobs.begin(request.domain, backup, checkpoint, is_push=request.is_push)
    except DomainError as err:
        # one that began just now; if libvirt can't say, the first error is the better one
        with contextlib.suppress(DomainError):
            _check_block_jobs(request)
        if "Permission denied" in err.message or "No such file" in err.message:
            raise DomainError(
                f"{err.message}; QEMU must reach {request.scratch_dir} and "
                f"{request.where.server_socket(request.socket).parent} on {request.where.name}: "
                f"check permissions, confinement, and that no file system was mounted there "
                f"after the guest's start",
                **err.fields,
            ) from err
        raise
    # a libvirt on another host, or in another mount namespace, has another directory of that name
    unseen = [disk.scratch for disk in plan if request.where.facts(disk.scratch) is None]
    if unseen:
        raise ConfigError(
            f"QEMU's scratch file {unseen[0]} is not to be seen here, so that its space can't be "
            f"watched: libvirt must see the same {request.scratch_dir} as this program"
        )


def _snapshot(
    request: RunningRequest,
    plan: tuple[JobDisk, ...],
    demoted: dict[str, str],
    moment: Moment,
    guard: Guard,
) -> Snapshot:
    domain = request.domain
    has_checkpoint = request.new_checkpoint and any(disk.tracked for disk in request.disks)
    return Snapshot(
        exports={
            disk.target: Export(
                target=disk.target,
                socket=request.socket,
                name=disk.target,
                size=domain.disk_size(disk.target),
                bitmap=disk.bitmap if disk.base else "",
                keeper=guard,
                file=Path(disk.scratch) if request.is_push else None,
            )
            for disk in plan
        },
        consistency=moment.consistency,
        checkpoint_xml=checkpoints.xml(domain, request.new_checkpoint) if has_checkpoint else "",
        demoted=demoted,
        warnings=tuple(moment.warnings),
    )


class _JobEnd:
    """An exit callback: ends our job, and fails for it only if nothing else has failed.

    Then the server closes the connections; what of that is not seen is left to the guard.
    """

    def __init__(self, request: RunningRequest, guard: Guard) -> None:
        self._request = request
        self._guard = guard

    def __call__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        request = self._request
        domain = request.domain
        try:
            job = jobs.active_job(domain)
            if isinstance(error, SourceError) and (job is None or scratch.is_ending(domain)):
                # what was seen of it is only the consequence
                request.on_trouble(scratch.why_gone(domain))
            if job is not None and is_own_job(job, request.runtime_dir, domain):
                _end_job(domain, self._guard)
            if domain.connection.is_embedded:
                # the guard can't reach the guest
                quiesce.release(domain, marker(request.runtime_dir))
        except NbdbackupError as err:
            if error is None:
                raise
            if not self._has_ended(error):
                LOG.warning("domain %s: %s", domain.name, err)
                return
        is_held = quiesce.is_held(marker(request.runtime_dir))
        self._guard.is_settled = self._guard.kept.wait_closed(CLOSE_SECONDS) and not is_held

    def _has_ended(self, error: BaseException) -> bool:
        """Whether the domain is about to end, told as the cause of what the copy saw of it.

        libvirt can't read the job of a QEMU that has just gone.
        """
        domain = self._request.domain
        with contextlib.suppress(NbdbackupError):
            if isinstance(error, SourceError) and scratch.is_ending(domain):
                self._request.on_trouble(scratch.why_gone(domain))
                return True
        return False


def _end_job(domain: Domain, guard: Guard) -> None:
    """End our job in such a way that QEMU survives it. Raises SourceError, DomainError."""
    if not guard.settle():
        raise SourceError(
            f"domain {domain.name}: QEMU does not answer, so that the job can't be ended now: a "
            f"process of this run ends it as soon as QEMU answers",
            domain=domain.name,
        )
    jobs.abort(domain)


def is_own_job(job: jobs.ActiveJob, runtime_dir: Path, domain: Domain) -> bool:
    """Tell whether a job is one of ours: its NBD socket is the one in our runtime directory.

    On another host: the one that is named after us. One in push mode has none; it writes into files
    that are called as our scratch files are.
    """
    where = domain.connection.where
    if job.backup is not None and job.backup.mode == "push":
        found = job.backup.scratch.values()
        return where.is_here and any(scratch.is_ours(Path(each), domain.uuid) for each in found)
    if not where.is_here:
        server = where.server_socket(runtime_dir / rundir.NBD_SOCKET)
        return job.backup is not None and job.backup.socket == os.fspath(server)
    # a job may outlive an upgrade from a version that had another place
    older = rundir.beside(runtime_dir) / "nbd"
    own = {os.fspath(each / rundir.NBD_SOCKET) for each in (runtime_dir, older)}
    return job.backup is not None and job.backup.socket in own


def _remove_files(request: RunningRequest) -> None:
    where = request.where
    request.socket.unlink(missing_ok=True)
    # what a way that is lost has left is for the guard
    with contextlib.nullcontext() if where.is_here else contextlib.suppress(NbdbackupError):
        for disk in request.disks:
            where.remove(_scratch_file(request, disk.target))
        where.leave(request.socket)
