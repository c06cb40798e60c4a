"""Opening a set, whoever wrote it, for all that only reads: list, verify, restore, map, boot."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nbdbackupd.errors import ChainBrokenError, IntegrityError
from nbdbackupd.format import stream
from nbdbackupd.model.chain import BackupSet, DiskMode, DiskPoint, Layout, RestorePoint
from nbdbackupd.ops import layers as layering
from nbdbackupd.ops.frames import FrameCache
from nbdbackupd.ops.layers import Layer, RawLayer, ScannedLayer
from nbdbackupd.repo import layout, peer, peer_points
from nbdbackupd.repo.repository import Repository


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedSet:
    """A set whose points and links are proven; ``known`` holds them.

    ``problems`` tell what of the set is not sound, ``hints`` what else should be known, a line
    each. ``peer``: virtnbdbackup wrote it, and no manifest of ours vouches for it; then digests
    are empty.
    """

    path: Path
    known: BackupSet
    problems: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    peer: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """Problems and hints alike."""
        return (*self.problems, *self.hints)

    def layers(
        self,
        point: RestorePoint,
        target: str,
        stack: ExitStack,
        check: Callable[[], None],
        *,
        deep: bool = False,
    ) -> tuple[Layer, ...]:
        """What one disk of a point is made of, newest first; all but the blocks is proven.

        ``stack`` owns the open files, ``check`` is called now and then and may raise. ``deep``: of
        a peer's set the checksums of whole files, too, as nothing else vouches for plain blocks.
        Raises RepositoryError if the point does not hold the disk, ChainBrokenError, FormatError,
        IntegrityError.
        """
        cache = FrameCache()
        found: list[Layer] = []
        for each in self.known.path(point, target):
            disk = each.disk(target)
            if self.peer:
                layer = open_peer(self.path, each, disk, check, deep=deep)
            else:
                layer = layering.open_proven(self.path, each, disk, check)
            layer.frames = cache
            found.append(stack.enter_context(layer))
        return tuple(found)


def open_set(path: Path, *, sound: bool = False) -> OpenedSet:
    """Read and prove what the set says of itself.

    With ``sound`` only what is sound, with a warning for the rest: which point is the newest, or
    the newest at a time, can't be told then. Raises RepositoryError if the path is no directory
    or can't be read, FormatError, IntegrityError or ChainBrokenError for a damaged set.
    """
    repository = Repository.open(path)
    if repository.exists and peer.is_peer(path):
        found = peer_points.build(peer.read_files(path))
        if found.problems and not sound:
            more = len(found.problems) - 1
            rest = f" (and {more} more problem{'s' * (more > 1)})" if more else ""
            raise ChainBrokenError(f"{path}: {found.problems[0]}{rest}")
        return OpenedSet(
            path=path, known=found.known, problems=found.problems, hints=found.warnings, peer=True
        )
    if sound:
        known, problems = repository.load_sound()
        return OpenedSet(path=path, known=known, problems=problems)
    return OpenedSet(path=path, known=repository.load())


def open_peer(
    directory: Path,
    point: RestorePoint,
    disk: DiskPoint,
    check: Callable[[], None],
    *,
    deep: bool,
) -> Layer:
    """The layer of one disk in a point of a peer's set, its frames walked once.

    Raises IntegrityError, FormatError.
    """
    where: dict[str, object] = {"disk": disk.target, "point": point.id}
    path = directory / disk.file
    layering.check_size(path, disk.file_size, **where)
    if deep:
        check_sum(directory, disk, check, where)
    if disk.layout is Layout.RAW:
        return RawLayer(path, **where)
    meta = stream.read_meta(path)
    if (meta.disk_name, meta.virtual_size) != (disk.target, disk.size) or meta.incremental != (
        disk.mode is DiskMode.DELTA
    ):
        raise IntegrityError("the stream has changed since the set was read", file=path, **where)
    layer = ScannedLayer(path, meta)
    try:
        for _ in layer.records():
            check()
    except BaseException:
        layer.close()
        raise
    return layer


def check_sum(
    directory: Path, disk: DiskPoint, check: Callable[[], None], where: dict[str, object]
) -> bool:
    """Prove a file by the peer's checksum beside it; whether there is one.

    Raises IntegrityError.
    """
    path = directory / disk.file
    beside = directory / layout.checksum(disk.file)
    if not beside.exists():
        return False
    if layering.read_checksum(beside) != layering.adler32_file(path, check):
        raise IntegrityError("file is damaged: its Adler-32 does not match", file=path, **where)
    return True
