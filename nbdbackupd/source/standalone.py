"""A running QEMU without libvirt as a source: what the guest overwrites goes to scratch images.

Two ways, which QEMU's description of itself and the disks decide between, for all disks alike:

* By filters, where it can be, one below each disk's device: what is in a scratch image, on top of
  the disk, is how that was when the filter came. Old blocks that can't be kept end the backup; the
  guest goes on. First the new bitmaps, then the filters, then the copies of the base's: nothing is
  lost between.
* By jobs, as libvirt does it: one transaction for all disks, with the new bitmap, a frozen copy of
  the base's, and a job. Old blocks that can't be kept fail the guest's writes.

Scratch images have no name, and QEMU's NBD server listens on a socket of ours: QEMU needs no right
to any path, and no file is left, whatever ends the run.
"""

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from nbdbackupd import durable, events, rundir
from nbdbackupd.errors import (
    CheckpointError,
    ConfigError,
    NbdbackupError,
    NotSupportedError,
    ProcessError,
    SourceError,
)
from nbdbackupd.model.policy import FreezePolicy
from nbdbackupd.qemu import image, machine
from nbdbackupd.qemu.machine import Drive, Machine, Part, node
from nbdbackupd.source import Export, Snapshot, quiesce, running, scratch
from nbdbackupd.source.guard import (
    BEGUN,
    MOST_DISKS,
    THAW,
    Charge,
    Guard,
    guarded,
    turn,
    wait_for_guards,
)
from nbdbackupd.source.qemu_guest import QemuGuest
from nbdbackupd.source.quiesce import Moment, Quiet
from nbdbackupd.where import HERE

LOG = logging.getLogger(__name__)
JOB_POLL_SECONDS: Final = 0.5
OVER: Final = frozenset({"concluded", "null", "aborting"})
"""States of a job that keeps nothing any more."""

FILTERED_DISKS: Final = 20
"""With five connections each, of which QEMU closes all at the end, see ``guard.MANY_DISKS``."""


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
    ``on_trouble`` see ``running.RunningRequest``. ``quiet`` is how the guest is held, but
    for ``on_held``, and ``agent`` its agent's socket. ``at_instant`` is called while the guest is
    halted, which it is for that.
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
    quiet: Quiet
    base_bitmap: str = ""
    new_bitmap: str = ""
    agent: Path | None = None
    at_instant: Callable[[], None] | None = None

    @property
    def guest(self) -> QemuGuest:
        """What is held still."""
        return QemuGuest.of(self.name, self.machine, self.agent)

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


@contextmanager
def open_standalone(request: StandaloneRequest) -> Iterator[Snapshot]:
    """Begin the jobs and yield their exports; all is ended and removed on every path out.

    A guard does that if we are killed. A disk whose bitmap is lost is read in full (``demoted``).
    The new bitmap is there when the body runs; removing it when the run fails is the caller's.
    Raises BusyError if QEMU's NBD server serves another, ConfigError, ScratchSpaceError,
    FreezeError, DomainError, ProcessError; on leaving SourceError if what was read is no snapshot.
    """
    has_iothreads = _check(request)
    scheme = _scheme(request, has_iothreads=has_iothreads)
    scratch.prepare(request.scratch_dir, request.scratch_reserve)
    with durable.translate_os_errors("use", request.runtime_dir):
        durable.make_directory(request.runtime_dir, rundir.CLOSED)
    with contextlib.ExitStack() as stack:
        scratches = [_scratch(request, disk, stack) for disk in request.disks]
        guard = stack.enter_context(guarded(_charge(request), is_holding=has_iothreads))
        # before anything begins, so that no interruption can come between
        stack.push(_End(request, guard))
        request.machine.serve(request.socket, request.head)
        scheme.prepare(scratches)
        deltas, demoted = _deltas(request)
        moment = _begin(scheme, deltas, guard)
        guard.note(BEGUN)
        for number, disk in enumerate(request.disks):
            scheme.export(number, disk, is_delta=disk.target in deltas)
        stack.enter_context(scratch.watch(_watched(scheme, guard)))
        yield Snapshot(
            exports={
                disk.target: Export(
                    target=disk.target,
                    socket=request.socket,
                    name=disk.target,
                    size=disk.drive.size,
                    bitmap=request.changes if disk.target in deltas else "",
                    keeper=guard,
                    proof=scheme.proof(number),
                )
                for number, disk in enumerate(request.disks)
            },
            consistency=moment.consistency,
            demoted=demoted,
            warnings=tuple(moment.warnings),
        )
        if problem := _problem(scheme):
            raise problem


def sweep(guest: QemuGuest, found: Machine, runtime_dir: Path) -> tuple[tuple[str, ...], str]:
    """Remove what dead runs left in a QEMU, and let its guest go; its lock is held.

    Returns what that was, and what became of the guest.

    Raises BusyError if a guard takes too long, ProcessError, SourceError.
    """
    with turn(runtime_dir):
        released = quiesce.release(guest, running.marker(runtime_dir))
        wait_for_guards(runtime_dir)
        done = found.clear(machine.PREFIX, runtime_dir / rundir.NBD_SOCKET)
    if done:
        events.emit(LOG, events.DEAD_RUN_SWEPT, reason="; ".join(done))
    if released.done:
        events.emit(LOG, events.GUEST_RELEASED, reason=released.done)
    if released.problem:
        LOG.info("%s", released.problem)
    return done, released.done or released.problem


def clear_dead(charge: Charge) -> bool:
    """What a guard removes after its run; True, since all is done.

    Raises DomainNotFoundError if QEMU has ended, BusyError, ProcessError, SourceError.
    """
    directory = Path(charge.runtime_dir)
    with machine.connect(Path(charge.monitor), charge.domain) as found:
        done = found.clear(machine.tag(charge.run_id), directory / rundir.NBD_SOCKET)
    if done:
        events.emit(LOG, events.DEAD_RUN_SWEPT, reason="; ".join(done))
    return True


def _check(request: StandaloneRequest) -> bool:
    """Whether connections are QEMU's to close."""
    if fault := rundir.socket_fault(request.socket):
        raise ConfigError(f"{fault}: give a shorter --runtime-dir")
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
        agent=os.fspath(request.agent) if request.agent is not None else "",
    )


def _scratch(request: StandaloneRequest, disk: StandaloneDisk, stack: contextlib.ExitStack) -> int:
    """A scratch image until ``stack`` ends. Raises ConfigError, NoSpaceError, ProcessError."""
    with durable.translate_os_errors("write", request.scratch_dir):
        return stack.enter_context(image.nameless(request.scratch_dir, disk.drive.size))


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


def _scheme(request: StandaloneRequest, *, has_iothreads: bool) -> "_Jobs":
    """Filters, or jobs where these can't be."""
    reasons = [
        f"disk {each.target}: {each.drive.obstacle}"
        for each in request.disks
        if each.drive.obstacle
    ]
    if has_iothreads and len(request.disks) > FILTERED_DISKS:
        reasons.append(f"it has iothreads, and more than {FILTERED_DISKS} disks")
    if not reasons and not request.machine.has_filters():
        reasons = ["this QEMU has no filter that spares the guest"]
    if not reasons:
        LOG.info("QEMU of %s: by filters, which never fail a write of the guest", request.name)
        return _Filters(request)
    LOG.info("QEMU of %s: by jobs, since filters can't be: %s", request.name, "; ".join(reasons))
    return _Jobs(request)


class _Jobs:
    """Jobs that copy old blocks before the guest overwrites them; what is read is their scratch."""

    def __init__(self, request: StandaloneRequest) -> None:
        self.request = request

    def name(self, part: Part, number: int) -> str:
        """The name of one of our nodes."""
        return node(self.request.head, part, number)

    def prepare(self, scratches: Sequence[int]) -> None:
        """Open the scratch images: nothing is kept there yet."""
        for number, disk in enumerate(self.request.disks):
            self.open_scratch(number, scratches[number], backing=disk.drive.node)

    def open_scratch(self, number: int, descriptor: int, **more: Any) -> None:
        """Open the scratch image of one disk."""
        name = self.request.machine.lend(descriptor, self.request.head)
        self.request.machine.execute(
            "blockdev-add",
            driver="qcow2",
            node_name=self.name(Part.SCRATCH, number),
            file={"driver": "file", "filename": name, "locking": "off"},
            **more,
        )

    @property
    def may_pause(self) -> bool:
        """Whether one instant of all disks needs the guest to be halted."""
        return False

    def track(self) -> None:
        """What is done before the instant. Raises ProcessError."""

    def begin(self, deltas: frozenset[str]) -> None:
        """Begin at one instant; the guest may be halted. Raises ProcessError."""
        actions: list[dict[str, Any]] = []
        for number, disk in enumerate(self.request.disks):
            actions += [*_added(self.request, disk), *_frozen(self.request, disk, deltas)]
            # last, so that none begins too early
            actions.append(
                _action(
                    "blockdev-backup",
                    job_id=f"{self.request.head}-j{number}",
                    device=disk.drive.node,
                    target=self.name(Part.SCRATCH, number),
                    sync="none",
                )
            )
        self.request.machine.execute("transaction", actions=actions)

    def finish(self, deltas: frozenset[str]) -> None:
        """What is left to do when the guest runs again. Raises ProcessError."""

    def export(self, number: int, disk: StandaloneDisk, *, is_delta: bool) -> None:
        """Offer what the disk held at the instant. Raises ProcessError."""
        bitmap = {"node": disk.drive.node, "name": self.request.changes}
        more: dict[str, Any] = {"bitmaps": [bitmap]} if is_delta else {}
        self.serve("e", number, Part.SCRATCH, disk.target, **more)

    def serve(self, kind: str, number: int, part: Part, name: str, **more: Any) -> None:
        """Add an export of one of our nodes."""
        self.request.machine.execute(
            "block-export-add",
            type="nbd",
            id=f"{self.request.head}-{kind}{number}",
            node_name=self.name(part, number),
            name=name,
            writable=False,
            **more,
        )

    def proof(self, number: int) -> str:
        """See ``Export``."""
        del number
        return ""

    def problem(self) -> str:
        """Why what was read is no snapshot, or nothing. Raises ProcessError."""
        states = self.request.machine.jobs(self.request.head)
        live = [state for state in states.values() if state not in OVER]
        is_live = len(live) == len(self.request.disks)
        return "" if is_live else "a backup job was ended before the copy was complete"

    def seen_by_guest(self, space: scratch.Space) -> str:
        """As ``scratch.seen_by_guest``, by QEMU's own word."""
        found = self.request.machine
        names = ", ".join(each.name for each in found.drives() if each.error)
        if found.status() == "io-error":
            found.execute("cont")
            return f"the guest was held by an error of {names or 'a disk'} meanwhile, and goes on"
        return f"the guest may have seen errors of {names}" if names else scratch.unseen(space)


class _Filters(_Jobs):
    """A filter below each device; it fails no write of the guest, but gives the snapshot up.

    That is seen by reading through it (snapshot-access), which is why that is not done for the
    data: what lies in several blocks, the first of which was kept, QEMU 7.2 reads as it is now.
    """

    def prepare(self, scratches: Sequence[int]) -> None:
        """Open the scratch images, and on each disk a filter, below which nothing goes yet."""
        super().prepare(scratches)
        for number, disk in enumerate(self.request.disks):
            self.request.machine.execute(
                "blockdev-add",
                driver=machine.FILTER,
                node_name=self.name(self._filter(disk), number),
                file=disk.drive.node,
                target=self.name(Part.SCRATCH, number),
                on_cbw_error="break-snapshot",
                cbw_timeout=machine.CBW_SECONDS,
                # or no discard of the guest gets through
                discard="unmap",
            )

    @property
    def may_pause(self) -> bool:
        """Filters come one by one."""
        return len(self.request.disks) > 1

    def track(self) -> None:
        """Add the new bitmaps: what is written from here on is in the next delta, if in none."""
        request = self.request
        actions = [each for disk in request.disks for each in _added(request, disk)]
        if actions:
            request.machine.execute("transaction", actions=actions)

    def begin(self, deltas: frozenset[str]) -> None:
        """Each filter takes a millisecond."""
        del deltas
        for number, disk in enumerate(self.request.disks):
            self.request.machine.put_filter(self.request.head, number, disk.drive)

    def finish(self, deltas: frozenset[str]) -> None:
        """What was written since is in these copies, too, and reads as it was: no harm."""
        request = self.request
        actions = [each for disk in request.disks for each in _frozen(request, disk, deltas)]
        if actions:
            request.machine.execute("transaction", actions=actions)
        for number, disk in enumerate(request.disks):
            # QEMU 7.2 aborts if a disk is resized whose bitmap is in use; of a node that has an
            # export it refuses that, and what is above the filter would hide it
            held = self._filter(disk)
            self.serve("h", number, held, self.name(held, number))
            request.machine.execute(
                "blockdev-add",
                driver=machine.ACCESS,
                node_name=self.name(Part.ACCESS, number),
                file=self.name(held, number),
            )
            self.serve("p", number, Part.ACCESS, self.proof(number))

    def proof(self, number: int) -> str:
        """It lets nothing be read once the snapshot was given up."""
        return self.name(Part.ACCESS, number)

    def problem(self) -> str:
        """A device that has something else below it now writes past our filter."""
        plugged = self.request.machine.plugged()
        found = [
            disk.target
            for disk in self.request.disks
            # one that was unplugged writes no more
            if not plugged.get(disk.drive.device, self.request.head).startswith(self.request.head)
        ]
        return f"what is below {', '.join(found)} was changed during the backup" if found else ""

    def seen_by_guest(self, space: scratch.Space) -> str:
        """Nothing, by the filters' nature."""
        del space
        return "no write of the guest failed for it"

    @staticmethod
    def _filter(disk: StandaloneDisk) -> Part:
        return Part.THROTTLED if disk.drive.throttle else Part.FILTER


def _begin(scheme: _Jobs, deltas: frozenset[str], guard: Guard) -> Moment:
    """Begin to keep what is overwritten, of all disks at one instant."""
    request = scheme.request
    quiet = replace(request.quiet, on_held=lambda: guard.note(THAW))
    halts = quiet.freeze is not FreezePolicy.PAUSE
    try:
        scheme.track()
        with quiesce.quiet(request.guest, quiet) as moment, contextlib.ExitStack() as stack:
            if halts and (scheme.may_pause or request.at_instant is not None):
                # for the instant alone it is as if the guest's power had failed
                stack.enter_context(quiesce.paused(request.guest, quiet, Moment()))
            scheme.begin(deltas)
            if request.at_instant is not None:
                request.at_instant()
        scheme.finish(deltas)
    except ProcessError as err:
        raise CheckpointError(f"the backup can't begin: {err.message}") from err
    return moment


def _added(request: StandaloneRequest, disk: StandaloneDisk) -> Iterator[dict[str, Any]]:
    """The new bitmap of a disk; QEMU keeps that of a raw one as long as its process lives."""
    if request.new_bitmap and disk.tracked:
        yield _action(
            "block-dirty-bitmap-add",
            node=disk.drive.node,
            name=request.new_bitmap,
            persistent=disk.drive.format != machine.RAW,
        )


def _frozen(
    request: StandaloneRequest, disk: StandaloneDisk, deltas: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """A copy of the base's bitmap that records nothing."""
    base = disk.drive.bitmap(request.base_bitmap)
    if disk.target in deltas and base is not None:
        yield _action(
            "block-dirty-bitmap-add",
            node=disk.drive.node,
            name=request.changes,
            disabled=True,
            granularity=base.granularity,
        )
        yield _action(
            "block-dirty-bitmap-merge",
            node=disk.drive.node,
            target=request.changes,
            bitmaps=[base.name],
        )


def _action(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": {name.replace("_", "-"): each for name, each in data.items()}}


def _watched(scheme: _Jobs, guard: Guard) -> scratch.Watched:
    request = scheme.request
    return scratch.Watched(
        directory=request.scratch_dir,
        reserve=request.scratch_reserve,
        on_trouble=request.on_trouble,
        look=functools.partial(HERE.free_bytes, request.scratch_dir),
        end_job=lambda: _end(request, guard),
        seen_by_guest=scheme.seen_by_guest,
        watch_job=functools.partial(_watch, scheme),
    )


def _watch(scheme: _Jobs, stop: threading.Event) -> None:
    while not stop.wait(JOB_POLL_SECONDS):
        problem = _problem(scheme)
        if problem is not None and not stop.is_set():
            scheme.request.on_trouble(problem)
            return


def _problem(scheme: _Jobs) -> SourceError | None:
    """Why what was read is no snapshot, if so."""
    what = f"QEMU of {scheme.request.name}"
    try:
        found = scheme.problem()
    except ProcessError as err:
        what = f"{what} ended during the backup, or does not answer"
        return SourceError(f"{what}; nothing was saved, run again: {err}")
    return SourceError(f"{what}: {found}; nothing was saved, run again") if found else None


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
            run_id = self._request.run_id
            quiesce.settle(self._request.guest, marker, run_id, seconds=quiesce.ANSWER_SECONDS)
        except NbdbackupError as err:
            if error is None:
                raise
            LOG.warning("%s", err)
            return
        is_held = quiesce.is_held(marker)
        is_closed = self._guard.kept.wait_closed(running.CLOSE_SECONDS)
        self._guard.is_settled = is_closed and not is_held
