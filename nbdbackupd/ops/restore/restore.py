"""``restore``: the disks of one restore point as images, with the domain's XML beside them.

Everything is proven before the first byte is written: the links of the chain, the presence and
size of every file that is needed, the digest of every index. Then the chain is flattened while it
is read, each block is proven by its digest, and each image gets its name only when all of them
are complete and on the device. Whatever fails leaves ``.incomplete`` files and raises.
"""

import contextlib
import errno
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from nbdbackupd import durable, events
from nbdbackupd import log as runlog
from nbdbackupd.errors import GaveWayError, NbdbackupError, UsageError
from nbdbackupd.model.choice import NEWEST
from nbdbackupd.nbdio.throttle import Throttle
from nbdbackupd.ops.domain import endings
from nbdbackupd.ops.restore import plan as restore_plan
from nbdbackupd.ops.restore import side_files, sites, work
from nbdbackupd.ops.restore.plan import Placement, RestorePlan
from nbdbackupd.ops.restore.replaced import resemble
from nbdbackupd.ops.restore.request import (
    Definer,
    Definition,
    PlannedDisk,
    PlannedDomain,
    Progress,
    RestoredDisk,
    RestoreReport,
    RestoreRequest,
    Style,
)
from nbdbackupd.ops.restore.sites import Site

__all__ = ["Progress", "RestoreReport", "RestoreRequest", "RestoredDisk", "run"]

log = logging.getLogger(__name__)

LOCK: Final = ".nbdbackup-restore"
NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS})
"""What network file systems without locks answer; then there is just none."""

Confirm = Callable[[tuple[str, ...]], None]
"""Gets what will be overwritten, a line each; raises to keep it."""


def run(
    request: RestoreRequest,
    *,
    progress: Progress,
    cancelled: Callable[[], None],
    placement: Placement | None = None,
    confirm: Confirm = lambda _: None,
    definer: Definer | None = None,
) -> RestoreReport:
    """Restore; ``progress`` is called from any thread.

    ``cancelled`` is polled and raises to end the run. ``placement`` chooses where the disks go,
    else that is the request's output directory. ``confirm`` is asked before a device or an image
    of a domain is overwritten. ``definer`` makes a domain of what was restored. Raises UsageError,
    RepositoryError (also for an existing target without ``force``), ChainBrokenError, FormatError,
    IntegrityError, NoSpaceError, BusyError, ProcessError or NbdError of qemu-nbd, and what
    ``definer`` raises.
    """
    _check_request(request)
    ending = endings.Ending(log, lambda _: events.RESTORE_FAILED)
    with runlog.context(SET=request.source or ""), ending.told():
        with ExitStack() as stack:
            check = cancelled if placement is None else _also(cancelled, placement.check)
            if request.source is None:
                plan = restore_plan.of_sequence(request, stack, check)
            else:
                plan = restore_plan.of_set(request.source, request, placement, stack, check)
            _prepare(plan, request, confirm, definer, stack)
            for warning in plan.warnings:
                log.warning("%s", warning)
            with _state_told(plan.sites):
                disks = _write(plan, request, placement, progress, check)
        # when devices are let go: QEMU wants them for itself
        definition = definer.finish() if definer is not None else None
    report = _report(plan, disks, definition, ending.seconds)
    with runlog.context(DOMAIN=plan.domain, SET=request.source or ""):
        events.emit(
            log,
            events.RESTORE_DONE,
            point=report.point,
            bytes=sum(disk.data_bytes for disk in report.disks),
            duration_usec=events.usec(report.seconds),
        )
    return report


def _report(
    plan: RestorePlan,
    disks: tuple[RestoredDisk, ...],
    definition: Definition | None,
    seconds: float,
) -> RestoreReport:
    xml = [each.final for each in plan.files if each.stored.role == side_files.XML_ROLE]
    return RestoreReport(
        point=plan.point,
        domain=plan.domain,
        created=plan.created,
        disks=disks,
        config=xml[0] if xml else None,
        files=tuple(each.final for each in plan.files if each.final not in xml),
        warnings=plan.warnings + (definition.warnings if definition else ()),
        seconds=seconds,
        definition=definition,
    )


def _check_request(request: RestoreRequest) -> None:
    if bool(request.sequence) == (request.source is not None):
        raise UsageError("give either a backup set or a sequence of stream files")
    if request.sequence and (request.choice != NEWEST or request.disks):
        raise UsageError("a sequence of stream files is one point of one disk: choose none")
    if request.sequence and len(request.places) > 1:
        raise UsageError("a sequence of stream files is one disk: give it one place")
    if request.format not in (None, "qcow2", "raw"):
        raise UsageError(f"can't restore to format {request.format}, only qcow2 and raw")
    if request.workers < 1 or request.jobs < 1:
        raise UsageError("at least one worker is needed, and one disk at a time")
    if request.compress:
        _check_compress(request)
    if request.style is Style.PLAIN:
        if request.since:
            raise UsageError("the oldest point can only be chosen for a chain or snapshots")
        return
    if request.sequence:
        raise UsageError("stream files by hand can't become a chain or snapshots: give a set")
    if request.format == "raw" or request.preallocate:
        raise UsageError("a chain or snapshots need qcow2 images that are not preallocated")
    if any(place.path.is_block_device() for place in request.places):
        raise UsageError("a chain or snapshots need files, not block devices")


def _check_compress(request: RestoreRequest) -> None:
    if request.format == "raw" or request.preallocate or request.style is not Style.PLAIN:
        raise UsageError("compressed images are plain qcow2: not raw, preallocated or in layers")
    if any(place.path.is_block_device() for place in request.places):
        raise UsageError("compressed images are files, not block devices")


def _prepare(
    plan: RestorePlan,
    request: RestoreRequest,
    confirm: Confirm,
    definer: Definer | None,
    stack: ExitStack,
) -> None:
    """Make and lock the directories, and refuse what can't work: nothing is written yet."""
    if request.output is not None:
        with durable.translate_os_errors("create", request.output):
            # QEMU has to pass it, should there be a domain
            durable.make_directory(request.output, 0o700 if definer is None else 0o711)
    directories = {site.incomplete.parent for site in plan.sites if site.incomplete != site.final}
    directories |= {request.output} if request.output is not None else set()
    for directory in sorted(directories):
        stack.enter_context(_locked(directory))
    _check_targets(plan, force=request.force)
    if definer is not None:
        definer.prepare(_planned(plan, request))
    lost = [site.overwrites for site in plan.sites if site.overwrites]
    lost += [f"{each.stored.role} {each.final}" for each in plan.files if each.replaces]
    if lost:
        confirm(tuple(lost))


def _planned(plan: RestorePlan, request: RestoreRequest) -> PlannedDomain:
    if request.output is None:
        raise UsageError("a domain needs an output directory for its XML and firmware: give -o")
    return PlannedDomain(
        point=plan.point,
        domain=plan.domain,
        output=request.output,
        files=plan.files,
        disks=tuple(
            PlannedDisk(
                target=job.target,
                path=job.site.final,
                format=job.options.format,
                type="block" if job.site.is_device else "file",
            )
            for job in plan.jobs
        ),
        live=plan.live,
        force=request.force,
    )


def _also(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def _deaf(cancelled: Callable[[], None], placement: Placement | None) -> Callable[[], None]:
    """``cancelled`` when nobody is served by giving way: the old disks are gone.

    Who is asked to let go goes on; a guest that runs nevertheless ends it.
    """

    def check() -> None:
        with contextlib.suppress(GaveWayError):
            cancelled()
        if placement is not None:
            placement.check(is_overwritten=True)

    return check


def _write(
    plan: RestorePlan,
    request: RestoreRequest,
    placement: Placement | None,
    progress: Progress,
    cancelled: Callable[[], None],
) -> tuple[RestoredDisk, ...]:
    pace = Throttle(request.bandwidth) if request.bandwidth else None
    # what can fail without harm comes first: a device has lost its old content when it begins
    kept = [job for job in plan.jobs if not job.site.is_overwritten]
    rest = [job for job in plan.jobs if job.site.is_overwritten]
    done = work.write_all(kept, request, pace, progress, cancelled)
    for each in plan.files:
        with durable.translate_os_errors("write", each.incomplete):
            side_files.copy(each, cancelled, point=plan.point)
            if each.replaces and each.final.exists():
                resemble(each.incomplete, each.final)
    cancelled()
    if placement is not None:
        placement.settle(is_overwritten=False)
        placement.adopt()
    _set_aside(plan)
    done += work.write_all(rest, request, pace, progress, _deaf(cancelled, placement))
    if placement is not None:
        placement.settle(is_overwritten=bool(rest))
    _name_all(plan, force=request.force)
    order = [job.target for job in plan.jobs]
    return tuple(sorted(done, key=lambda disk: order.index(disk.target)))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep a second restore out of the output directory.

    By a file that is removed again: who may read a directory could lock it. Raises BusyError,
    RepositoryError, NoSpaceError.
    """
    lock = durable.Lock(directory / LOCK, owner="restore")
    with durable.translate_os_errors("write", directory):
        try:
            lock.__enter__()
        except OSError as err:
            if err.errno not in NO_LOCKS:
                raise
    try:
        yield
    finally:
        if lock.is_held:
            with contextlib.suppress(OSError):
                lock.path.unlink()
        lock.__exit__(None, None, None)


@contextmanager
def _state_told(places: Iterable[Site]) -> Iterator[None]:
    """Whatever ends the block: say of which place the old content is lost already."""
    try:
        yield
    except BaseException as err:
        states = [state for state in (site.state() for site in places) if state]
        if states and isinstance(err, NbdbackupError):
            err.message = "; ".join([err.message, *states])
        elif states:
            log.error("%s", "; ".join(states))  # noqa: TRY400 - the cause is raised
        raise


def _check_targets(plan: RestorePlan, *, force: bool) -> None:
    for site in plan.sites:
        site.check(force=force)
    for each in plan.files:
        sites.refuse_existing(each.final, force=force or each.replaces)


def _set_aside(plan: RestorePlan) -> None:
    with durable.translate_os_errors("rename", "the old images"):
        # what stands on others goes first
        for site in reversed(plan.sites):
            site.set_aside()


def _name_all(plan: RestorePlan, *, force: bool) -> None:
    """Give everything its name, durably."""
    _check_targets(plan, force=force)
    named = [site for site in plan.sites if not site.is_overwritten]
    with durable.translate_os_errors("complete", "what was restored"):
        # files last: a domain without one of them can't start
        for site in plan.sites:
            if site.is_overwritten:
                site.name()
        for each in plan.files:
            durable.rename(each.incomplete, each.final)
        for site in named:
            site.name()
        finals = [*(each.final for each in plan.files), *(site.final for site in named)]
        for directory in dict.fromkeys(path.parent for path in finals):
            durable.fsync_directory(directory)
        for site in plan.sites:
            site.finish()
