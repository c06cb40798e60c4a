"""Stream files of one disk given by hand, oldest first: restoring without manifests.

What the files say of themselves is checked: the first is no increment, each increment names the
checkpoint before it, all are of one disk. An index beside a stream is used if it fits it frame by
frame; then every block is proven by its digest. Otherwise the stream is scanned, and its checksum
file vouches for the bytes, if there is one.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nbdbackupd.errors import ChainBrokenError, FormatError, IntegrityError
from nbdbackupd.format import stream
from nbdbackupd.format.index import Kind
from nbdbackupd.format.stream import StreamMeta, StreamReader
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets import peer_index
from nbdbackupd.ops.sets.layers import IndexedLayer, Layer, RawLayer, ScannedLayer
from nbdbackupd.repo import layout
from nbdbackupd.repo.virtnbdbackup.peer import read_files
from nbdbackupd.repo.virtnbdbackup.storage import Folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """The opened files, newest first; owned by the stack that was given.

    ``disk`` and ``format`` are as the newest stream names them, ``created`` its date, ``point``
    the point that it is of, or where it does not say that, the checkpoint.
    """

    disk: str
    format: str
    created: str
    point: str
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Given:
    """One file: its meta frame, or None for a raw image."""

    path: Path
    meta: StreamMeta | None


def load(paths: tuple[Path, ...], stack: ExitStack, check: Callable[[], None]) -> Sequence:
    """Open and prove the files; ``check`` is called now and then and may raise.

    Raises ChainBrokenError if they do not follow one another, FormatError or IntegrityError for
    a damaged file.
    """
    given = [_read(path.resolve()) for path in paths]
    for older, newer in itertools.pairwise(given):
        _check_link(older, newer)
    starts = [n for n, each in enumerate(given) if each.meta is None or not each.meta.incremental]
    if not starts:
        raise ChainBrokenError(f"{paths[0]} is an increment: begin with a full")
    warnings: list[str] = []
    if starts[0] != 0:
        raise ChainBrokenError(f"{paths[0]} is an increment: begin with a full")
    layers = [_open(each, stack, check, warnings) for each in given[starts[-1] :]]
    newest = given[-1]
    name = newest.path.name.partition(".")[0]
    return Sequence(
        disk=newest.meta.disk_name if newest.meta else name,
        format=(newest.meta.disk_format or "qcow2") if newest.meta else "raw",
        created=newest.meta.date if newest.meta else "",
        point=_point(newest.meta) if newest.meta else "",
        layers=tuple(reversed(layers)),
        warnings=tuple(warnings),
    )


def _point(meta: StreamMeta) -> str:
    return dict(meta.extra).get("point", "") or meta.checkpoint


def index_beside(path: Path) -> Path:
    """The index file of a stream."""
    return path.with_name(layout.index(path.name))


def _read(path: Path) -> _Given:
    try:
        return _Given(path, stream.read_meta(path))
    except FileNotFoundError as err:
        raise IntegrityError("stream is missing", file=path) from err
    except IntegrityError:
        if PurePosixPath(path).suffix == ".raw" and index_beside(path).exists():
            return _Given(path, None)
        if _is_peers_raw(path):
            return _Given(path, None)
        raise


def _is_peers_raw(path: Path) -> bool:
    """Whether the files beside it say that this is a raw image that virtnbdbackup saved."""
    return any(
        file.name == path.name and file.meta is None
        for file in read_files(Folder(path.parent)).files
    )


def _check_link(older: _Given, newer: _Given) -> None:
    if older.meta is None or newer.meta is None:
        return
    if older.meta.disk_name != newer.meta.disk_name:
        raise ChainBrokenError(
            f"{newer.path} is of disk {newer.meta.disk_name}, {older.path} of "
            f"{older.meta.disk_name}: a sequence restores one disk"
        )
    wanted, found = newer.meta.parent_checkpoint, older.meta.checkpoint
    if newer.meta.incremental and wanted and found and wanted != found:
        raise ChainBrokenError(
            f"{newer.path} starts from checkpoint {wanted}, {older.path} made {found}: "
            f"a file is missing between them or the order is wrong"
        )


def _open(given: _Given, stack: ExitStack, check: Callable[[], None], warnings: list[str]) -> Layer:
    path, meta = given.path, given.meta
    index = index_beside(path)
    if index.exists():
        try:
            layer = IndexedLayer(path, index, whole=meta is None or not meta.incremental)
        except FormatError as err:
            if meta is None:
                raise
            warnings.append(f"the index of {path} can't be used, the stream is scanned: {err}")
        else:
            stack.push(layer)
            if meta is None or _fits(layer, meta, check):
                return layer
            warnings.append(f"the index of {path} does not fit it, the stream is scanned")
    if meta is None:
        warnings.append(f"neither index nor checksum vouches for the bytes of {path}")
        return stack.enter_context(RawLayer(path))
    return _scan(path, meta, stack, check, warnings)


def _fits(layer: IndexedLayer, meta: StreamMeta, check: Callable[[], None]) -> bool:
    """Whether the index has the stream's frames, one record each."""
    if layer.index.header.frames:
        with ScannedLayer(layer.path, meta) as scanned:
            return peer_index.fits(layer, scanned, check)
    kinds = {stream.DATA: Kind.DATA, stream.ZERO: Kind.ZERO}
    try:
        with StreamReader(layer.path) as reader:
            if reader.meta.virtual_size != layer.size:
                return False
            if reader.meta.codec is not layer.codec or layer.raw:
                return False
            frames = (frame for frame in reader.frames() if frame.kind != stream.STOP)
            for frame, record in itertools.zip_longest(frames, layer.records()):
                check()
                if frame is None or record is None:
                    return False
                place = frame.position if frame.kind == stream.DATA else 0
                said = (kinds[frame.kind], frame.start, frame.length, place, frame.stored)
                if said != (record.kind, *record[:4]):
                    return False
    except FormatError:
        return False  # if it is the stream that is damaged, the scan will tell
    return True


def _scan(
    path: Path, meta: StreamMeta, stack: ExitStack, check: Callable[[], None], warnings: list[str]
) -> Layer:
    layer = stack.enter_context(ScannedLayer(path, meta))
    for _ in layer.records():
        check()
    checksum = path.with_name(layout.checksum(path.name))
    if not checksum.exists():
        warnings.append(f"neither index nor checksum vouches for the bytes of {path}")
    elif layering.read_checksum(checksum) != layering.adler32_file(path, check):
        raise IntegrityError("stream is damaged: its Adler-32 does not match", file=path)
    return layer
