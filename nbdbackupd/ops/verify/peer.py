"""Proving a set that virtnbdbackup wrote, by what it says of itself.

The links of its points, the structure of each stream, the Adler-32 of each file that has one
beside it, and each compressed block by the checksums of its lz4 frame. No digest vouches for
plain blocks without a checksum file: that is told as a warning, for it is no damage.
"""

import mmap
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from nbdbackupd.errors import FormatError
from nbdbackupd.format.index import Kind
from nbdbackupd.model.chain import DiskPoint, RestorePoint
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets import opened
from nbdbackupd.ops.sets.layers import Layer
from nbdbackupd.ops.sets.opened import OpenedSet
from nbdbackupd.ops.verify.findings import Findings
from nbdbackupd.repo import layout
from nbdbackupd.repo.virtnbdbackup.storage import Storage

BLOCK: Final = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerCheck:
    """What the checks of a set share; ``progress`` gets disk, bytes done and in all of a file."""

    source: OpenedSet
    findings: Findings
    progress: Callable[[str, int, int], None]
    cancelled: Callable[[], None]

    def run(self, chosen: Iterable[tuple[RestorePoint, frozenset[str]]]) -> tuple[int, int]:
        """Prove the disks of these points; how many files and bytes were looked at."""
        files = size = 0
        for point, targets in chosen:
            for disk in point.disks:
                if disk.target not in targets:
                    continue
                self._prove(point, disk)
                files, size = files + 1, size + disk.file_size
        return files, size

    def _prove(self, point: RestorePoint, disk: DiskPoint) -> None:
        where: dict[str, object] = {"disk": disk.target, "point": point.id}
        assert self.source.storage is not None  # noqa: S101 - for the type checker
        storage = self.source.storage
        self._note(
            lambda: opened.check_sum(storage, disk, self.cancelled, where),
            point,
            disk,
            layout.checksum(disk.file),
        )
        self._note(lambda: self._prove_blocks(storage, point, disk), point, disk, disk.file)

    def _note(
        self, prove: Callable[[], object], point: RestorePoint, disk: DiskPoint, file: str
    ) -> None:
        try:
            prove()
        except (FormatError, OSError) as err:
            told = err.fields.get("file") if isinstance(err, FormatError) else None
            name = str(told).rpartition("/")[2] if told else file
            self.findings.add_error(err, point=point.id, disk=disk.target, file=name)

    def _prove_blocks(self, storage: Storage, point: RestorePoint, disk: DiskPoint) -> None:
        with ExitStack() as stack:
            layer = stack.enter_context(
                opened.open_peer(storage, point, disk, self.cancelled, deep=False)
            )
            if layer.compressed:
                self._decompress(layer, disk)
            self.progress(disk.target, disk.file_size, disk.file_size)

    def _decompress(self, layer: Layer, disk: DiskPoint) -> None:
        view = memoryview(mmap.mmap(-1, BLOCK))
        scratch = memoryview(mmap.mmap(-1, layering.MAX_STORED))
        for record in layer.records():
            self.cancelled()
            if record.kind == Kind.DATA:
                layer.read(record, view[: record.length], scratch)
                self.progress(disk.target, record.position, disk.file_size)
