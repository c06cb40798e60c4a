"""A running QEMU without libvirt as a source: fleecing jobs that we begin by its monitor.

What libvirt does for a pull-mode backup, done by ourselves, with one transaction for all disks:
the new bitmap, a frozen copy of the base's, and a job that copies what the guest overwrites into a
scratch image before it does so. Scratch images have no name, and QEMU's NBD server listens on a
socket of ours: QEMU needs no right to any path, and no file is left, whatever ends the run.
"""

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from nbdbackupd import durable, events, rundir
from nbdbackupd.errors import (
    CheckpointError,
    ConfigError,
    FreezeError,
    NbdbackupError,
    NotSupportedError,
    ProcessError,
    SourceError,
)
from nbdbackupd.model.policy import FreezePolicy
from nbdbackupd.qemu import image, machine
from nbdbackupd.qemu.machine import Drive, Machine
from nbdbackupd.source import Export, Snapshot, quiesce, running, scratch
from nbdbackupd.source.guard import BEGUN, MOST_DISKS, Charge, Guard, guarded, turn, wait_for_guards
from nbdbackupd.source.quiesce import Moment, Quiet
from nbdbackupd.virt.domain import GuestState

LOG = logging.getLogger(__name__)
JOB_POLL_SECONDS: Final = 0.5
OVER: Final = frozenset({"concluded", "null", "aborting"})
"""States of a job that keeps nothing any more."""

NO_AGENT: Final = "there is no agent's socket"


@dataclass(frozen=True, kw_only=True, slots=True)
class StandaloneDisk:
    """A disk to read. ``delta``: since the base; ``tracked``: it gets the new bitmap."""

    target: str
    drive: Drive
    delta: bool = False
    tracked: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class StandaloneRequest:
    """What ``open_standalone`` needs; sizes in bytes.

    ``name`` and ``uuid`` are those of the point. An empty ``new_bitmap`` makes none.
    ``runtime_dir`` is that of the socket (``rundir.socket_dir``). For ``scratch_reserve`` and
    ``on_trouble`` see ``running.RunningRequest``.
    """

    machine: Machine
    name: str
    uuid: str
    disks: tuple[StandaloneDisk, ...]
    run_id: str
    runtime_dir: Path
    scratch_dir: Path
    scratch_reserve: int
    on_trouble: Callable[[NbdbackupError], None]
    base_bitmap: str = ""
    new_bitmap: str = ""
    freeze: FreezePolicy = FreezePolicy.AUTO

    @property
    def socket(self) -> Path:
        """The NBD server's socket."""
        return self.runtime_dir / rundir.NBD_SOCKET

    @property
    def head(self) -> str:
        """How all names in QEMU begin that the run makes."""
        return machine.tag(self.run_id)

    @property
    def changes(self) -> str:
        """The name of the frozen bitmaps."""
        return f"{self.head}-changes"


class Guest:
    """A guest that can be paused by its monitor."""

    def __init__(self, found: Machine) -> None:
        self._machine = found

    def state(self) -> GuestState:
        """What QEMU does with it."""
        is_running = self._machine.status() == "running"
        return GuestState.RUNNING if is_running else GuestState.PAUSED

    def suspend(self) -> None:
        """Halt it."""
        self._machine.execute("stop")

    def resume(self) -> None:
        """Let it go on."""
        self._machine.execute("cont")


@contextmanager
def open_standalone(request: StandaloneRequest) -> Iterator[Snapshot]:
    """Begin the jobs and yield their exports; all is ended and removed on every path out.

    A guard does that if we are killed. A disk whose bitmap is lost is read in full (``demoted``).
    The new bitmap is there when the body runs; removing it when the run fails is the caller's.
    Raises BusyError if QEMU's NBD server serves another, ConfigError, ScratchSpaceError,
    FreezeError, DomainError, ProcessError; on leaving SourceError if a job did not live to its end.
    """
    has_iothreads = _check(request)
    scratch.prepare(request.scratch_dir, request.scratch_reserve)
    with durable.translate_os_errors("use", request.runtime_dir):
        durable.make_directory(request.runtime_dir, rundir.CLOSED)
    with contextlib.ExitStack() as stack:
        scratches = [_scratch(request, disk, stack) for disk in request.disks]
        guard = stack.enter_context(guarded(_charge(request), is_holding=has_iothreads))
        # before anything begins, so that no interruption can come between
        stack.push(_End(request, guard))
        request.machine.serve(request.socket, request.head)
        for number, disk in enumerate(request.disks):
            _prepare(request, number, disk, scratches[number])
        deltas, demoted = _deltas(request)
        moment = _begin(request, deltas)
        guard.note(BEGUN)
        for number, disk in enumerate(request.disks):
            _export(request, number, disk, is_delta=disk.target in deltas)
        stack.enter_context(scratch.watch(_watched(request, guard)))
        yield Snapshot(
            exports={
                disk.target: Export(
                    target=disk.target,
                    socket=request.socket,
                    name=disk.target,
                    size=disk.drive.size,
                    bitmap=request.changes if disk.target in deltas else "",
                    keeper=guard,
                )
                for disk in request.disks
            },
            consistency=moment.consistency,
            demoted=demoted,
            warnings=tuple(moment.warnings),
        )
        if problem := _problem(request):
            raise problem


def sweep(found: Machine, runtime_dir: Path) -> tuple[tuple[str, ...], str]:
    """Remove what dead runs left in a QEMU, and let its guest go; its lock is held.

    Returns what that was, and what became of the guest.

    Raises BusyError if a guard takes too long, ProcessError, SourceError.
    """
    with turn(runtime_dir):
        released = quiesce.release_paused(Guest(found), running.marker(runtime_dir))
        wait_for_guards(runtime_dir)
        done = found.clear(machine.PREFIX, runtime_dir / rundir.NBD_SOCKET)
    if done:
        events.emit(LOG, events.DEAD_RUN_SWEPT, reason="; ".join(done))
    if released:
        events.emit(LOG, events.GUEST_RELEASED, reason=released)
    return done, released


def clear_dead(charge: Charge) -> bool:
    """What a guard does after its run: the same for that run alone; True, since all is done.

    Raises DomainNotFoundError if QEMU has ended, BusyError, ProcessError, SourceError.
    """
    directory = Path(charge.runtime_dir)
    with machine.connect(Path(charge.monitor), charge.domain) as found, turn(directory):
        released = quiesce.release_paused(Guest(found), running.marker(directory), charge.run_id)
        done = found.clear(machine.tag(charge.run_id), directory / rundir.NBD_SOCKET)
    if done:
        events.emit(LOG, events.DEAD_RUN_SWEPT, reason="; ".join(done))
    if released:
        events.emit(LOG, events.GUEST_RELEASED, reason=released)
    return True


def _check(request: StandaloneRequest) -> bool:
    """Whether connections are QEMU's to close."""
    if fault := rundir.socket_fault(request.socket):
        raise ConfigError(f"{fault}: give a shorter --runtime-dir")
    if request.freeze is FreezePolicy.REQUIRE:
        raise FreezeError(
            f"QEMU of {request.name} can't be frozen: {NO_AGENT}; use '--freeze auto' or --pause"
        )
    has_any = request.machine.has_iothreads()
    if has_any and len(request.disks) > MOST_DISKS:
        raise NotSupportedError(
            f"QEMU of {request.name} has iothreads, and {len(request.disks)} disks to save: no "
            f"more than {MOST_DISKS} at a time; save them in two sets, with 'backup --include'"
        )
    return has_any


def _charge(request: StandaloneRequest) -> Charge:
    return Charge(
        uri="",
        user="",
        password="",
        domain=request.name,
        uuid=request.uuid,
        run_id=request.run_id,
        pid=os.getpid(),
        runtime_dir=os.fspath(request.runtime_dir.absolute()),
        scratch_dir=os.fspath(request.scratch_dir),
        scratch_reserve=request.scratch_reserve,
        # they have no names; their number decides how many connections there may be
        scratch=tuple(disk.target for disk in request.disks),
        is_reachable=True,
        monitor=os.fspath(request.machine.path.absolute()),
    )


def _scratch(request: StandaloneRequest, disk: StandaloneDisk, stack: contextlib.ExitStack) -> int:
    """A scratch image until ``stack`` ends. Raises ConfigError, NoSpaceError, ProcessError."""
    with durable.translate_os_errors("write", request.scratch_dir):
        return stack.enter_context(image.nameless(request.scratch_dir, disk.drive.size))


def _prepare(
    request: StandaloneRequest, number: int, disk: StandaloneDisk, descriptor: int
) -> None:
    """Open a scratch image on top of the disk."""
    found, head = request.machine, request.head
    name = found.lend(descriptor, head)
    file = {"driver": "file", "filename": name, "locking": "off"}
    found.execute(
        "blockdev-add",
        driver="qcow2",
        node_name=f"{head}-s{number}",
        backing=disk.drive.node,
        file=file,
    )


def _deltas(request: StandaloneRequest) -> tuple[frozenset[str], dict[str, str]]:
    """Disks whose changes can be read, and why others can't."""
    base = request.base_bitmap
    demoted = {}
    for disk in request.disks:
        bitmap = disk.drive.bitmap(base)
        if disk.delta and (bitmap is None or not bitmap.sound or not bitmap.recording):
            demoted[disk.target] = running.unsound(base)
    wanted = {disk.target for disk in request.disks if disk.delta}
    return frozenset(wanted - demoted.keys()), demoted


def _begin(request: StandaloneRequest, deltas: frozenset[str]) -> Moment:
    """Begin all jobs at one instant."""
    actions: list[dict[str, Any]] = []
    for number, disk in enumerate(request.disks):
        actions += _actions(request, number, disk, is_delta=disk.target in deltas)
    moment = Moment()
    with contextlib.ExitStack() as stack:
        if request.freeze is FreezePolicy.PAUSE:
            quiet = Quiet(marker=running.marker(request.runtime_dir), run_id=request.run_id)
            stack.enter_context(quiesce.paused(Guest(request.machine), quiet, moment))
        try:
            request.machine.execute("transaction", actions=actions)
        except ProcessError as err:
            raise CheckpointError(f"the backup can't begin: {err.message}") from err
    return moment


def _actions(
    request: StandaloneRequest, number: int, disk: StandaloneDisk, *, is_delta: bool
) -> Iterator[dict[str, Any]]:
    """What is done to a disk in the transaction; the job last, so that none begins too early."""
    node, base = disk.drive.node, disk.drive.bitmap(request.base_bitmap)
    if request.new_bitmap and disk.tracked:
        yield _action("block-dirty-bitmap-add", node=node, name=request.new_bitmap, persistent=True)
    if is_delta and base is not None:
        yield _action(
            "block-dirty-bitmap-add",
            node=node,
            name=request.changes,
            disabled=True,
            granularity=base.granularity,
        )
        yield _action(
            "block-dirty-bitmap-merge", node=node, target=request.changes, bitmaps=[base.name]
        )
    yield _action(
        "blockdev-backup",
        job_id=f"{request.head}-j{number}",
        device=node,
        target=f"{request.head}-s{number}",
        sync="none",
    )


def _action(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": {name.replace("_", "-"): each for name, each in data.items()}}


def _export(
    request: StandaloneRequest, number: int, disk: StandaloneDisk, *, is_delta: bool
) -> None:
    more: dict[str, Any] = {"bitmaps": [request.changes]} if is_delta else {}
    request.machine.execute(
        "block-export-add",
        type="nbd",
        id=f"{request.head}-e{number}",
        node_name=f"{request.head}-s{number}",
        name=disk.target,
        writable=False,
        **more,
    )


def _watched(request: StandaloneRequest, guard: Guard) -> scratch.Watched:
    return scratch.Watched(
        directory=request.scratch_dir,
        reserve=request.scratch_reserve,
        on_trouble=request.on_trouble,
        end_job=lambda: _end(request, guard),
        seen_by_guest=functools.partial(_seen_by_guest, request.machine),
        watch_job=functools.partial(_watch_jobs, request),
    )


def _seen_by_guest(found: Machine, space: scratch.Space) -> str:
    """As ``scratch.seen_by_guest``, by QEMU's own word."""
    names = ", ".join(each.name for each in found.drives() if each.error)
    if found.status() == "io-error":
        found.execute("cont")
        return f"the guest was held by an error of {names or 'a disk'} meanwhile, and goes on"
    return f"the guest may have seen errors of {names}" if names else scratch.unseen(space)


def _watch_jobs(request: StandaloneRequest, stop: threading.Event) -> None:
    while not stop.wait(JOB_POLL_SECONDS):
        problem = _problem(request)
        if problem is not None and not stop.is_set():
            request.on_trouble(problem)
            return


def _problem(request: StandaloneRequest) -> SourceError | None:
    """Why what was read is no snapshot, if so: a job that ended keeps nothing."""
    what = f"QEMU of {request.name} ended during the backup"
    try:
        states = request.machine.jobs(request.head)
    except ProcessError as err:
        return SourceError(f"{what}, or does not answer; nothing was saved, run again: {err}")
    live = [state for state in states.values() if state not in OVER]
    if len(live) == len(request.disks):
        return None
    return SourceError(
        f"QEMU of {request.name}: a backup job was ended before the copy was complete; nothing was "
        f"saved, run again"
    )


def _end(request: StandaloneRequest, guard: Guard) -> None:
    """End our jobs in such a way that QEMU survives it. Raises SourceError, ProcessError."""
    if not guard.settle():
        raise SourceError(
            f"QEMU of {request.name} does not answer on its NBD server, so that its jobs can't be "
            f"ended now: a process of this run ends them as soon as it does"
        )
    request.machine.clear(request.head, request.socket)


class _End:
    """An exit callback: ends what is ours, and fails for it only if nothing else has failed."""

    def __init__(self, request: StandaloneRequest, guard: Guard) -> None:
        self._request = request
        self._guard = guard

    def __call__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        marker = running.marker(self._request.runtime_dir)
        try:
            _end(self._request, self._guard)
            quiesce.release_paused(Guest(self._request.machine), marker, self._request.run_id)
        except NbdbackupError as err:
            if error is None:
                raise
            LOG.warning("%s", err)
            return
        self._guard.is_settled = self._guard.kept.wait_closed(running.CLOSE_SECONDS)
