"""Copying one disk of a snapshot into the files of a draft."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nbdbackupd import durable
from nbdbackupd.errors import NbdError, SourceError
from nbdbackupd.format.stream import StreamMeta
from nbdbackupd.format.writer import ImageIndexer, RawWriter, StreamWriter, Written
from nbdbackupd.model.chain import DigestKind, Layout
from nbdbackupd.model.extents import Segment
from nbdbackupd.nbdio import copy, extents, nbdinfo
from nbdbackupd.nbdio.arena import Arena
from nbdbackupd.nbdio.client import ALLOCATION, Connection, Endpoint, Patience
from nbdbackupd.nbdio.throttle import Throttle
from nbdbackupd.source import Export


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """What is the same for all disks of a run.."""

    tuning: copy.Tuning
    arena: Arena
    patience: Patience
    digest: DigestKind
    layout: Layout
    by_nbdinfo: bool
    progress: Callable[[str, int, int, int], None]
    throttle: Throttle | None = None


@dataclass(frozen=True, slots=True)
class Copied:
    """A disk that was copied: what the files hold, seconds that it took; an image's SHA-256."""

    written: Written
    seconds: float
    sha256: str = ""


def copy_disk(
    transfer: Transfer, export: Export, meta: StreamMeta, file: Path, index: Path
) -> Copied:
    """Copy one export into ``file`` and ``index``, both new and durable afterwards.

    ``transfer.progress`` gets the disk, the guest position reached, the disk's size and the
    number of data bytes so far.

    Raises NbdError, SourceError if the export has another size than the disk, NoSpaceError or
    RepositoryError of the target, and what ``transfer.patience.cancelled`` raises.
    """
    begun = time.monotonic()
    endpoint = Endpoint(
        socket=export.socket, export=export.name, bitmap=export.bitmap, keeper=export.keeper
    )
    with Connection(endpoint, patience=transfer.patience) as connection:
        size = connection.size
    if size != export.size:
        raise SourceError(
            f"disk {export.target} changed its size during the start of the backup",
            expected=export.size,
            found=size,
        )
    data = 0

    def progress(segment: Segment) -> None:
        nonlocal data
        data += 0 if segment.zero else segment.length
        transfer.progress(export.target, segment.end, size, data)

    with ExitStack() as stack:
        stack.enter_context(durable.translate_os_errors("write", file))
        writer = _writer(transfer, meta, file, index)
        stack.callback(writer.close)
        copy.copy(
            endpoint,
            writer,
            tuning=transfer.tuning,
            arena=transfer.arena,
            patience=transfer.patience,
            progress=progress,
            plan=nbdinfo.plan(endpoint, size) if transfer.by_nbdinfo else None,
            throttle=transfer.throttle,
        )
        if export.proof:
            _prove(export, transfer.patience)
        written = writer.finish()
    transfer.progress(export.target, size, size, data)
    return Copied(written, time.monotonic() - begun)


def take_image(
    export: Export,
    file: Path,
    index: Path,
    *,
    backing: str,
    digest: DigestKind,
    check: Callable[[], None],
) -> Copied:
    """Make the image that QEMU has written ours, call it ``file``, and make its ``index``.

    Raises IntegrityError if it is not what a backup job writes onto ``backing``, NoSpaceError or
    RepositoryError of the target, and what ``check`` raises.
    """
    begun = time.monotonic()
    written_by_qemu = export.file or file
    with durable.translate_os_errors("take over", written_by_qemu), ExitStack() as stack:
        if os.geteuid() == 0:
            os.chown(written_by_qemu, 0, 0, follow_symlinks=False)
        durable.rename(written_by_qemu, file)
        indexer = ImageIndexer(file, index, disk_size=export.size, digest=digest)
        stack.callback(indexer.close)
        durable.set_mode(file, 0o600)
        written, sha256 = indexer.describe(backing=backing, check=check)
    return Copied(written, time.monotonic() - begun, sha256)


def _prove(export: Export, patience: Patience) -> None:
    """Raise NbdError if what was read is no snapshot, see ``Export``."""
    endpoint = Endpoint(socket=export.socket, export=export.proof, keeper=export.keeper)
    try:
        with Connection(endpoint, contexts=(ALLOCATION,), patience=patience) as connection:
            extents.prove_alive(connection)
    except NbdError as err:
        raise NbdError(
            f"disk {export.target}: QEMU gave the snapshot up, so that no write of the guest "
            f"fails: an old block could not be kept in the scratch directory, or not in time; "
            f"nothing was saved, give a faster one: scratch.directory, or 'backup --scratch-dir' "
            f"({err})"
        ) from err


def _writer(
    transfer: Transfer, meta: StreamMeta, file: Path, index: Path
) -> StreamWriter | RawWriter:
    if transfer.layout is Layout.RAW:
        return RawWriter(file, index, disk_size=meta.virtual_size, digest=transfer.digest)
    return StreamWriter(file, index, meta=meta, digest=transfer.digest)
