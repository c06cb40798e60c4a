"""Carrying out a removal: new streams and manifests, one switch, then the old files go.

Until the switch the set is what it was, after it what the removal says; whatever is cut short is
undone or finished by the next removal or run.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from nbdbackupd import durable, events, rundir
from nbdbackupd import log as runlog
from nbdbackupd.errors import IntegrityError, NoSpaceError, RepositoryError
from nbdbackupd.format import manifest
from nbdbackupd.model.chain import BackupSet, DiskPoint, Level, RestorePoint, StoredFile
from nbdbackupd.model.removal import DiskMerge, Merge, Removal, disk_merges
from nbdbackupd.nbdio.throttle import Throttle
from nbdbackupd.ops.removal import streams
from nbdbackupd.ops.removal.streams import Tools
from nbdbackupd.plain import versioned
from nbdbackupd.repo import foreign, generation, layout, removing, written
from nbdbackupd.repo.set_directory import SetDirectory, all_names
from nbdbackupd.repo.written import Verdict
from nbdbackupd.units import human_size

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
MAX_MERGED: Final = 10000
"""Ids that a point keeps of those merged into it, the newest: a manifest has a limit."""

SPARE: Final = 16 << 20
"""Bytes that must be free beyond the new streams: manifests, and what others write meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemovalRequest:
    """What a removal needs beside the points.

    ``state_dirs`` are where this host notes which manifests it wrote; ``bandwidth`` limits the
    bytes per second that a merge reads.
    """

    program: str
    state_dirs: tuple[Path, ...] = ()
    bandwidth: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RemovalReport:
    """What has left the set, and the bytes that its file system has more now.

    ``pending`` says why old files are still there; they are removed later. ``is_gone``: the set
    held nothing else and is gone itself.
    """

    path: Path
    dropped: tuple[str, ...] = ()
    merges: tuple[Merge, ...] = ()
    freed_bytes: int = 0
    seconds: float = 0.0
    pending: str = ""
    is_gone: bool = False

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        return versioned(
            set=str(self.path),
            dropped=list(self.dropped),
            merged=[{"into": each.into, "points": list(each.absorbed)} for each in self.merges],
            freed_bytes=self.freed_bytes,
            pending=self.pending,
            set_removed=self.is_gone,
            seconds=round(self.seconds, 3),
        )


@contextmanager
def opened(
    path: Path, runtime_dir: Path, *, owner: str, wait: durable.Wait = durable.NO_WAIT
) -> Iterator[tuple[SetDirectory, BackupSet]]:
    """A set of ours to remove points from: its domain and itself locked, and swept.

    ``owner`` is what others are told, before the domain's name. Raises RepositoryError for what is
    no such set, BusyError, FormatError and ChainBrokenError for a damaged set.
    """
    set_dir = SetDirectory.open(path)
    found = foreign.find(path) if set_dir.exists else None
    if found is not None:
        raise RepositoryError(
            f"{path} is a set of {found.program}, of which nothing is removed: "
            f"'nbdbackupctl import' makes it one of ours"
        )
    known = set_dir.load()
    if not known.points:
        raise RepositoryError(f"{path} holds no restore point: is it a backup set?")
    domain, uuid = known.points[0].domain, known.points[0].uuid
    who = f"{owner}{domain}"
    directory = rundir.make_domain_dir(runtime_dir, uuid)
    with ExitStack() as stack:
        stack.enter_context(runlog.context(DOMAIN=domain, UUID=uuid, SET=path))
        with durable.translate_os_errors("lock", directory):
            stack.enter_context(durable.Lock(directory / rundir.LOCK, owner=who, wait=wait))
        stack.enter_context(set_dir.lock(owner=who, wait=wait))
        set_dir.sweep_removals()
        yield set_dir, set_dir.load()


def apply_removal(
    set_dir: SetDirectory,
    known: BackupSet,
    removal: Removal,
    request: RemovalRequest,
    *,
    progress: Progress,
    cancelled: Callable[[], None],
) -> RemovalReport:
    """Let points leave the set, which the caller has from ``opened``.

    ``progress`` gets disk, position and size of the stream that is made. Raises IntegrityError for
    damage that is met, or a point that was changed since this host wrote it; NoSpaceError,
    RepositoryError, FormatError, and what ``cancelled`` raises: then the set is what it was.
    """
    begun = time.monotonic()
    if not removal.gone:
        return RemovalReport(path=set_dir.path)
    _check_unchanged(known, removal, request)
    made = _Making(set_dir, known, removal, request, progress, cancelled)
    points = made.run()
    cleaned = set_dir.sweep_removals()
    is_gone = False
    if not points and not cleaned.reason:
        is_gone = set_dir.remove_empty(known.points[0].domain)
    _tell(removal, cleaned)
    return RemovalReport(
        path=set_dir.path,
        dropped=removal.dropped,
        merges=removal.merges,
        freed_bytes=max(0, cleaned.freed - made.added),
        seconds=time.monotonic() - begun,
        pending=cleaned.reason,
        is_gone=is_gone,
    )


def _check_unchanged(known: BackupSet, removal: Removal, request: RemovalRequest) -> None:
    """Refuse to merge what somebody has changed, so that nothing of it gets into what is kept.

    Raises IntegrityError.
    """
    found = written.verdicts(request.state_dirs, known.points)
    for each in removal.merges:
        for ident in (*each.absorbed, each.into):
            if found[ident] is Verdict.CHANGED:
                raise IntegrityError(
                    f"point {ident} is not what this host wrote, so nothing is merged: "
                    f"'nbdbackupctl verify' tells more",
                    point=ident,
                )


def _vouch(known: BackupSet, points: Sequence[RestorePoint], request: RemovalRequest) -> None:
    """Note the new manifests of points wherever it is noted that this host wrote the old ones.

    Before they count: after a kill they must not seem to be somebody else's. Raises
    RepositoryError.
    """
    before = {point.digest for point in known.points}
    for directory in request.state_dirs:
        verdicts = written.verdicts([directory], known.points)
        new = [each for each in points
               if each.digest not in before and verdicts[each.id] is Verdict.OURS]  # fmt: skip
        if new and not written.note(directory, *new):
            raise RepositoryError(
                f"the manifests that are written anew can't be noted in {directory}, so nothing is "
                f"removed: see to that directory"
            )


def _tell(removal: Removal, cleaned: removing.Cleaned) -> None:
    for each in removal.merges:
        events.emit(log, events.POINTS_MERGED, point=each.into, count=len(each.absorbed))
    if removal.dropped:
        events.emit(log, events.POINTS_REMOVED, count=len(removal.dropped), bytes=cleaned.freed)
    if cleaned.reason:
        log.info("old files are removed later: %s", cleaned.reason)


@dataclass
class _Making:
    """A removal until its switch; ``added`` are the bytes of its new files."""

    set_dir: SetDirectory
    known: BackupSet
    removal: Removal
    request: RemovalRequest
    progress: Progress
    cancelled: Callable[[], None]
    added: int = field(default=0, init=False)

    def run(self) -> Sequence[RestorePoint]:
        """The points that the set holds afterwards, as their new manifests tell them."""
        dropped = self.removal.dropped
        # a set that lacks files would be refused in the end
        self.set_dir.check_present(each for each in self.known.points if each.id not in dropped)
        rate = self.request.bandwidth
        tools = Tools(
            directory=self.set_dir.path,
            program=self.request.program,
            progress=self.progress,
            cancelled=self.cancelled,
            pace=Throttle(rate) if rate is not None else None,
        )
        number = generation.current(self.set_dir.path) + 1
        disks = {each.into: disk_merges(self.known, each) for each in self.removal.merges}
        self._check_room()
        planned = {
            each.into: _described(self.known, each, disks[each.into], number)
            for each in self.removal.merges
        }
        adds = [
            name
            for ident, point in planned.items()
            for merge in disks[ident]
            for name in _files_of(point.disk(merge.target))
        ]
        intent = removing.Intent(
            adds=tuple(adds), removes=tuple(self._removes(planned)), gone=tuple(self.removal.gone)
        )
        with self.set_dir.removal(intent) as stage:
            for ident, point in planned.items():
                made = [self._write(tools, stage, merge, point) for merge in disks[ident]]
                planned[ident] = _with_disks(point, made)
            self.cancelled()
            points = _linked(self.known, self.removal, planned)
            _vouch(self.known, points, self.request)
            stage.commit(points)
        return points

    def _removes(self, planned: dict[str, RestorePoint]) -> list[str]:
        """The files that no point names afterwards."""
        before, after = set[str](), set[str]()
        for point in self.known.points:
            before.update(all_names(point))
            if point.id not in self.removal.gone:
                after.update(all_names(planned.get(point.id, point)))
        return sorted(before - after)

    def _check_room(self) -> None:
        path = self.set_dir.path
        needed = streams.room(path, self.known, self.removal, self.cancelled)
        if not needed:
            return
        needed += SPARE
        with durable.translate_os_errors("look at", path):
            free = shutil.disk_usage(path).free
        if free < needed:
            raise NoSpaceError(
                f"merging needs up to {human_size(needed)} on {path} until old files are removed, "
                f"{human_size(free)} are free: make room, or merge fewer points"
            )

    def _write(
        self, tools: Tools, stage: removing.Removal, merge: DiskMerge, point: RestorePoint
    ) -> DiskPoint:
        disk = point.disk(merge.target)
        file, index, checksum = (stage.place(name) for name in _files_of(disk))
        done = streams.write(tools, merge, point, file, index)
        with durable.translate_os_errors("write", checksum):
            fd = durable.create_exclusive(checksum)
            try:
                durable.write_all(fd, str(done.adler32).encode())
            finally:
                os.close(fd)
            # virtnbdrestore takes the streams of a disk in the order of their times
            status = (self.set_dir.path / merge.sources[0].disk(merge.target).file).stat()
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
            with index.open("rb") as reading:
                digest = hashlib.file_digest(reading, "sha256").hexdigest()
        self.added += done.file_size + done.index_size
        return replace(
            disk,
            file_size=done.file_size,
            adler32=done.adler32,
            data_bytes=done.data_bytes,
            zero_bytes=done.zero_bytes,
            index=StoredFile(index.name, "disk-index", done.index_size, digest, disk=disk.target),
        )


def _described(
    known: BackupSet, merge: Merge, disks: Sequence[DiskMerge], number: int
) -> RestorePoint:
    """The point that others are merged into as it will be, but for what its streams hold."""
    by_id = {point.id: point for point in known.points}
    point, oldest = by_id[merge.into], by_id[merge.absorbed[0]]
    level = Level.FULL if oldest.level is Level.FULL else point.level
    merged = [ident for each in merge.absorbed for ident in (*by_id[each].merged, each)]
    made = replace(
        point,
        level=level,
        parent=oldest.parent,
        base_checkpoint=oldest.base_checkpoint,
        merged=(*merged, *point.merged)[-MAX_MERGED:],
    )
    changed = []
    for each in disks:
        file = layout.stream(
            each.target,
            level,
            checkpoint=point.checkpoint or point.id,
            point_id=point.id,
            generation=number,
        )
        disk, last = point.disk(each.target), each.sources[-1].disk(each.target)
        index = replace(disk.index, name=layout.index(file))
        changed.append(replace(disk, mode=each.mode, file=file, index=index, reason=last.reason))
    return _with_disks(made, changed)


def _with_disks(point: RestorePoint, changed: Sequence[DiskPoint]) -> RestorePoint:
    new = {disk.target: disk for disk in changed}
    return replace(point, disks=tuple(new.get(disk.target, disk) for disk in point.disks))


def _files_of(disk: DiskPoint) -> tuple[str, str, str]:
    return disk.file, disk.index.name, layout.checksum(disk.file)


def _linked(
    known: BackupSet, removal: Removal, planned: dict[str, RestorePoint]
) -> tuple[RestorePoint, ...]:
    """What stays, oldest first, each with the digest of its parent's new manifest."""
    made: dict[str, RestorePoint] = {}
    for old in known.points:
        if old.id in removal.gone:
            continue
        point = planned.get(old.id, old)
        digest = made[point.parent].digest if point.parent else ""
        linked = manifest.parse(manifest.pack(replace(point, parent_digest=digest)))
        made[linked.id] = linked
    return BackupSet.from_points(made.values()).points
