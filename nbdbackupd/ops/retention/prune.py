"""``prune``: remove what no rule of a domain's retention wants."""

import functools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from nbdbackupd import __version__, durable, events, rundir
from nbdbackupd import log as runlog
from nbdbackupd.errors import (
    ChainBrokenError,
    FormatError,
    NbdbackupError,
    NoSpaceError,
    RepositoryError,
)
from nbdbackupd.model.domain import is_uuid
from nbdbackupd.model.removal import Removal
from nbdbackupd.model.retention import Rules
from nbdbackupd.ops.removal.apply import RemovalReport, RemovalRequest, apply_removal
from nbdbackupd.ops.retention import history
from nbdbackupd.ops.retention.history import Judgement, Verdict
from nbdbackupd.ops.sets.sets import DomainSet, read_set
from nbdbackupd.plain import versioned
from nbdbackupd.repo import generation, removing, verified
from nbdbackupd.repo.set_directory import SetDirectory

log = logging.getLogger(__name__)
OWNER: Final = "prune of "
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneRequest:
    """The domain's sets, all of them, the newest at the end, and the rules.

    ``only``: remove from this set alone. ``state_dirs`` are those of this host, ``bandwidth`` is
    in bytes per second, ``wait`` in seconds. ``force``: also more than half of all points.
    """

    domain: str
    directory: Path
    sets: tuple[DomainSet, ...]
    rules: Rules
    now: datetime
    runtime_dir: Path
    state_dirs: tuple[Path, ...]
    only: Path | None = None
    bandwidth: int | None = None
    wait: float = 0.0
    dry_run: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneReport:
    """What was removed, or with ``dry_run`` would be; ``problem`` says why nothing is.

    ``freed_bytes`` is what the file system has more; of a dry run what is dropped, without what
    merging saves. ``warnings`` tell of sets from which nothing is removed, and of files that are
    removed later.
    """

    domain: str
    directory: Path
    verdicts: tuple[Verdict, ...]
    dry_run: bool
    problem: str = ""
    warnings: tuple[str, ...] = ()
    freed_bytes: int = 0
    seconds: float = 0.0

    @property
    def gone(self) -> int:
        """How many points are removed, or would be."""
        return sum(each.fate != "kept" for each in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        return versioned(
            domain=self.domain,
            directory=str(self.directory),
            dry_run=self.dry_run,
            problem=self.problem,
            warnings=list(self.warnings),
            freed_bytes=self.freed_bytes,
            seconds=round(self.seconds, 3),
            points=[each.to_json() for each in self.verdicts],
        )


def prune(
    request: PruneRequest, *, progress: Progress, cancelled: Callable[[], None]
) -> PruneReport:
    """Remove what no rule wants; with ``dry_run`` only tell.

    ``progress`` gets disk, position and size of a stream that is made. Raises RepositoryError if
    nothing may be removed, BusyError, and what a removal raises; each set is then what it was, or
    what it is to be. Want of space, and damage that no verification has noted, are raised when all
    else is done.
    """
    begun = time.monotonic()
    judged = _judge(request, request.sets)
    if request.dry_run or not request.rules.are_set:
        return _report(request, judged)
    uuid = next((each.uuid for each in request.sets if each.uuid), "")
    with runlog.context(DOMAIN=request.domain, UUID=uuid):
        _refuse(judged, request)
        cut = [each.path for each in request.sets if _is_cut(each)]
        if not judged.removals and not cut:
            return _report(request, judged)
        with _locked(request, uuid, {*judged.removals, *cut}, cancelled) as opened:
            # a run, or another prune, may have ended meanwhile
            judged = _judge(request, [read_set(each.path) for each in request.sets], opened)
            _refuse(judged, request)
            done, failed = _apply_all(opened, judged, request, progress, cancelled)
        removals = {path: each for path, each in judged.removals.items() if path not in failed}
        judged = replace(judged, removals=removals)
        report = _report(request, judged, done, time.monotonic() - begun, failed)
        kept = len(report.verdicts) - report.gone
        events.emit(
            log,
            events.RETENTION_DONE,
            bytes=report.freed_bytes,
            reason=f"{report.gone} points were removed, {kept} stay",
        )
    return report


def _is_cut(found: DomainSet) -> bool:
    """Whether a removal from a set, or that of the set itself, was cut short."""
    if found.problems or not found.path.is_dir():
        return False
    is_emptied = not found.known.points and generation.current(found.path) > 0
    return is_emptied or bool(removing.unfinished(found.path))


def _judge(
    request: PruneRequest, sets: Sequence[DomainSet], within: Collection[Path] | None = None
) -> Judgement:
    """What is to go, of the one set that is meant, and of those in ``within`` if it is given."""
    judged = history.judge(sets, request.rules, request.now, request.state_dirs)
    removals = {
        path: removal
        for path, removal in judged.removals.items()
        if request.only in (None, path) and (within is None or path in within)
    }
    return replace(judged, removals=removals)


def _why_not(judged: Judgement, request: PruneRequest) -> str:
    """Why nothing may be removed; empty if it may."""
    if judged.decision.problem:
        return judged.decision.problem
    if judged.is_drastic and not request.force:
        return (
            f"{judged.gone} of {judged.total} points would go at once, more than half: look with "
            f"--dry-run, then give --force"
        )
    return ""


def _refuse(judged: Judgement, request: PruneRequest) -> None:
    problem = _why_not(judged, request)
    if problem:
        events.emit(log, events.RETENTION_REFUSED, reason=problem)
        raise RepositoryError(f"domain {request.domain}: nothing is removed: {problem}")


@contextmanager
def _locked(
    request: PruneRequest, uuid: str, paths: Collection[Path], cancelled: Callable[[], None]
) -> Iterator[dict[Path, SetDirectory]]:
    """The sets, with the domain and each of them locked, and swept of removals that were cut."""
    who = f"{OWNER}{request.domain}"
    wait = durable.Wait(
        seconds=request.wait,
        cancelled=cancelled,
        told=functools.partial(log.log, runlog.NOTICE, "%s"),
        option="--wait",
    )
    with ExitStack() as stack:
        # what is no UUID came from a set, and is of no domain of libvirt's
        if is_uuid(uuid):
            directory = rundir.make_domain_dir(request.runtime_dir, uuid)
            stack.enter_context(durable.Lock(directory / rundir.LOCK, owner=who, wait=wait))
        opened = {path: SetDirectory.open(path) for path in sorted(paths)}
        # to lock one that has gone would make it again
        for set_dir in (each for each in opened.values() if each.exists):
            stack.enter_context(set_dir.lock(owner=who, wait=wait))
            left = set_dir.sweep_removals()
            if set_dir.is_empty and not left.reason:
                # all points had left, and somebody was reading
                set_dir.remove_empty(request.domain)
        yield opened


def _apply_all(
    opened: Mapping[Path, SetDirectory],
    judged: Judgement,
    request: PruneRequest,
    progress: Progress,
    cancelled: Callable[[], None],
) -> tuple[list[RemovalReport], dict[Path, str]]:
    """What was done, and what kept it from being done in sets that are known to be damaged.

    What only gives room comes first. Where a merge finds none, what is dropped goes all the same.
    """
    done, failed = [], {}
    first: NbdbackupError | None = None
    act = functools.partial(_apply, judged, request, progress=progress, cancelled=cancelled)
    for path, removal in sorted(judged.removals.items(), key=lambda each: bool(each[1].merges)):
        set_dir = opened[path]
        try:
            done.append(act(set_dir, removal))
        except NoSpaceError as err:
            first = first or err
            done.append(act(set_dir, replace(removal, merges=())))
        except (FormatError, ChainBrokenError) as err:
            proofs = verified.read(path, set_dir.load())
            if any(each.damage for each in proofs.values()):
                failed[path] = err.message
            else:
                first = first or err
    if first is not None:
        raise first
    return done, failed


def _apply(
    judged: Judgement,
    request: PruneRequest,
    set_dir: SetDirectory,
    removal: Removal,
    *,
    progress: Progress,
    cancelled: Callable[[], None],
) -> RemovalReport:
    how = RemovalRequest(
        program=f"nbdbackupd {__version__}",
        state_dirs=request.state_dirs,
        bandwidth=request.bandwidth,
    )
    known = next(each.known for each in judged.sets if each.path == set_dir.path)
    with runlog.context(SET=set_dir.path):
        return apply_removal(set_dir, known, removal, how, progress=progress, cancelled=cancelled)


def _report(
    request: PruneRequest,
    judged: Judgement,
    done: Sequence[RemovalReport] = (),
    seconds: float = 0.0,
    failed: Mapping[Path, str] = MappingProxyType({}),
) -> PruneReport:
    shown = [each for each in judged.sets if request.only in (None, each.path)]
    verdicts = tuple(verdict for each in shown for verdict in history.verdicts(each, judged))
    damage = {each.path: each.problems[0] for each in shown if each.problems} | dict(failed)
    warnings = [
        f"{path}: nothing is removed from it, since it is damaged: {why}"
        for path, why in damage.items()
    ]
    warnings += [f"old files are removed later: {each.pending}" for each in done if each.pending]
    dropped = sum(each.bytes for each in verdicts if each.fate == "removed")
    return PruneReport(
        domain=request.domain,
        directory=request.directory,
        verdicts=verdicts,
        dry_run=request.dry_run,
        problem=_why_not(judged, request) if not done else "",
        warnings=tuple(warnings),
        freed_bytes=dropped if request.dry_run else sum(each.freed_bytes for each in done),
        seconds=seconds,
    )
